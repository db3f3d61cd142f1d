"""What holds for any shape, setting and number that the interface accepts, 0 and 1 tokens included."""

import copy
import math
from functools import cache

import torch
from codec_helpers import REGISTRY, VARIANTS, U, moments, rotation_bound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import prompt, tiny_model
from transformers import DynamicCache

import tqcompress
from tqcompress import Backend, HeadShape, Recipe, RecipeError, TensorSpec, artifacts, blockwise
from tqcompress.cache import CompressedLayer
from tqcompress.calibrate import Statistics
from tqcompress.plan import build_codec
from tqcompress.view import GroupCodecs, LayerCodecs

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
FEW = settings(QUICK, max_examples=25)


@cache
def codec_of(name: str, bits: int, side: str, dim: int, heads: int, options: tuple):
    codec = build_codec(TensorSpec(name, bits, dict(options)), HeadShape(heads, dim, side))
    if codec.needs_statistics:
        codec.fit(moments(dim).of(tuple(i % 2 for i in range(heads))))
    return codec


@st.composite
def codecs(draw, dims=(8, 16, 24, 64)):
    """Any codec, its bits, side, head size, heads and some of its options."""
    name = draw(st.sampled_from(REGISTRY.names()))
    kind = REGISTRY.codec(name)
    bits = 32 if name == "exact" else draw(st.sampled_from(kind.supported_bits))
    options = draw(st.sampled_from([{}, *VARIANTS.get(name, [])]))
    if name == "affine":
        options = {"group": draw(st.sampled_from([1, 2, 4, 8]))}
    if "center" in kind.Options.model_fields and draw(st.booleans()):
        options = options | {"center": True}
    while True:
        dim = draw(st.sampled_from(dims))
        try:
            case = name, bits, draw(st.sampled_from(["key", "value"])), dim, draw(st.integers(1, 3))
            return codec_of(*case, tuple(options.items()))
        except RecipeError:
            dims = tuple(other for other in dims if other != dim)
            if not dims:  # too few bits for so many states, for example
                name, bits, options, dims = "turboquant", 2, {}, (16,)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(codecs(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31), st.floats(-4, 4))
def test_encode_decode(codec, batch, blocks, seed, size):
    """Shapes as the layout says; rows and sequences alone give what they give together; scaling does not matter."""
    layout = codec.layout()
    x = normal(batch, codec.shape.num_kv_heads, blocks * layout.block, codec.shape.head_dim, seed=seed) * 10**size
    if codec.name in ("fp8", "nvfp4"):
        x = x.clamp(-400, 400)
    packed = codec.encode(x)
    for name, field in layout.fields.items():
        assert packed[name].shape == (*x.shape[:2], x.shape[2] // field.tokens, field.size)
        assert packed[name].dtype == field.dtype
    decoded = codec.decode(packed)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    if not x.numel():
        assert bool(codec.fits(packed))
        return
    if not bool(codec.fits(packed)):
        assert getattr(codec.options, "scale", "") == "log8" and abs(size) > 1  # 2^7.9 is 240
        return
    assert decoded.isfinite().all()
    last = {name: rows[-1:] for name, rows in packed.items()}
    bound = 4 * rotation_bound(codec.shape.head_dim) * decoded[-1:].norm(dim=-1) + 1e-30
    assert ((codec.decode(last) - decoded[-1:]).norm(dim=-1) <= bound).all()
    assert torch.equal(codec.decode(packed), decoded)


@st.composite
def layers(draw):
    """An empty layer of one group or two, with any window, and the codecs' numbers."""
    dim, heads = draw(st.sampled_from([8, 16])), draw(st.integers(1, 3))
    split = draw(st.integers(1, heads))
    groups = []
    for places in (tuple(range(split)), tuple(range(split, heads))):
        if places:
            pair = []
            for side in ("key", "value"):
                name = draw(st.sampled_from(["exact", "turboquant", "affine"]))
                options = {"group": draw(st.sampled_from([1, 4]))} if name == "affine" else {}
                bits = 32 if name == "exact" else draw(st.integers(1, 8))
                pair.append(codec_of(name, bits, side, dim, len(places), tuple(options.items())))
            groups.append(GroupCodecs(places, *pair, Backend("torch", blockwise.attend, "")))
    block = math.lcm(*(codec.layout().block for group in groups for codec in (group.key, group.value)))
    sinks, window = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    return CompressedLayer(LayerCodecs(0, tuple(groups), heads, dim, sinks, window, block, False))


def held(layer: CompressedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that a layer stands for, in order, float32."""
    parts = []
    for i in (0, 1):
        middle = torch.empty(layer.sinks[0].shape[0], layer.codecs.num_kv_heads, 0, layer.codecs.head_dim)
        stores = [(group, pair[i]) for group, pair in zip(layer.codecs.groups, layer.stores, strict=True)]
        if stores[0][1].length:
            decoded = [(group.key, group.value)[i].decode(store.read()) for group, store in stores]
            middle = torch.cat(decoded, dim=1)  # groups are neighbouring heads here
        parts.append(torch.cat([layer.sinks[i], middle, layer.recent[i]], dim=2))
    return tuple(parts)


@QUICK
@given(
    layers(), st.lists(st.integers(0, 12), min_size=1, max_size=7), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([None, 5.0]), st.sampled_from([None, "rows", "dense", "additive"]), st.integers(0, 2**31),
)  # fmt: skip
def test_attention_is_that_of_float64_over_what_is_held(layer, pieces, batch, share, softcap, kind, seed):
    """For any pieces, masks and numbers of queries: the output is that of dense attention over the decoded tokens."""
    heads, dim = layer.codecs.num_kv_heads, layer.codecs.head_dim
    for step, count in enumerate(pieces):
        keys, values = (normal(batch, heads, count, dim, seed=seed + 2 * step + i) for i in (0, 1))
        before = layer.get_seq_length()
        view, _ = layer.update(keys, values)
        tokens = layer.get_seq_length()
        assert tokens == before + count
        if before == 0 or count == 0:
            continue
        query = normal(batch, heads * share, count, dim, seed=seed + 100 + step)
        causal = torch.ones(count, tokens, dtype=torch.bool).tril(tokens - count)
        shown = normal(batch, tokens, seed=seed) < 0.8
        shown[:, 0] = True
        seen = causal if kind is None else causal & shown[:, None, None]
        mask = {None: None, "rows": shown, "dense": seen, "additive": torch.where(seen, 0.0, -torch.inf)}[kind]
        k, v = (states.double().repeat_interleave(share, 1) for states in _held_when_seen(view))
        scores = query.double() @ k.mT * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        output, lse = view.attend(query, mask, 0.3, softcap)
        # Float32 scores of size s err by (dim + 3) U s, weights and sums by as much relative to the values.
        limit = 64 * (dim + tokens) * U * (1 + scores.abs().max()) * (1 + v.abs().max())
        assert (output - weights @ v).abs().max() <= limit
        want = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        assert (lse - want).abs().max() <= limit


def _held_when_seen(view) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a view as float32 tensors: newer ones may have been packed since it was made."""
    sides = []
    for i, side in enumerate(("key", "value")):
        parts = []
        for group in view.groups:
            codec, store = getattr(group.codecs, side), getattr(group, side)
            packed = codec.decode(store.read(0, group.packed)) if group.packed else group.sinks[i][:, :, :0].float()
            parts.append(torch.cat([group.sinks[i].float(), packed, group.recent[i].float()], dim=2))
        sides.append(torch.cat(parts, dim=1))
    return tuple(sides)


@QUICK
@given(
    layers(), st.lists(st.tuples(st.sampled_from(["add", "crop", "reorder", "copy"]), st.integers(0, 40)), max_size=12)
)
def test_any_sequence_of_operations_keeps_the_right_tokens(layer, operations):
    """Sinks are the tokens that came first, and so is whatever is exact, but for what a crop left of a block.

    Packed ones are what the codec makes of the same token, where it does so token by token.
    """
    heads, dim, made = layer.codecs.num_kv_heads, layer.codecs.head_dim, 0
    want = torch.empty(2, heads, 0, dim)
    layer.update(want, want)
    for what, number in operations:
        if what == "add":
            new = normal(2, heads, number, dim, seed=made)
            made += 1
            layer.update(new, new * 2)
            want = torch.cat([want, new], dim=2)
        elif what == "crop":
            layer.crop(-number)
            want = want[:, :, : max(0, want.shape[2] - number)]
        elif what == "reorder":
            rows = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]][number % 4])
            layer.reorder_cache(rows)
            want = want[rows]
        else:
            layer, old = copy.deepcopy(layer), layer
            old.reset()  # nothing of the copy is lost with it
    assert layer.get_seq_length() == want.shape[2]
    keys, values = held(layer)
    assert keys.shape == values.shape == want.shape
    sinks, recent = layer.sinks[0].shape[2], layer.recent[0].shape[2]
    assert torch.equal(keys[:, :, :sinks], want[:, :, :sinks])
    if layer.codecs.block == 1:
        tail = want.shape[2] - recent
        assert torch.equal(keys[:, :, tail:], want[:, :, tail:]) or "crop" in {what for what, _ in operations}
        for group in layer.codecs.groups:
            part = list(group.heads)
            decoded = group.key.decode(group.key.encode(want[:, part, sinks:tail]))
            error = (keys[:, part, sinks:tail] - decoded).norm(dim=-1)
            # A code on the border may fall on either side if a rotation of another size rounds otherwise: rare.
            near = error <= 1e-4 * decoded.norm(dim=-1) + 1e-30
            assert near.float().mean() > 0.97 if near.numel() else True


sides = st.fixed_dictionaries(
    {"bits": st.integers(1, 4)},
    optional={
        "rotation": st.sampled_from(["hadamard", "dense", "identity"]),
        "seed": st.integers(-(2**40), 2**40),
        "scale": st.sampled_from(["fp16", "log8"]),
        "norm_correction": st.booleans(),
    },
)
rules = st.lists(
    st.one_of(
        st.fixed_dictionaries({"layers": st.integers(0, 2), "heads": st.integers(0, 1), "key": sides}),
        st.fixed_dictionaries({"layers": st.sampled_from(["odd", 1]), "skip": st.just(True)}),
        st.fixed_dictionaries({"heads": st.integers(0, 1), "value": sides}),
    ),
    max_size=3,
)
recipes = st.fixed_dictionaries(
    {"version": st.just(1), "key": sides, "value": sides},
    optional={
        "keep": st.fixed_dictionaries({"sinks": st.integers(0, 9), "window": st.integers(0, 20)}),
        "quantizer": st.sampled_from(["turboquant", "polar"]),
        "center": st.fixed_dictionaries({"key": st.booleans(), "value": st.booleans()}),
        "rules": rules,
        "name": st.text(st.characters(codec="utf-8"), max_size=30),
    },
)


@cache
def model():
    return tiny_model("llama")


@cache
def taken() -> Statistics:
    return Statistics({i: {"key": moments(16), "value": moments(16)} for i in range(3)})


@FEW
@given(recipes, st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 2))
def test_the_plan_counts_what_the_cache_holds(recipe, pieces, batch):
    plan = tqcompress.apply(model(), recipe, statistics=taken())
    try:
        cache, total = DynamicCache(config=model().config), sum(pieces) + 1
        with torch.no_grad():
            for part in prompt(total, batch).split([*pieces, 1], dim=1):
                model()(part, past_key_values=cache)
        state = sum(tensor.nbytes for tensor in model().tqcompress.state().values())
        layers = enumerate(cache.layers)
        whole = model().tqcompress.layers
        held = sum(x.nbytes if i in whole else x.keys.nbytes + x.values.nbytes for i, x in layers)
        assert plan.nbytes(total, batch) == held + state
        assert plan.nbytes(total, batch) <= plan.nbytes(total + 1, batch)
    finally:
        tqcompress.remove(model())


@FEW
@given(recipes)
def test_recipes_and_artifacts_come_back(tmp_path_factory, recipe):
    """The recipe through YAML, the plan and every tensor through the file, to the bit."""
    folder = tmp_path_factory.mktemp("artifact")
    loaded = Recipe.load(recipe)
    plan = tqcompress.apply(model(), loaded, statistics=taken())
    state = {name: tensor.clone() for name, tensor in model().tqcompress.state().items()}
    try:
        tqcompress.save(model(), folder / "a", base="base")
        tqcompress.remove(model())
        assert tqcompress.load(model(), folder / "a").to_dict() == plan.to_dict()
        assert Recipe.load(folder / "a" / "recipe.yaml") == loaded == model().tqcompress.recipe
        again = model().tqcompress.state()
        assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
        tqcompress.save(model(), folder / "b", base="base")
        first, second = ((folder / name / artifacts.FILE_NAME).read_bytes() for name in "ab")
        assert first == second
    finally:
        tqcompress.remove(model())
