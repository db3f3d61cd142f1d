"""Codes as int8 tensor-core operands, and the fixed-point query that meets them. See `fast_kernel`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import fast_asm, trellis_asm

LIMIT = gl.constexpr(32000.0)  # of the fixed-point numbers: 125 * 256, so that no high byte overflows

# Kinds: "u" uniform levels read by masks, "t" a table of levels, "h" one for rows of 64 values; then the bits. "w",
# trellis codes: `trellis_asm.Kind`.
PLANS = gl.constexpr({"key": fast_asm.key_plans(), "value": fast_asm.value_plans()})


@gluon.constexpr_function
def plan(side, kind, entry):
    """An entry of a kind's `fast_asm.Plan`."""
    return getattr(trellis_asm.plan(side, kind) if kind[0] == "w" else PLANS.value[side][kind], entry)


@gluon.constexpr_function
def text_of(side, kind, odd):
    text = plan(side, kind, "text")
    return text[odd] if isinstance(text, tuple) else text


@gluon.constexpr_function
def code_bits(kind):
    return int(kind[1])


@gluon.constexpr_function
def is_uniform(kind):
    return kind[0] == "u"


@gluon.constexpr_function
def is_trellis(kind):
    return kind[0] == "w"


@gluon.constexpr_function
def word_count(side, kind, dim):
    """Words a lane has of a row in the main plane, or what stands for words: `plan`'s codes at once."""
    if kind[0] == "w":
        return dim // 4 // trellis_asm.parse(kind).codes
    return dim * main_bits(kind) // 128 if side == "key" else dim // 8 // plan(side, kind, "codes")


@gluon.constexpr_function
def main_bits(kind):
    """Bits of a code in the main plane; 3-bit codes have their high bits in a plane of their own."""
    return 2 if kind[1] == "3" else int(kind[1])


@gluon.constexpr_function
def key_shift(kind, o):
    """The factor with which operand `o` holds its codes."""
    bits = int(kind[1])
    return float(1 << (o % (8 // bits) * bits % 4)) if kind[0] == "u" and bits < 4 else 1.0


@gluon.constexpr_function
def two_lookups(kind):
    """Whether a value is the sum of two operands."""
    return kind == "t4" or (kind[0] == "w" and trellis_asm.parse(kind).copies == 0)


@gluon.constexpr_function
def _coordinate(kind, j, r):
    return trellis_asm.key_coordinates(kind)[j][r]


@gluon.jit
def key_code(kind: gl.constexpr, o: gl.constexpr, c, r, WORDS: gl.constexpr):
    """The coordinate in byte `r` of lane quarter `c` of operand `o`, counted over all words of a quarter row."""
    j: gl.constexpr = o % plan("key", kind, "operands")
    first = (c * WORDS + o // plan("key", kind, "operands")) * plan("key", kind, "codes")
    if kind == "t4":
        return first + 4 * (j // 2) + r
    elif kind[0] == "w":
        low = gl.where(r == 0, _coordinate(kind, j, 0), _coordinate(kind, j, 1))
        return first + gl.where(r < 2, low, gl.where(r == 2, _coordinate(kind, j, 2), _coordinate(kind, j, 3)))
    elif kind[0] == "t":
        return first + 2 * (4 * (j % 2) + r) + j // 2
    else:
        return first + (8 // code_bits(kind)) * r + j


@gluon.constexpr_function
def value_rows(kind, i):
    """Of accumulator `i` of a word: the codes of its upper and lower 8 rows, their shift, and the zero point."""
    bits = int(kind[1])
    if kind[0] in "thw":
        return 2 * i, 2 * i + 1, 0, 0
    if bits == 8:
        return 2 * i, 2 * i + 1, 0, 128
    count, size = 8 // bits, 2 if bits == 1 else 4
    j, byte = 2 * i // size, 2 * i % size
    return byte * count + j, (byte + 1) * count + j, j * bits, (1 << (bits - 1) if j == count - 1 else 0)


@gluon.jit
def join_fixed(x):
    """`[rows, 2C]` int32 products with high and low bytes -> float32 `[rows, C]`."""
    high, low = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def side_by_side(a, b, dim: gl.constexpr):
    """Two half operands as one, along `dim`."""
    both = gl.join(a, b)
    if dim == 0:
        return gl.reshape(gl.permute(both, [2, 0, 1]), [2 * a.shape[0], a.shape[1]])
    else:
        return gl.reshape(gl.permute(both, [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@gluon.jit
def lane_table(p):
    """A word that every lane loads for itself, `[8, 4]`: from one address it would become a uniform register, which
    `prmt` cannot read."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    return gl.load(
        p + gl.arange(0, 8, gl.SliceLayout(1, L))[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, L))[None, :]
    )


@gluon.jit
def key_table(p, T: gl.constexpr):
    """The same for every element of a key word, `[T, 16]`."""
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [1, 1, 1, 1], [3, 2, 1, 0])
    x = gl.convert_layout(lane_table(p), gl.SliceLayout(0, gl.SliceLayout(3, L)), assert_trivial=True)
    x = gl.expand_dims(gl.expand_dims(x, 0), 3) + gl.zeros([T // 8, 8, 4, 4], gl.int32, L)
    return gl.reshape(x, [T, 16])


@gluon.jit
def value_table(p, T: gl.constexpr):
    """The same for every element of a value word, `[8, T]`."""
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [8, 1, 4, 1], [1, 1, 1, 1], [3, 2, 1, 0])
    x = gl.convert_layout(lane_table(p), gl.SliceLayout(1, gl.SliceLayout(3, L)), assert_trivial=True)
    x = gl.expand_dims(gl.expand_dims(x, 1), 3) + gl.zeros([8, T // 16, 4, 4], gl.int32, L)
    return gl.reshape(x, [8, T])


@gluon.jit
def key_tables(p, kind: gl.constexpr, T: gl.constexpr):
    """All words of the table of a kind of keys."""
    tables = ()
    for i in gl.static_range(plan("key", kind, "tables")):
        tables = tables + (key_table(p + 32 * i, T),)
    return tables


@gluon.jit
def value_tables(p, kind: gl.constexpr, T: gl.constexpr):
    """All words of the table of a kind of values."""
    tables = ()
    for i in gl.static_range(plan("value", kind, "tables")):
        tables = tables + (value_table(p + 32 * i, T),)
    return tables


@gluon.jit
def arguments(kind: gl.constexpr, word, high, tables):
    """What the assembly of a kind reads, all in the layout of `word`."""
    L: gl.constexpr = word.type.layout
    args = (word,)
    if code_bits(kind) == 3:
        args = args + (gl.convert_layout(high, L, assert_trivial=True),)
    for i in gl.static_range(len(tables)):
        args = args + (gl.convert_layout(tables[i], L, assert_trivial=True),)
    return args


@gluon.jit
def expand(side: gl.constexpr, kind: gl.constexpr, odd: gl.constexpr, args):
    """Run the assembly of a kind: a tuple of int8 tensors."""
    text: gl.constexpr = text_of(side, kind, odd)
    constraints: gl.constexpr = plan(side, kind, "constraints")
    if plan(side, kind, "operands") == 1:
        return (gl.inline_asm_elementwise(text, constraints, args, dtype=gl.int8, is_pure=True, pack=4),)
    else:
        types: gl.constexpr = (gl.int8,) * plan(side, kind, "operands")
        return gl.inline_asm_elementwise(text, constraints, args, dtype=types, is_pure=True, pack=4)


@gluon.jit
def four_times(word):
    """Each word `[T, 4]` for the four bytes that its assembly returns at once, `[T, 16]`."""
    T: gl.constexpr = word.shape[0]
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [1, 1, 1], [2, 1, 0])
    x = gl.expand_dims(gl.convert_layout(word, gl.SliceLayout(2, L), assert_trivial=True), 2)
    return gl.reshape(x + gl.zeros([T, 4, 4], gl.int32, L), [T, 16])


@gluon.jit
def key_operands(kind: gl.constexpr, words, high, tables):
    """Half operands `[T, 16]` int8 of all words of a tile of keys."""
    out = ()
    for u in gl.static_range(len(words)):
        out = out + expand("key", kind, u % 2, arguments(kind, four_times(words[u]), four_times(high[u // 2]), tables))
    return out


@gluon.jit
def half_words(x, COUNT: gl.constexpr):
    """`COUNT` words of which the low 16 bits count, from as many or half as many."""
    if len(x) == COUNT:
        return x
    else:
        out = ()
        for u in gl.static_range(COUNT // 2):
            out = out + (x[u], x[u] >> 16)
        return out


@gluon.jit
def fixed_bytes(x, low):
    """The high (low = 0) or low (low = 1) byte of integers held in float32, both signed."""
    n = x.to(gl.int32)
    high = (n + 128) >> 8
    return gl.where(low == 0, high, n - (high << 8)).to(gl.int8)


@gluon.jit
def query_operands(p, kind: gl.constexpr, WORDS: gl.constexpr, D: gl.constexpr, ALL: gl.constexpr,
                   COLUMNS: gl.constexpr, N: gl.constexpr, B8: gl.constexpr):  # fmt: skip
    """Fixed-point query operands `[32, N]` of every pair of key operands, each column's largest number `[N]`, and
    the sum over coordinates of what multiplies a code of 1; of the first `D` of `ALL` coordinates of each query."""
    n = gl.arange(0, N, gl.SliceLayout(0, B8))
    k = gl.arange(0, 32, gl.SliceLayout(1, B8))
    head = (n // 2)[None, :]
    d = gl.arange(0, 4 * WORDS * plan("key", kind, "codes"), gl.SliceLayout(1, B8))[:, None]
    top = gl.max(gl.abs(gl.load(p + head * ALL + d, mask=(d < D) & (head < COLUMNS), other=0.0)), 0)
    top = gl.maximum(top, 1e-30)
    fix = (LIMIT / top)[None, :]
    total = gl.zeros([N], gl.float32, gl.SliceLayout(0, B8))
    out = ()
    for pair in gl.static_range(WORDS * plan("key", kind, "operands") // 2):
        code = gl.where(
            k < 16,
            key_code(kind, 2 * pair, (k % 16) // 4, k % 4, WORDS),
            key_code(kind, 2 * pair + 1, (k % 16) // 4, k % 4, WORDS),
        )
        shift = gl.where(k < 16, key_shift(kind, 2 * pair), key_shift(kind, 2 * pair + 1))[:, None]
        x = gl.load(p + head * ALL + code[:, None], mask=(code < D)[:, None] & (head < COLUMNS), other=0.0)
        x = gl.floor(x * fix / shift + 0.5)
        total += gl.sum(x * shift, 0)
        out = out + (fixed_bytes(x, (n % 2)[None, :]),)
    return out, top, total


@gluon.jit
def per_head(x, layout: gl.constexpr):
    """`[2C]` with equal neighbours -> `[C]`."""
    x = gl.convert_layout(x, gl.BlockedLayout([2], [32], [1], [0]))
    even, _ = gl.split(gl.reshape(x, [x.shape[0] // 2, 2]))
    return gl.convert_layout(even, layout)


@gluon.jit
def zero_point(total, kind: gl.constexpr, layout: gl.constexpr):
    """What is too much in the products of uniform keys, which are the code, for 8 bits less 128."""
    bits: gl.constexpr = code_bits(kind)
    return per_head(total, layout) * (0.5 * ((1 << bits) - 1) - (128 if bits == 8 else 0))


@gluon.jit
def store_rows(p, acc, i: gl.constexpr, scale, weight, VALUE: gl.constexpr, WORDS: gl.constexpr, D: gl.constexpr, ok):
    """Bring accumulator `i` to true levels and store it."""
    bits: gl.constexpr = code_bits(VALUE)
    OUTS: gl.constexpr = plan("value", VALUE, "codes") // 2
    info: gl.constexpr = value_rows(VALUE, i % OUTS)
    r = gl.arange(0, 16, gl.SliceLayout(1, acc.type.layout))
    code = ((r % 8) * WORDS + i // OUTS) * plan("value", VALUE, "codes") + gl.where(r < 8, info[0], info[1])
    out = acc * (scale * (1.0 / (1 << info[2])))
    if is_uniform(VALUE):
        out = out + weight * (info[3] - 0.5 * ((1 << bits) - 1))
    gl.store(p + code[:, None], out, mask=(code < D)[:, None] & ok)
