"""Exact tokens in a ring whose length only the device knows: what a step of a captured graph reads and writes.

Token i is in row i of the buffers if it is a sink, else in row `sinks + (i - sinks - base) % room`. When the ring is
full, its oldest `BLOCK` tokens are encoded together, so the number of packed tokens follows from that of all tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # tokens that are encoded together


class Ring(NamedTuple):
    """Sinks and recent tokens of the KV heads of a group, and how many tokens there are.

    Attributes:
        exact: keys and values, `[2, batch, kv_heads, sinks + room, head_dim]`, `room` a multiple of `BLOCK`.
        state: int64 `[2 + batch]`: all tokens cached, packed ones included; base, the packed tokens when the oldest
            recent token was in the first row of the ring; the packed tokens, the same for all of the batch.
        sinks: rows before the ring.
    """

    exact: Tensor
    state: Tensor
    sinks: int

    @property
    def room(self) -> int:
        """Recent tokens that it holds."""
        return self.exact.shape[3] - self.sinks

    @property
    def lengths(self) -> Tensor:
        """Packed tokens of each sequence, int64 `[batch]`."""
        return self.state[2:]


def room_for(window: int) -> int:
    """Rows of a ring that always holds `window` tokens: whole blocks, one of which comes and goes."""
    return (-(-window // BLOCK.value) + 1) * BLOCK.value


def packed_at(length: int, base: int, sinks: int, room: int) -> int:
    """Packed tokens when there are `length` in all."""
    return base + max(0, -(-(length - sinks - base - room) // BLOCK.value)) * BLOCK.value


def is_due(length: int, base: int, sinks: int, room: int) -> bool:
    """Whether a block must be encoded before the token after `length` others finds room."""
    return packed_at(length + 1, base, sinks, room) > packed_at(length, base, sinks, room)


def recent_rows(length: int, base: int, sinks: int, room: int) -> tuple[int, int]:
    """The row of the ring, sinks left out, with the oldest recent token, and how many there are: with wrap around."""
    packed = packed_at(length, base, sinks, room)
    return (packed - base) % room, max(0, length - sinks - packed)


def tokens_of(length: int, base: int, sinks: int, room: int) -> list[int]:
    """The token that each row of the buffers holds when there are `length`, -1 for none: the naive version."""
    found = [i if i < length else -1 for i in range(sinks)] + [-1] * room
    for token in range(sinks + packed_at(length, base, sinks, room), length):
        found[sinks + (token - sinks - base) % room] = token
    return found


@triton.jit
def packed_on_device(length, base, sinks, ROOM: tl.constexpr):
    """`packed_at`."""
    return base + (tl.maximum(length - sinks - base - ROOM, 0) + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def due_block(p_state, sinks, capacity, ROOM: tl.constexpr):
    """Whether the next token finds the ring full; the row of its oldest block, where that goes, and how many are packed
    then. A store that is full takes nothing more.
    """
    length, base = tl.load(p_state), tl.load(p_state + 1)
    over = length - sinks - base - ROOM
    start = base + tl.maximum(over, 0) // BLOCK * BLOCK
    due = (over >= 0) & (over % BLOCK == 0) & (start + BLOCK <= capacity)
    packed = tl.minimum(packed_on_device(length + 1, base, sinks, ROOM), capacity)
    return due, (start - base) % ROOM, start, packed


@triton.jit
def ring_tokens(newest, base, rows, sinks, RECENT, ROOM: tl.constexpr):
    """The token in each of `rows`, `newest` being the last; -1 for none. `RECENT`: rows of the ring, else sinks."""
    last = newest - sinks - base
    token = newest - ((last + ROOM) % ROOM - rows + ROOM) % ROOM
    first = sinks + packed_on_device(newest + 1, base, sinks, ROOM)
    token = tl.where((last >= 0) & (token >= first), token, -1)
    return tl.where(RECENT, token, tl.where((rows < sinks) & (rows <= newest), rows, -1))


def empty_ring(like: Tensor, sinks: int, window: int) -> Ring:
    """An empty ring for the batch, KV heads, head_dim, dtype and device of `like` `[batch, kv_heads, _, head_dim]`.

    Rows that hold no token yet are read and weighted with zero: they must be finite.
    """
    batch, heads, _, dim = like.shape
    exact = like.new_zeros(2, batch, heads, sinks + room_for(window), dim)
    return Ring(exact, torch.zeros(2 + batch, dtype=torch.int64, device=like.device), sinks)
