"""Device functions: nearest levels of rotated vectors, packed into planes.

Codes are found by arithmetic on the magnitude of a coordinate, in units of its vector's root mean square: the levels
are symmetric, so a code is a count of boundaries passed and a sign. Nothing is gathered up to 4 bits.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1e-30)  # below any scale; keeps boundaries of vectors of zeros above zero


@triton.jit
def levels_of(table, BITS: tl.constexpr, METHOD: tl.constexpr):
    """The square of the smallest level, and what `METHOD` compares with: the step, or boundaries and jumps at them."""
    COUNT: tl.constexpr = (1 << (BITS - 1)) - 1
    square = tl.load(table + COUNT)
    levels = (square,)
    if METHOD == "uniform":
        levels = (square, tl.load(table))
    elif METHOD == "linear":
        for i in tl.static_range(COUNT):
            levels += (tl.load(table + i), tl.load(table + COUNT + i + 1) - tl.load(table + COUNT + i))
    return levels


@triton.jit
def quantized(
    y, rms, levels, table, BITS: tl.constexpr, METHOD: tl.constexpr, CORRECT: tl.constexpr, FIRST: tl.constexpr,
    END: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The words of every plane, and sums of the squared levels less the smallest one: `[BLOCK, LANES]`.

    Only coordinates from `FIRST` to `END`, multiples of 8, count for the sums.
    """
    energy = tl.zeros((y.shape[0], y.shape[1]), tl.float32)
    parts, done = _split(y, y.shape[2] // 8), ()
    for i in tl.static_range(len(parts)):
        # Each part waits for the one before: worked on at once, they would need more registers than there are.
        zero = energy * 0.0
        magnitude, squares = _magnitude(tl.abs(parts[i]), tl.maximum(rms, TINY) + zero, levels, table, BITS, METHOD)
        if CORRECT:
            if END - FIRST < DIM:
                word = tl.arange(0, y.shape[1]) * len(parts) + i
                squares = tl.where(((word >= FIRST // 8) & (word < END // 8))[None, :], squares, 0.0)
            energy += squares
        done += (_words(parts[i] > zero[:, :, None], magnitude, BITS),)
    planes = ()
    for p in tl.static_range(len(done[0])):
        words = ()
        for i in tl.static_range(len(done)):
            words += (done[i][p],)
        planes += (_joined(words),)
    return planes, energy


@triton.jit
def _split(y, COUNT: tl.constexpr):
    """`[BLOCK, LANES, COUNT * 8]` as `COUNT` tensors `[BLOCK, LANES, 8]`; COUNT is 1, 2 or 4."""
    parts = (y,)
    for _ in tl.static_range(COUNT // 2):
        halves = ()
        for i in tl.static_range(len(parts)):
            pairs = tl.reshape(parts[i], (y.shape[0], y.shape[1], 2, parts[i].shape[2] // 2))
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            halves += (low, high)
        parts = halves
    return parts


@triton.jit
def _joined(words):
    """1, 2 or 4 tensors `[BLOCK, LANES]` side by side in every lane: `[BLOCK, LANES * len(words)]`."""
    if len(words) == 1:
        joined = words[0]
    elif len(words) == 2:
        joined = tl.join(words[0], words[1])
    else:
        joined = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    return tl.reshape(joined, (words[0].shape[0], words[0].shape[1] * len(words)))


@triton.jit
def _magnitude(y, unit, levels, table, BITS: tl.constexpr, METHOD: tl.constexpr):
    """Indices of the nearest positive levels of `y / unit`, y >= 0, lower ones at a tie, and their `energy`.

    The indices are float32 up to 4 bits and int32 above.
    """
    COUNT: tl.constexpr = (1 << (BITS - 1)) - 1
    if METHOD == "linear":
        index = tl.zeros_like(y)
        energy = tl.zeros((y.shape[0], y.shape[1]), tl.float32)
        for i in tl.static_range(COUNT):
            passed = tl.where(y > (unit * levels[2 * i + 1])[:, :, None], 1.0, 0.0)
            index += passed
            energy += tl.sum(passed * levels[2 * i + 2], 2)
    elif METHOD == "uniform":
        steps = y * (1.0 / (unit * levels[1]))[:, :, None]
        index = tl.where(steps > 1, tl.minimum(tl.ceil(steps) - 1, COUNT), 0.0)  # NaN is not > 1
        energy = tl.sum(index * index + index, 2) * (levels[1] * levels[1])
    else:
        index = tl.zeros_like(y).to(tl.int32)
        normal = y * (1.0 / unit)[:, :, None]
        for i in tl.static_range(BITS - 1):
            boundary = tl.load(table + index + ((1 << (BITS - 2 - i)) - 1))
            index += tl.where(normal > boundary, 1 << (BITS - 2 - i), 0)
        energy = tl.sum(tl.load(table + COUNT + index) - levels[0], 2)
    if BITS > 4:
        index = index.to(tl.int32)
    return index, energy


@triton.jit
def _words(positive, index, BITS: tl.constexpr):
    """What the planes hold of 8 coordinates, as integers of 8 * width bits `[BLOCK, LANES]`, widest plane first."""
    if BITS == 8:
        words = (_packed(_code(positive, index, BITS), 8, 0.0),)
    elif BITS == 7:
        code = _code(positive, index, BITS)
        words = (_packed(code & 15, 4, 0.0), _packed((code >> 4) & 3, 2, 0.0), _packed(code >> 6, 1, 0.0))
    elif BITS > 4:
        code = _code(positive, index, BITS)
        words = (_packed(code & 15, 4, 0.0), _packed(code >> 4, BITS - 4, 0.0))
    elif BITS == 3:
        high = tl.where(positive, 1.0, 0.0)
        words = (_packed((index - 1.5) * (2 * high - 1), 2, 1.5), _packed(high, 1, 0.0))
    else:
        words = (_packed(tl.where(positive, index + 0.5, -0.5 - index), BITS, (1 << BITS) / 2 - 0.5),)
    return words


@triton.jit
def _code(positive, index, BITS: tl.constexpr):
    return tl.where(positive, (1 << (BITS - 1)) + index, (1 << (BITS - 1)) - 1 - index)


@triton.jit
def _packed(digits, WIDTH: tl.constexpr, LESS: tl.constexpr):
    """Little-endian integers of the 8 digits of `WIDTH` bits in the last dimension; floats are `LESS` too small.

    Floats are packed by multiply-and-add, which there is twice as much of as of shifts, 16 bits at most at a time.
    """
    place = tl.arange(0, 8)
    if digits.dtype == tl.float32:
        if WIDTH == 4:
            digits = tl.reshape(digits, (digits.shape[0], digits.shape[1], 2, 4))
            halves = tl.sum(digits * (1 << (4 * tl.arange(0, 4))).to(tl.float32), 3) + LESS * 0x1111
            low, high = tl.split(halves.to(tl.int32))
            word = low | (high << 16)
        else:
            ONES: tl.constexpr = ((1 << (8 * WIDTH)) - 1) // ((1 << WIDTH) - 1)
            word = (tl.sum(digits * (1 << (WIDTH * place)).to(tl.float32), 2) + LESS * ONES).to(tl.int32)
    elif WIDTH == 8:
        word = tl.sum(digits.to(tl.int64) << (8 * place), 2)
    else:
        word = tl.sum(digits << (WIDTH * place), 2)
    return word
