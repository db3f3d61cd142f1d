"""The contract that every registered codec keeps, then what only one of them promises.

The vectors are random: the contract is about shapes, independence and arithmetic, which do not depend on where
the vectors come from. Nothing here says how well a codec does on a real model.
"""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch

from tqcompress import Codec, HeadShape, RecipeError, TensorSpec
from tqcompress.codebook import distortion
from tqcompress.packing import unpack
from tqcompress.plan import build_codec
from tqcompress.registry import plugins

U = 2.0**-24  # unit roundoff of float32
U16 = 2.0**-11  # unit roundoff of float16
TINY16 = 2.0**-25  # half the smallest float16: its absolute error near zero

DIMS = (64, 80, 96, 128, 192, 256)
ODD_DIM = 45  # codecs may refuse it
BATCH, HEADS, BLOCKS = 2, 2, 3

# Tried in order: the first options that a codec accepts for a head size make the case ...
FALLBACKS = [{"group": 16}, {"group": 15}, {}]
# ... and these must keep the contract as well, at 3 bits and two head sizes.
VARIANTS = {
    "turboquant": [
        {"rotation": "dense"},
        {"rotation": "identity"},
        {"levels": "e4m3"},
        {"scale": "log8"},
        {"norm_correction": False},
        {"seed": 7, "rotation": "dense", "levels": "e4m3", "scale": "log8"},
    ],
    "affine": [{}, {"group": 1}],
}

REGISTRY = plugins().registry


@cache
def build(name: str, bits: int, side: str, dim: int, options: tuple = ()) -> Codec:
    return build_codec(TensorSpec(name, bits, dict(options)), HeadShape(HEADS, dim, side, torch.bfloat16))


def accepted(name: str, side: str, dim: int) -> tuple | None:
    """The first options with which the codec takes that head size, or None."""
    bits = REGISTRY.codec(name).supported_bits[-1]
    for options in FALLBACKS:
        try:
            build(name, bits, side, dim, tuple(options.items()))
            return tuple(options.items())
        except (RecipeError, ValueError):  # a refused key is a ValidationError, which is a ValueError
            continue
    return None


def contract_cases() -> list:
    cases = []
    for name in REGISTRY.names():
        supported = REGISTRY.codec(name).supported_bits
        for side in ("key", "value"):
            for dim in (*DIMS, ODD_DIM):
                options = accepted(name, side, dim)
                if options is None and dim == ODD_DIM:
                    continue
                # All bits at one size, elsewhere the fewest, the most and 3 bits
                # (test_more_bits_are_never_worse goes through all of them).
                some = {supported[0], 3, supported[-1]} & set(supported)
                cases += [
                    pytest.param((name, bits, side, dim, options or ()), id=f"{name}-{bits}-{side}-{dim}")
                    for bits in (supported if dim == 64 else sorted(some))
                ]
            for i, options in enumerate(VARIANTS.get(name, [])):
                cases += [
                    pytest.param((name, 3, side, dim, tuple(options.items())), id=f"{name}-variant{i}-{side}-{dim}")
                    for dim in (64, 80)
                    if not (name == "affine" and not options and dim % 32)  # its default group is 32
                ]
    return cases


@pytest.fixture(params=contract_cases())
def codec(request) -> Codec:
    return build(*request.param)


def vectors(codec: Codec, blocks: int = BLOCKS, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors of different sizes, `blocks` blocks of tokens, as a bfloat16 model would have them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, blocks * codec.layout().block, codec.shape.head_dim)
    size = torch.rand(*shape[:3], 1, generator=generator) * 4 + 0.1
    return (torch.randn(shape, generator=generator) * size).to(torch.bfloat16).float()


def rotation_bound(dim: int) -> float:
    """The relative error of one float32 product with an orthogonal matrix stored in float32.

    A coordinate is a sum of dim products, |fl(xR) - xR| <= dim U |x| |R|; rounding R adds U |x| |R|; the norm of
    |R| is at most its Frobenius norm sqrt(dim). 2 % for second-order terms.
    """
    return 1.02 * (dim + 1) * math.sqrt(dim) * U


# ---------------------------------------------------------------------------------------------- the contract


def test_something_is_registered():
    assert {"turboquant", "affine", "exact"} <= set(REGISTRY.names())


def test_every_required_head_size_is_accepted_with_some_options():
    for name in REGISTRY.names():
        for side in ("key", "value"):
            assert all(accepted(name, side, dim) is not None for dim in DIMS), (name, side)


def test_encoded_fields_match_the_layout(codec):
    x, layout = vectors(codec), codec.layout()
    packed = codec.encode(x)
    assert packed.keys() == layout.fields.keys()
    for name, field in layout.fields.items():
        assert packed[name].dtype == field.dtype
        assert packed[name].shape == (BATCH, HEADS, x.shape[2] // field.tokens, field.size)
    total = sum(tensor.nbytes for tensor in packed.values())
    assert total == round(BATCH * HEADS * x.shape[2] * layout.nbytes_per_token)


def test_decode_is_float32_deterministic_and_leaves_its_input_alone(codec):
    x = vectors(codec)
    before = x.clone()
    packed = codec.encode(x)
    stored = {name: tensor.clone() for name, tensor in packed.items()}
    decoded = codec.decode(packed)
    assert decoded.dtype == torch.float32
    assert decoded.shape == x.shape
    assert torch.equal(decoded, codec.decode(packed))
    assert torch.equal(x, before)
    again = codec.encode(x)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert all(torch.equal(packed[name], tensor) for name, tensor in stored.items())


def test_half_precision_input_is_computed_in_float32(codec):
    x = vectors(codec)
    packed, half = codec.encode(x), codec.encode(x.to(torch.bfloat16))
    assert codec.decode(half).dtype == torch.float32
    # bfloat16 to float32 is exact and all arithmetic is in float32.
    assert all(torch.equal(half[name], packed[name]) for name in packed)


def test_blocks_do_not_depend_on_each_other(codec):
    """One block of one head keeps its bits whatever the other tokens, heads and sequences hold."""
    x, block = vectors(codec), codec.layout().block
    other = vectors(codec, seed=1) * 3
    part = (1, 1, slice(block, 2 * block))
    other[part] = x[part]
    first, second = codec.encode(x), codec.encode(other)
    decoded, decoded_other = codec.decode(first), codec.decode(second)
    assert torch.equal(decoded[part], decoded_other[part])
    for name, field in codec.layout().fields.items():
        rows = slice(block // field.tokens, 2 * block // field.tokens)
        assert torch.equal(first[name][1, 1, rows], second[name][1, 1, rows])


def test_encoding_a_slice_is_the_slice_of_the_encoding(codec):
    """Encoding a token when it leaves the window gives what encoding the whole prompt gave.

    Vectors with one coordinate: each sum of a rotation then has one term, so it is exact in any order, and
    matrix products of another shape cannot round differently (with dense vectors they may, at a border).
    """
    block, dim = codec.layout().block, codec.shape.head_dim
    sizes = vectors(codec)[..., :1].abs() + 0.1
    where = torch.randint(dim, sizes.shape, generator=torch.Generator().manual_seed(2))
    x = torch.zeros(*sizes.shape[:3], dim).scatter(-1, where, sizes).to(torch.bfloat16).float()
    whole = codec.encode(x)
    for tokens in (slice(0, block), slice(block, 3 * block)):
        piece = codec.encode(x[1:, 1:, tokens])
        for name, field in codec.layout().fields.items():
            rows = slice(tokens.start // field.tokens, tokens.stop // field.tokens)
            assert torch.equal(piece[name], whole[name][1:, 1:, rows]), name
    # A row of packed tensors decodes alone, also from a strided view.
    for name, field in codec.layout().fields.items():
        assert whole[name].shape[2] * field.tokens == x.shape[2]
    last = {name: whole[name][:1, 1:, 2 * block // field.tokens :] for name, field in codec.layout().fields.items()}
    # Decoding rounds each sum of products: compare within one float32 rotation.
    error = (codec.decode(last) - codec.decode(whole)[:1, 1:, 2 * block :]).norm(dim=-1)
    assert (error <= 2 * rotation_bound(dim) * codec.decode(last).norm(dim=-1)).all()


def test_decode_is_unrotate_of_decode_rotated(codec):
    packed = codec.encode(vectors(codec))
    decoded = codec.decode(packed)
    error = (codec.unrotate(codec.decode_rotated(packed)) - decoded).norm(dim=-1)
    # A codec may compute either side in its own way: one float32 rotation each.
    assert (error <= 2 * rotation_bound(codec.shape.head_dim) * decoded.norm(dim=-1)).all()


def test_attention_scores_are_the_same_in_the_stored_basis(codec):
    """rotate(q) . decode_rotated(k) == q . decode(k): wrong by O(1/sqrt(dim)) if the bases differ."""
    x = vectors(codec)
    query = vectors(codec, seed=3)
    packed = codec.encode(x)
    keys, rotated = codec.decode(packed), codec.decode_rotated(packed)
    plain = (query.double() * keys.double()).sum(-1)
    stored = (codec.rotate(query).double() * rotated.double()).sum(-1)
    # Two float32 rotations, of the query and in decode; the dot products are taken in float64. The float32
    # matrix is orthogonal only to 2 U |R| |R|', at most 2 U sqrt(dim) in norm: within the slack of (dim + 1).
    bound = 2.1 * rotation_bound(codec.shape.head_dim) * query.norm(dim=-1) * keys.norm(dim=-1)
    assert ((plain - stored).abs() <= bound).all()


def test_state_round_trip_decodes_bit_equally(codec):
    """What the artifact stores, `state()`, is all of the state there is."""
    packed = codec.encode(vectors(codec))
    fresh = type(codec)(codec.spec, codec.shape)
    saved = {name: tensor.clone() for name, tensor in codec.state().items()}
    assert saved.keys() == fresh.state().keys()
    for name, tensor in fresh.state().items():
        assert tensor.dtype == saved[name].dtype
        tensor.zero_()  # or equal seeds would hide a state that is not used
    if saved:
        assert not torch.equal(fresh.decode(packed), codec.decode(packed))
    for name, tensor in fresh.state().items():
        tensor.copy_(saved[name])
    assert torch.equal(fresh.decode(packed), codec.decode(packed))
    again = fresh.encode(vectors(codec))
    assert all(torch.equal(again[name], packed[name]) for name in packed)
    assert not codec.state_dict()  # strict weight loaders must not meet these tensors


def test_casting_the_module_keeps_its_state(codec):
    cast = torch.nn.Sequential(type(codec)(codec.spec, codec.shape))
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in cast[0].state().items()}
    for change in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float64)):
        for name, tensor in change(cast)[0].state().items():
            assert tensor.dtype == before[name][0]
            assert torch.equal(tensor, before[name][1])


def test_zero_tokens(codec):
    x = vectors(codec, blocks=0)
    packed = codec.encode(x)
    for name, field in codec.layout().fields.items():
        assert packed[name].shape == (BATCH, HEADS, 0, field.size)
    assert codec.decode(packed).shape == x.shape


def test_constant_vectors_decode_to_finite_vectors(codec):
    x = torch.ones_like(vectors(codec, blocks=1))
    for value in (0.0, 1.0, -3.5, 1e-6, 1e4):
        decoded = codec.decode(codec.encode(value * x))
        assert decoded.isfinite().all(), value
        assert value != 0 or not decoded.any()


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", REGISTRY.names())
def test_more_bits_are_never_worse(name, dim, side):
    errors = []
    for bits in sorted(REGISTRY.codec(name).supported_bits):
        codec = build(name, bits, side, dim, accepted(name, side, dim))
        x = vectors(codec, blocks=max(1, 16 // codec.layout().block))
        errors.append(((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()).item())
    assert all(later < earlier or later == earlier == 0 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("name", REGISTRY.names())
def test_unsupported_bits_and_unknown_options_are_refused(name):
    supported = REGISTRY.codec(name).supported_bits
    with pytest.raises(RecipeError, match=r"^bits: found 2\.5; "):
        build_codec(TensorSpec(name, 2.5), HeadShape(1, 64, "key"))
    with pytest.raises(ValueError, match="no_such_option"):
        build_codec(TensorSpec(name, supported[-1], {"no_such_option": 1}), HeadShape(1, 64, "key"))


# ---------------------------------------------------------------------------------------------- turboquant


def turboquant(bits: int, dim: int = 128, **options) -> Codec:
    return build("turboquant", bits, "key", dim, tuple(options.items()))


def gaussian(codec: Codec, tokens: int) -> torch.Tensor:
    return torch.randn(1, 1, tokens, codec.shape.head_dim, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("options", [{}, {"rotation": "dense"}, {"levels": "e4m3"}], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_turboquant_distortion_is_that_of_its_codebook(bits, dim, options):
    """The direction of a Gaussian vector is uniform on the sphere, exactly the law the codebook is made for."""
    codec, count = turboquant(bits, dim, **options), 2000
    x = gaussian(codec, count)
    packed = codec.encode(x)
    rotated = codec.rotate(x)
    unit = rotated / rotated.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    level = codec.codebook[unpack(packed["codes"], bits, dim)]
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
    level = codec.codebook[unpack(codec.encode(x)["codes"], bits, dim)]
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
    assert torch.equal(one["codes"], four["codes"])
    assert torch.equal(4 * codec.decode(one), codec.decode(four))


def test_turboquant_seeds_give_different_codes_of_equal_quality():
    x = gaussian(turboquant(3), 20)
    first, second = turboquant(3, seed=0), turboquant(3, seed=1)
    assert not torch.equal(first.encode(x)["codes"], second.encode(x)["codes"])
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


def test_turboquant_scalar_levels_describe_its_codes():
    codec = turboquant(3)
    levels, packed = codec.levels(), codec.encode(gaussian(codec, 4))
    assert levels.bits == 3
    assert levels.levels.shape == (8,)
    assert (levels.levels.diff() > 0).all()
    by_hand = levels.levels[unpack(packed[levels.codes], 3, 128)] * packed[levels.scale].float()
    assert torch.equal(by_hand, codec.decode_rotated(packed))


def test_turboquant_refuses_e4m3_levels_that_do_not_exist():
    with pytest.raises(RecipeError, match=r"^levels: found 'e4m3'; 8 bits: .* too few"):
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
