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


def parts(levels: ScalarLevels) -> list[tuple[slice, torch.Tensor, int, str]]:
    """Coordinates, levels, bits and the planes' name of the parts of a vector."""
    wide, dim = levels.wide, levels.into.shape[-1]
    first = wide.dim if wide else 0
    rest = (slice(first, dim), levels.levels, levels.bits, "codes")
    return [(slice(first), wide.levels, wide.bits, "wide"), rest] if wide else [rest]


def decoded_levels(packed: dict[str, torch.Tensor], levels: ScalarLevels) -> torch.Tensor:
    """The levels of the codes, float64."""
    found = [
        book.double()[unpack(packed, bits, len(range(*part.indices(levels.into.shape[-1]))), name)]
        for part, book, bits, name in parts(levels)
    ]
    return torch.cat(found, dim=-1)


def decode(packed: dict[str, torch.Tensor], levels: ScalarLevels) -> tuple[torch.Tensor, torch.Tensor]:
    """What `packed` stands for by `ScalarLevels` alone, in float64: in the stored basis, and back in the model's."""
    stored = packed["scale"].double()
    scale = stored if levels.scale_format == "fp16" else torch.where(stored == 0, 0.0, 2 ** ((stored - 128) / 16))
    vectors = decoded_levels(packed, levels) * scale
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
    fraction = codec.spec.bits - codec.bits
    assert (levels.wide is None) == (fraction == 0)
    if levels.wide:
        assert levels.wide.bits == codec.bits + 1
        assert levels.wide.dim == pytest.approx(fraction * dim)
    for _, book, bits, _ in parts(levels):
        assert book.shape == (2**bits,)
        assert (book.diff() > 0).all()
    assert levels.levels.dtype == levels.into.dtype == levels.back.dtype == torch.float32
    assert levels.into.shape == levels.back.shape and levels.into.shape[1:] == (dim, dim)
    assert levels.into.shape[0] in (1, HEADS)
    assert levels.mean is None or levels.mean.shape == (HEADS, dim)
    assert {"fp16": torch.float16, "log8": torch.uint8}[levels.scale_format] == codec.layout().fields["scale"].dtype
    # As in the rotations' own tests: a float32 matrix is orthogonal, or inverted, to 2 U an entry.
    product = levels.into.double() @ levels.back.double() - torch.eye(dim, dtype=torch.float64)
    assert product.abs().max() <= 2.01 * U
    for one in (levels, levels.wide):
        if one is None or one.step is None:
            continue
        shift = 0.5 if one.bits == 8 else 0
        numbers = one.levels.double() / one.step - shift
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
    units, norm = units_of(x, levels)
    # A float32 rotation and norm, of vectors of the length sqrt(dim), may push a coordinate over a border.
    slack = (2 * rotation_bound(dim) + (dim + 10) * U) * dim**0.5
    for part, book, bits, name in parts(levels):
        unit, borders = units[..., part].contiguous(), (book[1:].double() + book[:-1].double()) / 2
        codes = unpack(packed, bits, unit.shape[-1], name)
        assert (codes >= torch.bucketize(unit - slack, borders)).all()
        assert (codes <= torch.bucketize(unit + slack, borders)).all()
        # Zeros have nothing to round.
        assert (codes[0, 0, 0] == torch.bucketize(torch.zeros(1).double(), borders)).all()
    length = decoded_levels(packed, levels).norm(dim=-1, keepdim=True) if levels.norm_correction else dim**0.5
    expected, stored = norm / length, packed["scale"].double()
    assert stored[0, 0, 0] == 0
    arithmetic = rotation_bound(dim) + (2 * dim + 10) * U
    if levels.scale_format == "fp16":
        assert ((stored - expected).abs() <= (2.0**-11 + arithmetic) * expected).all()
    else:
        there = expected > 0
        off = (stored[there] - 128) / 16 - expected[there].log2()
        assert (off.abs() <= 1 / 32 + 2 * arithmetic + 16 * U).all()
