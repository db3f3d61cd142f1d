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

from .packed import plane_widths

# How codes become levels, a mode a side:
AFFINE = tl.constexpr(0)  # equally spaced levels: the code, in the mantissa of an fp16 number
BITWISE = tl.constexpr(1)  # 2 bits: symmetric levels are a sum over the two bits, each read as by AFFINE
SHUFFLE = tl.constexpr(2)  # up to 5 bits: the lanes of a warp hold the table, a shuffle reads it
LOAD = tl.constexpr(3)  # any levels: loads from the table
WINDOW = tl.constexpr(16)  # plus the bits of a window: trellis codes, whose states overlap; loads from the table


widths = triton.constexpr_function(plane_widths)


@triton.constexpr_function
def window_of(mode):
    """The bits of a window, 0 for other modes."""
    return max(0, mode - WINDOW.value)


@triton.constexpr_function
def digits(mode):
    """Parts of a code that are read one by one; the level is the sum of `gap * (part - middle)` over them."""
    return 2 if mode == BITWISE else 1


@triton.constexpr_function
def place(mode, bits, j, digit):
    """Where sub-plane j lies in the mantissa: a place that few shifts lead to; at least 1, so half a step is exact."""
    at = widths(bits)[0] * j % 8 + digit + 1
    return at if at + bits // digits(mode) <= 10 else 1


@triton.constexpr_function
def factor(mode, bits, j, digit):
    """By how much digits of sub-plane j are too large."""
    return 2.0 ** place(mode, bits, j, digit)


@triton.constexpr_function
def _zero(mode, bits, j, digit):
    """What the mantissa trick yields for the middle of a digit."""
    return 1024 + (2 ** (bits // digits(mode)) - 1) / 2 * factor(mode, bits, j, digit)


@triton.constexpr_function
def _place(bits, first, k):
    return first + sum(widths(bits)[:k])  # wider planes hold the lower bits


@triton.constexpr_function
def _mask(bits, first, k):
    return (((1 << widths(bits)[k]) - 1) << _place(bits, first, k)) * 0x10001


@triton.constexpr_function
def _at(bits, j, k):
    """The bit of a word at which sub-plane j of plane k begins."""
    return j // 2 * 4 + j % 2 if bits == 3 and k == 1 else widths(bits)[k] * j


@triton.constexpr_function
def repeats(bits, per, k):
    """Words of plane k that share a load: less than a byte each, or in one group of 16 high bits of 3-bit codes."""
    return 16 // per if bits == 3 and k == 1 else max(1, 8 // (widths(bits)[k] * per))


@triton.constexpr_function
def word_bytes(bits, per, k):
    """Bytes that are loaded at once for words of plane k."""
    return widths(bits)[k] * per * repeats(bits, per, k) // 8


@triton.constexpr_function
def _moved(bits, first, j, k):
    return _at(bits, j, k) % 16 - _place(bits, first, k)


@triton.constexpr_function
def _halves(bits, per, k):
    """The 16-bit parts of a word of plane k."""
    return _at(bits, per - 1, k) // 16 + 1


@triton.jit
def _load(
    p_plane, stride, o_block, i_row, m_row,
    WORDS: tl.constexpr, VALID: tl.constexpr, AXIS: tl.constexpr, SIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Words of `SIZE` bytes of the rows at `o_block + i_row * stride` bytes: `[rows, words]`, for AXIS 1 transposed.

    `BYTES`: bytes that one load may take; 1 where rows are not aligned. Words from `VALID` on are zeros.
    """
    i_word = tl.arange(0, WORDS)
    rows, words = tl.expand_dims(i_row, 1 - AXIS), tl.expand_dims(i_word, AXIS)
    m_load = tl.expand_dims(m_row, 1 - AXIS)
    if VALID < WORDS:
        m_load = m_load & (words < VALID)
    if BYTES == SIZE:
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
def _beside(x, SHIFT: tl.constexpr):
    """Two words of every one along the last axis: itself, and shifted."""
    return tl.join(x, x >> SHIFT).reshape(x.shape[0], x.shape[1] * 2)


@triton.jit
def _below(x, shift, TIMES: tl.constexpr):
    """`TIMES` words of every one along the first axis, shifted by `shift`."""
    rows: tl.constexpr = x.shape[0] * TIMES
    x = tl.broadcast_to(tl.expand_dims(x, 1), x.shape[0], TIMES, x.shape[1]).reshape(rows, x.shape[1])
    return x >> shift.to(x.dtype)[:, None]


@triton.jit
def load_words(
    p_plane, stride, o_block, i_row, m_row,
    K: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr,
    AXIS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The words of plane K, the one of a side with codes of `BITS` bits: coordinate j of a word begins at bit `_at`.

    The high bits of 3-bit codes are stored 16 at a time, coordinate 8 a + 2 b + c in place 4 b + 2 a + c.
    """
    TIMES: tl.constexpr = repeats(BITS, PER, K)
    SIZE: tl.constexpr = word_bytes(BITS, PER, K)
    VALID: tl.constexpr = (DIM // PER + TIMES - 1) // TIMES
    x = _load(p_plane, stride, o_block, i_row, m_row, WORDS // TIMES, VALID, AXIS, SIZE, BYTES)
    # Words that share what was loaded: the ways differ because each keeps the layout of its dot.
    first: tl.constexpr = 2 if BITS == 3 else 4
    if TIMES > 1 and AXIS == 0:
        x = _beside(x, first)
        if TIMES == 4:
            x = _beside(x, 8)
    elif TIMES > 1:
        i_word = tl.arange(0, WORDS)
        x = _below(x, i_word * 2 // TIMES % 2 * first + i_word * 4 // TIMES % 2 * 8 * (TIMES // 4), TIMES)
    return x


@triton.jit
def load_windows(
    p_plane, stride, o_block, i_row, m_row,
    BITS: tl.constexpr, WINDOW: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """`load_words` for trellis codes: uint64 words with the codes of 8 coordinates and what is beyond in the last one.

    The state at coordinate 8 i + j begins at bit `j * BITS` of word i.
    """
    i_word = tl.arange(0, WORDS)
    rows, words = tl.expand_dims(i_row, 1 - AXIS), tl.expand_dims(i_word, AXIS)
    m_load = tl.expand_dims(m_row, 1 - AXIS) & (words < DIM // 8)
    x = tl.zeros([1, 1], tl.uint64)
    for b in tl.static_range((8 * BITS + WINDOW - BITS + 7) // 8):
        o_byte = rows * stride + (words * BITS + b) % (DIM * BITS // 8)
        x |= tl.load(p_plane + o_block + o_byte, mask=m_load, other=0).to(tl.uint64) << (8 * b)
    return x


@triton.jit
def pair_words(x, HALF: tl.constexpr):
    """Bits 16 * HALF ... of the words 2i and 2i + 1 of the last axis, in the low and high half of a uint32."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    if x.dtype.primitive_bitwidth <= 16:
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
        for h in tl.static_range(_halves(BITS, PER, k)):
            pairs = pairs + (pair_words(words[k], h),)
        planes = planes + (pairs,)
    return planes


@triton.jit
def unpair(y):
    """fp16 `[m, 2k]` from the bit patterns in the halves of uint32 `[m, k]`."""
    low = y.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (y >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high).reshape(y.shape[0], y.shape[1] * 2)


@triton.jit
def code_pairs(planes, y, J: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr):
    """`y` with the codes of sub-plane J at bit FIRST of both halves; `planes` is `pair_planes`'s."""
    WIDTHS: tl.constexpr = widths(BITS)
    for k in tl.static_range(len(WIDTHS)):
        pair, moved, mask = planes[k][_at(BITS, J, k) // 16], _moved(BITS, FIRST, J, k), _mask(BITS, FIRST, k)
        piece = (pair >> moved if moved > 0 else pair << -moved) & mask
        y = y ^ piece if k == 0 else y | piece  # only ORs would be reordered, and then need one instruction more
    return y


@triton.jit
def digit_operand(planes, magic, J: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """Digit D of the codes of sub-plane J minus the middle, times `factor`, as an fp16 dot operand; exact."""
    first: tl.constexpr = place(MODE, BITS, J, D)
    if MODE == BITWISE:
        pair, moved = planes[0][J // 8], (2 * J + D) % 16 - first
        x = unpair((pair >> moved if moved > 0 else pair << -moved) & (0x10001 << first) ^ magic)
    else:
        x = unpair(code_pairs(planes, magic, J, first, BITS))
    return x - _zero(MODE, BITS, J, D)


@triton.jit
def gap_of(p_levels, o_levels, D: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """The gap of digit D, or what 1.0 of a looked-up level stands for; `o_levels` gives the result its shape."""
    if window_of(MODE):
        every = tl.load(p_levels + tl.arange(0, 2 ** window_of(MODE)))
        return tl.maximum(tl.max(tl.abs(every), 0), 1e-30) + 0.0 * o_levels
    else:
        first, last = tl.load(p_levels + o_levels), tl.load(p_levels + 2**BITS - 1 + o_levels)
        if MODE == AFFINE:
            return (last - first) / (2**BITS - 1)
        elif MODE == BITWISE:
            return tl.load(p_levels + 1 + D + o_levels) - first
        else:
            return tl.maximum(tl.maximum(-first, last), 1e-30)


@triton.jit
def load_table(p_levels, BITS: tl.constexpr, MODE: tl.constexpr):
    """What `digit_operand` ORs (1024.0 in both halves) or `level_operands` looks up."""
    if MODE == SHUFFLE:
        one = tl.arange(0, 2**BITS)
        level = tl.load(p_levels + one) / gap_of(p_levels, 0 * one, 0, BITS, MODE)
        high = level.to(tl.float16)
        low = (level - high.to(tl.float32)).to(tl.float16)
        table = high.to(tl.uint16, bitcast=True).to(tl.uint32) | (low.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        table = 1 / gap_of(p_levels, tl.zeros([1, 1], tl.int32), 0, BITS, MODE)
        if MODE <= BITWISE:  # no constant: as one, OR and AND would not fit into one instruction
            table = tl.where(table > 1e38, -1, 0x64006400).to(tl.uint32)
    return table


@triton.jit
def _lookup(p_levels, table, code, MODE: tl.constexpr):
    """A level as the sum of two fp16 numbers."""
    if MODE == SHUFFLE:
        flat = code.to(tl.int32).reshape(code.shape[0] * code.shape[1])
        both = tl.gather(table, flat, 0).reshape(code.shape)
        high, low = both.to(tl.uint16), (both >> 16).to(tl.uint16)
        return high.to(tl.float16, bitcast=True), low.to(tl.float16, bitcast=True)
    else:
        level = tl.load(p_levels + code) * table
        high = level.to(tl.float16)
        return high, (level - high.to(tl.float32)).to(tl.float16)


@triton.jit
def level_operands(planes, p_levels, table, J: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """The levels of sub-plane J in units of `gap_of`, rounded to fp16, and what rounding took away."""
    if window_of(MODE):
        state = (planes[0] >> (BITS * J)).to(tl.int32) & (2 ** window_of(MODE) - 1)
        return _lookup(p_levels, table, state, LOAD)
    else:
        y = code_pairs(planes, 0, J, 0, BITS)
        a_high, a_low = _lookup(p_levels, table, y & 0xFFFF, MODE)
        b_high, b_low = _lookup(p_levels, table, y >> 16, MODE)
        high = tl.join(a_high, b_high).reshape(y.shape[0], y.shape[1] * 2)
        return high, tl.join(a_low, b_low).reshape(y.shape[0], y.shape[1] * 2)


@triton.jit
def load_scales(p_scale, o_scale, m_t, LOG8: tl.constexpr):
    """The scales of a block's tokens and their log2, rounded up (of zero: something small)."""
    code = tl.load(p_scale + o_scale, mask=m_t, other=0).to(tl.float32)
    if LOG8:
        log = code * 0.0625 - 8.0
        return tl.where(code == 0, 0.0, tl.exp2(log)), log
    else:
        bits = tl.maximum(code, 1e-9).to(tl.int32, bitcast=True)
        return code, ((bits >> 23) - 126).to(tl.float32)
