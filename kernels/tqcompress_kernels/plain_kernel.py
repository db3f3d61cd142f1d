"""The device side of `plain.split`.

Source: the split-KV scheme of Flash-Decoding (Dao et al. 2023). Tokens lie on the rows of the key dot and are
what the value dot sums over; the columns (queries) of a KV head lie on the columns of both, so a coordinate is
dequantized once for all of them. The naive version is `reference.split`.

Precision: operands are fp16, sums float32. Queries and levels that are not exact in fp16 are sums of two fp16
numbers for scores, which are accurate to about 2**-20 of the largest product therefore. Values are rounded to fp16
once, and so are softmax weights times value scales. A column of the query is a fraction of its largest element, and
weights times scales are at most 1, so nothing overflows; what underflows is below 2**-24 of the largest term.
"""

import triton
import triton.language as tl

from .tiles import (
    BITWISE,
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
    planes, strides, i_h, page, row, i_row, m_row, FIRST: tl.constexpr,
    AXIS: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
    DIM: tl.constexpr, BYTES: tl.constexpr, PAGED_TILE: tl.constexpr,
):  # fmt: skip
    """The words of a part's planes, from `FIRST` on, of a block of tokens, in pairs; words of windows as they are."""
    words = ()
    for k in tl.static_range(1 if window_of(MODE) else len(widths(BITS))):
        plane, stride = planes[FIRST + k], strides[3 * (FIRST + k) + 2]
        o_block = page * strides[3 * (FIRST + k)] + i_h * strides[3 * (FIRST + k) + 1] + row * stride
        if PAGED_TILE:
            o_block = tl.expand_dims(o_block, 1 - AXIS)
        if window_of(MODE):
            x = load_windows(plane, stride, o_block, i_row, m_row, BITS, window_of(MODE), WORDS, DIM, AXIS)
        else:
            x = load_words(
                plane, stride, o_block, i_row, m_row, k, BITS, PER, WORDS, DIM, AXIS, BYTES[FIRST + k]
            )  # fmt: skip
        words = words + (x,)
    if window_of(MODE):
        return words
    else:
        return pair_planes(words, BITS, PER)


@triton.jit
def _tile(
    o_column, m_column, FIRST: tl.constexpr, DIM: tl.constexpr, ALL: tl.constexpr, PER: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Offsets `[WORDS, COLUMNS]` of every `PER`th of the coordinates of a part, and which are there."""
    i_word = tl.arange(0, WORDS)
    return o_column[None, :] * ALL + (FIRST + i_word[:, None] * PER), (i_word < DIM // PER)[:, None] & m_column[None, :]


@triton.jit
def _load_query(
    p_query, o_c, m_c, p_levels, FIRST: tl.constexpr, DIM: tl.constexpr, ALL: tl.constexpr, BITS: tl.constexpr,
    PER: tl.constexpr, WORDS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The operands that meet those of a part of keys, in two fp16 parts each, and the unit of scores."""
    o_query, m_query = _tile(o_c, m_c, FIRST, DIM, ALL, PER, WORDS)
    p_query += o_query
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


@triton.jit
def _nothing(PER: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Accumulators of the sub-planes of a part."""
    total = ()
    for _ in tl.static_range(PER):
        total = total + (tl.zeros([WORDS, COLUMNS], tl.float32),)
    return total


@triton.jit
def _store_values(
    p_partial, total, o_out, m_c, mass, p_levels, FIRST: tl.constexpr, DIM: tl.constexpr, ALL: tl.constexpr,
    BITS: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Bring the accumulators of a part to true levels and store them."""
    LAST: tl.constexpr = digits(MODE) - 1
    o_tile, m_tile = _tile(o_out, m_c, FIRST, DIM, ALL, PER, WORDS)
    norm = gap_of(p_levels, 0, LAST, BITS, MODE) / tl.where(mass > 0, mass, 1.0)
    for j in tl.static_range(PER):
        out = total[j] * norm[None, :]
        if MODE <= BITWISE:
            out /= factor(MODE, BITS, j, LAST)
        tl.store(p_partial + o_tile + j, out, m_tile)


# Not specialised: what changes from step to step or with the size of a buffer, or Triton compiles anew.
@triton.jit(
    do_not_specialize=[
        "tokens", "mask_b", "table_b", "key_scale_n", "key_scale_h", "value_scale_n", "value_scale_h"
    ],
    do_not_specialize_on_alignment=["p_mask", "p_lengths", "p_table"],
)  # fmt: skip
def split_kernel(
    p_query, p_bias, key_planes, p_key_scale, p_key_levels, value_planes, p_value_scale, p_value_levels,
    p_partial, p_lse, p_lengths, p_mask, p_table, key_strides, value_strides, key_scale_n, key_scale_h,
    value_scale_n, value_scale_h, mask_b, table_b, tokens, kv_heads, columns, scaling, softcap,
    DIM: tl.constexpr, KEY_FIRST: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_MODE: tl.constexpr,
    KEY_PER: tl.constexpr, KEY_WORDS: tl.constexpr, KEY_PLANE: tl.constexpr, KEY_BYTES: tl.constexpr,
    VALUE_FIRST: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_MODE: tl.constexpr,
    VALUE_PER: tl.constexpr, VALUE_WORDS: tl.constexpr, VALUE_PLANE: tl.constexpr, VALUE_BYTES: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SCALE_ROW: tl.constexpr, VALUE_SCALE_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Constants of the sides are tuples with what `_Parts` has of each part, and `*_BYTES` of each plane."""
    i_head, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_b, i_h = i_head // kv_heads, i_head % kv_heads
    i_c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = i_c < columns
    o_c = i_head * columns + i_c
    i_t = tl.arange(0, BLOCK)
    PAGED_TILE: tl.constexpr = PAGE > 0 and PAGE % BLOCK != 0
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0)
    if not SOFTCAP:
        scaling, bias = scaling * LOG2E, bias * LOG2E
    query, gain, key_table = (), (), ()
    for p in tl.static_range(len(KEY_BITS)):
        operands, unit = _load_query(
            p_query, o_c, m_c, p_key_levels[p],
            KEY_FIRST[p], KEY_DIM[p], DIM, KEY_BITS[p], KEY_PER[p], KEY_WORDS[p], KEY_MODE[p],
        )  # fmt: skip
        query, gain = query + (operands,), gain + (unit * scaling,)
        key_table = key_table + (load_table(p_key_levels[p], KEY_BITS[p], KEY_MODE[p]),)
    value_table = ()
    for p in tl.static_range(len(VALUE_BITS)):
        value_table = value_table + (load_table(p_value_levels[p], VALUE_BITS[p], VALUE_MODE[p]),)

    if p_lengths is not None:
        tokens = tl.minimum(tokens, tl.load(p_lengths + i_b).to(tl.int32))
    span = tl.cdiv(tl.cdiv(tokens, splits), BLOCK) * BLOCK
    first = i_split * span
    last = tl.minimum(first + span, tokens)
    top = tl.full([COLUMNS], START, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    total = ()
    for p in tl.static_range(len(VALUE_BITS)):
        total = total + (_nothing(VALUE_PER[p], VALUE_WORDS[p], COLUMNS),)
    for start in range(first, last, BLOCK):
        m_t = i_t < last - start
        page, row, i_row = _place(p_table, i_b, table_b, start, last, BLOCK, PAGE)
        o_scale = page * key_scale_n + i_h * key_scale_h + row * KEY_SCALE_ROW + i_row * KEY_SCALE_ROW
        k_scale, _ = load_scales(p_key_scale, o_scale, m_t, KEY_LOG8)
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for p in tl.static_range(len(KEY_BITS)):
            planes = _load_planes(
                key_planes, key_strides, i_h, page, row, i_row, m_t, KEY_PLANE[p],
                0, KEY_BITS[p], KEY_MODE[p], KEY_PER[p], KEY_WORDS[p], KEY_DIM[p], KEY_BYTES, PAGED_TILE,
            )  # fmt: skip
            some = tl.zeros([BLOCK, COLUMNS], tl.float32)
            some = _scores(
                planes, p_key_levels[p], key_table[p], query[p], some, KEY_BITS[p], KEY_PER[p], KEY_MODE[p]
            )  # fmt: skip
            scores += some * k_scale[:, None] * gain[p][None, :]
        scores += bias[None, :]
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
        weights *= v_scale[:, None]
        new_total = ()
        for p in tl.static_range(len(VALUE_BITS)):
            planes = _load_planes(
                value_planes, value_strides, i_h, page, row, i_row, m_t, VALUE_PLANE[p],
                1, VALUE_BITS[p], VALUE_MODE[p], VALUE_PER[p], VALUE_WORDS[p], VALUE_DIM[p], VALUE_BYTES, PAGED_TILE,
            )  # fmt: skip
            added = _add_values(
                planes, p_value_levels[p], value_table[p], weights, shrink, total[p],
                VALUE_BITS[p], VALUE_PER[p], VALUE_MODE[p],
            )  # fmt: skip
            new_total = new_total + (added,)
        total = new_total

    o_out = (i_head * splits + i_split) * columns + i_c
    tl.store(p_lse + o_out, tl.where(mass > 0, top + tl.log2(mass), -float("inf")), m_c)
    for p in tl.static_range(len(VALUE_BITS)):
        _store_values(
            p_partial, total[p], o_out, m_c, mass, p_value_levels[p],
            VALUE_FIRST[p], VALUE_DIM[p], DIM, VALUE_BITS[p], VALUE_PER[p], VALUE_WORDS[p], VALUE_MODE[p],
        )  # fmt: skip
