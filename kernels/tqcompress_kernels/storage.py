"""Where rows of a cache lie, on the host and on the device, and how words of 8 coordinates are read and written."""

import functools
import math

import triton
import triton.language as tl
from torch import Tensor


@functools.lru_cache(1024)
def units(strides: tuple[int, ...], largest: int) -> tuple[int, tuple[int, ...]]:
    """The unit that all strides are multiples of, up to `largest`, and the strides as `offset_of` takes them."""
    unit = math.gcd(largest, *strides)
    return unit, tuple(16 * (stride // unit) for stride in strides)


def aligned(planes: tuple[Tensor, ...], widths: tuple[int, ...]) -> bool:
    """Whether the `width` bytes of 8 coordinates are an integer in memory, in every plane."""
    widths = (2, 2) if widths == (2, 1) else widths  # 3-bit codes: `shuffled` words have 2 bytes
    return not any(
        plane.data_ptr() % width or any(stride % width for stride in plane.stride()[:3])
        for plane, width in zip(planes, widths, strict=True)
    )


@triton.jit
def offset_of(page, row, head, lane, strides, UNIT: tl.constexpr):
    """Where token `row + lane` of a head of a page is.

    Strides come in units, times 16: whatever they are, Triton sees multiples of 16, for which it compiles once.
    """
    token = strides[2] // 16 * UNIT
    return page * (strides[0] // 16 * UNIT) + head * (strides[1] // 16 * UNIT) + row * token + lane.to(tl.int64) * token


@triton.jit
def shuffled(words):
    """The high bits of 3-bit codes as they are stored: two neighbouring bytes of 8 coordinates as one 16-bit word.

    Coordinate 8 a + 2 b + c of 16 has place 4 b + 2 a + c.
    """
    spread = (words | (words << 4)) & 0x0F0F
    spread = (spread | (spread << 2)) & 0x3333
    pairs = tl.reshape(spread, (words.shape[0], words.shape[1] // 2, 2))
    return tl.sum(pairs << (2 * tl.arange(0, 2))[None, None, :], 2)


@triton.jit
def load_shuffled(rows, seen, SIZE: tl.constexpr, DIM: tl.constexpr, ALIGNED: tl.constexpr):
    """The digits that `shuffled` words hold, int32 `[BLOCK, SIZE // 8, 8]`."""
    group, place = tl.arange(0, SIZE // 8), tl.arange(0, 8)
    mask = seen[:, None] & (group < DIM // 8)[None, :]
    if ALIGNED:
        words = rows.to(tl.pointer_type(tl.uint16), bitcast=True)[:, None] + (group // 2)[None, :]
        word = tl.load(words, mask=mask, other=0).to(tl.int32)
    else:
        byte = rows[:, None] + (group // 2 * 2)[None, :]
        word = tl.load(byte, mask=mask, other=0).to(tl.int32)
        word |= tl.load(byte + 1, mask=mask, other=0).to(tl.int32) << 8
    shift = (place // 2 * 4 + place % 2)[None, :] + (group % 2 * 2)[:, None]
    return (word[:, :, None] >> shift[None, :, :]) & 1


@triton.jit
def load_digits(rows, seen, WIDTH: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, ALIGNED: tl.constexpr):
    """The digits of `WIDTH` bits of all coordinates, int32 `[BLOCK, SIZE // 8, 8]`; `rows` points to their rows."""
    group, place = tl.arange(0, SIZE // 8), tl.arange(0, 8)
    mask = seen[:, None]
    if DIM < SIZE:
        mask = mask & (group < DIM // 8)[None, :]
    if WIDTH == 8:
        column = group[:, None] * 8 + place[None, :]
        digits = tl.load(rows[:, None, None] + column[None, :, :], mask=mask[:, :, None], other=0).to(tl.int32)
    else:
        if ALIGNED:
            kind: tl.constexpr = (tl.uint8, tl.uint16, None, tl.uint32)[WIDTH - 1]
            words = rows.to(tl.pointer_type(kind), bitcast=True)[:, None] + group[None, :]
            word = tl.load(words, mask=mask, other=0).to(tl.uint32)
        else:
            word = tl.zeros((rows.shape[0], SIZE // 8), tl.uint32)
            for i in tl.static_range(WIDTH):
                byte = tl.load(rows[:, None] + (group * WIDTH + i)[None, :], mask=mask, other=0)
                word |= byte.to(tl.uint32) << (8 * i)
        digits = (word[:, :, None] >> (WIDTH * place)[None, None, :].to(tl.uint32)).to(tl.int32) & ((1 << WIDTH) - 1)
    return digits


@triton.jit
def load_states(rows, seen, BITS: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """The states of trellis codes at all coordinates, int32 `[BLOCK, SIZE // 8, 8]`; see `Packed.window`."""
    group, place = tl.arange(0, SIZE // 8), tl.arange(0, 8)
    mask = seen[:, None] & (group < DIM // 8)[None, :]
    word = tl.zeros((rows.shape[0], SIZE // 8), tl.uint64)
    for b in tl.static_range((8 * BITS + WINDOW - BITS + 7) // 8):
        byte = (group * BITS + b) % (DIM * BITS // 8)
        word |= tl.load(rows[:, None] + byte[None, :], mask=mask, other=0).to(tl.uint64) << (8 * b)
    return (word[:, :, None] >> (BITS * place)[None, None, :].to(tl.uint64)).to(tl.int32) & ((1 << WINDOW) - 1)


@triton.jit
def store_words(rows, words, seen, WIDTH: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, ALIGNED: tl.constexpr):
    """Store the `WIDTH` low bytes of every word from `FIRST` to `END`, at once if the rows allow it."""
    group = tl.arange(0, words.shape[1])
    mask = seen[:, None]
    if words.shape[1] > END:
        mask = mask & (group < END)[None, :]
    if FIRST > 0:
        mask = mask & (group >= FIRST)[None, :]
        group -= FIRST
    if ALIGNED:
        kind: tl.constexpr = (tl.int8, tl.int16, None, tl.int32, None, None, None, tl.int64)[WIDTH - 1]
        rows = rows.to(tl.pointer_type(kind), bitcast=True)
        tl.store(rows[:, None] + group[None, :], words.to(kind), mask=mask)
    else:
        for i in tl.static_range(WIDTH):
            byte = (words >> (8 * i)).to(tl.uint8)
            tl.store(rows[:, None] + (group * WIDTH + i)[None, :], byte, mask=mask)
