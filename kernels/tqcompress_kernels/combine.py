"""The end of a decode: attend to the exact tokens, merge all parts, rotate the packed ones back.

`exact_kernel` attends to sinks and recent tokens in chunks, in the original basis; `finish_kernel` merges the splits
of the packed tokens, rotates them and adds the exact chunks, all weighted by their log-sum-exp. Both are accurate to
float32: products of half-precision numbers are exact, softmax weights are the sum of two numbers of the values' type,
the rotation takes float32 operands in three steps. The naive version is `reference.combine`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Scratch, launch
from .overlap import launch_options, let_next_start, wait_for_previous
from .prepare import load_columns, precision
from .ring import Ring, ring_tokens

CHUNK = tl.constexpr(64)  # recent tokens a program attends to
BLOCK = 64  # tokens at once, and fewer of long vectors in float32, which would not fit shared memory
LOG2E = tl.constexpr(1.4426950408889634)
START = tl.constexpr(-1e20)  # below every score, above a masked one

Exact = tuple[Tensor, Tensor] | None


class RingStep(NamedTuple):
    """A step of one query for which a ring holds the exact tokens.

    Attributes:
        ring: the tokens before this step; it takes the new one.
        new: key and value of the new token, `[batch, kv_heads, 1, head_dim]`, last stride 1; None attends again to
            what is there.
        limit: tokens that there is room for, packed ones included.
    """

    ring: Ring
    new: tuple[Tensor, Tensor] | None
    limit: int


# Not specialised: what changes from step to step or with the size of a buffer, or Triton compiles anew.
@triton.jit(
    do_not_specialize=["kv_heads", "columns", "queries", "sinks", "recent", "mask_b", "recent_mask", "limit"],
    do_not_specialize_on_alignment=["p_mask"],
)
def exact_kernel(
    p_query, p_sink_k, p_sink_v, p_recent_k, p_recent_v, p_mask, p_state, p_new_k, p_new_v, p_out, p_lse,
    sink_strides, recent_strides, query_b, query_h, query_q, new_k_b, new_k_h, new_v_b, new_v_h,
    mask_b, recent_mask, kv_heads, columns, queries, sinks, recent, limit, scaling, softcap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    SINKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Chunk `program_id(2)` of the exact tokens, all sinks being the first one, for columns of a KV head.

    With a ring (`ROOM` rows) the recent tokens are those in it and the new one, which is written to it, too. A token
    past `limit` has no room: what comes out is NaN.
    """
    if FIRST:
        wait_for_previous(OVERLAP)
    let_next_start(OVERLAP)
    i_head = tl.program_id(0).to(tl.int64)
    i_b, i_h, part, parts = i_head // kv_heads, i_head % kv_heads, tl.program_id(2), tl.num_programs(2)
    i_c, i_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DIM_PAD)
    query = load_columns(p_query, query_b, query_h, query_q, i_b, i_h, i_c, columns, queries, DIM, DIM_PAD)
    if WIDEN:
        query = query.to(tl.float32)
    # Query i sees the first `everybody + i` tokens.
    first, everybody, o_mask = (part - SINKS) * CHUNK, recent - queries + 1, recent_mask
    last = tl.minimum(first + CHUNK, recent)
    p_k = p_recent_k + i_b * recent_strides[0] + i_h * recent_strides[1]
    p_v = p_recent_v + i_b * recent_strides[3] + i_h * recent_strides[4]
    k_row, v_row = recent_strides[2], recent_strides[5]
    if SINKS:
        other = part > 0
        first, last = tl.where(other, first, 0), tl.where(other, last, sinks)
        everybody, o_mask = tl.where(other, everybody, sinks), tl.where(other, o_mask, 0)
        p_k = tl.where(other, p_k, p_sink_k + i_b * sink_strides[0] + i_h * sink_strides[1])
        p_v = tl.where(other, p_v, p_sink_v + i_b * sink_strides[3] + i_h * sink_strides[4])
        k_row, v_row = tl.where(other, k_row, sink_strides[2]), tl.where(other, v_row, sink_strides[5])
    newest, appended, base = 0, -1, 0
    if ROOM:
        newest, base = tl.load(p_state), tl.load(p_state + 1)
        if p_new_k is None:
            newest -= 1
        else:
            appended = newest
            new_k = tl.load(p_new_k + i_b * new_k_b + i_h * new_k_h + i_d, mask=i_d < DIM, other=0.0)
            new_v = tl.load(p_new_v + i_b * new_v_b + i_h * new_v_h + i_d, mask=i_d < DIM, other=0.0)
    top = tl.full([COLUMNS], START, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([COLUMNS, DIM_PAD], tl.float32)
    for start in range(first, last, BLOCK):
        i_t = start + tl.arange(0, BLOCK)
        m_t, o_t, m_d = i_t < last, i_t.to(tl.int64), i_d < DIM
        key = tl.load(p_k + o_t[None, :] * k_row + i_d[:, None], mask=m_d[:, None] & m_t[None, :], other=0.0)
        value = tl.load(p_v + o_t[:, None] * v_row + i_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        token = i_t
        if ROOM:
            token = ring_tokens(newest, base, i_t, sinks, part >= SINKS, ROOM)
            if p_new_k is not None:
                is_new = m_t & (token == appended)
                key = tl.where(is_new[None, :], new_k[:, None], key)
                value = tl.where(is_new[:, None], new_v[None, :], value)
                place = tl.sum(tl.where(is_new, i_t, 0), 0)
                m_new = m_d & (tl.sum(is_new.to(tl.int32), 0) > 0) & (tl.program_id(1) == 0)
                tl.store(p_k + place * k_row + i_d, new_k, mask=m_new)
                tl.store(p_v + place * v_row + i_d, new_v, mask=m_new)
        if WIDEN:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision=PRECISION) * scaling
        if SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / softcap)) + 1))
        if ROOM:
            m_t = m_t & (token >= 0)
            o_mask = 0
        m_seen = m_t[None, :] & (i_t[None, :] < everybody + (i_c % queries)[:, None])
        if p_mask is not None:
            m_seen = m_seen & (tl.load(p_mask + i_b * mask_b + o_mask + token, mask=m_t, other=0) != 0)[None, :]
        scores = tl.where(m_seen, scores * LOG2E, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        mass, top = mass * shrink + tl.sum(weights, 1), new_top
        high = weights.to(value.dtype)
        total = tl.dot(high, value, total * shrink[:, None], input_precision=PRECISION)
        if not WIDEN:
            total = tl.dot((weights - high.to(tl.float32)).to(value.dtype), value, total)
    row = (i_head * columns + i_c) * parts + part
    m_c = i_c < columns
    out = total / tl.where(mass > 0, mass, 1.0)[:, None]
    if ROOM:
        out = tl.where(newest < limit, out, float("nan"))
    tl.store(p_out + row[:, None] * DIM + i_d[None, :], out, mask=m_c[:, None] & (i_d < DIM)[None, :])
    tl.store(p_lse + row, tl.where(mass > 0, top + tl.log2(mass), -float("inf")), mask=m_c)
    if not FIRST:
        wait_for_previous(OVERLAP)


@triton.jit
def _merge(p_x, p_lse, o_first, step, count, m_row, i_d, DIM: tl.constexpr, EACH: tl.constexpr):
    """Coordinates i_d of the average of parts weighted by exp2(lse): largest lse, sum of weights over its, sum."""
    top = tl.full([o_first.shape[0]], START, tl.float32)
    mass = tl.zeros([o_first.shape[0]], tl.float32)
    total = tl.zeros([o_first.shape[0], i_d.shape[0]], tl.float32)
    for start in range(0, count, EACH):
        i = start + tl.arange(0, EACH)
        o = o_first[:, None] + (i * step)[None, :]
        m = m_row[:, None] & (i < count)[None, :]
        lse = tl.load(p_lse + o, mask=m, other=-float("inf"))
        p_part = p_x + (o * DIM)[:, :, None] + i_d[None, None, :]
        x = tl.load(p_part, mask=m[:, :, None] & (i_d < DIM)[None, None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 1))
        weight, shrink = tl.exp2(lse - new_top[:, None]), tl.exp2(top - new_top)
        mass, top = mass * shrink + tl.sum(weight, 1), new_top
        total = total * shrink[:, None] + tl.sum(x * weight[:, :, None], 1)
    return top, mass, total


@triton.jit(do_not_specialize=["kv_heads", "columns", "count", "splits", "parts"])
def finish_kernel(
    p_partial, p_lse, p_exact, p_exact_lse, p_back, p_mean, p_state, p_out, p_out_lse, back_h, mean_h,
    kv_heads, columns, count, splits, parts,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Coordinates `program_id(2) * TILE` and on of some of `count` rows; a row is a column of a KV head.

    With the state of a ring the number of tokens in it becomes one more.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < count
    i_row = tl.program_id(1).to(tl.int64) * count + i_row
    i_head, i_c = i_row // columns, i_row % columns
    i_d, i_n = tl.arange(0, DIM_PAD), tl.program_id(2) * TILE + tl.arange(0, TILE)
    i_h = tl.program_id(1) % kv_heads  # one head a program where heads differ in rotation or mean
    m_back = (i_d < DIM)[:, None] & (i_n < DIM)[None, :]
    back = tl.load(p_back + i_h * back_h + i_d[:, None] * DIM + i_n[None, :], mask=m_back, other=0.0)
    wait_for_previous(OVERLAP)
    o_first = i_head * splits * columns + i_c
    packed_top, packed_mass, packed = _merge(p_partial, p_lse, o_first, columns, splits, m_row, i_d, DIM, EACH)
    top, mass, exact = _merge(p_exact, p_exact_lse, i_row * parts, 1, parts, m_row, i_n, DIM, 8)
    new_top = tl.maximum(packed_top, top)
    share, exact_share = tl.exp2(packed_top - new_top), tl.exp2(top - new_top)
    packed_mass *= share
    mass, top = packed_mass + mass * exact_share, new_top
    total = tl.dot(packed * share[:, None], back, exact * exact_share[:, None], input_precision=PRECISION)
    if p_mean is not None:
        mean = tl.load(p_mean + i_h * mean_h + i_n, mask=i_n < DIM, other=0.0)
        total += packed_mass[:, None] * mean[None, :]
    out = total / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(p_out + i_row[:, None] * DIM + i_n[None, :], out, mask=m_row[:, None] & (i_n < DIM)[None, :])
    if p_state is not None and (tl.program_id(0) + tl.program_id(1) + tl.program_id(2)) == 0:
        tl.store(p_state, tl.load(p_state) + 1)
    if tl.program_id(2) == 0:
        tl.store(p_out_lse + i_row, tl.where(mass > 0, (top + tl.log2(mass)) / LOG2E, -float("inf")), mask=m_row)


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
    step: RingStep | None = None,
    memory: Tensor | Scratch | None = None,
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
        out: `[batch, heads, queries, head_dim]`, contiguous.
        out_lse: natural logarithm of the sum of exp(score), float32 `[batch, heads, queries]`, contiguous.
        step: what stands for `sinks`, `recent` and `tokens` if a ring holds the exact tokens.
        memory: whose `new_empty` gives room for intermediate results; `query` if None.
    """
    batch, kv_heads, splits, columns, dim = partial.shape
    if out.numel() == 0:
        return
    pad = max(16, triton.next_power_of_2(dim))
    memory = query if memory is None else memory
    exact, exact_lse = _exact(query, sinks, recent, mask, tokens, scaling, softcap, partial.shape, pad, step, memory)
    shared = value_back.shape[0] == 1 and value_mean is None
    segments, count = (1, batch * kv_heads * columns) if shared else (batch * kv_heads, columns)
    rows, tile, each, warps = _tiling(segments * count, count, pad)
    grid = triton.cdiv(count, rows), segments, triton.cdiv(dim, tile)
    launch(
        finish_kernel, grid,
        partial, lse, exact, exact_lse, value_back, value_mean,
        None if step is None or step.new is None else step.ring.state, out, out_lse,
        0 if value_back.shape[0] == 1 else value_back.stride(0), 0 if value_mean is None else value_mean.stride(0),
        kv_heads, columns, count, splits, exact_lse.shape[-1],
        DIM=dim, DIM_PAD=pad, ROWS=rows, EACH=each, TILE=tile, PRECISION=precision(), num_warps=warps,
        **launch_options(query.device),
    )  # fmt: skip


def _tiling(total: int, count: int, pad: int) -> tuple[int, int, int, int]:
    """Rows and coordinates a program of `finish_kernel`, parts it loads at once, and its warps.

    `total`: all rows; `count`: those of a segment, which a program cannot leave.
    """
    rows, tile, each, warps = (1, 32, 128, 4) if total <= 64 else (4, 64, 16, 4) if total <= 1024 else (16, 128, 2, 8)
    while rows > 1 and rows > count:
        rows, each = rows // 2, each * 2
    return rows, min(pad, tile), each, warps


def _exact(
    query, sinks, recent, mask, tokens, scaling, softcap, shape, pad: int, step: RingStep | None, memory
) -> tuple[Tensor, Tensor]:
    """Attention to each chunk of exact tokens: `[batch, kv_heads, columns, parts, head_dim]` and log2 weights."""
    batch, kv_heads, _, columns, dim = shape
    new: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    room = 0
    if step is not None:
        new, room, split = step.new or new, step.ring.room, step.ring.sinks
        sinks, recent = step.ring.exact[:, :, :, :split].unbind(), step.ring.exact[:, :, :, split:].unbind()
    sink_k, sink_v, sink_strides, n_sinks = _arguments(sinks)
    recent_k, recent_v, recent_strides, n_recent = _arguments(recent)
    parts = (n_sinks > 0) + triton.cdiv(n_recent, CHUNK.value)
    out = memory.new_empty(batch, kv_heads, columns, parts, dim, dtype=torch.float32)
    lse = memory.new_empty(batch, kv_heads, columns, parts, dtype=torch.float32)
    if parts:
        if not n_recent:  # the kernel needs some pointer
            recent_k, recent_v = sink_k, sink_v
        dtypes = {x.dtype for x in (query, sink_k, sink_v, recent_k, recent_v, *new) if x is not None}
        interpreted = not isinstance(exact_kernel, triton.JITFunction)  # which cannot multiply bfloat16
        widen = len(dtypes) > 1 or query.dtype == torch.float32 or interpreted
        tile = max(16, min(32, triton.next_power_of_2(columns)))
        block = max(16, min(BLOCK, 4096 // pad)) if widen else BLOCK  # 16 KiB of keys
        new_strides = (0,) * 4 if new[0] is None else (*new[0].stride()[:2], *new[1].stride()[:2])
        launch(
            exact_kernel, (batch * kv_heads, triton.cdiv(columns, tile), parts),
            query, sink_k, sink_v, recent_k, recent_v, mask, None if step is None else step.ring.state, *new, out, lse,
            sink_strides, recent_strides, *query.stride()[:3], *new_strides,
            0 if mask is None else mask.stride(0), n_sinks + tokens, kv_heads, columns, query.shape[2],
            n_sinks, n_recent, 0 if step is None else step.limit, scaling, softcap or 0.0,
            DIM=dim, DIM_PAD=pad, COLUMNS=tile, SOFTCAP=bool(softcap), WIDEN=widen, SINKS=int(n_sinks > 0), ROOM=room,
            BLOCK=block, PRECISION=precision(), FIRST=shape[2] == 0, num_warps=4, num_stages=1 if widen else 2,
            **launch_options(query.device),
        )  # fmt: skip
    return out, lse


def _arguments(pair: Exact) -> tuple[Any, ...]:
    """What the kernel takes of exact keys and values: pointers, strides, tokens."""
    if pair is None or pair[0].shape[2] == 0:
        return None, None, (0,) * 6, 0
    return *pair, (*pair[0].stride()[:3], *pair[1].stride()[:3]), pair[0].shape[2]
