"""Kernels for trellis codes against their references in float64."""

import pytest
import torch
from decode_helpers import HEADS, check_split, in_pages, in_records, random, side  # first: how the kernels run
from encode_helpers import POISON, ordinal, rotation, vectors
from kernels_helpers import DEVICE
from tqcompress.plugins.trellis import pack_string, search, windows
from trellis_helpers import table_of, trellis_side

from tqcompress_kernels import dequantize, encode_reference, encode_trellis, reference, trellis_reference
from tqcompress_kernels.encode import encode

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
    for states, bits in ((16, 1), (64, 3), (1024, 4)):
        codes = trellis_side(states, bits, 1, 9, 72).planes[0]
        window = states.bit_length() - 1
        assert torch.equal(reference.states(codes, bits, window, 72), windows(codes, bits, 72, states).long())


@pytest.mark.parametrize(("states", "bits", "dim"), [(16, 1, 64), (64, 3, 72), (256, 2, 128), (16, 4, 64)])
def test_reference_search_is_the_codecs(states, bits, dim):
    """Symbols in float64 and in float32 are the same but for ties."""
    x, (table, _) = random(40, dim), table_of(states, bits)
    symbols = trellis_reference.search(x.double(), table, bits)
    assert (symbols == search(x, table, bits)).all(1).double().mean() >= 0.95
    assert torch.equal(trellis_reference.pack(symbols, bits), pack_string(symbols, bits))


# -------------------------------------------------------------------------------------------------- encoding


def path_errors(codes, unit, table, bits):
    """float64: the squared errors of the paths that codes stand for."""
    found = reference.states(codes, bits, len(table).bit_length() - 1, unit.shape[-1])
    return (table.double()[found] - unit).square().sum(-1)


def check_paths(codes, unit, by, table, equal=0.9):
    """Paths are as good as those of `search`, but for what rounding vectors to the grid of the kernel explains.

    Coordinates are rounded by `grid / 2`, which moves the difference of two paths' errors by `grid` times the sum of
    the differences of their values. `equal`: the least share of vectors with the same codes.
    """
    dim = unit.shape[-1]
    symbols = search(unit.float().reshape(-1, dim), table, by.bits)
    want = path_errors(pack_string(symbols, by.bits).view(codes.shape), unit, table, by.bits)
    grid = by.step / 2 ** (by.point - by.group * by.bits + 1)
    assert (path_errors(codes, unit, table, by.bits) <= want + 2 * dim * grid * table.abs().max()).all()
    assert (codes == pack_string(symbols, by.bits).view(codes.shape)).all(-1).double().mean() >= equal


@pytest.mark.parametrize(
    ("states", "bits", "dim", "group", "dtype", "centred", "scale_format", "correct"),
    [
        (16, 1, 64, None, BF16, False, "fp16", True),
        (16, 2, 64, None, F32, True, "log8", True),
        (16, 3, 128, 2, BF16, False, "fp16", False),
        (16, 4, 72, None, torch.float16, True, "fp16", True),
        (64, 3, 64, None, F32, False, "fp16", True),
    ],
)
def test_encode(states, bits, dim, group, dtype, centred, scale_format, correct, monkeypatch):
    """In several chunks of tokens, into the middle of a store."""
    monkeypatch.setattr(encode_trellis, "CHUNK", 64 * HEADS)
    (batch, tokens), start = (1, 66) if bits == 1 else (2, 5), 3
    x, into = vectors(batch, tokens, dim, dtype), rotation("dense" if centred else "identity", dim)
    table, step = table_of(states, bits)
    mean = random(HEADS, dim, seed=1) if centred else None
    by = encode_trellis.trellis_encoder(into, mean, table, step, bits, scale_format, correct, group)
    codes = torch.full((batch, HEADS, tokens + 5, dim * bits // 8), POISON, dtype=torch.uint8, device=DEVICE)
    scale = torch.zeros(batch, HEADS, tokens + 5, 1, device=DEVICE)
    scale = scale.to(torch.float16 if scale_format == "fp16" else torch.uint8)
    encode(x, (codes,), scale, start, by)
    rows = slice(start, start + tokens)
    assert (codes[:, :, :start] == POISON).all() and (codes[:, :, rows.stop :] == POISON).all()
    y = (x.double() - (0 if mean is None else mean.double()[:, None])) @ into.double()
    unit = y * dim**0.5 / y.norm(dim=-1, keepdim=True)
    check_paths(codes[:, :, rows], unit, by, table)
    decoded = table.double()[reference.states(codes[:, :, rows], bits, states.bit_length() - 1, dim)]
    length = decoded.norm(dim=-1, keepdim=True) if correct else dim**0.5
    want = encode_reference.encode_scale(y.norm(dim=-1, keepdim=True) / length, scale_format)
    assert (ordinal(scale[:, :, rows]) - ordinal(want)).abs().max() <= 1


def test_encode_into_pages():
    dim, bits, page_tokens = 64, 2, 4
    x, into, (table, step) = vectors(2, 5, dim, F32), rotation("identity", dim), table_of(16, 2)
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:10].view(2, 5)
    slots[0, 4] = -1
    by = encode_trellis.trellis_encoder(into, None, table, step, bits, "fp16")
    pool = torch.full((4, HEADS, page_tokens, dim * bits // 8 + 3), POISON, dtype=torch.uint8, device=DEVICE)
    scale = torch.zeros(4, HEADS, page_tokens, 1, dtype=torch.float16, device=DEVICE)
    encode(x, (pool[..., 1:17],), scale, 0, by, slots.to(DEVICE))
    plain = torch.zeros(2, HEADS, 5, 16, dtype=torch.uint8, device=DEVICE)
    plain = plain, torch.zeros(2, HEADS, 5, 1, dtype=torch.float16, device=DEVICE)
    encode(x, plain[:1], plain[1], 0, by)
    want, want_scale = torch.full_like(pool, POISON), torch.zeros_like(scale)
    encode_reference.write(want[..., 1:17], plain[0], 0, slots)
    encode_reference.write(want_scale, plain[1], 0, slots)
    assert torch.equal(pool, want)
    assert torch.equal(scale, want_scale)


def test_encode_hostile_vectors():
    """Spikes, zeros, and what no format holds: finite codes, and scales that say so."""
    dim, (table, step) = 64, table_of(16, 2)
    x = torch.randn(1, HEADS, 8, dim, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 0
    x[:, :, 1] = 0
    x[:, :, 1, 5] = 7.0
    x[:, :, 2] = -3.5
    x[:, :, 3] *= 1e30
    x[:, :, 4, 3] = torch.inf
    x[:, :, 5, 3] = torch.nan
    x = x.to(DEVICE)
    by = encode_trellis.trellis_encoder(rotation("identity", dim), None, table, step, 2, "fp16")
    codes = torch.zeros(1, HEADS, 8, 16, dtype=torch.uint8, device=DEVICE)
    scale = torch.zeros(1, HEADS, 8, 1, dtype=torch.float16, device=DEVICE)
    encode(x, (codes,), scale, 0, by)
    finite = [1, 2, 6, 7]
    assert not scale[:, :, 0].any()
    assert scale[:, :, finite].isfinite().all()
    assert not scale[:, :, 3:6].isfinite().any()
    unit = x.double() * dim**0.5 / x.double().norm(dim=-1, keepdim=True)
    check_paths(codes[:, :, finite], unit[:, :, finite], by, table, equal=0.7)  # a spike leaves ties


def test_encoder_refuses():
    table, step = table_of(16, 2)
    with pytest.raises(ValueError, match="negatives"):
        encode_trellis.trellis_encoder(torch.eye(64)[None], None, table.abs(), step, 2, "fp16")
    with pytest.raises(ValueError, match="512 path costs"):
        encode_trellis.trellis_encoder(torch.eye(64)[None], None, *table_of(1024, 1), 1, "fp16")
