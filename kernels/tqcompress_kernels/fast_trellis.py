"""Trellis codes in `fast_kernel`: tables and tiles of strings in shared memory, on their way to `trellis_asm`.

Lane 4g + c reads quarter c of a row of keys and eighth g of one of values, and the words behind it that its windows
reach into; rows of 3-bit codes are no power of two long. So tiles are plain bytes, which the kernel addresses itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import trellis_asm
from .fast_operands import expand, four_times
from .fast_tiles import copy_line, line_of, load_rows, row_offsets, scale_of, value_layout, value_words


@gluon.constexpr_function
def row_bytes(kind, dim):
    return trellis_asm.parse(kind).bits * dim // 8


@gluon.constexpr_function
def in_shared_memory(kind):
    """Whether the kind's table is there."""
    return kind[0] == "w" and trellis_asm.parse(kind).copies > 0


@gluon.constexpr_function
def _table_bytes(kind):
    return trellis_asm.parse(kind).nbytes


@gluon.constexpr_function
def _table_name(kind):
    return trellis_asm.parse(kind).name


@gluon.constexpr_function
def _lane_bits(side, kind):
    """Bits of the part of a row that a lane reads in one go."""
    return trellis_asm.parse(kind).codes_of(side) * trellis_asm.parse(kind).bits


@gluon.constexpr_function
def _words(side, kind):
    return trellis_asm.parse(kind).words(side)


@gluon.constexpr_function
def _copy_text(name, size):
    cache = "cg" if size == 16 else "ca"
    return (
        f"{{ .reg .b32 a; mov.u32 a, {name}; add.u32 a, a, $1; "
        f"cp.async.{cache}.shared.global [a], [$2], {size}; mov.u32 $0, 0; }}"
    )


@gluon.constexpr_function
def _token_steps(side, tile):
    """How many tokens behind its first one those in a lane's other registers are: as the layouts of tiles have it."""
    bits = [8, 16, 32] if side == "key" else [8, 16, 4, 32]
    bits = bits[: tile.bit_length() - (4 if side == "key" else 3)]
    return [sum(bit for j, bit in enumerate(bits) if i >> j & 1) for i in range(1 << len(bits))]


@gluon.constexpr_function
def _load_text(name, steps, row):
    """Loads of all registers of a lane at fixed distances from the first one's address, the only input that is read."""
    loads = " ".join(f"ld.shared.b32 ${i}, [a + {step * row}];" for i, step in enumerate(steps))
    return f"{{ .reg .b32 a; mov.u32 a, {name}; add.u32 a, a, ${len(steps)}; {loads} }}"


@gluon.constexpr_function
def _load_constraints(steps):
    return ",".join(["=&r"] * len(steps) + ["r"] * len(steps))


@gluon.jit
def _lanes():
    return gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def declare(NAME: gl.constexpr, SIZE: gl.constexpr):
    """An array of `SIZE` bytes in shared memory, known by name from now on."""
    text: gl.constexpr = trellis_asm.declare(NAME, SIZE)
    gl.inline_asm_elementwise(text, "=r,r", (_lanes(),), dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _copy(NAME: gl.constexpr, offset, pointer, SIZE: gl.constexpr):
    """Start copying `SIZE` bytes a lane into an array."""
    text: gl.constexpr = _copy_text(NAME, SIZE)
    args = (offset, pointer.to(gl.int64))
    gl.inline_asm_elementwise(text, "=r,r,l", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_table(p, kind: gl.constexpr):
    """Start copying a table into shared memory: 16 bytes a lane at once, or 4 of a table that is smaller."""
    SIZE: gl.constexpr = 16 if _table_bytes(kind) >= 512 else 4
    declare(_table_name(kind), _table_bytes(kind))
    for i in gl.static_range((_table_bytes(kind) + 32 * SIZE - 1) // (32 * SIZE)):
        piece = _lanes() + 32 * i
        if _table_bytes(kind) < 32 * SIZE:
            piece = piece % (_table_bytes(kind) // SIZE)
        _copy(_table_name(kind), piece * SIZE, p + piece * (SIZE // 4), SIZE)


@gluon.jit
def warp_barrier():
    """What lanes wrote before it, all lanes see behind it."""
    TEXT: gl.constexpr = "bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(TEXT, "=r,r", (_lanes(),), dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_strings(kind: gl.constexpr, NAME: gl.constexpr, lines, stage, side, s, D: gl.constexpr, ROW: gl.constexpr,
                 table, PAGE: gl.constexpr, T: gl.constexpr, SIZE: gl.constexpr):  # fmt: skip
    """Start copying a whole tile of one side, `SIZE` bytes a lane at once; `side` as `copy_side` takes it."""
    BYTES: gl.constexpr = row_bytes(kind, D)
    PIECES: gl.constexpr = BYTES // SIZE
    p = side[0].to(gl.pointer_type(gl.int32), bitcast=True)
    p += row_offsets(s, 0, ROW // 4, table, side[3] // 4, PAGE)
    for i in gl.static_range(T * PIECES // 32):
        piece = _lanes() + 32 * i
        word = piece * (SIZE // 4) if ROW == BYTES else piece // PIECES * (ROW // 4) + piece % PIECES * (SIZE // 4)
        _copy(NAME, stage * (T * BYTES) + piece * SIZE, p + word, SIZE)
    copy_line(lines.index(stage), side[2], s, table, side[5], PAGE, T)


@gluon.jit
def _load(which: gl.constexpr, kind: gl.constexpr, NAME: gl.constexpr, stage, p, s, end, t, word, D: gl.constexpr,
          ROW: gl.constexpr, table, page_stride, PAGE: gl.constexpr, T: gl.constexpr,
          PARTIAL: gl.constexpr):  # fmt: skip
    """Words `word` (a row) of the tokens `s + t` (a column): from shared memory, or the last tile from global memory
    with zeros beyond `end`."""
    if PARTIAL:
        offsets = row_offsets(s, t, ROW // 4, table, page_stride // 4, PAGE)[:, None] + word[None, :]
        p = p.to(gl.pointer_type(gl.int32), bitcast=True)
        return gl.load(p + offsets, mask=(s + t < end)[:, None] & (word >= 0)[None, :], other=0)
    else:
        BYTES: gl.constexpr = row_bytes(kind, D)
        STEPS: gl.constexpr = _token_steps(which, T)
        text: gl.constexpr = _load_text(NAME, STEPS, BYTES)
        inputs: gl.constexpr = _load_constraints(STEPS)
        offset = (t * BYTES)[:, None] + (stage * (T * BYTES) + word * 4)[None, :]
        return gl.inline_asm_elementwise(text, inputs, (offset,), dtype=gl.int32, is_pure=False, pack=len(STEPS))


@gluon.jit
def _shifted(low, high, by):
    """The 32 bits from bit `by` of `low` on."""
    TEXT: gl.constexpr = "shf.r.wrap.b32 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(TEXT, "=r,r,r,r", (low, high, by), dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _strings(which: gl.constexpr, kind: gl.constexpr, NAME: gl.constexpr, stage, side, s, end, t, part, u: gl.constexpr,
             U: gl.constexpr, D: gl.constexpr, ROW: gl.constexpr, table, PAGE: gl.constexpr, T: gl.constexpr,
             PARTIAL: gl.constexpr):  # fmt: skip
    """Words of the u-th of U strings of each lane, whose part of a row is `part`."""
    BITS: gl.constexpr = _lane_bits(which, kind)
    COUNT: gl.constexpr = _words(which, kind)
    EXTRA: gl.constexpr = 1 if BITS % 32 else 0  # parts that may begin in mid-word
    first = (part * U + u) * BITS
    loaded = ()
    for k in gl.static_range(COUNT + EXTRA):
        word = (first // 32 + k) % (row_bytes(kind, D) // 4)
        loaded = loaded + (
            _load(which, kind, NAME, stage, side[0], s, end, t, word, D, ROW, table, side[3], PAGE, T, PARTIAL),
        )
    out = ()
    for k in gl.static_range(COUNT):
        x = loaded[k]
        if EXTRA:
            x = _shifted(x, loaded[k + 1], (first % 32)[None, :] + gl.zeros_like(x))
        out = out + (x,)
    return out


@gluon.jit
def key_strings(kind: gl.constexpr, NAME: gl.constexpr, stage, side, s, end, D: gl.constexpr, ROW: gl.constexpr, table,
                PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """Of a tile of keys `[T, 4]`, the words of each lane's strings, one string after another."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    t = gl.arange(0, T, gl.SliceLayout(1, L))
    c = gl.arange(0, 4, gl.SliceLayout(0, L))
    U: gl.constexpr = row_bytes(kind, D) * 8 // 4 // _lane_bits("key", kind)
    out = ()
    for u in gl.static_range(U):
        out = out + _strings("key", kind, NAME, stage, side, s, end, t, c, u, U, D, ROW, table, PAGE, T, PARTIAL)
    return out


@gluon.jit
def value_strings(kind: gl.constexpr, NAME: gl.constexpr, stage, side, s, end, D: gl.constexpr, ROW: gl.constexpr,
                  table, PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """Of a tile of values, the words of each lane's strings as `[8, T]` tensors."""
    L: gl.constexpr = value_layout(T, 8)
    t = gl.arange(0, T, gl.SliceLayout(1, L))
    g = gl.arange(0, 8, gl.SliceLayout(0, L))
    U: gl.constexpr = row_bytes(kind, D) * 8 // 8 // _lane_bits("value", kind)
    out = ()
    for u in gl.static_range(U):
        x = _strings("value", kind, NAME, stage, side, s, end, t, g, u, U, D, ROW, table, PAGE, T, PARTIAL)
        for k in gl.static_range(len(x)):
            out = out + value_words(x[k])
    return out


@gluon.jit
def string_scales(lines, stage, side, s, end, SCALE_ROW: gl.constexpr, table, PAGE: gl.constexpr, T: gl.constexpr,
                  PARTIAL: gl.constexpr):  # fmt: skip
    """Scales of a tile of either side."""
    if PARTIAL:
        return scale_of(load_rows(side[2], s, end, SCALE_ROW, table, side[5], PAGE, T, True))
    else:
        return scale_of(line_of(lines.index(stage), side[2].dtype.element_ty, T))


@gluon.jit
def _expand(side: gl.constexpr, kind: gl.constexpr, args, tables):
    """`expand` with the lane's copy of the table, or a table in registers, behind the words."""
    L: gl.constexpr = args[0].type.layout
    for i in gl.static_range(len(tables)):
        args = args + (gl.convert_layout(tables[i], L, assert_trivial=True),)
    return expand(side, kind, 0, args)


@gluon.jit
def trellis_key_operands(kind: gl.constexpr, strings, tables):
    """Half operands `[T, 16]` int8 of all strings of a tile."""
    COUNT: gl.constexpr = _words("key", kind)
    out = ()
    for u in gl.static_range(len(strings) // COUNT):
        args = ()
        for k in gl.static_range(COUNT):
            args = args + (four_times(strings[u * COUNT + k]),)
        out = out + _expand("key", kind, args, tables)
    return out


@gluon.jit
def trellis_value_operands(kind: gl.constexpr, strings, u: gl.constexpr, tables):
    """Operands of 4 tokens' coordinates: int8 `[8, T]`, one or two for each of the coordinates of strings `u`."""
    COUNT: gl.constexpr = _words("value", kind)
    args = ()
    for k in gl.static_range(COUNT):
        args = args + (strings[u * COUNT + k],)
    return _expand("value", kind, args, tables)
