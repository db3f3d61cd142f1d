"""The contract that every registered codec keeps."""

from itertools import pairwise

import pytest
import torch
from codec_helpers import BATCH, DIMS, HEADS, REGISTRY, accepted, build, contract_cases, rotation_bound, vectors

from tqcompress import Codec, HeadShape, RecipeError, TensorSpec
from tqcompress.plan import build_codec


@pytest.fixture(params=contract_cases())
def codec(request) -> Codec:
    return build(*request.param)


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


def test_decode_factors_multiply_to_decode_rotated(codec):
    packed = codec.encode(vectors(codec))
    rotated, (states, factors) = codec.decode_rotated(packed), codec.decode_factors(packed)
    product = states if factors is None else states * factors.unsqueeze(-1)
    assert (product - rotated).abs().max() == 0


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
    with pytest.raises(RecipeError, match=r"^bits: found 2\.3; "):
        build_codec(TensorSpec(name, 2.3), HeadShape(1, 64, "key"))
    with pytest.raises(ValueError, match="no_such_option"):
        build_codec(TensorSpec(name, supported[-1], {"no_such_option": 1}), HeadShape(1, 64, "key"))


def assert_last_head_is_the_same_alone(codec):
    """What a process of tensor parallelism holds: the codec of one head reads that head's rows."""
    head = HEADS - 1
    part, packed = codec.of_heads([head]), codec.encode(vectors(codec))
    assert part.shape.num_kv_heads == 1
    got, want = part.decode({name: rows[:, head:] for name, rows in packed.items()}), codec.decode(packed)[:, head:]
    # Products of head_dim float32 terms, in float32: a wrong matrix or mean errs by as much as the vectors are long.
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    mine, whole = part.state(), codec.state()
    assert mine.keys() == whole.keys()
    for name, tensor in mine.items():
        assert tensor.equal(whole[name] if tensor.shape == whole[name].shape else whole[name][head:]), name


def test_some_heads_are_the_same_as_within_all(codec):
    assert_last_head_is_the_same_alone(codec)


@pytest.mark.parametrize("balance", ["key", "diagonal"])
def test_some_heads_have_their_own_matrices_and_means(balance):
    codec = build("turboquant", 3, "key", 64, (("balance", balance), ("center", True)))
    assert not codec.into[0].equal(codec.into[1])
    assert not codec.mean[0].equal(codec.mean[1])
    assert_last_head_is_the_same_alone(codec)
