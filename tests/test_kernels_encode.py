"""The encoding kernels against their naive reference, in float64."""

import math

import pytest
import torch
from encode_helpers import HEADS, POISON, Target, U, check, even_levels, gaussian_levels, ordinal, rotation, vectors
from kernels_helpers import DEVICE

from tqcompress import HeadShape, TensorSpec, packing
from tqcompress.plan import build_codec
from tqcompress_kernels import dequantize, encode, encode_reference
from tqcompress_kernels.encode_reference import decode_scale, encode_scale, pack, quantize, read, unpack, write
from tqcompress_kernels.packed import Packed

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# bits, levels, dim, dtype, rotation, mean, scale, norm correction
CASES = [
    (1, gaussian_levels, 128, BF16, "hadamard", False, "fp16", True),
    (2, gaussian_levels, 64, F16, "hadamard", True, "log8", True),
    (2, even_levels, 128, BF16, "hadamard", False, "fp16", True),
    (3, gaussian_levels, 128, BF16, "hadamard", True, "fp16", True),
    (3, gaussian_levels, 72, F32, "dense", False, "log8", True),
    (3, gaussian_levels, 256, BF16, "hadamard", False, "fp16", False),
    (4, gaussian_levels, 128, F32, "hadamard", False, "fp16", True),
    (4, gaussian_levels, 128, F16, "dense", True, "fp16", True),
    (4, gaussian_levels, 80, BF16, "dense", True, "log8", False),
    (4, even_levels, 64, F16, "hadamard", False, "fp16", True),
    (5, gaussian_levels, 192, BF16, "dense", False, "fp16", True),
    (6, gaussian_levels, 128, BF16, "hadamard", False, "log8", True),
    (7, gaussian_levels, 72, F16, "identity", True, "fp16", True),
    (8, gaussian_levels, 128, BF16, "hadamard", False, "fp16", True),
    (8, even_levels, 128, BF16, "dense", False, "fp16", True),
]


# Few vectors are encoded without a matrix product; more in tiles, that may run on over the batch or not.
@pytest.mark.parametrize(
    ("case", "batch", "tokens"),
    [(case, 3, 7) for case in CASES] + [(CASES[i], 2, 1) for i in (2, 3, 5, 8)] + [(CASES[3], 1, 150)],
)
def test_encode(case, batch, tokens):
    bits, levels_of, dim, dtype, kind, centred, scale_format, norm_correction = case
    x, into, levels = vectors(batch, tokens, dim, dtype), rotation(kind, dim), levels_of(bits)
    mean = torch.randn(HEADS, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE) if centred else None
    target = Target(batch, tokens + 5, dim, bits, scale_format)
    by = encode.encoder(into, mean, levels, scale_format, norm_correction)
    encode.encode(x, target.planes, target.scale, 3, by)
    check(*target.take(3, tokens), x, into, mean, levels, scale_format, norm_correction)


@pytest.mark.parametrize("bits", [3, 8])
def test_encode_is_what_the_codec_does(bits):
    codec = build_codec(TensorSpec("turboquant", bits), HeadShape(HEADS, 64, "key", BF16)).to(DEVICE)
    scalar, x = codec.levels(), vectors(2, 9, 64, BF16)
    target = Target(2, 12, 64, bits, scalar.scale_format)
    by = encode.encoder(scalar.into, scalar.mean, scalar.levels, scalar.scale_format, scalar.norm_correction)
    encode.encode(x, target.planes, target.scale, 1, by)
    codes, stored = target.take(1, 9)
    packed = codec.encode(x)
    assert (codes != packing.unpack(packed, bits, 64)).sum() <= 1
    assert (ordinal(stored) - ordinal(packed["scale"])).abs().max() <= 1


@pytest.mark.parametrize("case", [CASES[8], CASES[3]])
def test_encode_with_a_streamed_matrix(case, monkeypatch):
    """Where shared memory does not hold the matrix, and with several programs a head."""
    monkeypatch.setattr(encode, "_tiling", lambda *_: encode._Tiling(64, False, 3 * HEADS, {"num_warps": 4}))
    test_encode(case, 2, 70)


@pytest.mark.parametrize("interleaved", [False, True])
def test_encode_into_pages(interleaved):
    dim, bits, pages, page_tokens = 64, 3, 7, 4
    x, into, levels = vectors(2, 9, dim, BF16), rotation("hadamard", dim), gaussian_levels(bits)
    slots = torch.randperm(pages * page_tokens, generator=torch.Generator().manual_seed(0))[:18].view(2, 9)
    slots[0, 4] = slots[1, 0] = -1
    slots = slots.to(DEVICE)
    row = dim * bits // 8 + 2
    stride = row + 1 if interleaved else row  # an engine's rows may be aligned to nothing
    pool = torch.full((pages, HEADS, page_tokens, stride), POISON, dtype=torch.uint8, device=DEVICE)
    if interleaved:
        fields = [pool[..., :16], pool[..., 16:24], pool[..., 25:26]]
    else:
        fields = [torch.full((pages, HEADS, page_tokens, n), POISON, dtype=torch.uint8) for n in (16, 8, 1)]
        fields = [field.to(DEVICE) for field in fields]
    expected = [field.clone() for field in fields]
    by = encode.encoder(into, None, levels, "log8")
    encode.encode(x, tuple(fields[:2]), fields[2], 0, by, slots)
    codes, _, scale = quantize(x.double(), into, None, levels)
    for field, rows in zip(expected, (*pack(codes, bits), encode_scale(scale, "log8")), strict=True):
        write(field, rows, 0, slots)
    different = torch.stack([(a != b).any(-1) for a, b in zip(fields, expected, strict=True)]).any(0)
    assert different.sum() <= 1, "a tie, at most"
    if interleaved:
        assert (pool[..., 24] == POISON).all()
        assert (pool[..., 26] == POISON).all()


@pytest.mark.parametrize("scale_format", ["fp16", "log8"])
@pytest.mark.parametrize(("bits", "levels_of"), [(4, gaussian_levels), (8, even_levels)])
def test_encode_hostile_vectors(bits, levels_of, scale_format):
    dim, into, levels = 128, rotation("hadamard", 128), levels_of(bits)
    x = torch.randn(1, HEADS, 20, dim, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 0.0
    x[:, :, 1] = 3.5
    x[:, :, 2] = 0.0
    x[:, :, 2, 5] = -2.0
    x[:, :, 3] *= 1e30
    x[:, :, 4] *= 1e-30
    x[:, :, 5] *= 1e-40
    x[:, :, 6, 7] = math.inf
    x[:, :, 7, 7] = math.nan
    x[:, :, 8, 9] = 1e4
    x[:, :, 9] *= 2e5
    x[:, :, 10] *= 1e-7
    x = x.to(DEVICE)
    target = Target(1, 20, dim, bits, scale_format)
    encode.encode(x, target.planes, target.scale, 0, encode.encoder(into, None, levels, scale_format))
    codes, stored = target.take(0, 20)
    expected, _, scale = quantize(x, into, None, levels)  # in float32, as codecs do
    plain = encode_scale(scale, scale_format)
    refused = plain == 255 if scale_format == "log8" else ~plain.isfinite()
    assert torch.equal(stored == 255 if scale_format == "log8" else ~stored.isfinite(), refused)
    assert refused[:, :, [3, 6, 7]].all()
    assert ((ordinal(stored) - ordinal(plain)).abs() <= 1)[~refused].all()
    assert (decode_scale(stored)[:, :, [0, 4, 5]] == 0).all()
    ordinary = (~refused & (decode_scale(stored) != 0))[..., 0]  # the codes of others say nothing
    assert (codes != expected)[ordinary].sum() <= 1
    assert (codes[:, :, 0] == 2 ** (bits - 1) - 1).all()


def stored_side(batch, rows, dim, bits, scale_format, levels) -> Packed:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (batch, HEADS, rows, dim), generator=generator)
    scale = torch.rand(batch, HEADS, rows, 1, generator=generator) * 3
    scale[:, :, 1] = 0.0
    planes = tuple(plane.to(DEVICE) for plane in pack(codes, bits))
    even = bool((levels.diff() - levels.diff()[0]).abs().max() < 1e-6)
    return Packed(planes, encode_scale(scale, scale_format).to(DEVICE), levels, bits, uniform=even)


@pytest.mark.parametrize(
    ("bits", "levels_of", "dim", "dtype", "scale_format", "paged"),
    [
        (1, gaussian_levels, 64, BF16, "fp16", False),
        (2, gaussian_levels, 128, F16, "log8", True),
        (3, gaussian_levels, 72, F32, "fp16", True),
        (4, gaussian_levels, 128, BF16, "fp16", False),
        (4, even_levels, 96, F32, "log8", False),
        (5, gaussian_levels, 256, F16, "fp16", False),
        (6, gaussian_levels, 128, BF16, "fp16", True),
        (7, gaussian_levels, 72, F32, "log8", False),
        (8, gaussian_levels, 192, BF16, "fp16", False),
        (8, even_levels, 128, F32, "fp16", True),
    ],
)
def test_dequantize(bits, levels_of, dim, dtype, scale_format, paged):
    start, tokens = 5, 70
    if paged:
        packed = stored_side(12, 8, dim, bits, scale_format, levels_of(bits))
        table = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:10].view(1, 10).int().to(DEVICE)
    else:
        packed, table = stored_side(1, 80, dim, bits, scale_format, levels_of(bits)), None
    buffer = torch.full((1, tokens + 3, HEADS, dim + 8), -7.0, dtype=dtype, device=DEVICE)
    out = buffer[:, :tokens, :, :dim].transpose(1, 2)
    dequantize.dequantize(packed, out, start, table)
    expected = torch.empty_like(out)
    encode_reference.dequantize(packed.planes, packed.scale, packed.levels, expected, start, table)
    torch.testing.assert_close(out, expected, rtol={F32: 4 * U, F16: 2.0**-10, BF16: 2.0**-7}[dtype], atol=0.0)
    out.fill_(-7.0)
    assert (buffer == -7.0).all(), "wrote where it should not"


def test_dequantize_unaligned_rows():
    levels = gaussian_levels(6)
    packed = stored_side(1, 9, 64, 6, "fp16", levels)
    row = torch.zeros(1, HEADS, 9, 51, dtype=torch.uint8, device=DEVICE)
    planes = (row[..., 1:33], row[..., 33:49])
    for plane, rows in zip(planes, packed.planes, strict=True):
        plane.copy_(rows)
    out, expected = torch.empty(2, 1, HEADS, 9, 64, device=DEVICE)
    dequantize.dequantize(packed._replace(planes=planes), out, 0)
    dequantize.dequantize(packed, expected, 0)
    assert out.equal(expected)


def test_operators():
    x, levels = vectors(2, 1, 64, BF16).contiguous(), gaussian_levels(4)
    target = Target(2, 4, 64, 4, "fp16")
    by = encode.encoder(rotation("hadamard", 64), None, levels, "fp16")
    planes, checks = [plane.contiguous() for plane in target.planes], ("test_schema", "test_faketensor")
    torch.library.opcheck(encode.encode_op, (x, planes, target.scale.contiguous(), 1, *by, None), test_utils=checks)
    out = torch.empty(2, HEADS, 2, 64, device=DEVICE)
    arguments = (planes, target.scale.contiguous(), levels, 4, False, 0, out, 1, None)
    torch.library.opcheck(dequantize.dequantize_op, arguments, test_utils=checks)


def test_encoder_refuses():
    with pytest.raises(ValueError, match="head_dim: found 100"):
        encode.encoder(torch.eye(100)[None], None, gaussian_levels(2), "fp16")
    with pytest.raises(ValueError, match="symmetric"):
        encode.encoder(torch.eye(64)[None], None, torch.tensor([-1.0, 0.0, 1.0, 2.0]), "fp16")


def test_reference_reads_what_it_writes():
    codes = torch.randint(0, 32, (2, HEADS, 6, 40), generator=torch.Generator().manual_seed(0))
    planes = pack(codes, 5)
    assert torch.equal(unpack(planes, 5, 40), codes)
    pages = torch.zeros(4, HEADS, 4, planes[0].shape[-1], dtype=torch.uint8)
    table = torch.tensor([[2, 0], [3, 1]])
    token = torch.arange(6)
    write(pages, planes[0], 0, table[:, token // 4] * 4 + token % 4)
    assert torch.equal(read(pages, 0, 6, table), planes[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_encode_beyond_31_bits_and_in_a_graph():
    tokens, dim = (2**31 // (2 * 128)) + 100, 128
    x = torch.zeros(1, HEADS, tokens, dim, dtype=BF16, device=DEVICE)
    x[:, :, -20:] = vectors(1, 20, dim, BF16)
    into, levels = rotation("hadamard", dim), gaussian_levels(3)
    target = Target(1, tokens, dim, 3, "fp16")
    by = encode.encoder(into, None, levels, "fp16")
    encode.encode(x[:, :, -40:], target.planes, target.scale, tokens - 40, by)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode.encode(x, target.planes, target.scale, 0, by)
    graph.replay()
    codes = unpack(tuple(plane[:, :, tokens - 20 : tokens] for plane in target.planes), 3, dim)
    check(codes, target.scale[:, :, tokens - 20 : tokens], x[:, :, -20:], into, None, levels, "fp16", True)
    assert (target.scale[:, :, : tokens - 20] == 0).all()
