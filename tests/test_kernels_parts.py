"""Vectors whose first coordinates have more bits than the rest: the kernels against their naive references."""

import pytest
import torch
from decode_helpers import DEVICE, HEADS, check_split, in_pages, in_records, random, side
from encode_helpers import POISON, even_levels, gaussian_levels, rotation, vectors

from tqcompress_kernels import decode, dequantize, encode, encode_reference, reference
from tqcompress_kernels.encode_reference import decode_scale, pack, unpack
from tqcompress_kernels.packed import Packed, Wide

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def both(bits, count: int, batch: int, rows: int, dim: int, uniform=(False, False), **options) -> Packed:
    """Random codes: `bits[0]` for the first `count` coordinates, `bits[1]` for the others."""
    first = side(bits[0], batch, rows, count, uniform[0], seed=7, **options)
    rest = side(bits[1], batch, rows, dim - count, uniform[1], seed=8, **options)
    wide = Wide(count, first.levels, bits[0], None, first.uniform)
    return rest._replace(planes=first.planes + rest.planes, wide=wide)


def test_the_reference_reads_each_part_as_a_vector_of_its_own():
    packed = both((4, 2), 16, 1, 9, 64)
    stored = reference.stored(packed, 64, torch.float64)
    for first, count, part in packed.parts(64):
        assert part.wide is None
        assert torch.equal(stored[..., first : first + count], reference.stored(part, count, torch.float64))
    assert [part[:2] for part in packed.parts(64)] == [(0, 16), (16, 48)]


@pytest.mark.parametrize(
    ("key", "value", "dim"),
    [
        (((3, 2), 64), ((3, 2), 64), 128),
        (((3, 2), 32), ((4, 3), 96), 128),
        (((4, 2), 16), ((2, 1), 48), 64),
        (((8, 6), 16), ((5, 4), 64), 80),
        (((4, 3), 64), None, 96),
        (None, ((6, 5), 16), 40),
    ],
)
def test_split(key, value, dim):
    sides = [
        side(4, 1, 70, dim, uniform=True) if given is None else both(*given, 1, 70, dim, log8=log8)
        for given, log8 in ((key, True), (value, False))
    ]
    check_split(random(1, HEADS, 5, dim), random(1, HEADS, 5), *sides, 70, dim**-0.5)


def test_split_over_unaligned_records_and_pages():
    key, value = both((3, 2), 32, 2, 100, 64), both((2, 1), 16, 2, 100, 64, uniform=(True, True))
    (paged_key, table), (paged_value, _) = in_pages(key, 16), in_pages(value, 16)
    check_split(
        random(2, HEADS, 4, 64), torch.zeros(2, HEADS, 4, device=DEVICE), key, value, 100, 0.125,
        paged=(in_records(paged_key, 1), paged_value), table=table,
        lengths=torch.tensor([100, 60], device=DEVICE), softcap=5.0,
    )  # fmt: skip


@pytest.mark.parametrize("through", [decode.decode_attention, decode.through_op])
def test_attention(through):
    key, value = both((3, 2), 32, 1, 40, 64), both((4, 3), 16, 1, 40, 64)
    query, back = random(1, HEADS * 2, 1, 64), torch.linalg.qr(random(1, 64, 64, seed=2))[0].contiguous()
    none = query.new_empty(1, HEADS, 0, 64)
    rest = (back, back, None, None, (none, none), (none, none), 40, 0.125)
    got, got_lse = through(query, key, value, *rest)
    want, want_lse = reference.decode_attention(query.double(), key, value, *rest)
    assert (got - want).norm() < 2e-3 * want.norm()
    assert (got_lse - want_lse).abs().max() < 1e-4


def test_custom_op_is_sound():
    key, value = both((3, 2), 32, 1, 20, 64), side(2, 1, 20, 64)
    query, back = random(1, HEADS, 1, 64).half(), torch.eye(64, device=DEVICE)[None]
    arguments = (
        query, *key.flat, *value.flat, back, back, None, None, [], [], 20, 0.1, None, None, None, None, "plain", 1,
    )  # fmt: skip
    torch.library.opcheck(decode.decode_attention_op, arguments, test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------- encoding


class Target:
    """Planes and scales in bigger buffers full of poison."""

    def __init__(self, batch: int, tokens: int, dim: int, bits: int, wide: Wide, stray: int = 0):
        sizes = [plane.shape[-1] for plane in pack(torch.zeros(dim, dtype=torch.int64), bits, wide)]
        shape = batch, HEADS, tokens + 2, sum(sizes) + 2 + stray
        self.row = torch.full(shape, POISON, dtype=torch.uint8, device=DEVICE)
        views = self.row.split([*sizes, 2, stray], dim=-1)
        scale = torch.full((*shape[:3], 1), POISON, dtype=torch.uint8, device=DEVICE)
        self.planes, self.scale, self.bits, self.wide, self.dim = tuple(views[: len(sizes)]), scale, bits, wide, dim

    def take(self, start: int, tokens: int):
        """Codes and scales of some tokens; everything else must still be poison."""
        rows = slice(start, start + tokens)
        codes = unpack(tuple(plane[:, :, rows].clone() for plane in self.planes), self.bits, self.dim, self.wide)
        scale = self.scale[:, :, rows].clone()
        for field in (*self.planes, self.scale):
            field[:, :, rows] = POISON
        assert (self.row == POISON).all() and (self.scale == POISON).all(), "wrote where it should not"
        return codes, scale


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize(
    ("bits", "count", "dim", "dtype", "kind", "levels_of", "stray"),
    [
        ((3, 2), 64, 128, BF16, "hadamard", (gaussian_levels, gaussian_levels), 0),
        ((3, 2), 32, 64, BF16, "hadamard", (gaussian_levels, gaussian_levels), 1),
        ((4, 3), 96, 128, F16, "hadamard", (gaussian_levels, gaussian_levels), 0),
        ((4, 2), 16, 64, BF16, "dense", (gaussian_levels, gaussian_levels), 0),
        ((2, 1), 48, 80, F32, "dense", (even_levels, gaussian_levels), 0),
        ((8, 5), 16, 256, BF16, "hadamard", (even_levels, gaussian_levels), 0),
    ],
)
def test_encode(bits, count, dim, dtype, kind, levels_of, stray, tokens):
    x, into = vectors(2, tokens, dim, dtype), rotation(kind, dim)
    levels, wide = levels_of[1](bits[1]), Wide(count, levels_of[0](bits[0]), bits[0])
    target = Target(2, tokens + 3, dim, bits[1], wide, stray)
    encode.encode(x, target.planes, target.scale, 2, encode.encoder(into, None, levels, "log8", wide=wide))
    codes, stored = target.take(2, tokens)
    # Each part by the check of whole vectors: units and norms are those of all coordinates.
    expected, unit, scale = encode_reference.quantize(x.double(), into, None, levels.double(), wide=wide)
    assert (codes != expected).sum() <= 1 + 1e-3 * codes.numel()
    assert ((codes - expected).abs() <= 1).all()
    for part, book in encode_reference.books(levels.double(), wide):
        borders, found = (book[1:] + book[:-1]) / 2, codes[..., part]
        off = found != expected[..., part]
        near = unit[..., part][off] - borders[torch.minimum(found, expected[..., part])[off]]
        assert (near.abs() <= 2.0**-24 * dim**1.5 * 4).all()
    assert ((decode_scale(stored) / scale).log2().abs() <= 1 / 32 + 1e-3).all()


@pytest.mark.parametrize(("bits", "count", "dim", "dtype"), [((3, 2), 64, 128, BF16), ((4, 2), 16, 72, F32)])
def test_dequantize(bits, count, dim, dtype):
    packed = both(bits, count, 2, 80, dim)
    buffer = torch.full((2, 73, HEADS, dim + 8), -7.0, dtype=dtype, device=DEVICE)
    out = buffer[:, :70, :, :dim].transpose(1, 2)
    dequantize.dequantize(packed, out, 5)
    expected = torch.empty_like(out)
    encode_reference.dequantize(packed.planes, packed.scale, packed.levels, expected, 5, wide=packed.wide)
    torch.testing.assert_close(out, expected, rtol={F32: 4 * 2.0**-24, BF16: 2.0**-7}[dtype], atol=0.0)
    again = torch.empty_like(out).contiguous()
    planes, scale, levels, b, _, uniform, window, *wide = packed.flat
    dequantize.dequantize_op(planes, scale, levels, b, uniform, window, again, 5, None, *wide)
    assert torch.equal(again, out)
    out.fill_(-7.0)
    assert (buffer == -7.0).all(), "wrote where it should not"
