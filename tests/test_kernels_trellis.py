"""Kernels for trellis codes against their references in float64."""

import pytest
import torch
from decode_helpers import HEADS, check_split, in_pages, in_records, random, side  # first: how the kernels run
from kernels_helpers import DEVICE
from trellis_helpers import trellis_side

from tqcompress_kernels import dequantize, encode_reference, reference

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("key", "value", "dim", "options"),
    [
        ((16, 2), (16, 3), 64, {}),
        ((256, 3), (64, 1), 128, {"log8": False}),
        ((1024, 2), (1024, 4), 72, {}),
        ((16, 4), 3, 64, {"log8": False}),  # a trellis and scalar levels
        (4, (256, 2), 128, {}),
    ],
)
def test_split(key, value, dim, options):
    tokens = 70
    key, value = (
        side(kind, 2, tokens, dim, seed=i, **options)
        if isinstance(kind, int)
        else trellis_side(*kind, 2, tokens, dim, seed=i, **options)
        for i, kind in enumerate((key, value))
    )
    query, bias = random(2, HEADS, 3, dim), random(2, HEADS, 3, seed=1)
    lengths = torch.tensor([tokens, 33], dtype=torch.int32, device=DEVICE)
    check_split(query, bias, key, value, tokens, dim**-0.5, lengths=lengths)


@pytest.mark.parametrize("page", [16, 64])
def test_split_over_pages_and_records(page):
    tokens, dim = 70, 64
    key, value = trellis_side(64, 3, 2, tokens, dim), trellis_side(256, 2, 2, tokens, dim, seed=1)
    paged_key, table = in_pages(key, page)
    paged_value, _ = in_pages(value, page)
    paged = in_records(paged_key, 1), in_records(paged_value, 0)
    query, bias = random(2, HEADS, 1, dim), random(2, HEADS, 1, seed=1)
    check_split(query, bias, key, value, tokens, dim**-0.5, paged=paged, table=table)


@pytest.mark.parametrize(
    ("states", "bits", "dim", "dtype", "paged"),
    [(16, 1, 64, BF16, False), (64, 3, 72, F32, True), (256, 4, 128, F32, False), (1024, 2, 256, BF16, True)],
)
def test_dequantize(states, bits, dim, dtype, paged):
    start, tokens, rows = 5, 66, 80
    packed = trellis_side(states, bits, 1, rows, dim, log8=paged)
    stored, table = in_pages(packed, 8) if paged else (packed, None)
    out = torch.empty(1, HEADS, tokens, dim, dtype=dtype, device=DEVICE)
    dequantize.dequantize(stored, out, start, table)
    want = reference.stored(packed, dim, torch.float64)[:, :, start : start + tokens]
    torch.testing.assert_close(out.double(), want, rtol=2.0**-7 if dtype == BF16 else 2.0**-22, atol=0.0)


def test_reference_states_are_the_codecs():
    from tqcompress.plugins.trellis import windows

    for states, bits in ((16, 1), (64, 3), (1024, 4)):
        codes = trellis_side(states, bits, 1, 9, 72).planes[0]
        window = states.bit_length() - 1
        assert torch.equal(reference.states(codes, bits, window, 72), windows(codes, bits, 72, states).long())
    assert encode_reference  # keeps the import above the kernels'
