"""What `levels()` of a codec says is all that a kernel needs to do the codec's work: both, naively, in float64."""

import pytest
import torch
from codec_helpers import HEADS, U, build, contract_cases, rotation_bound, vectors

from tqcompress import Codec, ScalarLevels
from tqcompress.packing import unpack

CASES = [case for case in contract_cases() if isinstance(build(*case.values[0]).levels(), ScalarLevels)]


@pytest.fixture(params=CASES)
def codec(request) -> Codec:
    return build(*request.param)


@pytest.fixture
def levels(codec) -> ScalarLevels:
    return codec.levels()


def decode(packed: dict[str, torch.Tensor], levels: ScalarLevels) -> tuple[torch.Tensor, torch.Tensor]:
    """What `packed` stands for by `ScalarLevels` alone, in float64: in the stored basis, and back in the model's."""
    codes, stored = unpack(packed, levels.bits, levels.into.shape[-1]), packed["scale"].double()
    scale = stored if levels.scale_format == "fp16" else torch.where(stored == 0, 0.0, 2 ** ((stored - 128) / 16))
    vectors = levels.levels.double()[codes] * scale
    mean = 0 if levels.mean is None else levels.mean.double()[:, None]
    return vectors, vectors @ levels.back.double() + mean


def units_of(x: torch.Tensor, levels: ScalarLevels) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be coded of `x`, in float64: `y * sqrt(dim) / |y|` and `|y|`."""
    y = (x.double() - (0 if levels.mean is None else levels.mean.double()[:, None])) @ levels.into.double()
    norm = y.norm(dim=-1, keepdim=True)
    return y * y.shape[-1] ** 0.5 / torch.where(norm == 0, 1.0, norm), norm


def test_scalar_levels_are_what_they_promise(codec, levels):
    dim = codec.shape.head_dim
    assert levels.bits == codec.bits
    assert levels.levels.shape == (2**levels.bits,)
    assert (levels.levels.diff() > 0).all()
    assert levels.levels.dtype == levels.into.dtype == levels.back.dtype == torch.float32
    assert levels.into.shape == levels.back.shape and levels.into.shape[1:] == (dim, dim)
    assert levels.into.shape[0] in (1, HEADS)
    assert levels.mean is None or levels.mean.shape == (HEADS, dim)
    assert {"fp16": torch.float16, "log8": torch.uint8}[levels.scale_format] == codec.layout().fields["scale"].dtype
    # As in the rotations' own tests: a float32 matrix is orthogonal, or inverted, to 2 U an entry.
    product = levels.into.double() @ levels.back.double() - torch.eye(dim, dtype=torch.float64)
    assert product.abs().max() <= 2.01 * U
    if levels.step is not None:
        shift = 0.5 if levels.bits == 8 else 0
        numbers = levels.levels.double() / levels.step - shift
        assert (numbers - numbers.round()).abs().max() <= 127.5 * 2 * U
        assert (numbers + shift).abs().max() < 128
        assert torch.equal(levels.back, levels.into.mT)


def test_decoding_by_scalar_levels_is_decode(codec, levels):
    packed = codec.encode(vectors(codec))
    stored, decoded = decode(packed, levels)
    norm, bound = decoded.norm(dim=-1), rotation_bound(codec.shape.head_dim)
    # One float32 rotation in the codec; scales of powers of two and products with levels round by a few U.
    assert ((codec.decode(packed) - decoded).norm(dim=-1) <= (bound + 20 * U) * norm).all()
    if levels.mean is None:
        assert ((codec.decode_rotated(packed) - stored).norm(dim=-1) <= 20 * U * norm).all()
    query = vectors(codec, seed=3)
    rotated = query.double() @ levels.back.double().mT
    assert ((codec.rotate(query) - rotated).norm(dim=-1) <= bound * query.norm(dim=-1)).all()


def test_encoding_by_scalar_levels_is_encode(codec, levels):
    x, dim = vectors(codec), codec.shape.head_dim
    x[0, 0, 0] = 0
    packed = codec.encode(x)
    codes = unpack(packed, levels.bits, dim)
    units, norm = units_of(x, levels)
    borders = (levels.levels[1:].double() + levels.levels[:-1].double()) / 2
    # A float32 rotation and norm, of vectors of the length sqrt(dim), may push a coordinate over a border.
    slack = (2 * rotation_bound(dim) + (dim + 10) * U) * dim**0.5
    assert (codes >= torch.bucketize(units - slack, borders)).all()
    assert (codes <= torch.bucketize(units + slack, borders)).all()
    # Zeros have nothing to round.
    assert (codes[0, 0, 0] == torch.bucketize(torch.zeros(1).double(), borders)).all()
    length = levels.levels.double()[codes].norm(dim=-1, keepdim=True) if levels.norm_correction else dim**0.5
    expected, stored = norm / length, packed["scale"].double()
    assert stored[0, 0, 0] == 0
    arithmetic = rotation_bound(dim) + (2 * dim + 10) * U
    if levels.scale_format == "fp16":
        assert ((stored - expected).abs() <= (2.0**-11 + arithmetic) * expected).all()
    else:
        there = expected > 0
        off = (stored[there] - 128) / 16 - expected[there].log2()
        assert (off.abs() <= 1 / 32 + 2 * arithmetic + 16 * U).all()
