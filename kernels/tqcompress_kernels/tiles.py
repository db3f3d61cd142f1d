"""Triton functions that turn stored bits into fp16 tensor-core operands, two coordinates a 32-bit word.

A tile of words has the coordinates or tokens that a dot sums over on its last axis. A word holds `PER`
consecutive coordinates of one plane (word i: coordinates i * PER ...), so sub-plane j, the coordinates
i * PER + j of all words, is one dot operand. `pair_words` puts 16 bits of two neighbouring words next to each
other; everything after it works on both at once, and `unpair` takes the halves apart again, which costs nothing
where the two belong into the same register of the tensor core.

Scalars that take part are tensors of shape [1, 1]: the compiler then keeps the whole chain in the layout of the
tensor core (it moves the change of layout to the loads only if all other leaves are constants or loads).
"""

import triton
import triton.language as tl

# The ways to turn codes into levels.
AFFINE = tl.constexpr(0)  # equally spaced symmetric levels: an OR and a subtraction
SELECT = tl.constexpr(1)  # symmetric levels of 2 bits: integer arithmetic on two fp16 patterns at once
SHUFFLE = tl.constexpr(2)  # up to 5 bits: the lanes of a warp hold the table, a shuffle reads it
LOAD = tl.constexpr(3)  # any levels: loads from the table


@triton.jit
def load_words(
    p_plane, stride, o_block, i_row, i_word, m_load, AXIS: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr
):
    """Words of `BITS` bits of the rows at `o_block + i_row * stride` bytes: `[rows, words]`, or `[words, rows]` for AXIS 1.

    `BYTES`: bytes that one load may take; 1 where rows are not aligned.
    """
    SIZE: tl.constexpr = (BITS + 7) // 8
    rows, words = tl.expand_dims(i_row, 1 - AXIS), tl.expand_dims(i_word, AXIS)
    if BITS == 4:  # a byte serves two words
        x = tl.load(p_plane + o_block + (rows * stride + words // 2), mask=m_load, other=0)
        return (x >> (words % 2 * 4).to(tl.uint8)) & 15
    elif BYTES == SIZE:
        dtype: tl.constexpr = (
            tl.uint8 if SIZE == 1 else tl.uint16 if SIZE == 2 else tl.uint32 if SIZE == 4 else tl.uint64
        )
        p_word = p_plane.to(tl.pointer_type(dtype))
        return tl.load(p_word + o_block // SIZE + (rows * (stride // SIZE) + words), mask=m_load, other=0)
    else:
        wide: tl.constexpr = tl.uint64 if SIZE == 8 else tl.uint32
        p_byte = p_plane + o_block + (rows * stride + words * SIZE)
        x = tl.load(p_byte, mask=m_load, other=0).to(wide)
        for b in tl.static_range(1, SIZE):
            x |= tl.load(p_byte + b, mask=m_load, other=0).to(wide) << (8 * b)
        return x


@triton.jit
def load_high_words(p_plane, stride, o_block, i_row, i_word, m_load, AXIS: tl.constexpr, PER: tl.constexpr):
    """As `load_words` for the high bits of 3-bit codes, `PER` = 4 or 8 of them, brought into their order.

    They are stored 16 at a time, coordinate 8 a + 2 b + c in place 4 b + 2 a + c.
    """
    rows, words = tl.expand_dims(i_row, 1 - AXIS), tl.expand_dims(i_word, AXIS)
    p_byte = p_plane + o_block + (rows * stride + words * PER // 16 * 2)
    x = tl.load(p_byte, mask=m_load, other=0).to(tl.uint32) | (
        tl.load(p_byte + 1, mask=m_load, other=0).to(tl.uint32) << 8
    )
    x = (x >> (words * PER // 8 % 2 * 2).to(tl.uint32)) & 0x3333
    x = (x | (x >> 2)) & 0x0F0F
    x = (x | (x >> 4)) & 0xFF
    if PER == 4:
        x = (x >> (words % 2 * 4).to(tl.uint32)) & 15
    return x.to(tl.uint8)


@triton.jit
def pair_words(x, HALF: tl.constexpr, BITS: tl.constexpr):
    """Bits 16 * HALF ... of the words 2i and 2i + 1 of the last axis, in the low and high half of a uint32."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    if BITS <= 16:
        return even.to(tl.uint32) | (odd.to(tl.uint32) << 16)
    even, odd = (even >> (16 * HALF)).to(tl.uint32), (odd >> (16 * HALF)).to(tl.uint32)
    return (even & 0xFFFF) | (odd << 16)


@triton.jit
def pair_planes(words, BITS: tl.constexpr, PER: tl.constexpr):
    """`pair_words` of all bits of all planes: a tuple of tuples."""
    WIDTHS: tl.constexpr = widths(BITS)
    planes = ()
    for k in tl.static_range(len(WIDTHS)):
        pairs = ()
        for h in tl.static_range((WIDTHS[k] * PER + 15) // 16):
            pairs = pairs + (pair_words(words[k], h, WIDTHS[k] * PER),)
        planes = planes + (pairs,)
    return planes


@triton.jit
def unpair(y):
    """fp16 `[m, 2k]` from the bit patterns in the halves of uint32 `[m, k]`."""
    low = y.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (y >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high).reshape(y.shape[0], y.shape[1] * 2)


@triton.constexpr_function
def widths(bits):
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@triton.constexpr_function
def affine_place(bits, j, axis):
    """Where the codes of sub-plane j lie in the mantissa: a place that needs few shifts.

    Values (AXIS 1) start at bit 1, so that subtracting half a step is exact; keys are corrected in float32.
    """
    place = widths(bits)[0] * j % 8 + axis
    return place if place + bits <= 10 else axis


@triton.constexpr_function
def _place(bits, place, k):
    return place + sum(widths(bits)[:k])  # wider planes hold the lower bits


@triton.constexpr_function
def _mask(bits, place, k):
    return (((1 << widths(bits)[k]) - 1) << _place(bits, place, k)) * 0x10001


@triton.constexpr_function
def _moved(bits, place, j, k):
    return widths(bits)[k] * j % 16 - _place(bits, place, k)


@triton.jit
def code_pairs(planes, y, J: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr):
    """`y` with the codes of sub-plane J at bit PLACE of both halves; `planes` is `pair_planes`'s."""
    WIDTHS: tl.constexpr = widths(BITS)
    for k in tl.static_range(len(WIDTHS)):
        pair, moved, mask = planes[k][J * WIDTHS[k] // 16], _moved(BITS, PLACE, J, k), _mask(BITS, PLACE, k)
        piece = (pair >> moved if moved > 0 else pair << -moved) & mask
        y = y ^ piece if k == 0 else y | piece  # only ORs would be reordered, and then need one instruction more
    return y


@triton.jit
def select_pairs(planes, table, J: tl.constexpr):
    """fp16 bit patterns of the levels of sub-plane J, 2 bits; `table`: the larger magnitude and the way to the smaller."""
    place: tl.constexpr = J * 2 % 16
    y = planes[0][J // 8] ^ 0xFFFFFFFF  # the interpreter has no ~ for unsigned numbers
    inner = ((y ^ (y >> 1)) >> place) & 0x10001  # codes 1 and 2
    sign = (y & (0x20002 << place)) * (1 << (14 - place))  # codes 0 and 1, at the sign bit
    return table[0] + inner * table[1] + sign


@triton.jit
def unit_of(p_levels, o_levels, BITS: tl.constexpr, MODE: tl.constexpr):
    """What 1.0 in an operand of `levels_of` stands for; `o_levels` gives the result its shape."""
    first, last = tl.load(p_levels + o_levels), tl.load(p_levels + 2**BITS - 1 + o_levels)
    if MODE == AFFINE:
        return (last - first) / (2**BITS - 1)
    else:
        return tl.maximum(tl.maximum(-first, last), 1e-30)


@triton.jit
def _pattern(p_level, per_unit):
    return (tl.load(p_level) * per_unit).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def load_table(p_levels, BITS: tl.constexpr, MODE: tl.constexpr):
    """What `levels_of` looks up, as tensors of shape [1, 1]."""
    zero = tl.zeros([1, 1], tl.int32)
    per_unit = 1 / unit_of(p_levels, zero, BITS, MODE)
    if MODE == SELECT:
        inner, outer = _pattern(p_levels + 2 + zero, per_unit), _pattern(p_levels + 3 + zero, per_unit)
        return outer * 0x10001, inner - outer
    elif MODE == AFFINE:
        # 1024.0 in both halves, but no constant: as one, OR and AND would not fit into one instruction.
        return (tl.where(per_unit > 1e38, -1, 0x64006400).to(tl.uint32),)
    elif MODE == SHUFFLE:
        one = tl.arange(0, 2**BITS)
        return (_pattern(p_levels + one, 1 / unit_of(p_levels, 0 * one, BITS, MODE)),)
    else:
        return (per_unit,)


@triton.jit
def _lookup(p_levels, table, code, MODE: tl.constexpr, BITS: tl.constexpr):
    if MODE == SHUFFLE:
        flat = code.to(tl.int32).reshape(code.shape[0] * code.shape[1])
        return tl.gather(table[0], flat, 0).reshape(code.shape).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return (tl.load(p_levels + code) * table[0]).to(tl.float16)


@triton.jit
def levels_of(
    planes, p_levels, table, J: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """The levels of sub-plane J as an fp16 dot operand, in units of `unit_of`.

    AFFINE: with an offset and a factor, see `affine_place`.
    """
    if MODE == SELECT:
        return unpair(select_pairs(planes, table, J))
    elif MODE == AFFINE:
        return unpair(code_pairs(planes, table[0], J, affine_place(BITS, J, AXIS), BITS))
    else:
        y = code_pairs(planes, 0, J, 0, BITS)
        low, high = _lookup(p_levels, table, y & 0xFFFF, MODE, BITS), _lookup(p_levels, table, y >> 16, MODE, BITS)
        return tl.join(low, high).reshape(y.shape[0], y.shape[1] * 2)
