"""The PTX that looks up trellis codes, run by the tiny interpreter of `test_fast_asm`: strings in, signed bytes out."""

import random

import pytest
import torch
from test_fast_asm import MASK, run, signed
from tqcompress.plugins.trellis import shipped_table, windows

from tqcompress_kernels import trellis_asm
from tqcompress_kernels.lookups import trellis_lookup

CASES = [
    (states, bits, per, copies)
    for states, bits in [
        (16, 1),
        (16, 2),
        (16, 3),
        (16, 4),
        (64, 3),
        (256, 1),
        (256, 2),
        (256, 3),
        (1024, 3),
        (1024, 4),
    ]
    for per, copies in [(1, 1), (1, 32), (2, 1), (2, 4), (3, 1), (3, 2), (4, 1), (4, 2)]
    if states << (per - 1) * bits <= 1 << 15
] + [(16, 2, None, None), (16, 3, None, None)]  # in registers


def strings(states, bits, count, seed, dim):
    """Rows of bytes, and the integer values of their states `[count, dim]`."""
    codes = torch.randint(
        256, (count, dim // 8 * bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    table = shipped_table(states, bits)
    whole = (table / table.abs().max() * 127).round().int()
    return codes, whole[windows(codes, bits, dim, states)].tolist()


def words_of(row, first_bit, count):
    """32-bit words of a circular string from a bit on."""
    number, size = int.from_bytes(bytes(row.tolist()), "little"), 8 * len(row)
    turned = (number >> first_bit | number << size - first_bit) & (1 << size) - 1
    turned |= turned << size
    return [turned >> 32 * i & MASK for i in range(count)]


def built(states, bits, per, copies, side, dim):
    """Kind, and a function that runs the PTX for the words of a string on some lane and adds up lookups."""
    table = shipped_table(states, bits)
    found = trellis_lookup(table, float(table.abs().max() / 127), bits, dim, per, copies)
    kind, how = found.trellis, trellis_asm.plan(side, found.kind)
    lane, address = random.Random(0).randrange(32), 64
    assert (kind.copies == 0) == (per is None)
    inputs = found.table[:, lane].tolist() if kind.copies == 0 else [int(found.table[lane])]
    inputs = [word & MASK for word in inputs for _ in range(4)]
    content = b"" if kind.copies == 0 else found.table[32:].numpy().tobytes()
    assert len(content) == kind.nbytes

    def execute(words):
        out = run(how.text, how.operands, words + inputs, bytes(address) + content, **{kind.name: address})
        out = [signed(register) for register in out]
        if kind.copies:
            return out
        return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(out[::2], out[1::2], strict=True)]

    return kind, execute


WITH_DIM = [(*case, 128) for case in CASES] + [(*case, 64) for case in CASES if case[2]]


@pytest.mark.parametrize(("states", "bits", "per", "copies", "dim"), WITH_DIM)
def test_keys_come_out_in_their_order(states, bits, per, copies, dim):
    kind, execute = built(states, bits, per, copies, "key", dim)
    codes, values = strings(states, bits, 1, states + bits, dim)
    order = trellis_asm.key_coordinates(kind.text)[:: 1 if kind.copies else 2]
    assert sorted(i for four in order for i in four) == list(range(dim // 4))
    for quarter in range(4):
        words = words_of(codes[0], dim // 4 * bits * quarter, kind.words("key"))
        out = execute([x for word in words for x in [word] * 4])
        mine = values[0][dim // 4 * quarter :]
        assert out == [[mine[i] for i in four] for four in order]


@pytest.mark.parametrize(("states", "bits", "per", "copies", "dim"), WITH_DIM)
def test_values_come_out_across_tokens(states, bits, per, copies, dim):
    kind, execute = built(states, bits, per, copies, "value", dim)
    codes, values = strings(states, bits, 4, states + bits, dim)
    for eighth in (0, 3, 7):
        tokens = [words_of(row, dim // 8 * bits * eighth, kind.words("value")) for row in codes]
        out = execute([token[i] for i in range(kind.words("value")) for token in tokens])
        assert out == [[row[dim // 8 * eighth + j] for row in values] for j in range(dim // 8)]
