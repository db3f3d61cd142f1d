"""Split-KV decoding over bit planes in plain Triton: any bits, any head_dim, any device Triton has.

Source: the split-KV scheme of Flash-Decoding (Dao et al. 2023). Tokens lie on the rows of the key dot and are
what the value dot sums over; the columns (queries) of a KV head lie on the columns of both, so a coordinate is
dequantized once for all of them. The naive version is `reference.split`.

Precision: operands are fp16, sums float32. Queries and levels that are not exact in fp16 are sums of two fp16
numbers for scores, which are accurate to about 2**-20 of the largest product therefore. Values are rounded to fp16
once, and so are softmax weights times value scales. A column of the query is a fraction of its largest element, and
weights times scales are at most 1, so nothing overflows; what underflows is below 2**-24 of the largest term.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .packed import Packed
from .tiles import (
    AFFINE,
    BITWISE,
    LOAD,
    SHUFFLE,
    WINDOW,
    digit_operand,
    digits,
    factor,
    gap_of,
    level_operands,
    load_scales,
    load_table,
    load_windows,
    load_words,
    pair_planes,
    widths,
    window_of,
    word_bytes,
)

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # of a masked score; finite, so that differences are
START = tl.constexpr(-1e20)  # of the running maximum: masked scores weigh nothing even before the first other one


@triton.jit
def _place(p_table, i_b, table_b, start, last, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Where the tokens of a block lie: index on the first axis, first row, rows after that one.

    The first two are int64 scalars where the block lies in one page, else the first is a column of indices.
    """
    i = tl.arange(0, BLOCK)
    zero = tl.zeros([], tl.int64)
    if PAGE == 0:
        return i_b, zero + start, i
    elif PAGE % BLOCK == 0:
        return tl.load(p_table + i_b * table_b + start // PAGE).to(tl.int64), zero + start % PAGE, i
    else:
        page = tl.load(p_table + i_b * table_b + (start + i) // PAGE, mask=i < last - start, other=0)
        return page.to(tl.int64), zero, (start + i) % PAGE


@triton.jit
def _load_planes(
    planes, strides, i_h, page, row, i_row, m_row,
    AXIS: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
    DIM: tl.constexpr, BYTES: tl.constexpr, PAGED_TILE: tl.constexpr,
):  # fmt: skip
    """The words of every plane of a block of tokens, in pairs; words of windows as they are."""
    words = ()
    for k in tl.static_range(1 if window_of(MODE) else len(widths(BITS))):
        o_block = page * strides[3 * k] + i_h * strides[3 * k + 1] + row * strides[3 * k + 2]
        if PAGED_TILE:
            o_block = tl.expand_dims(o_block, 1 - AXIS)
        stride = strides[3 * k + 2]
        if window_of(MODE):
            x = load_windows(planes[k], stride, o_block, i_row, m_row, BITS, window_of(MODE), WORDS, DIM, AXIS)
        else:
            x = load_words(planes[k], stride, o_block, i_row, m_row, k, BITS, PER, WORDS, DIM, AXIS, BYTES[k])
        words = words + (x,)
    if window_of(MODE):
        return words
    else:
        return pair_planes(words, BITS, PER)


@triton.jit
def _load_query(p_query, m_query, p_levels, BITS: tl.constexpr, PER: tl.constexpr, MODE: tl.constexpr):
    """The operands that meet those of keys, in two fp16 parts each, and the unit of scores."""
    largest = tl.max(tl.abs(tl.load(p_query, mask=m_query, other=0.0)), 0)
    for j in tl.static_range(1, PER):
        largest = tl.maximum(largest, tl.max(tl.abs(tl.load(p_query + j, mask=m_query, other=0.0)), 0))
    unit = tl.where(largest > 0, largest, 1.0) / 128  # room for `factor`
    DIGITS: tl.constexpr = digits(MODE)
    query = ()
    for j in tl.static_range(PER):
        for d in tl.static_range(DIGITS):
            x = tl.load(p_query + j, mask=m_query, other=0.0) / unit[None, :]
            if MODE == BITWISE:
                x *= gap_of(p_levels, 0, d, BITS, MODE) / gap_of(p_levels, 0, 1, BITS, MODE)
            if MODE <= BITWISE:
                x /= factor(MODE, BITS, j, d)
            high = x.to(tl.float16)
            low = (x - high.to(tl.float32)).to(tl.float16)
            query = query + ((high, low),)
    return query, unit * gap_of(p_levels, 0, DIGITS - 1, BITS, MODE)


@triton.jit
def _scores(planes, p_levels, table, query, scores, BITS: tl.constexpr, PER: tl.constexpr, MODE: tl.constexpr):
    """Add the products of stored keys and queries, accurate to float32."""
    for j in tl.static_range(PER):
        if MODE <= BITWISE:
            for d in tl.static_range(digits(MODE)):
                key = digit_operand(planes, table, j, d, BITS, MODE)
                high, low = query[j * digits(MODE) + d]
                scores = tl.dot(key, low, tl.dot(key, high, scores))
        else:
            key, rest = level_operands(planes, p_levels, table, j, BITS, MODE)
            scores = tl.dot(rest, query[j][0], tl.dot(key, query[j][1], tl.dot(key, query[j][0], scores)))
    return scores


@triton.jit
def _add_values(
    planes, p_levels, table, weights, shrink, total, BITS: tl.constexpr, PER: tl.constexpr, MODE: tl.constexpr
):
    """The accumulators `[words, columns]` of all sub-planes after a block with weights `[tokens, columns]`."""
    last: tl.constexpr = digits(MODE) - 1
    high = weights.to(tl.float16)
    if MODE == BITWISE:  # the lower bit lies one bit lower, so its weight counts twice
        ratio = gap_of(p_levels, 0, 0, BITS, MODE) / gap_of(p_levels, 0, 1, BITS, MODE)
        low = (weights * (2 * ratio)).to(tl.float16)
    new_total = ()
    for j in tl.static_range(PER):
        x = total[j] * shrink[None, :]
        if MODE <= BITWISE:
            x = tl.dot(digit_operand(planes, table, j, last, BITS, MODE), high, x)
            if MODE == BITWISE:
                x = tl.dot(digit_operand(planes, table, j, 0, BITS, MODE), low, x)
        else:
            value, _ = level_operands(planes, p_levels, table, j, BITS, MODE)
            x = tl.dot(value, high, x)
        new_total = new_total + (x,)
    return new_total


# Not specialised: what changes from step to step or with the size of a buffer, or Triton compiles anew.
@triton.jit(
    do_not_specialize=[
        "tokens", "mask_b", "table_b", "key_scale_n", "key_scale_h", "value_scale_n", "value_scale_h"
    ],
    do_not_specialize_on_alignment=["p_mask", "p_lengths", "p_table"],
)  # fmt: skip
def _split(
    p_query, p_bias, key_planes, p_key_scale, p_key_levels, value_planes, p_value_scale, p_value_levels,
    p_partial, p_lse, p_lengths, p_mask, p_table, key_strides, value_strides, key_scale_n, key_scale_h,
    value_scale_n, value_scale_h, mask_b, table_b, tokens, kv_heads, columns, scaling, softcap,
    DIM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_MODE: tl.constexpr,
    VALUE_MODE: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, KEY_LOG8: tl.constexpr,
    VALUE_LOG8: tl.constexpr, KEY_SCALE_ROW: tl.constexpr, VALUE_SCALE_ROW: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_head, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_b, i_h = i_head // kv_heads, i_head % kv_heads
    i_word, i_c = tl.arange(0, WORDS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_c, m_word = i_c < columns, i_word < DIM // PER
    o_c = i_head * columns + i_c
    i_t = tl.arange(0, BLOCK)
    PAGED_TILE: tl.constexpr = PAGE > 0 and PAGE % BLOCK != 0
    m_tile = m_word[:, None] & m_c[None, :]
    o_tile = i_word[:, None] * PER
    query, gain = _load_query(p_query + o_c[None, :] * DIM + o_tile, m_tile, p_key_levels, KEY_BITS, PER, KEY_MODE)
    gain *= scaling
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0)
    if not SOFTCAP:
        gain, bias = gain * LOG2E, bias * LOG2E
    key_table, value_table = (
        load_table(p_key_levels, KEY_BITS, KEY_MODE),
        load_table(p_value_levels, VALUE_BITS, VALUE_MODE),
    )

    if p_lengths is not None:
        tokens = tl.minimum(tokens, tl.load(p_lengths + i_b).to(tl.int32))
    span = tl.cdiv(tl.cdiv(tokens, splits), BLOCK) * BLOCK
    first = i_split * span
    last = tl.minimum(first + span, tokens)
    top = tl.full([COLUMNS], START, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    total = ()
    for _j in tl.static_range(PER):
        total = total + (tl.zeros([WORDS, COLUMNS], tl.float32),)
    for start in range(first, last, BLOCK):
        m_t = i_t < last - start
        page, row, i_row = _place(p_table, i_b, table_b, start, last, BLOCK, PAGE)
        planes = _load_planes(
            key_planes, key_strides, i_h, page, row, i_row, m_t,
            0, KEY_BITS, KEY_MODE, PER, WORDS, DIM, KEY_BYTES, PAGED_TILE,
        )  # fmt: skip
        o_scale = page * key_scale_n + i_h * key_scale_h + row * KEY_SCALE_ROW + i_row * KEY_SCALE_ROW
        k_scale, _ = load_scales(p_key_scale, o_scale, m_t, KEY_LOG8)
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        scores = _scores(planes, p_key_levels, key_table, query, scores, KEY_BITS, PER, KEY_MODE)
        scores = scores * k_scale[:, None] * gain[None, :] + bias[None, :]
        if SOFTCAP:
            scores = softcap * LOG2E * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / softcap)) + 1))
        m_seen = m_t
        if p_mask is not None:
            m_seen = m_t & (tl.load(p_mask + i_b * mask_b + start + i_t, mask=m_t, other=0) != 0)
        o_scale = page * value_scale_n + i_h * value_scale_h + row * VALUE_SCALE_ROW + i_row * VALUE_SCALE_ROW
        v_scale, v_log = load_scales(p_value_scale, o_scale, m_t, VALUE_LOG8)
        # `top` is the largest log2 of weight times scale, so that their product fits fp16 whatever the scales.
        scores = tl.where(m_seen[:, None], scores, LOWEST)
        new_top = tl.maximum(top, tl.max(scores + v_log[:, None], 0))
        weights = tl.exp2(scores - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(weights, 0)
        top = new_top
        planes = _load_planes(
            value_planes, value_strides, i_h, page, row, i_row, m_t,
            1, VALUE_BITS, VALUE_MODE, PER, WORDS, DIM, VALUE_BYTES, PAGED_TILE,
        )  # fmt: skip
        total = _add_values(
            planes, p_value_levels, value_table, weights * v_scale[:, None], shrink, total, VALUE_BITS, PER, VALUE_MODE
        )

    m_any = mass > 0
    o_out = (i_head * splits + i_split) * columns + i_c
    tl.store(p_lse + o_out, tl.where(m_any, top + tl.log2(mass), -float("inf")), m_c)
    LAST: tl.constexpr = digits(VALUE_MODE) - 1
    norm = gap_of(p_value_levels, 0, LAST, VALUE_BITS, VALUE_MODE) / tl.where(m_any, mass, 1.0)
    for j in tl.static_range(PER):
        out = total[j] * norm[None, :]
        if VALUE_MODE <= BITWISE:
            out /= factor(VALUE_MODE, VALUE_BITS, j, LAST)
        tl.store(p_partial + o_out[None, :] * DIM + o_tile + j, out, m_tile)


def mode(side: Packed) -> int:
    """How the kernel turns the codes of `side` into levels."""
    if side.window:
        return WINDOW.value + side.window
    if side.uniform or side.bits == 1:
        return AFFINE.value
    return BITWISE.value if side.bits == 2 else SHUFFLE.value if side.bits <= 5 else LOAD.value


def _load_bytes(side: Packed, per: int) -> tuple[int, ...]:
    """Bytes that a load of each plane may take: a word, or one where rows are not aligned to words."""
    if side.window:
        return (1,)
    sizes = [word_bytes.fn(side.bits, per, k) for k in range(len(side.planes))]
    return tuple(
        1 if any(n % size for n in (plane.data_ptr(), *plane.stride()[:3])) else size
        for plane, size in zip(side.planes, sizes, strict=True)
    )


def _strides(side: Packed) -> tuple[int, ...]:
    return sum((plane.stride()[:3] for plane in side.planes), ())


def split(
    rotated: Tensor,
    bias: Tensor,
    key: Packed,
    value: Packed,
    partial: Tensor,
    lse: Tensor,
    tokens: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> None:
    """Attend to the packed tokens, in `partial.shape[2]` spans; writes every element of `partial` and `lse`.

    Args:
        rotated: queries in the basis of the stored keys, float32 `[batch, kv_heads, columns, head_dim]`.
        bias: added to the scores of a column, float32 `[batch, kv_heads, columns]`.
        key, value: the packed tokens.
        partial: float32 `[batch, kv_heads, splits, columns, head_dim]`: the average of the stored values.
        lse: float32 `[batch, kv_heads, splits, columns]`: log2 of the sum of exp(score), -inf of nothing.
        tokens: how many tokens to walk at most; the same for all of the batch.
        lengths: how many tokens each sequence has, integers `[batch]`.
        mask: bool `[batch, >= tokens]`, True = attend.
        block_table: int32 `[batch, max_pages]`: the pages of a sequence (then N of `key` and `value` is pages).
    """
    batch, kv_heads, splits, columns, dim = partial.shape
    if partial.numel() == 0:
        return
    per = 4 if dim <= 64 and not key.window and not value.window else 8
    modes, key_bytes = (mode(key), mode(value)), _load_bytes(key, per)
    # Triton spreads operands that come from loads of single bytes over at least 32 elements of the sum, and repeats
    # them if there are fewer (seen with Triton 3.6 on sm_90: wrong scores).
    words = max(32 if 1 in key_bytes else 16, triton.next_power_of_2(dim // per))
    tile = 8 if columns <= 8 and torch.version.hip is None else 16
    big = words * tile >= 512
    launch(
        _split, (batch * kv_heads, splits, triton.cdiv(columns, tile)),
        rotated, bias, key.planes, key.scale, key.levels, value.planes, value.scale, value.levels,
        partial, lse, lengths, mask, block_table, _strides(key), _strides(value),
        *key.scale.stride()[:2], *value.scale.stride()[:2], 0 if mask is None else mask.stride(0),
        0 if block_table is None else block_table.stride(0), tokens, kv_heads, columns, scaling, softcap or 0.0,
        DIM=dim, KEY_BITS=key.bits, VALUE_BITS=value.bits, KEY_MODE=modes[0], VALUE_MODE=modes[1],
        KEY_BYTES=key_bytes, VALUE_BYTES=_load_bytes(value, per),
        KEY_LOG8=key.scale.dtype == torch.uint8, VALUE_LOG8=value.scale.dtype == torch.uint8,
        KEY_SCALE_ROW=key.scale.stride(2), VALUE_SCALE_ROW=value.scale.stride(2), SOFTCAP=bool(softcap),
        PAGE=0 if block_table is None else key.planes[0].shape[2], PER=per, WORDS=words, COLUMNS=tile,
        BLOCK=32 if words > 16 and not big else 64,
        num_warps=2 if big else 1, num_stages=1 if max(modes) >= LOAD.value else 2,
    )  # fmt: skip
