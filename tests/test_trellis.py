"""What only the trellis codec promises: the string of bits, the search, the shipped tables."""

from functools import cache

import pytest
import torch
from codec_helpers import U, build, rotation_bound
from torch import Tensor
from tqcompress.plugins.trellis import pack_string, search, shipped_table, shipped_tables, windows

from tqcompress import Codec, HeadShape, RecipeError, TensorSpec
from tqcompress.plan import build_codec

U16 = 2.0**-11  # unit roundoff of float16

STATES, BITS = (16, 64, 256, 1024), (1, 2, 3, 4)


def trellis(bits: int, dim: int = 128, **options) -> Codec:
    return build("trellis", bits, "key", dim, tuple(options.items()))


@cache
def gaussian(vectors: int, dim: int) -> Tensor:
    return torch.randn(vectors, dim, generator=torch.Generator().manual_seed(5))


def naive_decode(codes: list[int], table: list[float], bits: int) -> list[float]:
    """The documented format, a bit at a time."""
    string = [byte >> place & 1 for byte in codes for place in range(8)]
    length = len(table).bit_length() - 1
    return [
        table[sum(string[(start + j) % len(string)] << j for j in range(length))]
        for start in range(0, len(string), bits)
    ]


def naive_search(x: Tensor, table: Tensor, bits: int) -> Tensor:
    """float64 `[vectors]`: the least squared errors of closed paths, by trying every overlap at the seam."""
    table, x = table.double(), x.double()
    overlaps = len(table) >> bits
    costs = torch.full((overlaps, overlaps, len(x)), torch.inf, dtype=torch.float64)  # [now, at the seam, vector]
    costs.diagonal().zero_()
    for i in range(x.shape[1]):
        reached = torch.full_like(costs, torch.inf)
        for state, value in enumerate(table):
            path = costs[state % overlaps] + (x[:, i] - value) ** 2
            reached[state >> bits] = torch.minimum(reached[state >> bits], path)
        costs = reached
    return costs.diagonal().amin(-1)


def squared_errors(x: Tensor, table: Tensor, bits: int) -> Tensor:
    """float64 `[vectors]`: of the paths that `search` finds."""
    states = windows(pack_string(search(x, table, bits), bits), bits, x.shape[1], len(table))
    return (table[states] - x).double().square().sum(-1)


# -------------------------------------------------------------------------------------------------- the string


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_reads_the_documented_string(bits, dim):
    for states in STATES:
        codec = trellis(bits, dim, states=states)
        codes = torch.randint(256, (1, 2, 3, dim * bits // 8), generator=torch.Generator().manual_seed(1))
        decoded = codec.dequantize({"codes": codes.to(torch.uint8)})
        table = codec.codebook.tolist()
        expected = [naive_decode(row, table, bits) for row in codes.flatten(0, 2).tolist()]
        assert decoded.shape == (1, 2, 3, dim)
        assert decoded.flatten(0, 2).tolist() == expected


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_quantize_says_what_it_stores(bits, dim):
    codec = trellis(bits, dim)
    packed, decoded = codec.quantize(gaussian(6, dim).view(1, 2, 3, dim))
    assert torch.equal(decoded, codec.dequantize(packed))
    rows = packed["codes"].flatten(0, 2).tolist()
    assert decoded.flatten(0, 2).tolist() == [naive_decode(row, codec.codebook.tolist(), bits) for row in rows]


@pytest.mark.parametrize("bits", BITS)
def test_the_string_is_the_symbols_in_their_order(bits):
    symbols = torch.randint(2**bits, (5, 16), generator=torch.Generator().manual_seed(2))
    string = sum(symbols[:, i] << bits * i for i in range(15))  # the last might reach the sign bit
    packed = pack_string(symbols, bits).long()
    assert packed.shape == (5, 2 * bits)
    little_endian = sum(packed[:, j] << 8 * j for j in range(2 * bits))
    assert torch.equal(little_endian & ((1 << 15 * bits) - 1), string)
    assert torch.equal(windows(pack_string(symbols, bits), bits, 16, 16) % 2**bits, symbols)


def test_a_string_of_one_byte_wraps_around_onto_itself():
    table = [float(state) for state in range(64)]
    for byte in range(256):
        states = windows(torch.tensor([byte], dtype=torch.uint8), 2, 4, 64)
        assert states.tolist() == naive_decode([byte], table, 2)


# -------------------------------------------------------------------------------------------------- the search


SMALL = [(16, 1, 64), (16, 2, 64), (16, 3, 32), (16, 4, 8), (64, 1, 64), (64, 2, 64), (64, 3, 64), (64, 4, 32)]


@pytest.mark.parametrize(("states", "bits", "dim"), SMALL)
def test_search_is_nearly_optimal(states, bits, dim):
    """Two passes can miss the best overlap at the seam: by 1 % of the error at most, on vectors that are short."""
    x, table = gaussian(40, dim), shipped_table(states, bits)
    least, found = naive_search(x, table, bits), squared_errors(x, table, bits)
    # Subtracting in float32 rounds by 8 U at most, below 8; of errors below 8 that is 2 * 8 * 8 U a coordinate.
    assert (found >= least - dim * 128 * U).all()
    assert found.mean() <= 1.01 * least.mean()


def test_naive_search_agrees_with_all_strings():
    x, table = gaussian(5, 6), shipped_table(16, 2)
    strings = torch.arange(2**12)
    state = torch.stack([((strings | strings << 12) >> 2 * i) & 15 for i in range(6)], -1)
    errors = (table[state][:, None].double() - x.double()).square().sum(-1)
    assert torch.allclose(errors.amin(0), naive_search(x, table, 2), rtol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_chunks_do_not_change_the_paths(bits, monkeypatch):
    x, table = gaussian(50, 64), shipped_table(64, bits)
    whole = search(x, table, bits)
    monkeypatch.setattr("tqcompress.plugins.trellis.CHUNK_BYTES", 2**17)
    assert torch.equal(search(x, table, bits), whole)


# -------------------------------------------------------------------------------------------------- the tables


# Mean squared errors a coordinate of the 2000 vectors below, and four standard errors more.
BOUNDS = {
    16: (0.3079, 0.0915, 0.02881, 0.00984),
    64: (0.2939, 0.0804, 0.02204, 0.00628),
    256: (0.2843, 0.0757, 0.02036, 0.00574),
    1024: (0.2804, 0.0731, 0.01891, 0.00542),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("states", STATES)
def test_distortion_of_the_shipped_tables(states, bits):
    errors = squared_errors(gaussian(2000, 128), shipped_table(states, bits), bits) / 128
    assert errors.mean() <= BOUNDS[states][bits - 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("states", STATES)
def test_shipped_tables_are_on_the_int8_grid_without_zero(states, bits):
    entries = shipped_tables()[f"states{states}.bits{bits}"]
    assert entries.dtype == torch.int8
    assert entries.shape == (states,)
    assert entries.min() >= -127
    assert entries.all()
    assert torch.equal(entries, -entries.flip(0))


# -------------------------------------------------------------------------------------------------- the codec


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_keeps_norms(bits, dim):
    codec = trellis(bits, dim)
    x = (gaussian(50, dim) * torch.logspace(-2, 3, 50)[:, None])[None, None]
    ratio = codec.decode(codec.encode(x)).double().norm(dim=-1) / x.double().norm(dim=-1)
    # As for turboquant: two rotations, two norms and three operations in float32, and the float16 scale.
    assert ((ratio - 1).abs() <= U16 + 2 * rotation_bound(dim) + (dim + 5) * U).all()


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits, dim):
    assert trellis(bits, dim).layout().nbytes_per_token == dim * bits / 8 + 2
    assert trellis(bits, dim, scale="log8").layout().nbytes_per_token == dim * bits / 8 + 1


@pytest.mark.parametrize("norm_correction", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits, norm_correction):
    codec = trellis(bits, 64, states=16, norm_correction=norm_correction)
    packed = codec.encode(torch.zeros(1, 2, 3, 64))
    assert not packed["scale"].any()
    assert not codec.decode(packed).any()


def test_better_than_scalar_levels():
    """The reason to have it: at 2 bits 256 states are worth a third of the error of the best scalar levels."""
    x = gaussian(200, 128)[None, None]
    errors = [
        (codec.decode(codec.encode(x)) - x).square().mean().item()
        for codec in (trellis(2), build("turboquant", 2, "key", 128, ()))
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(
    ("bits", "dim", "options", "match"),
    [
        (3, 45, {}, r"^bits: found 3; head_dim 45 times bits must be a multiple of 8"),
        (1, 8, {"states": 1024}, r"^states: found 1024; head_dim 8 has 8 bits, enough for 256"),
        (5, 64, {}, r"^bits: found 5; trellis supports 1, 2, 3, 4"),
    ],
)
def test_refused(bits, dim, options, match):
    with pytest.raises(RecipeError, match=match):
        build_codec(TensorSpec("trellis", bits, options), HeadShape(1, dim, "key"))


def test_unknown_numbers_of_states_are_refused():
    with pytest.raises(ValueError, match="states"):
        build_codec(TensorSpec("trellis", 2, {"states": 32}), HeadShape(1, 64, "key"))
