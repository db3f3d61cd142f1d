"""Tiles of packed rows on their way from global memory through shared memory into registers. See `fast_kernel`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.constexpr_function
def halves_shape(shape):
    return [*shape[:-1], shape[-1] // 2, 2]


@gluon.constexpr_function
def leading(shape):
    return list(shape[:-1])


@gluon.jit
def unbind(x):
    """The slices of `x` along its last dimension, as a tuple."""
    U: gl.constexpr = x.shape[len(x.shape) - 1]
    if U == 1:
        return (gl.reshape(x, leading(x.shape)),)
    else:
        even, odd = gl.split(gl.reshape(x, halves_shape(x.shape)))
        evens = unbind(even)
        odds = unbind(odd)
        out = ()
        for i in gl.static_range(U // 2):
            out = out + (evens[i], odds[i])
        return out


@gluon.constexpr_function
def key_layout(words):
    """Of a tile of key rows `[T, words]`: lane 4g + c holds quarter c of rows `8 i + g`."""
    return gl.BlockedLayout([1, words // 4], [8, 4], [1, 1], [1, 0])


@gluon.constexpr_function
def value_layout(tokens, parts):
    """Of a tile of value rows `[T, parts]`: lane 4g + c holds eighth g of rows `4 i + c`.

    Registers run over the parts, then over rows 8 apart: what one lane of the scores holds.
    """
    each = parts // 8
    across = [[0, 1 << i] for i in range(each.bit_length() - 1)]
    down = [[8, 0], [16, 0], [4, 0], [32, 0]][: tokens.bit_length() - 3]
    lanes = [[1, 0], [2, 0], [0, each], [0, 2 * each], [0, 4 * each]]
    return gl.DistributedLinearLayout(across + down, lanes, [], [], [tokens, parts])


@gluon.constexpr_function
def row_layout():
    """Of one number a token: lane 4g + c holds those of rows `8 i + g`."""
    return gl.SliceLayout(1, gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0]))


@gluon.constexpr_function
def copy_layout(words):
    """Of a tile of rows on its way to shared memory: up to 16 bytes a lane, neighbouring lanes along a row."""
    each = min(words, 4)
    return gl.BlockedLayout([1, each], [32 * each // words, words // each], [1, 1], [1, 0])


@gluon.jit
def key_words(x):
    """`[T, words]` in `key_layout` -> tuple of `[T, 4]`, word u of each lane's quarter."""
    return unbind(gl.reshape(x, [x.shape[0], 4, x.shape[1] // 4]))


@gluon.jit
def value_words(x):
    """`[T, parts]` in `value_layout` -> tuple of `[8, T]` int32, part u of each lane's eighth.

    Column 32 i + 16 b + 4 c + r is token 32 i + 8 r + 4 b + c.
    """
    T: gl.constexpr = x.shape[0]
    U: gl.constexpr = x.shape[1] // 8
    x = gl.permute(gl.reshape(x.to(gl.int32), [T // 32, 4, 2, 4, 8, U]), [4, 0, 2, 3, 1, 5])
    return unbind(gl.reshape(x, [8, T, U]))


@gluon.jit
def row_offsets(s, phys, ROW: gl.constexpr, table, page_stride, PAGE: gl.constexpr):
    """Element offsets of tokens `s + phys` of a head: rows in a line, or in pages of whole tiles."""
    if PAGE == 0:
        return s * ROW + phys * ROW
    else:
        page = gl.load(table + s // PAGE).to(gl.int64)
        return page * page_stride + (s % PAGE) * ROW + phys * ROW


@gluon.jit
def rows_at(p, s, end, ROW: gl.constexpr, PARTS: gl.constexpr, REAL: gl.constexpr, L: gl.constexpr, table, page_stride,
            PAGE: gl.constexpr, T: gl.constexpr):  # fmt: skip
    """Pointers to `[T, PARTS]` parts of the rows of tokens from `s`, and which of them are there."""
    t = gl.arange(0, T, gl.SliceLayout(1, L))
    i = gl.arange(0, PARTS, gl.SliceLayout(0, L))
    offsets = row_offsets(s, t, ROW, table, page_stride, PAGE)
    return p + (offsets[:, None] + i[None, :]), (s + t < end)[:, None] & (i < REAL)[None, :]


@gluon.jit
def load_part(p, s, end, ROW: gl.constexpr, PARTS: gl.constexpr, REAL: gl.constexpr, L: gl.constexpr, table,
              page_stride, PAGE: gl.constexpr, T: gl.constexpr):  # fmt: skip
    """The last, shorter tile: straight from global memory, zeros beyond `end`."""
    pointers, ok = rows_at(p, s, end, ROW, PARTS, REAL, L, table, page_stride, PAGE, T)
    return gl.load(pointers, mask=ok, other=0)


@gluon.jit
def copy_rows(buffer, p, s, end, ROW: gl.constexpr, REAL: gl.constexpr, table, page_stride, PAGE: gl.constexpr):
    """Start copying a whole tile of rows of 32-bit words into shared memory."""
    T: gl.constexpr = buffer.shape[0]
    WORDS: gl.constexpr = buffer.shape[1]
    pointers, ok = rows_at(p, s, end, ROW, WORDS, REAL, copy_layout(WORDS), table, page_stride, PAGE, T)
    if REAL < WORDS:
        async_copy.async_copy_global_to_shared(buffer, pointers, mask=ok)
    else:
        async_copy.async_copy_global_to_shared(buffer, pointers)


@gluon.jit
def copy_line(buffer, p, s, table, page_stride, PAGE: gl.constexpr, T: gl.constexpr):
    """Start copying one number a token, contiguous in memory, as 32-bit words."""
    WORDS: gl.constexpr = buffer.shape[0]
    PER: gl.constexpr = T // WORDS
    i = gl.arange(0, WORDS, gl.BlockedLayout([1], [32], [1], [0]))
    if PAGE == 0:
        start = s // PER
    else:
        page = gl.load(table + s // PAGE).to(gl.int64)
        start = (page * page_stride + s % PAGE) // PER
    async_copy.async_copy_global_to_shared(buffer, p.to(gl.pointer_type(gl.int32), bitcast=True) + (start + i))


@gluon.jit
def line_of(buffer, dtype: gl.constexpr, T: gl.constexpr):
    """The numbers of `copy_line`, in the order of `row_tokens`."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return buffer._reinterpret(dtype, [T], flat).load(row_layout())


@gluon.jit
def parts_of(buffer, dtype: gl.constexpr, PARTS: gl.constexpr):
    """A tile `[T, words]` in shared memory as `[T, PARTS]` of `dtype`."""
    if buffer.shape[1] == PARTS:
        return buffer
    else:
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        return buffer._reinterpret(dtype, [buffer.shape[0], PARTS], flat)


@gluon.jit
def row_tokens(T: gl.constexpr):
    """The tokens of a tile, spread over lanes like the rows of scores: lane 4g + c holds tokens `8 i + g`."""
    return gl.arange(0, T, row_layout())


@gluon.jit
def load_rows(p, s, end, ROW: gl.constexpr, table, page_stride, PAGE: gl.constexpr, T: gl.constexpr,
              MASKED: gl.constexpr):  # fmt: skip
    """One number a token, in the order of `row_tokens`."""
    t = row_tokens(T)
    offsets = row_offsets(s, t, ROW, table, page_stride, PAGE)
    if MASKED:
        return gl.load(p + offsets, mask=s + t < end, other=0)
    else:
        return gl.load(p + offsets)


@gluon.jit
def by_row(x, like):
    """Numbers of `load_rows` in the layout of the rows of `like`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)


@gluon.jit
def scale_of(x):
    """Stored scales as float32: fp16, or the 8-bit logarithmic format."""
    if x.dtype == gl.uint8:
        return gl.where(x == 0, 0.0, gl.exp2((x.to(gl.float32) - 128.0) * 0.0625))
    else:
        return x.to(gl.float32)


@gluon.jit
def scale_ring(BUFFERS: gl.constexpr, T: gl.constexpr, p_scale):
    """Shared-memory buffers of scales."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WORDS: gl.constexpr = T * p_scale.dtype.element_ty.primitive_bitwidth // 32
    return gl.allocate_shared_memory(gl.int32, [BUFFERS, WORDS], LINE)


@gluon.jit
def plane_ring(BUFFERS: gl.constexpr, T: gl.constexpr, DIM: gl.constexpr, MAIN: gl.constexpr, HIGH: gl.constexpr):
    """Shared-memory buffers of codes: of the main plane, and of the plane of high bits (or the main one again)."""
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    main = gl.allocate_shared_memory(gl.int32, [BUFFERS, T, DIM * MAIN // 32], ROWS)
    if HIGH:
        return main, gl.allocate_shared_memory(gl.int32, [BUFFERS, T, DIM // 32], ROWS)
    else:
        return main, main


@gluon.jit
def ring(BUFFERS: gl.constexpr, T: gl.constexpr, DIM: gl.constexpr, MAIN: gl.constexpr, HIGH: gl.constexpr, p_scale):
    """Shared-memory buffers of one side: `plane_ring`, and scales."""
    main, high = plane_ring(BUFFERS, T, DIM, MAIN, HIGH)
    return main, high, scale_ring(BUFFERS, T, p_scale)


@gluon.jit
def copy_side(buffers, stage, side, s, end, D: gl.constexpr, MAIN: gl.constexpr, HIGH: gl.constexpr, ROW: gl.constexpr,
              HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr, T: gl.constexpr):  # fmt: skip
    """Start copying a whole tile of one side; `side` is pointers to the planes and scales, then page strides."""
    copy_planes(buffers, stage, side, s, end, D, MAIN, HIGH, ROW, HIGH_ROW, table, PAGE)
    copy_line(buffers[2].index(stage), side[2], s, table, side[5], PAGE, T)


@gluon.jit
def copy_planes(buffers, stage, side, s, end, D: gl.constexpr, MAIN: gl.constexpr, HIGH: gl.constexpr,
                ROW: gl.constexpr, HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr):  # fmt: skip
    """The codes of `copy_side`."""
    words: gl.constexpr = gl.pointer_type(gl.int32)
    main = side[0].to(words, bitcast=True)
    copy_rows(buffers[0].index(stage), main, s, end, ROW // 4, D * MAIN // 32, table, side[3] // 4, PAGE)
    if HIGH:
        high = side[1].to(words, bitcast=True)
        copy_rows(buffers[1].index(stage), high, s, end, HIGH_ROW // 4, D // 32, table, side[4] // 4, PAGE)


@gluon.jit
def key_tile(buffers, stage, side, s, end, DIM: gl.constexpr, D: gl.constexpr, MAIN: gl.constexpr, HIGH: gl.constexpr,
             ROW: gl.constexpr, HIGH_ROW: gl.constexpr, SCALE_ROW: gl.constexpr, table, PAGE: gl.constexpr,
             T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """Words, words of high bits and scales of a tile of keys: from the ring, or the last tile from memory."""
    words, high = key_planes(buffers, stage, side, s, end, DIM, D, MAIN, HIGH, ROW, HIGH_ROW, table, PAGE, T, PARTIAL)
    if PARTIAL:
        return words, high, scale_of(load_rows(side[2], s, end, SCALE_ROW, table, side[5], PAGE, T, True))
    else:
        return words, high, scale_of(line_of(buffers[2].index(stage), side[2].dtype.element_ty, T))


@gluon.jit
def key_planes(buffers, stage, side, s, end, DIM: gl.constexpr, D: gl.constexpr, MAIN: gl.constexpr,
               HIGH: gl.constexpr, ROW: gl.constexpr, HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr,
               T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """The codes of `key_tile`; without high bits their words are the others again."""
    words = key_plane(buffers[0], stage, side[0], s, end, DIM * MAIN // 8, D * MAIN // 8, ROW, table, side[3], PAGE,
                      T, PARTIAL)  # fmt: skip
    high = words
    if HIGH:
        high = key_plane(buffers[1], stage, side[1], s, end, DIM // 8, D // 8, HIGH_ROW, table, side[4], PAGE, T,
                         PARTIAL)  # fmt: skip
    return words, high


@gluon.jit
def key_plane(buffer, stage, p, s, end, BYTES: gl.constexpr, REAL: gl.constexpr, ROW: gl.constexpr, table,
              page_stride, PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """One plane of a tile of keys: a lane reads a quarter of a row, in words or, if that is 2 bytes, in halves."""
    SIZE: gl.constexpr = 4 if BYTES >= 16 else 2
    PARTS: gl.constexpr = BYTES // SIZE
    part: gl.constexpr = gl.int32 if BYTES >= 16 else gl.uint16
    if PARTIAL:
        q = p.to(gl.pointer_type(part), bitcast=True)
        x = load_part(q, s, end, ROW // SIZE, PARTS, REAL // SIZE, key_layout(PARTS), table, page_stride // SIZE,
                      PAGE, T)  # fmt: skip
    else:
        x = parts_of(buffer.index(stage), part, PARTS).load(key_layout(PARTS))
    return key_words(x.to(gl.int32))


@gluon.jit
def value_plane(buffer, stage, p, s, end, BYTES: gl.constexpr, REAL: gl.constexpr, ROW: gl.constexpr, table,
                page_stride, PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """One plane of a tile of values: a lane reads an eighth of a row, in words or, if that is 2 bytes, in halves."""
    SIZE: gl.constexpr = 4 if BYTES >= 32 else 2
    PARTS: gl.constexpr = BYTES // SIZE
    L: gl.constexpr = value_layout(T, PARTS)
    part: gl.constexpr = gl.int32 if BYTES >= 32 else gl.uint16
    if PARTIAL:
        q = p.to(gl.pointer_type(part), bitcast=True)
        x = load_part(q, s, end, ROW // SIZE, PARTS, REAL // SIZE, L, table, page_stride // SIZE, PAGE, T)
    else:
        x = parts_of(buffer.index(stage), part, PARTS).load(L)
    return value_words(x)


@gluon.constexpr_function
def pairs_layout(tokens):
    """Of `[T, 4, 2]`: as `value_layout` of `[T, 8]`."""
    down = [[8, 0, 0], [16, 0, 0], [4, 0, 0], [32, 0, 0]][: tokens.bit_length() - 3]
    lanes = [[1, 0, 0], [2, 0, 0], [0, 0, 1], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout(down, lanes, [], [], [tokens, 4, 2])


@gluon.jit
def high_bytes(buffer, stage, p, s, end, REAL: gl.constexpr, ROW: gl.constexpr, table, page_stride,
               PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """High bits of values in rows of 64, of which a lane has 8: two lanes share 16, since these are shuffled.

    Coordinate 8 a + 2 b + c of 16 has place 4 b + 2 a + c: lane g reads what lane g ^ 1 reads, shifted by 2 (g % 2).
    """
    L: gl.constexpr = pairs_layout(T)
    H: gl.constexpr = gl.SliceLayout(2, L)
    if PARTIAL:
        q = p.to(gl.pointer_type(gl.uint16), bitcast=True)
        x = load_part(q, s, end, ROW // 2, 4, REAL // 2, H, table, page_stride // 2, PAGE, T)
    else:
        x = parts_of(buffer.index(stage), gl.uint16, 4).load(H)
    odd = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, L))), 0), 0)
    x = gl.reshape(gl.expand_dims(x.to(gl.int32), 2) >> (2 * odd), [T, 8])
    return value_words(gl.convert_layout(x, value_layout(T, 8), assert_trivial=True))


@gluon.jit
def value_tile(buffers, stage, side, s, end, DIM: gl.constexpr, D: gl.constexpr, MAIN: gl.constexpr,
               HIGH: gl.constexpr, ROW: gl.constexpr, HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr,
               T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """Words and words of high bits of a tile of values."""
    words = value_plane(
        buffers[0], stage, side[0], s, end, DIM * MAIN // 8, D * MAIN // 8, ROW, table, side[3], PAGE, T, PARTIAL
    )
    high = words
    if HIGH and DIM == 64:
        high = high_bytes(buffers[1], stage, side[1], s, end, D // 8, HIGH_ROW, table, side[4], PAGE, T, PARTIAL)
    elif HIGH:
        high = value_plane(
            buffers[1], stage, side[1], s, end, DIM // 8, D // 8, HIGH_ROW, table, side[4], PAGE, T, PARTIAL
        )
    return words, high


@gluon.jit
def value_scales(buffers, stage, side, s, end, SCALE_ROW: gl.constexpr, table, PAGE: gl.constexpr, T: gl.constexpr,
                 PARTIAL: gl.constexpr):  # fmt: skip
    """Scales of a tile of values."""
    if PARTIAL:
        return scale_of(load_rows(side[2], s, end, SCALE_ROW, table, side[5], PAGE, T, True))
    else:
        return scale_of(line_of(buffers[2].index(stage), side[2].dtype.element_ty, T))
