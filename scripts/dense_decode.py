"""A plain split-KV decode over dense keys and values (bf16 or fp8 e4m3): a baseline for `bench_decode.py`."""

import torch
import triton
import triton.language as tl


@triton.jit
def dense_split(p_q, p_k, p_v, p_out, p_lse, tokens, scaling, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d, c, n = tl.arange(0, D), tl.arange(0, C), tl.arange(0, BLOCK)
    query = tl.load(p_q + (head * C + c)[None, :] * D + d[:, None])
    span = tl.cdiv(tl.cdiv(tokens, splits), BLOCK) * BLOCK
    first = split * span
    last = tl.minimum(first + span, tokens)
    top = tl.full([C], -1e30, tl.float32)
    mass = tl.zeros([C], tl.float32)
    total = tl.zeros([D, C], tl.float32)
    for start in range(first, last, BLOCK):
        t = start + n
        seen = t < last
        row = (head * tokens + t) * D
        key = tl.load(p_k + row[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(query.dtype)
        scores = tl.where(seen[:, None], tl.dot(key, query) * scaling, -1e30)
        new = tl.maximum(top, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - new[None, :]), tl.exp2(top - new)
        mass, top = mass * shrink + tl.sum(weights, 0), new
        value = tl.load(p_v + row[None, :] + d[:, None], mask=seen[None, :], other=0.0).to(query.dtype)
        total = total * shrink[None, :] + tl.dot(value, weights.to(query.dtype))
    row = (head * splits + split) * C + c
    tl.store(p_out + row[None, :] * D + d[:, None], total / mass[None, :])
    tl.store(p_lse + row, top + tl.log2(mass))


@triton.jit
def dense_merge(p_part, p_lse, p_out, splits, D: tl.constexpr, C: tl.constexpr):
    head, c, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    top, mass, total = -1e30, 0.0, tl.zeros([D], tl.float32)
    for split in range(splits):
        row = (head * splits + split) * C + c
        lse = tl.load(p_lse + row)
        new = tl.maximum(top, lse)
        weight, shrink = tl.exp2(lse - new), tl.exp2(top - new)
        total = total * shrink + tl.load(p_part + row * D + d) * weight
        mass, top = mass * shrink + weight, new
    tl.store(p_out + (head * C + c) * D + d, total / mass)


def dense_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, splits: int, warps: int = 4):
    """A callable that attends `query` `[batch, kv_heads, 16, head_dim]` to `[batch, kv_heads, tokens, head_dim]`."""
    batch, kv_heads, columns, dim = query.shape
    part = query.new_empty(batch * kv_heads, splits, columns, dim, dtype=torch.float32)
    lse = query.new_empty(batch * kv_heads, splits, columns, dtype=torch.float32)
    out = torch.empty_like(query)
    scaling = dim**-0.5 * 1.4426950408889634

    def run() -> torch.Tensor:
        block = 64 if dim <= 128 else 32
        dense_split[batch * kv_heads, splits](
            query, key, value, part, lse, key.shape[2], scaling, D=dim, C=columns, BLOCK=block, num_warps=warps,
            num_stages=3,
        )  # fmt: skip
        dense_merge[batch * kv_heads, columns](part, lse, out, splits, D=dim, C=columns, num_warps=4)
        return out

    return run
