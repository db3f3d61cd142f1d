"""The PTX that looks up trellis codes, run by the tiny interpreter of `test_fast_asm`: strings in, signed bytes out."""

import random

import pytest
import torch
from test_fast_asm import MASK, run, signed
from tqcompress.plugins.trellis import shipped_table, windows

from tqcompress_kernels import trellis_asm
from tqcompress_kernels.fast import trellis_lookup

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
    for per, copies in [(1, 1), (1, 32), (2, 4), (4, 1), (4, 2)]
    if states << (per - 1) * bits <= 1 << 15
]


def strings(states, bits, count, seed):
    """Rows of bytes, and the integer values of their states `[count, 128]`."""
    codes = torch.randint(256, (count, 16 * bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    table = shipped_table(states, bits)
    whole = (table / table.abs().max() * 127).round().int()
    return codes, whole[windows(codes, bits, 128, states)].tolist()


def words_of(row, first_bit, count):
    """32-bit words of a circular string from a bit on."""
    number, size = int.from_bytes(bytes(row.tolist()), "little"), 8 * len(row)
    turned = (number >> first_bit | number << size - first_bit) & (1 << size) - 1
    turned |= turned << size
    return [turned >> 32 * i & MASK for i in range(count)]


def built(states, bits, per, copies, side):
    """Kind, PTX, and a function that runs it for the words of a string on some lane."""
    table = shipped_table(states, bits)
    found = trellis_lookup(table, float(table.abs().max() / 127), bits, per, copies)
    text, outputs = (trellis_asm.key_windows if side == "key" else trellis_asm.value_windows)(found.kind)
    lane, address = random.Random(0).randrange(32), 64
    shared = [0] * (address // 4) + [word & MASK for word in found.table[32:].tolist()]

    def execute(words):
        return run(text, outputs, words + [int(found.table[lane])] * 4, shared, **{found.trellis.name: address})

    return found.trellis, execute


@pytest.mark.parametrize(("states", "bits", "per", "copies"), CASES)
def test_keys_come_out_in_their_order(states, bits, per, copies):
    kind, execute = built(states, bits, per, copies, "key")
    codes, values = strings(states, bits, 1, seed=states + bits)
    for quarter in range(4):
        words = words_of(codes[0], 32 * bits * quarter, kind.words(32))
        out = execute([x for word in words for x in [word] * 4])
        assert [value for register in out for value in signed(register)] == values[0][32 * quarter : 32 * quarter + 32]


@pytest.mark.parametrize(("states", "bits", "per", "copies"), CASES)
def test_values_come_out_across_tokens(states, bits, per, copies):
    kind, execute = built(states, bits, per, copies, "value")
    codes, values = strings(states, bits, 4, seed=states + bits)
    for eighth in (0, 3, 7):
        tokens = [words_of(row, 16 * bits * eighth, kind.words(16)) for row in codes]
        out = execute([token[i] for i in range(kind.words(16)) for token in tokens])
        for j, register in enumerate(out):
            assert signed(register) == [row[16 * eighth + j] for row in values]
