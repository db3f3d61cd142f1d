"""Products of a tile on int8 tensor cores: of keys and queries, of values and weights. See `fast_kernel`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fast_operands import (
    arguments,
    code_bits,
    expand,
    half_words,
    is_trellis,
    join_fixed,
    plan,
    side_by_side,
    store_rows,
    two_lookups,
)
from .fast_trellis import trellis_value_operands


@gluon.jit
def key_products(operands, queries, T: gl.constexpr, N: gl.constexpr, A8: gl.constexpr, MMA: gl.constexpr):
    """The products of keys and queries, float32 `[T, N // 2]`."""
    S = gl.zeros([T, N], gl.int32, MMA)
    for i in gl.static_range(len(operands) // 2):
        a = side_by_side(operands[2 * i], operands[2 * i + 1], 1)
        S = mma_v2(gl.convert_layout(a, A8, assert_trivial=True), queries[i], S)
    return join_fixed(S)


@gluon.jit
def value_product(VALUE: gl.constexpr, o, i: gl.constexpr, P, A8: gl.constexpr, MMA: gl.constexpr):
    """Accumulator `i` of a word for this tile: the operands of two codes times the weights."""
    r = gl.zeros([16, P.shape[1]], gl.int32, MMA)
    if two_lookups(VALUE):
        a = gl.convert_layout(side_by_side(o[4 * i], o[4 * i + 2], 0), A8, assert_trivial=True)
        r = mma_v2(a, P, r)
        a = gl.convert_layout(side_by_side(o[4 * i + 1], o[4 * i + 3], 0), A8, assert_trivial=True)
        return mma_v2(a, P, r)
    else:
        a = gl.convert_layout(side_by_side(o[2 * i], o[2 * i + 1], 0), A8, assert_trivial=True)
        return mma_v2(a, P, r)


@gluon.jit
def add_values(VALUE: gl.constexpr, WORDS: gl.constexpr, words, high, tables, acc, P, shrink, grow, A8: gl.constexpr,
               MMA: gl.constexpr):  # fmt: skip
    """The accumulators after a tile, of which `words` are the words, or strings of trellis codes."""
    OUTS: gl.constexpr = plan("value", VALUE, "codes") // 2  # accumulators a word
    if not is_trellis(VALUE):
        if code_bits(VALUE) == 1:
            words = half_words(words, WORDS)
        high = half_words(high, WORDS) if code_bits(VALUE) == 3 else words
    new = ()
    for u in gl.static_range(WORDS):
        if is_trellis(VALUE):
            o = trellis_value_operands(VALUE, words, u, tables)
        else:
            o = expand("value", VALUE, 0, arguments(VALUE, words[u], high[u], tables))
        for i in gl.static_range(OUTS):
            r = value_product(VALUE, o, i, P, A8, MMA)
            new = new + (acc[OUTS * u + i] * shrink + join_fixed(r) * grow,)
    return new


@gluon.jit
def no_values(COUNT: gl.constexpr, C: gl.constexpr, L: gl.constexpr):
    """`COUNT` accumulators."""
    acc = ()
    for _ in gl.static_range(COUNT):
        acc = acc + (gl.zeros([16, C], gl.float32, L),)
    return acc


@gluon.jit
def store_values(p, acc, scale, weight, VALUE: gl.constexpr, WORDS: gl.constexpr, D: gl.constexpr, ok):
    """All accumulators, `store_rows` each."""
    for i in gl.static_range(len(acc)):
        store_rows(p, acc[i], i, scale, weight, VALUE, WORDS, D, ok)
