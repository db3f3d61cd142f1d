"""What only one codec promises: turboquant, affine and exact."""

import math

import pytest
import torch
from codec_helpers import U, build, rotation_bound, vectors

from tqcompress import Codec, HeadShape, RecipeError, TensorSpec
from tqcompress.codebook import distortion
from tqcompress.packing import unpack
from tqcompress.plan import build_codec

U16 = 2.0**-11  # unit roundoff of float16
TINY16 = 2.0**-25  # half the smallest float16: its absolute error near zero


# ---------------------------------------------------------------------------------------------- turboquant


def turboquant(bits: int, dim: int = 128, **options) -> Codec:
    return build("turboquant", bits, "key", dim, tuple(options.items()))


def gaussian(codec: Codec, tokens: int) -> torch.Tensor:
    return torch.randn(1, 1, tokens, codec.shape.head_dim, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("options", [{}, {"rotation": "dense"}, {"levels": "e4m3"}, {"levels": "uniform"}], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_turboquant_distortion_is_that_of_its_codebook(bits, dim, options):
    """The direction of a Gaussian vector is uniform on the sphere, exactly the law the codebook is made for."""
    codec, count = turboquant(bits, dim, **options), 2000
    x = gaussian(codec, count)
    packed = codec.encode(x)
    rotated = codec.rotate(x)
    unit = rotated / rotated.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    level = codec.codebook[unpack(packed, bits, dim)]
    per_vector = (unit - level).double().square().mean(-1).flatten()
    # Independent vectors, so the mean is normal around the expectation: 5 standard errors. Rounding of the
    # levels and of unit to float32 moves an error e by at most about 2 e sqrt(dim) U: far below.
    expected = distortion(codec.codebook.double().numpy(), dim)
    assert abs(per_vector.mean() - expected) <= 5 * per_vector.std() / math.sqrt(count)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_decoded_error_after_norm_correction(bits, dim):
    """With c the level vector and t its angle to x: |x - c|^2 >= sin(t)^2 |x|^2, and x' = |x| c/|c| has the
    error (2 - 2 cos t) |x|^2 = sin(t)^2 * 2 / (1 + cos t) |x|^2. So norm correction costs at most the factor
    2 / (1 + cos t) of each vector over the plain levels."""
    codec = turboquant(bits, dim)
    x = gaussian(codec, 500)
    decoded = codec.decode(codec.encode(x))
    error = ((decoded - x).double().norm(dim=-1) / x.double().norm(dim=-1)).square().flatten()
    cos = torch.nn.functional.cosine_similarity(decoded.double(), x.double(), dim=-1).flatten()
    unit = codec.rotate(x)
    unit = unit / unit.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    level = codec.codebook[unpack(codec.encode(x), bits, dim)]
    plain = (unit - level).double().square().mean(-1).flatten()
    # The scale rounds to float16: the norm is off by r <= U16, the squared error by r^2 + 2 r (1 - cos t);
    # float32 rotations add their bound to the norm of the error, twice in its square.
    slack = U16**2 + 2 * U16 * (1 - cos) + 4 * rotation_bound(dim) * error.sqrt()
    assert (error <= plain * 2 / (1 + cos) + slack).all()
    assert (error >= 1 - cos.square() - slack).all()


@pytest.mark.parametrize("rotation", ["hadamard", "dense", "identity"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_turboquant_keeps_norms(bits, dim, rotation):
    """Norm correction: only the float16 rounding of the scale and float32 arithmetic remain.

    Arithmetic: two rotations, two norms (each within dim/2 + 1 roundings) and three single operations.
    """
    codec = turboquant(bits, dim, rotation=rotation)
    x = gaussian(codec, 50) * torch.logspace(-2, 3, 50)[:, None]
    ratio = codec.decode(codec.encode(x)).double().norm(dim=-1) / x.double().norm(dim=-1)
    assert ((ratio - 1).abs() <= U16 + 2 * rotation_bound(dim) + (dim + 5) * U).all()


@pytest.mark.parametrize("bits", [1, 3])
def test_turboquant_log8_scale_is_off_by_half_a_step_at_most(bits):
    codec = turboquant(bits, scale="log8")
    assert codec.layout().fields["scale"].dtype == torch.uint8
    # Root mean squares from 2^-7.5 to 2^7.5: the documented range, less the 1-bit level of .8 and the spread.
    x = torch.nn.functional.normalize(gaussian(codec, 400), dim=-1) * math.sqrt(128)
    x = x * torch.logspace(-7.5, 7.5, 400, base=2.0)[:, None]
    ratio = codec.decode(codec.encode(x)).double().norm(dim=-1) / x.double().norm(dim=-1)
    # Half a step is 1/32 in log2. log2 and exp2 of numbers up to 2^8 round by about 8 U each, rotations as ever.
    assert (ratio.log2().abs() <= 1 / 32 + 2 * (2 * rotation_bound(128) + 133 * U + 16 * U)).all()
    # The steps are not finer than documented either: some scale is off by more than 80 % of half a step.
    assert ratio.log2().abs().max() > 0.8 / 32


def test_turboquant_log8_saturates_and_keeps_zero():
    codec = turboquant(2, scale="log8")
    x = gaussian(codec, 1)
    huge, tiny = codec.encode(x * 1e6), codec.encode(x * 1e-6)
    assert huge["scale"].tolist() == [[[[255]]]]
    assert tiny["scale"].tolist() == [[[[0]]]]
    assert not codec.decode(tiny).any()
    assert codec.decode(huge).isfinite().all()


def test_turboquant_scaling_a_vector_scales_its_decoding():
    """Powers of two change no mantissa: the codes must be equal and the decoding scale exactly."""
    codec = turboquant(3)
    x = gaussian(codec, 20)
    one, four = codec.encode(x), codec.encode(4 * x)
    assert all(torch.equal(one[name], four[name]) for name in ("codes2", "codes1"))
    assert torch.equal(4 * codec.decode(one), codec.decode(four))


def test_turboquant_seeds_give_different_codes_of_equal_quality():
    x = gaussian(turboquant(3), 20)
    first, second = turboquant(3, seed=0), turboquant(3, seed=1)
    assert not torch.equal(first.encode(x)["codes2"], second.encode(x)["codes2"])
    assert not torch.equal(first.decode(first.encode(x)), second.decode(second.encode(x)))


def test_turboquant_hadamard_helps_where_a_channel_sticks_out():
    """One channel 50 times the others, as keys have it: without a rotation the small channels are lost."""
    x = gaussian(turboquant(3), 100)
    x[..., 5] += 50
    plain, rotated = turboquant(3, rotation="identity"), turboquant(3)
    small = torch.arange(128) != 5
    lost = (plain.decode(plain.encode(x)) - x)[..., small].square().mean()
    kept = (rotated.decode(rotated.encode(x)) - x).square().mean()
    # Rotated: about .034 of the mean energy (1 + 2500/128). Not rotated: every level is at least .24 times the
    # root mean square sqrt(1 + 2500/128) = 4.5, so the unit-size channels become noise of their own size.
    assert kept < 1
    assert lost > 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_turboquant_takes_the_int8_grid_where_it_costs_next_to_nothing(bits):
    default, lloyd_max, int8 = (
        turboquant(bits, **options) for options in ({}, {"levels": "lloyd-max"}, {"levels": "int8"})
    )
    assert torch.equal(default.codebook, int8.codebook if bits in (1, 2, 3, 4, 8) else lloyd_max.codebook)
    error, best = (distortion(codec.codebook.double().numpy(), 128) for codec in (default, lloyd_max))
    # At 8 bits even twice the least error is less than a hundredth of that of 4 bits, 9.5e-3.
    assert error <= (best * 1.001 if bits < 8 else 9.5e-5)


def test_turboquant_tells_kernels_of_a_grid_only_if_its_levels_are_on_one():
    """A saved codebook replaces that of the options, which need not be what it was made with."""
    codec = build_codec(TensorSpec("turboquant", 3), HeadShape(1, 128, "key"))
    assert codec.levels().step is not None
    codec.codebook.copy_(turboquant(3, levels="lloyd-max").codebook)
    assert codec.levels().step is None
    assert turboquant(2, levels="uniform").levels().step == pytest.approx(turboquant(2, levels="uniform").codebook[2])
    assert turboquant(8, levels="int8").levels().step is not None


def test_turboquant_uniform_levels_are_evenly_spaced():
    for bits in range(2, 9):
        gaps = turboquant(bits, levels="uniform").codebook.double().diff()
        # The largest level rounds by 4 U in float32 (it is below 8), so a gap by twice that.
        assert (gaps.max() - gaps.min()) <= 16 * U


def test_turboquant_refuses_e4m3_levels_that_do_not_exist():
    with pytest.raises(RecipeError, match=r"^levels: found 'e4m3'; 8 bits: .* too few .*; use lloyd-max or uniform"):
        build_codec(TensorSpec("turboquant", 8, {"levels": "e4m3"}), HeadShape(1, 64, "key"))


# -------------------------------------------------------------------------------------------------- affine


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_error_is_half_a_step_and_the_rounding_of_step_and_low(bits, side, offset):
    """With low rounded to float16 first, n = 2**bits - 1 and s = (max - low)/n rounded to s' = s (1 + d):

    inside [low - s'/2, low + (n + 1/2) s'] the error is at most s'/2; below it is at most |min - low|, which is
    U16 |min|; above it is at most max - low - n s' = n s |d| <= n s U16. Float16 near zero: TINY16 instead.
    """
    dim, steps = 64, 2**bits - 1
    codec = build("affine", bits, side, dim, ())
    x = vectors(codec) + offset
    packed = codec.encode(x)
    error = (codec.decode(packed) - x).abs()

    axis = 3 if side == "value" else 2
    grouped, errors = (t.unflatten(axis, (-1, 32)) for t in (x, error))
    axis += 1
    low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
    step = packed["step"].float().unsqueeze(axis)
    below = U16 * low.abs() + TINY16
    above = steps * (step * U16 * (1 + 2 * U16) + TINY16)
    # Float32: the quotient x/step, up to n, rounds by 2 n U and so moves the border between two codes by
    # 2 n U step; code * step + low and x - low round by U of at most n step + |low| + |high| each.
    arithmetic = 2 * steps * U * step + 3 * U * (steps * step + low.abs() + high.abs())
    bound = torch.maximum(step / 2, torch.maximum(below, above)) + arithmetic
    assert (errors <= bound).all()
    # And the steps are as wide as minimum and maximum need, no wider (low and step rounded to float16).
    assert (step * steps <= (high - low + below) * (1 + U16) + steps * TINY16 + arithmetic).all()


def test_affine_keys_share_steps_along_tokens_and_values_along_channels():
    key, value = (build("affine", 2, side, 64, ()) for side in ("key", "value"))
    assert key.layout().block == 32
    assert value.layout().block == 1
    x = torch.zeros(1, 1, 32, 64)
    x[0, 0, :, 5] = torch.arange(32) / 31 * 3  # one channel from 0 to 3: with 2 bits a step of 1
    packed = key.encode(x)
    assert packed["step"].shape == (1, 1, 1, 64)
    assert packed["step"][0, 0, 0, 5] == 1
    assert packed["step"].count_nonzero() == 1
    assert torch.equal(key.decode(packed)[0, 0, :, 5], x[0, 0, :, 5].round())
    packed = value.encode(x)
    assert packed["step"].shape == (1, 1, 32, 2)
    # Channel 5 belongs to the first 32 channels; of each token it is the maximum and 0 the minimum.
    assert torch.equal(packed["step"][0, 0, :, 0], (x[0, 0, :, 5] / 3).half())
    assert not packed["step"][..., 1].any()


@pytest.mark.parametrize("side", ["key", "value"])
def test_affine_constant_groups_cost_only_the_rounding_of_low(side):
    codec = build("affine", 2, side, 64, ())
    x = torch.full_like(vectors(codec), 0.1)
    assert ((codec.decode(codec.encode(x)) - x).abs() <= U16 * 0.1).all()


def test_affine_refuses_a_group_that_does_not_divide_the_head():
    with pytest.raises(RecipeError, match=r"^group: found 32; .*80.*\[1, 2, 4, 5, 8, 10, 16, 20, 40, 80\]"):
        build_codec(TensorSpec("affine", 2), HeadShape(1, 80, "value"))
    assert build_codec(TensorSpec("affine", 2), HeadShape(1, 80, "key")).layout().block == 32


# --------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_is_bit_exact(dtype, bits):
    spec, shape = TensorSpec("exact", bits), HeadShape(2, 45, "key", dtype)
    if bits < dtype.itemsize * 8:
        with pytest.raises(RecipeError, match=r"^bits: found 16; .*float32 values, use 32"):
            build_codec(spec, shape)
        return
    codec = build_codec(spec, shape)
    x = torch.randn(2, 2, 5, 45, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    decoded = codec.decode(codec.encode(x)).to(dtype)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(decoded.view(as_int), x.view(as_int))
    assert codec.layout().nbytes_per_token == 45 * dtype.itemsize
