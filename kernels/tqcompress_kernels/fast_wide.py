"""The first coordinates of vectors in `fast_kernel`, where they have more bits than the rest: codes of their own.

A side of them is what the launch makes of `Packed.wide`: `(main plane, plane of high bits, table of levels, unit, page
and head strides of both planes)`, and as constants `(kind, coordinates, coordinates of its tile, bytes between rows of
both planes)`. The scales are those of the other coordinates.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fast_operands import code_bits, key_operands, main_bits
from .fast_tiles import copy_planes, key_planes, plane_ring, value_tile


@gluon.jit
def wide_rows(wide, first, h):
    """Pointers and strides as `copy_side` takes them; those of the scales stand for nothing."""
    return (
        wide[0] + first * wide[4] + h * wide[5],
        wide[1] + first * wide[6] + h * wide[7],
        wide[0],
        wide[4],
        wide[6],
        wide[4],
    )


@gluon.jit
def wide_ring(KIND: gl.constexpr, BUFFERS: gl.constexpr, T: gl.constexpr, DIM: gl.constexpr):
    """Its buffers."""
    return plane_ring(BUFFERS, T, DIM, main_bits(KIND), code_bits(KIND) == 3)


@gluon.jit
def copy_wide(KIND: gl.constexpr, buffers, stage, rows, s, end, D: gl.constexpr, ROW: gl.constexpr,
              HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr):  # fmt: skip
    """Start copying a whole tile."""
    bits: gl.constexpr = main_bits(KIND)
    copy_planes(buffers, stage, rows, s, end, D, bits, code_bits(KIND) == 3, ROW, HIGH_ROW, table, PAGE)


@gluon.jit
def wide_key_operands(KIND: gl.constexpr, buffers, stage, rows, s, end, DIM: gl.constexpr, D: gl.constexpr,
                      ROW: gl.constexpr, HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr, T: gl.constexpr,
                      PARTIAL: gl.constexpr, tables):  # fmt: skip
    """The operands of a tile of keys."""
    words, high = key_planes(
        buffers, stage, rows, s, end, DIM, D, main_bits(KIND), code_bits(KIND) == 3, ROW, HIGH_ROW, table, PAGE, T,
        PARTIAL,
    )  # fmt: skip
    return key_operands(KIND, words, high, tables)


@gluon.jit
def wide_value_words(KIND: gl.constexpr, buffers, stage, rows, s, end, DIM: gl.constexpr, D: gl.constexpr,
                     ROW: gl.constexpr, HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr, T: gl.constexpr,
                     PARTIAL: gl.constexpr):  # fmt: skip
    """Words and words of high bits of a tile of values."""
    bits: gl.constexpr = main_bits(KIND)
    return value_tile(
        buffers, stage, rows, s, end, DIM, D, bits, code_bits(KIND) == 3, ROW, HIGH_ROW, table, PAGE, T, PARTIAL
    )
