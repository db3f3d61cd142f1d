"""Trellis codes in `fast_kernel`: the table in shared memory, and strings on their way to `trellis_asm`.

Strings go from global memory straight into registers, since a lane's windows reach into the next lane's words and rows
of 3-bit codes are no power of two long. Lane 4g + c reads quarter c of a row of keys and eighth g of one of values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import trellis_asm
from .fast_operands import expand, four_times
from .fast_tiles import row_offsets, value_layout, value_words


@gluon.constexpr_function
def _bits(kind):
    return trellis_asm.parse(kind).bits


@gluon.constexpr_function
def _words(kind, codes):
    return trellis_asm.parse(kind).words(codes)


@gluon.constexpr_function
def _table_words(kind):
    return trellis_asm.parse(kind).entries * trellis_asm.parse(kind).copies


@gluon.jit
def load_table(p, kind: gl.constexpr, CLAIM: gl.constexpr):
    """Start copying a table into shared memory: 16 bytes a lane at once, or 4 of a table that is smaller."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, L)
    text: gl.constexpr = trellis_asm.declare(kind, CLAIM)
    address = gl.inline_asm_elementwise(text, "=r,r", (lane,), dtype=gl.int32, is_pure=False, pack=1)
    SIZE: gl.constexpr = 4 if _table_words(kind) >= 128 else 1
    COPY: gl.constexpr = (
        "cp.async.cg.shared.global [$1], [$2], 16; mov.u32 $0, 0;"
        if SIZE == 4
        else "cp.async.ca.shared.global [$1], [$2], 4; mov.u32 $0, 0;"
    )
    for i in range(0, _table_words(kind), 32 * SIZE):
        word = i + lane * SIZE
        source = (p + word).to(gl.int64)
        gl.inline_asm_elementwise(COPY, "=r,r,l", (address + 4 * word, source), dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_tables():
    """Wait until the tables are there, for all lanes."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    WAIT: gl.constexpr = "cp.async.wait_all; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(WAIT, "=r,r", (lane,), dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load(p, s, end, t, word, ROW: gl.constexpr, table, page_stride, PAGE: gl.constexpr, PARTIAL: gl.constexpr):
    """Words `word` (a row) of the rows of tokens `s + t` (a column), zeros beyond `end` if `PARTIAL`."""
    offsets = row_offsets(s, t, ROW, table, page_stride, PAGE)[:, None] + word[None, :]
    if PARTIAL:
        return gl.load(p + offsets, mask=(s + t < end)[:, None] & (word >= 0)[None, :], other=0)
    else:
        return gl.load(p + offsets)


@gluon.jit
def key_strings(kind: gl.constexpr, p, s, end, D: gl.constexpr, ROW: gl.constexpr, table, page_stride,
                PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """Of a tile of keys `[T, 4]`, each quarter's words, those behind it included; 32 coordinates after another."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    t = gl.arange(0, T, gl.SliceLayout(1, L))
    c = gl.arange(0, 4, gl.SliceLayout(0, L))
    words: gl.constexpr = _bits(kind) * D // 32
    p = p.to(gl.pointer_type(gl.int32), bitcast=True)
    out = ()
    for u in gl.static_range(D // 128):
        for k in gl.static_range(_words(kind, 32)):
            word = ((c * (D // 128) + u) * _bits(kind) + k) % words
            out = out + (_load(p, s, end, t, word, ROW // 4, table, page_stride // 4, PAGE, PARTIAL),)
    return out


@gluon.jit
def _expand(side: gl.constexpr, kind: gl.constexpr, args, lane_copy):
    """`expand` with the lane's copy of the table behind the words."""
    L: gl.constexpr = args[0].type.layout
    return expand(side, kind, 0, args + (gl.convert_layout(lane_copy, L, assert_trivial=True),))


@gluon.jit
def trellis_key_operands(kind: gl.constexpr, strings, lane_copy):
    """Half operands `[T, 16]` int8 of all strings of a tile."""
    COUNT: gl.constexpr = _words(kind, 32)
    out = ()
    for u in gl.static_range(len(strings) // COUNT):
        args = ()
        for k in gl.static_range(COUNT):
            args = args + (four_times(strings[u * COUNT + k]),)
        out = out + _expand("key", kind, args, lane_copy)
    return out


@gluon.jit
def _shifted(low, high, by):
    """The 32 bits from bit `by` of `low` on."""
    TEXT: gl.constexpr = "shf.r.wrap.b32 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(TEXT, "=r,r,r,r", (low, high, by), dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def value_strings(kind: gl.constexpr, p, s, end, D: gl.constexpr, ROW: gl.constexpr, table, page_stride,
                  PAGE: gl.constexpr, T: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    """Of a tile of values, each eighth's words as `[8, T]` tensors; 16 coordinates after another."""
    L: gl.constexpr = value_layout(T, 8)
    t = gl.arange(0, T, gl.SliceLayout(1, L))
    g = gl.arange(0, 8, gl.SliceLayout(0, L))
    words: gl.constexpr = _bits(kind) * D // 32
    COUNT: gl.constexpr = _words(kind, 16)
    p = p.to(gl.pointer_type(gl.int32), bitcast=True)
    out = ()
    for u in gl.static_range(D // 128):
        first = (g * (D // 128) + u) * (16 * _bits(kind))
        loaded = ()
        for k in gl.static_range(COUNT + _bits(kind) % 2):  # an odd number of bits: eighths begin in mid-word
            word = (first // 32 + k) % words
            loaded = loaded + (_load(p, s, end, t, word, ROW // 4, table, page_stride // 4, PAGE, PARTIAL),)
        for k in gl.static_range(COUNT):
            x = loaded[k]
            if _bits(kind) % 2:
                x = _shifted(x, loaded[k + 1], (first % 32)[None, :] + gl.zeros_like(x))
            out = out + value_words(x)
    return out


@gluon.jit
def trellis_value_operands(kind: gl.constexpr, strings, u: gl.constexpr, lane_copy):
    """Operands of 4 tokens' coordinates: int8 `[8, T]`, one for each of the 16 coordinates of strings `u`."""
    COUNT: gl.constexpr = _words(kind, 16)
    args = ()
    for k in gl.static_range(COUNT):
        args = args + (strings[u * COUNT + k],)
    return _expand("value", kind, args, lane_copy)
