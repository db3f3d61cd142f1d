"""The device side of `encode`. A tile is `[BLOCK, SIZE]`: tokens of one head, coordinates padded to `SIZE`.

With METHOD "unit" vectors are rotated and normalised only, for `viterbi`.
"""

import triton
import triton.language as tl

from .overlap import let_next_start, wait_for_previous
from .quantize import TINY, levels_of, quantized
from .ring import due_block
from .storage import offset_of, shuffled, store_words
from .tiles import widths


@triton.constexpr_function
def method_of(methods, p):
    """A text of a tuple; as an argument the subscription alone is none that Triton 3.6 takes."""
    return methods[p]


@triton.jit(do_not_specialize=["slot_stride", "sinks", "capacity", "batch", "tokens", "start", "tiles", "per"])
def encode_kernel(
    x,
    planes,  # tuple, widest first
    scale,
    slots,
    p_state,  # of the ring that `x` is: encode the block that leaves it at this step, if one does; see `ring`
    matrix,
    mean,
    table,
    x_strides,  # tuples of strides of batch (or page), head and token, see `offset_of`; the planes' one after another
    plane_strides,
    scale_strides,
    slot_stride,
    term_stride,
    head_stride,  # of the matrix; 0 if the heads share it
    sinks,
    capacity,
    batch,
    tokens,
    start,
    tiles,
    per,
    factor,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    FIRST: tl.constexpr,  # of each part of the coordinates: where it begins and ends,
    END: tl.constexpr,
    BITS: tl.constexpr,  # the bits of its codes,
    METHOD: tl.constexpr,  # how levels are found,
    PLANE: tl.constexpr,  # its first plane,
    TABLE: tl.constexpr,  # and where its table begins
    LOG_SCALE: tl.constexpr,
    CORRECT: tl.constexpr,
    FLAT: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,  # 0 without slots
    X_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    X_TERMS: tl.constexpr,
    M_TERMS: tl.constexpr,
    DOT: tl.constexpr,
    RESIDENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,  # rows of the ring, 0 without one
    COUNT: tl.constexpr,  # write the ring's number of packed tokens; this is the first launch of a step
    OVERLAP: tl.constexpr,
):
    """Tiles `program_id(0) * per` and on of head `program_id(1)`."""
    if COUNT:
        wait_for_previous(OVERLAP)
    let_next_start(OVERLAP)
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * per
    x_row = 0
    if ROOM:
        due, x_row, start, packed = due_block(p_state, sinks, capacity, ROOM)
        tiles = tl.where(due, tiles, 0)
        if COUNT and (first == 0) & (head == 0):
            for i in range(batch):
                tl.store(p_state + 2 + i, packed)
    matrix += head * head_stride
    levels = ()
    for p in tl.static_range(len(BITS)):
        levels += (levels_of(table + TABLE[p], BITS[p], method_of(METHOD, p)),)
    if RESIDENT:
        held = _terms_of_matrix(matrix, 0, SIZE, SIZE, M_TERMS, term_stride, DOT)
    for tile in tl.range(first, tl.minimum(first + per, tiles)):
        # Row i of the tile is token `row + lane[i]` of batch element `page`; `page` and `row` have a value for each
        # row of the tile where tiles run on from one batch element into the next.
        lane = tl.arange(0, BLOCK)
        if FLAT:
            page, row = ((tile * BLOCK + lane) // tokens).to(tl.int64), ((tile * BLOCK + lane) % tokens).to(tl.int64)
            seen, lane = page < batch, lane * 0
        else:
            a_batch = tl.cdiv(tokens, BLOCK)
            page, row = (tile // a_batch).to(tl.int64), (tile % a_batch).to(tl.int64) * BLOCK
            seen = lane < tokens - row
        vectors = x + offset_of(page, row + x_row, head, lane, x_strides, X_UNIT)
        y = tl.zeros((BLOCK, SIZE), tl.float32)
        if RESIDENT:
            y = _product(y, _coordinates(vectors, seen, 0, SIZE, SIZE, DIM), held, X_TERMS, M_TERMS, DOT)
        else:
            for k in tl.range(0, SIZE, CHUNK):
                part = _terms_of_matrix(matrix, k, CHUNK, SIZE, M_TERMS, term_stride, DOT)
                y = _product(y, _coordinates(vectors, seen, k, CHUNK, SIZE, DIM), part, X_TERMS, M_TERMS, DOT)
        if mean is not None:
            y -= tl.load(mean + head * SIZE + tl.arange(0, SIZE))[None, :]
        # The coordinates in their stored order, `SIZE // LANES` adjacent ones a thread: see `_columns`.
        y = tl.permute(tl.reshape(y, (BLOCK, LANES // 4, SIZE // LANES // 2, 4, 2)), (0, 1, 3, 2, 4))
        y = tl.reshape(y, (BLOCK, LANES, SIZE // LANES) if BLOCK > 1 else (1, SIZE // 8, 8))
        rms = tl.sqrt(tl.sum(tl.sum(y * y, 2), 1, keep_dims=True) / DIM)
        if method_of(METHOD, 0) == "unit":
            vector = (page * tl.num_programs(1) + head) * tokens + row + lane
            count = tl.num_programs(1).to(tl.int64) * batch * tokens
            unit = y * (levels[0][0] / tl.maximum(rms, TINY))[:, :, None]
            _store_units(planes[0] + vector, count, unit, seen, DIM)
            tl.store(scale + vector, tl.sum(rms, 1) * (factor * DIM**0.5), mask=seen)
        else:
            if PAGE_TOKENS:
                slot = tl.load(slots + page * slot_stride + row + lane, mask=seen, other=-1)
                seen, page, row, lane = slot >= 0, slot // PAGE_TOKENS, slot % PAGE_TOKENS, lane * 0
            else:
                row += start
            square = tl.zeros((BLOCK,), tl.float32)
            for p in tl.static_range(len(BITS)):  # a part's words leave the registers before the next ones come
                square += _encode_part(
                    y, rms, levels[p], table + TABLE[p], planes, page, row, head, lane, seen, plane_strides,
                    FIRST[p], END[p], BITS[p], method_of(METHOD, p), PLANE[p], CORRECT, DIM, PLANE_UNIT, ALIGNED,
                )  # fmt: skip
            stored = tl.sum(rms, 1) * factor
            if CORRECT:
                stored = stored / tl.sqrt(square)
            rows = scale + offset_of(page, row, head, lane, scale_strides, 1)
            tl.store(rows, stored_scale(stored, LOG_SCALE), mask=seen)
    if not COUNT:
        wait_for_previous(OVERLAP)


@triton.jit
def _encode_part(
    y, rms, levels, table, planes, page, row, head, lane, seen, plane_strides, FIRST: tl.constexpr, END: tl.constexpr,
    BITS: tl.constexpr, METHOD: tl.constexpr, PLANE: tl.constexpr, CORRECT: tl.constexpr, DIM: tl.constexpr,
    PLANE_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the codes of a part; returns its share of the mean square of the levels.

    All coordinates are quantized, and words of the part are stored: where its words are, threads have those of others.
    """
    words, energy = quantized(y, rms, levels, table, BITS, METHOD, CORRECT, FIRST, END, DIM)
    WIDTHS: tl.constexpr = widths(BITS)
    for i in tl.static_range(len(WIDTHS)):
        strides = (
            plane_strides[3 * (PLANE + i)], plane_strides[3 * (PLANE + i) + 1], plane_strides[3 * (PLANE + i) + 2],
        )  # fmt: skip
        rows = planes[PLANE + i] + offset_of(page, row, head, lane, strides, PLANE_UNIT)
        if BITS == 3 and WIDTHS[i] == 1:
            store_words(rows, shuffled(words[i]), seen, 2, FIRST // 16, (END + 15) // 16, ALIGNED)
        else:
            store_words(rows, words[i], seen, WIDTHS[i], FIRST // 8, END // 8, ALIGNED)
    return tl.sum(energy, 1) / DIM + levels[0] * ((END - FIRST) / DIM)


@triton.jit
def _store_units(target, count, unit, seen, DIM: tl.constexpr):
    """Rounded to integers, `count` vectors side by side in each of `DIM` rows: what `viterbi_kernel` reads."""
    SHARE: tl.constexpr = unit.shape[2]
    column = tl.arange(0, unit.shape[1])[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    mask = seen[:, None, None] & (column < DIM)[None, :, :]
    tl.store(target[:, None, None] + (column * count)[None, :, :], tl.floor(unit + 0.5).to(tl.int32), mask=mask)


@triton.jit
def _coordinates(vectors, seen, first, COUNT: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """`[BLOCK, COUNT]` coordinates from `first` on, zeros where there are none."""
    column = first + tl.arange(0, COUNT)
    mask = seen[:, None]
    if DIM < SIZE:
        mask = mask & (column < DIM)[None, :]
    return tl.load(vectors[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _terms_of_matrix(matrix, first, COUNT: tl.constexpr, SIZE: tl.constexpr, TERMS: tl.constexpr, stride, DOT):
    """`COUNT` rows of every term of the matrix."""
    terms = ()
    offset = (first + tl.arange(0, COUNT))[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    for i in tl.static_range(TERMS):
        terms += (tl.load(matrix + i * stride + offset).to(DOT),)
    return terms


@triton.jit
def _product(y, x, matrix, X_TERMS: tl.constexpr, M_TERMS: tl.constexpr, DOT: tl.constexpr):
    """`y + x @ sum(matrix)` to float32: `x` is split into terms too, and products below 2**-24 are left out."""
    if y.shape[0] == 1:
        entries = matrix[0]
        for i in tl.static_range(1, M_TERMS):
            entries += matrix[i]
        y += tl.sum(tl.permute(x, (1, 0)).to(tl.float32) * entries, 0)[None, :]
    else:
        rest, terms = x, ()
        for _ in tl.static_range(X_TERMS):
            term = rest.to(tl.bfloat16 if X_TERMS > 1 else x.dtype)
            terms += (term.to(DOT),)
            rest = rest.to(tl.float32) - term.to(tl.float32)
        for i in tl.static_range(X_TERMS):  # the smallest products first
            for j in tl.static_range(M_TERMS):
                if X_TERMS - i + M_TERMS - j <= 4:
                    y = tl.dot(terms[X_TERMS - i - 1], matrix[M_TERMS - j - 1], y, input_precision="ieee")
    return y


@triton.jit
def stored_scale(scale, LOG_SCALE: tl.constexpr):
    """The stored form: float16, or 2^((code - 128) / 16) in 8 bits, 0 for zero and 255 for too large or NaN."""
    if LOG_SCALE:
        code = tl.floor(tl.log2(scale) * 16 + 128.5)
        stored = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), 255.0), 255.0).to(tl.int32).to(tl.uint8)
    else:
        stored = scale.to(tl.float16)
    return stored
