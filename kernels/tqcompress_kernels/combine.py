"""The last of the three launches of a decode: merge the splits, rotate values back, attend to exact tokens.

A program computes `TILE` coordinates of the output of some columns of a KV head. Everything in it is accurate to
float32: the rotation is a float32 dot, exact keys meet queries of their own type, and softmax weights are the sum
of two numbers of the values' type. The naive version is `reference.combine`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prepare import load_columns, tile_columns

TILE = tl.constexpr(32)  # coordinates of the output a program computes
BLOCK = tl.constexpr(32)  # exact tokens a step
LOG2E = tl.constexpr(1.4426950408889634)
START = tl.constexpr(-1e20)  # below every score, above a masked one


@triton.jit
def _merge(
    p_partial, p_lse, i_head, i_c, splits, columns,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums over the splits: weighted values `[COLUMNS, DIM_PAD]`, weights, and the log2 that both are relative to."""
    i_s, i_d = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    top = tl.full([COLUMNS], START, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([COLUMNS, DIM_PAD], tl.float32)
    for start in range(0, splits, SPLITS):
        m_s = (start + i_s < splits)[:, None] & (i_c < columns)[None, :]
        row = (i_head * splits + start + i_s)[:, None] * columns + i_c[None, :]
        lse = tl.load(p_lse + row, mask=m_s, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights, shrink = tl.exp2(lse - new_top[None, :]), tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(weights, 0)
        m_part = m_s[:, :, None] & (i_d < DIM)[None, None, :]
        part = tl.load(p_partial + row[:, :, None] * DIM + i_d[None, None, :], mask=m_part, other=0.0)
        total = total * shrink[:, None] + tl.sum(part * weights[:, :, None], 0)
        top = new_top
    return total, mass, top


@triton.jit
def _attend(
    query, p_key, p_value, p_mask, strides, i_n, tokens, seen_by_all, i_query, scaling, softcap, top, mass, share, total,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add exact tokens; query i sees the first `seen_by_all + i` of them. `share` is what earlier sums shrink by."""
    i_d = tl.arange(0, DIM_PAD)
    for start in range(0, tokens, BLOCK):
        i_t = start + tl.arange(0, BLOCK)
        m_t = i_t < tokens
        o_t = i_t.to(tl.int64)
        p_tile = p_key + o_t[None, :] * strides[0] + i_d[:, None]
        key = tl.load(p_tile, mask=(i_d < DIM)[:, None] & m_t[None, :], other=0.0)
        if WIDEN:
            key = key.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * scaling
        if SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / softcap)) + 1))
        if p_mask is not None:
            m_t = m_t & (tl.load(p_mask + i_t, mask=m_t, other=0) != 0)
        m_seen = m_t[None, :] & (i_t[None, :] < seen_by_all + i_query[:, None])
        scores = tl.where(m_seen, scores * LOG2E, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        mass, share, top = mass * shrink + tl.sum(weights, 1), share * shrink, new_top
        p_tile = p_value + o_t[:, None] * strides[1] + i_n[None, :]
        value = tl.load(p_tile, mask=(i_t < tokens)[:, None] & (i_n < DIM)[None, :], other=0.0)
        if WIDEN:
            value = value.to(tl.float32)
        high = weights.to(value.dtype)
        total = tl.dot(high, value, total * shrink[:, None], input_precision="ieee")
        if value.dtype != tl.float32:
            total = tl.dot((weights - high.to(tl.float32)).to(value.dtype), value, total)
    return top, mass, share, total


# Not specialised: what changes from step to step or with the size of a buffer, or Triton compiles anew.
@triton.jit(
    do_not_specialize=["splits", "tokens", "sinks", "recent", "mask_b", "query_b", "query_h", "query_q"],
    do_not_specialize_on_alignment=["p_mask", "p_sink_k", "p_sink_v", "p_recent_k", "p_recent_v"],
)
def _combine(
    p_partial, p_lse, p_back, p_mean, p_query, p_sink_k, p_sink_v, p_recent_k, p_recent_v, p_mask, p_out, p_out_lse,
    sink_strides, recent_strides, query_b, query_h, query_q, back_h, mean_h, mask_b,
    kv_heads, splits, columns, queries, tokens, sinks, recent, scaling, softcap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_head // kv_heads, i_head % kv_heads
    i_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i_d, i_n = tl.arange(0, DIM_PAD), tl.program_id(2) * TILE + tl.arange(0, TILE)
    i_query = i_c % queries
    packed, mass, top = _merge(p_partial, p_lse, i_head, i_c, splits, columns, DIM, DIM_PAD, COLUMNS, SPLITS)
    packed_mass = mass
    share = tl.full([COLUMNS], 1.0, tl.float32)
    total = tl.zeros([COLUMNS, TILE], tl.float32)
    if p_mask is not None:
        p_mask += i_b * mask_b
    query = load_columns(p_query, query_b, query_h, query_q, i_b, i_h, i_c, columns, queries, DIM, DIM_PAD)
    if WIDEN:
        query = query.to(tl.float32)
    if p_sink_k is not None:
        p_k = p_sink_k + i_b * sink_strides[0] + i_h * sink_strides[1]
        p_v = p_sink_v + i_b * sink_strides[3] + i_h * sink_strides[4]
        top, mass, share, total = _attend(
            query, p_k, p_v, p_mask, (sink_strides[2], sink_strides[5]), i_n, sinks, sinks, i_query,
            scaling, softcap, top, mass, share, total, DIM, DIM_PAD, SOFTCAP, WIDEN,
        )  # fmt: skip
    if p_recent_k is not None:
        p_k = p_recent_k + i_b * recent_strides[0] + i_h * recent_strides[1]
        p_v = p_recent_v + i_b * recent_strides[3] + i_h * recent_strides[4]
        if p_mask is not None:
            p_mask += sinks + tokens
        top, mass, share, total = _attend(
            query, p_k, p_v, p_mask, (recent_strides[2], recent_strides[5]), i_n, recent, recent - queries + 1,
            i_query, scaling, softcap, top, mass, share, total, DIM, DIM_PAD, SOFTCAP, WIDEN,
        )  # fmt: skip
    m_back = (i_d < DIM)[:, None] & (i_n < DIM)[None, :]
    back = tl.load(p_back + i_h * back_h + i_d[:, None] * DIM + i_n[None, :], mask=m_back, other=0.0)
    total += tl.dot(packed, back, input_precision="ieee") * share[:, None]
    if p_mean is not None:
        mean = tl.load(p_mean + i_h * mean_h + i_n, mask=i_n < DIM, other=0.0)
        total += (packed_mass * share)[:, None] * mean[None, :]
    m_any, m_c = mass > 0, i_c < columns
    o_c = i_head * columns + i_c
    out = total / tl.where(m_any, mass, 1.0)[:, None]
    tl.store(p_out + o_c[:, None] * DIM + i_n[None, :], out, mask=m_c[:, None] & (i_n < DIM)[None, :])
    if tl.program_id(2) == 0:
        tl.store(p_out_lse + o_c, tl.where(m_any, (top + tl.log2(mass)) / LOG2E, -float("inf")), mask=m_c)


Exact = tuple[Tensor, Tensor] | None


def _exact(pair: Exact) -> tuple:
    """What the kernel takes of exact keys and values: pointers, strides, tokens."""
    if pair is None or pair[0].shape[2] == 0:
        return None, None, (0,) * 6, 0
    return *pair, (*pair[0].stride()[:3], *pair[1].stride()[:3]), pair[0].shape[2]


def combine(
    partial: Tensor,
    lse: Tensor,
    value_back: Tensor,
    value_mean: Tensor | None,
    query: Tensor,
    sinks: Exact,
    recent: Exact,
    mask: Tensor | None,
    tokens: int,
    scaling: float,
    softcap: float | None,
    out: Tensor,
    out_lse: Tensor,
) -> None:
    """Write `out` and `out_lse`; splits, sinks and recent tokens may each be none.

    Args:
        partial, lse: what `plain.split` wrote.
        value_back: float32 `[1 or kv_heads, head_dim, head_dim]`: value = stored value @ value_back + value_mean.
        value_mean: float32 `[kv_heads, head_dim]`.
        query: `[batch, heads, queries, head_dim]`, last stride 1; the last query is the last recent token.
        sinks, recent: keys and values `[batch, kv_heads, n, head_dim]` before and after the packed tokens.
        mask: bool `[batch, sinks + tokens + recent]`, True = attend.
        tokens: the packed tokens between sinks and recent ones in `mask`.
        out: float32 `[batch, heads, queries, head_dim]`, contiguous.
        out_lse: natural logarithm of the sum of exp(score), float32 `[batch, heads, queries]`, contiguous.
    """
    batch, kv_heads, splits, columns, dim = partial.shape
    if out.numel() == 0:
        return
    tile, pad = tile_columns(batch * kv_heads, columns, dim), max(16, triton.next_power_of_2(dim))
    sink_k, sink_v, sink_strides, n_sinks = _exact(sinks)
    recent_k, recent_v, recent_strides, n_recent = _exact(recent)
    dtypes = {x.dtype for x in (query, sink_k, sink_v, recent_k, recent_v) if x is not None}
    interpreted = not isinstance(_combine, triton.JITFunction)  # the interpreter cannot multiply bfloat16
    _combine[batch * kv_heads, triton.cdiv(columns, tile), triton.cdiv(dim, TILE.value)](
        partial, lse, value_back, value_mean, query, sink_k, sink_v, recent_k, recent_v, mask, out, out_lse,
        sink_strides, recent_strides, *query.stride()[:3],
        0 if value_back.shape[0] == 1 else value_back.stride(0), 0 if value_mean is None else value_mean.stride(0),
        0 if mask is None else mask.stride(0),
        kv_heads, splits, columns, query.shape[2], tokens, n_sinks, n_recent, scaling, softcap or 0.0,
        DIM=dim, DIM_PAD=pad, COLUMNS=tile, SPLITS=max(1, 4096 // (tile * pad)), SOFTCAP=bool(softcap),
        WIDEN=len(dtypes) > 1 or (interpreted and query.dtype == torch.bfloat16), num_warps=4,
    )  # fmt: skip
