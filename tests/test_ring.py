"""Steps of one token with a ring of exact tokens: what it holds, what is encoded when, and what attention sees."""

import pytest
import torch
from decode_helpers import levels_of, random
from encode_helpers import rotation
from kernels_helpers import DEVICE
from trellis_helpers import table_of

from tqcompress_kernels import plain, reference
from tqcompress_kernels.encode import encode, encoder
from tqcompress_kernels.encode_trellis import trellis_encoder
from tqcompress_kernels.launch import Scratch
from tqcompress_kernels.packed import plane_widths
from tqcompress_kernels.ring import empty_ring, is_due, packed_at, recent_rows, room_for, tokens_of
from tqcompress_kernels.step import Constants, Side, Stepper, ring_step, step_op

HEADS, DIM, SCALING = 2, 64, 0.125


def constants(key_bits: int, value_bits: int, mean: bool) -> Constants:
    sides = []
    for i, bits in enumerate((key_bits, value_bits)):
        into = rotation("hadamard" if i else "dense", DIM)
        offset = random(HEADS, DIM, seed=i) if mean else None
        back = into.transpose(1, 2).contiguous()
        if isinstance(bits, tuple):  # a trellis: its states and bits
            (table, step), window = table_of(*bits), bits[0].bit_length() - 1
            by = trellis_encoder(into, offset, table, step, bits[1], "fp16")
            sides.append(Side(table, bits[1], step, False, back, offset, by, window))
            continue
        levels = levels_of(bits, False)
        sides.append(Side(levels, bits, None, False, back, offset, encoder(into, offset, levels, "fp16")))
    return Constants(*sides, plain.split)


def buffers(bits: int | tuple[int, int], batch: int, capacity: int):
    widths = (bits[1],) if isinstance(bits, tuple) else plane_widths(bits)
    planes = [torch.zeros(batch, HEADS, capacity, DIM * width // 8, dtype=torch.uint8) for width in widths]
    scale = torch.zeros(batch, HEADS, capacity, 1, dtype=torch.float16, device=DEVICE)
    return tuple(plane.to(DEVICE) for plane in planes), scale


class Sequence:
    """A ring and its stores after `length` tokens, and all tokens as they came."""

    def __init__(self, batch, key_bits, value_bits, mean, sinks, window, length, base=0, total=400, capacity=256):
        self.constants = constants(key_bits, value_bits, mean)
        self.states = random(2, batch, HEADS, total, DIM, seed=3)
        self.ring = empty_ring(self.states[0], sinks, window)
        self.stores = [buffers(bits, batch, capacity) for bits in (key_bits, value_bits)]
        self.length, self.base = length, base
        packed = packed_at(length, base, sinks, self.ring.room)
        for row, token in enumerate(tokens_of(length, base, sinks, self.ring.room)):
            if token >= 0:
                self.ring.exact[:, :, :, row] = self.states[:, :, :, token]
        self.ring.state[:2] = torch.tensor([length, base])
        self.ring.state[2:] = packed
        self.encode(0, packed, self.stores)

    def encode(self, start: int, stop: int, stores) -> None:
        sinks = self.ring.sinks
        for states, side, (planes, scale) in zip(self.states, self.sides, stores, strict=True):
            encode(states[:, :, sinks + start : sinks + stop], planes, scale, start, side.encoder)

    @property
    def sides(self):
        return self.constants.key, self.constants.value

    def new(self, token: int):
        return tuple(self.states[:, :, :, token : token + 1])

    def want(self, query, length: int, mask):
        """Attention in float64 to the first `length` tokens."""
        ring, packed = self.ring, packed_at(length, self.base, self.ring.sinks, self.ring.room)
        recent = self.states[:, :, :, ring.sinks + packed : length].double()
        sides = [side.packed(*store) for side, store in zip(self.sides, self.stores, strict=True)]
        backs, means = ([getattr(side, name) for side in self.sides] for name in ("back", "mean"))
        mask = None if mask is None else mask[:, :length]
        sinks = self.states[:, :, :, : min(ring.sinks, length)].double()
        return reference.decode_attention(
            query.double(), *sides, *backs, *means, tuple(sinks), tuple(recent), packed, SCALING, mask=mask
        )

    def check(self, out, lse, query, length: int, mask=None) -> None:
        """Output and log-sum-exp after `length` tokens, what the ring holds and how far it counts."""
        want, want_lse = self.want(query, length, mask)
        # fp16 levels and weights (2^-11) in the packed part; what is exact is exact to float32
        assert (out - want).norm() < 1e-3 * want.norm()
        assert (lse - want_lse).abs().max() < 1e-3
        ring = self.ring
        for row, token in enumerate(tokens_of(length, self.base, ring.sinks, ring.room)):
            if token >= 0:
                assert torch.equal(ring.exact[:, :, :, row], self.states[:, :, :, token])
        packed = packed_at(length, self.base, ring.sinks, ring.room)
        assert ring.state.tolist() == [length, self.base] + [packed] * (len(ring.state) - 2)


@pytest.mark.parametrize(
    ("batch", "bits", "mean", "sinks", "window", "length", "base", "steps", "padded"),
    [
        (1, (4, 3), False, 4, 10, 0, 0, 7, False),  # the sinks fill
        (2, (4, 2), True, 4, 10, 128, 0, 8, False),  # the ring fills, a block goes
        (2, (3, 3), True, 3, 64, 128, 0, 6, True),
        (1, (2, 4), False, 0, 0, 62, 0, 4, False),  # no sinks, no window: the smallest ring
        (1, (2, 4), False, 0, 0, 126, 0, 4, False),  # and once more
        (1, ((16, 2), (16, 3)), True, 3, 10, 130, 0, 2, False),  # trellis codes
        (1, (4, 4), False, 5, 65, 64 + 37 + 5 + 188, 64 + 37, 10, False),  # blocks that do not begin at multiples of 64
    ],
)
def test_steps_see_all_tokens_and_keep_the_new_one(batch, bits, mean, sinks, window, length, base, steps, padded):
    sequence = Sequence(batch, *bits, mean, sinks, window, length, base)
    mask = torch.ones(batch, 400, dtype=torch.bool, device=DEVICE)
    mask[-1, :20] = False
    mask[0, 125:] = torch.arange(275, device=DEVICE) % 3 > 0
    mask = mask if padded else None
    stepper = Stepper(sequence.ring, *sequence.stores, sequence.constants)
    for i in range(steps):
        query = random(batch, 2 * HEADS, 1, DIM, seed=i)
        out, lse = stepper(query, sequence.new(length + i), length + i, base, mask, SCALING, None)
        sequence.check(out, lse, query, length + i + 1, mask)
    # What was encoded block by block is what encoding everything at once gives; a code next to a boundary may differ.
    packed = packed_at(length + steps, base, sinks, sequence.ring.room)
    rows = slice(8 if isinstance(bits[0], tuple) else None)  # interpreted, a search takes long
    fresh = [buffers(n, batch, 256) for n in bits]
    sequence.encode(0, min(packed, rows.stop or packed), fresh)
    for store, other in zip(sequence.stores, fresh, strict=True):
        for got, want in zip((*store[0], store[1]), (*other[0], other[1]), strict=True):
            assert (got != want)[:, :, rows].double().mean() < 1e-3


def test_the_op_does_the_same_and_a_query_may_come_again():
    """`due` asks the device; without a new token nothing changes."""
    sequence = Sequence(1, 4, 3, False, 4, 10, 131)
    for i in range(3):
        query, length = random(1, 4, 1, DIM, seed=i), 131 + i
        new, ring = sequence.new(length), sequence.ring
        (key, value), shared = sequence.stores, (sequence.constants.id, None, SCALING, None)
        out, lse = step_op(query, list(new), ring.exact, ring.state, ring.sinks, list(key[0]), key[1], list(value[0]),
                           value[1], *shared)  # fmt: skip
        sequence.check(out, lse, query, length + 1)
        again, _ = ring_step(query, None, ring, key, value, sequence.constants, None, SCALING)
        assert torch.equal(again, out)
        assert int(ring.state[0]) == length + 1


def test_groups_that_share_memory_keep_their_results():
    """The groups of a layer step one after the other, then their outputs and log-sum-exps are read together."""
    groups, memory, found = [Sequence(1, 4, 3, False, 4, 10, length) for length in (131, 5)], Scratch(DEVICE), []
    for i, group in enumerate(groups):
        query = random(1, 4 - 2 * i, 1, DIM, seed=i)
        new, *rest = group.new(group.length), group.ring, *group.stores, group.constants, None, SCALING
        found.append((query, *ring_step(query, new, *rest, memory=memory.restart())))
    for group, (query, out, lse) in zip(groups, found, strict=True):
        group.check(out, lse, query, group.length + 1)


def test_without_room_the_result_is_not_a_number():
    """And nothing is written outside of the buffers."""
    sequence = Sequence(1, 4, 4, False, 2, 10, 2 + 128 + 64, 0, capacity=64)
    stepper = Stepper(sequence.ring, *sequence.stores, sequence.constants)
    before = [store[0][0].clone() for store in sequence.stores]
    out, _ = stepper(random(1, 2, 1, DIM), sequence.new(194), 194, 0, None, SCALING, None)
    assert out.isnan().all()
    assert all(torch.equal(store[0][0], old) for store, old in zip(sequence.stores, before, strict=True))


@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize(("sinks", "base"), [(0, 0), (4, 0), (4, 77)])
def test_the_window_is_always_in_the_ring(window, sinks, base):
    room = room_for(window)
    for length in range(sinks + base, sinks + base + 4 * room):
        packed = packed_at(length, base, sinks, room)
        rows = tokens_of(length, base, sinks, room)
        first, count = recent_rows(length, base, sinks, room)
        recent = [rows[sinks + (first + i) % room] for i in range(count)]
        assert recent == list(range(length - count, length)) == sorted(token for token in rows[sinks:] if token >= 0)
        held = sorted(token for token in rows if token >= 0)
        assert held == [*range(min(sinks, length)), *range(sinks + packed, length)]
        assert packed == base or length - packed - sinks >= window
        after = packed_at(length + 1, base, sinks, room)
        assert is_due(length, base, sinks, room) == (after > packed)
