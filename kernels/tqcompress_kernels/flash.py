"""Attention to ordinary keys and values where torch's flash attention cannot: padding, a soft cap, a bias, float32.

Source: FlashAttention (Dao et al., arXiv 2205.14135): a tile of queries walks the keys with an online softmax, and the
scores are never stored. The naive version is `reference.attention`.

Precision: products of half-precision numbers are exact and their sums float32; softmax weights are rounded to the
values' type, as in torch's flash attention. float32 is multiplied to float32 accuracy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prepare import precision

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # of a masked score; finite, so that differences are
START = tl.constexpr(-1e20)  # of the running maximum: masked scores weigh nothing even before the first other one


# Not specialised: what changes from chunk to chunk, or Triton compiles anew.
@triton.jit(
    do_not_specialize=["queries", "tokens", "mask_b"], do_not_specialize_on_alignment=["p_mask", "p_first", "p_bias"]
)
def flash_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_first, p_out, p_lse, query_strides, key_strides, value_strides,
    mask_b, heads, share, queries, tokens, scaling, softcap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries `program_id(0) * ROWS` and on of head `program_id(1)` (of the whole batch)."""
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // heads, i_head % heads
    i_q, i_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    m_q, m_d = i_q < queries, i_d < DIM
    p_row = p_query + i_b * query_strides[0] + i_h * query_strides[1] + i_q.to(tl.int64) * query_strides[2]
    query = tl.load(p_row[:, None] + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    bias = tl.zeros([ROWS], tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + i_head * queries + i_q, mask=m_q, other=0.0)
    if not SOFTCAP:
        scaling, bias = scaling * LOG2E, bias * LOG2E
    p_k = p_key + i_b * key_strides[0] + i_h // share * key_strides[1]
    p_v = p_value + i_b * value_strides[0] + i_h // share * value_strides[1]
    first, last = 0, tokens
    if p_first is not None:  # what is hidden on the left is not walked
        first = tl.load(p_first + i_b).to(tl.int32) // BLOCK * BLOCK
    if CAUSAL:
        last = tl.minimum(tokens, tokens - queries + (tl.program_id(0) + 1) * ROWS)
    top = tl.full([ROWS], START, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for start in range(first, last, BLOCK):
        i_t = start + tl.arange(0, BLOCK)
        m_t, o_t = i_t < tokens, i_t.to(tl.int64)
        key = tl.load(p_k + o_t[None, :] * key_strides[2] + i_d[:, None], mask=m_t[None, :] & m_d[:, None], other=0.0)
        value = tl.load(
            p_v + o_t[:, None] * value_strides[2] + i_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0
        )
        if WIDEN:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision=PRECISION) * scaling + bias[:, None]
        if SOFTCAP:
            scores = softcap * LOG2E * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / softcap)) + 1))
        if p_mask is not None:
            m_t = m_t & (tl.load(p_mask + i_b * mask_b + i_t, mask=m_t, other=0) != 0)
        seen = m_t[None, :]
        if CAUSAL:
            seen = seen & (i_t[None, :] <= (tokens - queries + i_q)[:, None])
        scores = tl.where(seen, scores, LOWEST)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        mass, top = mass * shrink + tl.sum(weights, 1), new_top
        total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
    o_q = i_head * queries + i_q
    out = total / tl.where(mass > 0, mass, 1.0)[:, None]
    m_out = m_q[:, None] & m_d[None, :]
    tl.store(p_out + o_q.to(tl.int64)[:, None] * DIM + i_d[None, :], out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_q, tl.where(mass > 0, (top + tl.log2(mass)) / LOG2E, -float("inf")), mask=m_q)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend to `key` and `value` `[batch, kv_heads, tokens, head_dim]`.

    Args:
        query: `[batch, kv_heads * share, queries, head_dim]`; any float16, bfloat16 or float32, all last strides 1.
        scaling, softcap: score = scaling * query . key + bias, then softcap * tanh(score / softcap).
        mask: bool `[batch, tokens]`, True = attend, last stride 1.
        bias: float32 `[batch, heads, queries]`, contiguous.
        causal: the last query is the last token, and each sees no later one.

    Returns:
        The output `[batch, heads, queries, head_dim]` in the query's dtype and the natural log-sum-exp of the scores
        `[batch, heads, queries]`, float32. A query that sees nothing gets zeros and -inf.
    """
    batch, heads, queries, dim = query.shape
    tokens = key.shape[2]
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    first = mask.int().argmax(1).int() if mask is not None and tokens else None
    pad = max(16, triton.next_power_of_2(dim))
    interpreted = not isinstance(flash_kernel, triton.JITFunction)  # which cannot multiply bfloat16
    widen = len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype == torch.float32 or interpreted
    rows, block, warps, stages = _tiling(pad, widen, queries)
    with torch.cuda.device_of(query):
        flash_kernel[(triton.cdiv(queries, rows), batch * heads)](
            query, key, value, bias, mask, first, out, lse,
            query.stride()[:3], key.stride()[:3], value.stride()[:3], 0 if mask is None else mask.stride(0),
            heads, heads // key.shape[1], queries, tokens, scaling, softcap or 0.0,
            DIM=dim, DIM_PAD=pad, ROWS=rows, BLOCK=block, SOFTCAP=bool(softcap), CAUSAL=causal, WIDEN=widen,
            PRECISION=precision(), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def _tiling(pad: int, widen: bool, queries: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages: what fits the 99 KiB of shared memory of compute capability 8.9."""
    if widen:
        return (64, 32, 4, 1) if pad <= 128 else (32, 32, 4, 1)
    if pad > 64:  # what an H100 took fastest: scripts/bench_chunk.py
        return (128, 32, 8, 3) if pad <= 128 and queries > 64 else (64, 32, 4, 2)
    return (128, 64, 8, 3) if queries > 64 else (64, 64, 4, 3)
