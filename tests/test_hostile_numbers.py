"""Numbers that break caches: outliers, constants, zeros, denormals, infinities, and statistics without variance.

Whatever comes is stored as well as the codec's format can, or refused by an error that names layer and heads; nothing
that is not finite, and no scale that overflowed, is read back.
"""

import math

import pytest
import torch
from codec_helpers import BATCH, HEADS, REGISTRY, VARIANTS, accepted, build
from tiny import lossless, prompt, tiny_model
from transformers import DynamicCache

import tqcompress
from tqcompress import ModelError
from tqcompress.calibrate import Moments, Statistics
from tqcompress.transform import balancing

DIM = 64
LARGEST = 448  # what fp8 and nvfp4 hold


def hostile(tokens: int) -> dict[str, torch.Tensor]:
    """Vectors `[batch, heads, tokens, DIM]`; the Gaussian ones are random, for their size alone."""
    base = torch.randn(BATCH, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(0))
    found = {"zeros": 0 * base, "negative zeros": -0.0 * base.abs(), "denormal": torch.full_like(base, 1e-42)}
    found |= {f"constant {value:g}": torch.full_like(base, value) for value in (1e-38, 1e-30, 1e-6, 1.0, -3.5, 400.0)}
    found |= {f"constant {value:g}": torch.full_like(base, value) for value in (1e4, 6e4, 7e4, 1e6, 1e20, 3e38)}
    found |= {f"all times {factor:g}": base * factor for factor in (1e-20, 1e-4, 1e4, 1e20)}
    found["a channel of 1e4"] = base.index_fill(3, torch.tensor(3), 1e4)
    found["only a channel of 6e4"] = (0 * base).index_fill(3, torch.tensor(0), 6e4)
    found["a channel 1e4 times the others"] = base * torch.ones(DIM).index_fill(0, torch.tensor(3), 1e4)
    found["a token 1e4 times the others"] = base * torch.ones(tokens, 1).index_fill(0, torch.tensor(1), 1e4)
    for bad in (math.nan, math.inf, -math.inf):
        found[f"one {bad}"] = base.index_put(
            [torch.tensor(1)] * 2 + [torch.tensor(0), torch.tensor(5)], torch.tensor(bad)
        )
    return found


def hostile_cases() -> list:
    """Every codec, side and variant at few, some and most bits, with and without a centre and balancing."""
    cases = []
    for name in REGISTRY.names():
        for side in ("key", "value"):
            variants = [accepted(name, side, DIM), *(tuple(options.items()) for options in VARIANTS.get(name, []))]
            if "center" in REGISTRY.codec(name).Options.model_fields:
                variants.append((("center", True), ("balance", "key" if side == "key" else "none")))
            for i, options in enumerate(variants):
                for bits in sorted({2, 4, REGISTRY.codec(name).supported_bits[-1]}):
                    grid = dict(options).get("levels") == "e4m3" and bits == 8  # there are too few such numbers
                    if bits in REGISTRY.codec(name).supported_bits and not grid:
                        cases.append(pytest.param((name, bits, side, DIM, options), id=f"{name}-{bits}-{side}-{i}"))
    return cases


@pytest.mark.parametrize("case", hostile_cases())
def test_what_is_stored_is_finite_and_near_and_the_rest_does_not_fit(case):
    codec = build(*case)
    centred = dict(case[4]).get("center", False)
    for label, x in hostile(2 * codec.layout().block).items():
        packed = codec.encode(x)
        if not codec.fits(packed):
            limit = LARGEST if case[0] in ("fp8", "nvfp4") else 200 if dict(case[4]).get("scale") == "log8" else 6e4
            assert not x.isfinite().all() or x.abs().max() >= limit, label
            continue
        assert x.isfinite().all(), label
        decoded = codec.decode(packed)
        assert decoded.isfinite().all(), label
        error = (decoded.double() - x.double()).norm(dim=-1)
        if case[0] == "affine" and case[2] == "key":  # a channel's step is that of the largest of its tokens
            size = x.double().abs().amax((2, 3), keepdim=True)[..., 0] * DIM**0.5
        else:  # half a step between the two levels of 1 bit, or for a codec that centres, of the centred vector
            size = 1.2 * x.double().norm(dim=-1) + (4 * DIM**0.5 if centred else 0)
        assert (error <= size + 1e-5).all(), label


RECIPES = {
    "turboquant": {"version": 1, "key": {"bits": 3}, "value": {"bits": 2}, "keep": {"sinks": 4, "window": 8}},
    "log8": {"version": 1, "key": {"bits": 3, "scale": "log8"}, "value": {"bits": 2}},
    "affine": lossless(quantizer="affine", key={"bits": 2}, value={"bits": 2, "group": 16}),
    "exact": lossless(),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["keys", "values"])
@torch.no_grad()
def test_what_is_not_finite_is_named_and_never_stored(recipe, bad, side):
    """In a prompt, in a chunk and in a single token; afterwards the cache is as it was and goes on."""
    model = tiny_model("llama")
    tqcompress.apply(model, recipe)
    cache, twin = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for tokens in (50, 1, 9):
        fine = torch.randn(2, 2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        broken = fine.clone()
        broken[1, 1, tokens // 2, 3] = bad
        model.tqcompress.compress_layers(cache)
        model.tqcompress.compress_layers(twin)
        before = cache.get_seq_length()
        with pytest.raises(
            ModelError, match=rf"layer 1, KV heads \[1\]: {side} of 1 tokens are infinite or not a number"
        ):
            cache.layers[1].update(*((broken, fine) if side == "keys" else (fine, broken)))
        assert cache.layers[1].get_seq_length() == before
        for layers in (cache.layers, twin.layers):
            for layer in layers:
                layer.update(fine, fine)
        tqcompress.verify(cache)
    query = torch.randn(2, 6, 1, 16)
    views = [layers.layers[1].update(fine[:, :, :1], fine[:, :, :1])[0] for layers in (cache, twin)]
    assert torch.equal(*(view.attend(query, None, 0.25, None)[0] for view in views))


@pytest.mark.parametrize(("scale", "size"), [("fp16", 1e6), ("log8", 1e4)])
def test_a_scale_that_overflows_is_refused_and_named(scale, size):
    """The tokens stay where they were, exact: the error comes again, and nothing wrong is ever read."""
    model = tiny_model("llama")
    tqcompress.apply(model, RECIPES["turboquant"] | {"value": {"bits": 2, "scale": scale}})
    cache = DynamicCache(config=model.config)
    model.tqcompress.compress_layers(cache)
    states = torch.randn(1, 2, 250, 16, generator=torch.Generator().manual_seed(0))
    broken = states.clone()
    broken[0, 0, 9] *= size
    layer = cache.layers[2]
    with pytest.raises(ModelError, match=r"layer 2, KV heads \[0\]: turboquant cannot store these values"):
        layer.update(states, broken)
    assert [store.length for store in layer.stores[0]] == [0, 0] and layer.get_seq_length() == 250
    with pytest.raises(ModelError, match=r"layer 2, KV heads \[0\]"):
        layer.update(states[:, :, :1], states[:, :, :1])
    layer.reset()
    layer.update(states, states)


@pytest.mark.parametrize(
    "spread", ["zero", "rank one", "tiny", "huge", "one channel"], ids=lambda name: name.replace(" ", "-")
)
@pytest.mark.parametrize("query", ["zero", "rank one", "full"])
@pytest.mark.parametrize("kind", ["key", "diagonal"])
def test_statistics_without_variance_make_finite_invertible_bases(spread, query, kind):
    dim, generator = 16, torch.Generator().manual_seed(0)
    vector = torch.randn(2, dim, 1, generator=generator, dtype=torch.float64)
    square = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    matrices = {
        "zero": torch.zeros(2, dim, dim, dtype=torch.float64),
        "rank one": vector @ vector.mT,
        "full": square @ square.mT,
        "tiny": square @ square.mT * 1e-60,
        "huge": square @ square.mT * 1e60,
        "one channel": torch.zeros(2, dim, dim, dtype=torch.float64).index_put(
            [torch.tensor(0)] * 3, torch.tensor(1.0).double()
        ),
    }
    matrix = balancing(matrices[spread], matrices[query], kind).float()
    back = torch.linalg.inv(matrix.double())
    assert matrix.isfinite().all() and back.float().isfinite().all()
    # RIDGE bounds how far axes are stretched apart: by (1 + dim / RIDGE)^(1/2) for either matrix.
    assert torch.linalg.cond(matrix.double()).max() <= 1 + dim / 1e-3


@pytest.mark.parametrize("bad", ["nan", "not positive"])
def test_statistics_that_are_none_are_refused(bad):
    model = tiny_model("llama")
    eye = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    broken = eye * math.nan if bad == "nan" else eye + 5 * eye.flip(1)
    fine = Moments(10, torch.zeros(2, 16, dtype=torch.float64), eye, eye)
    statistics = Statistics({index: {"key": fine, "value": fine} for index in range(3)})
    statistics.layers[1]["key"] = Moments(10, fine.mean, broken, eye)
    recipe = RECIPES["turboquant"] | {"balance": "key", "calibration": {"text": "constitution"}}
    with pytest.raises(ModelError, match=r"layer 1, keys of KV heads \[0, 1\]: .*calibrate"):
        tqcompress.apply(model, recipe, statistics=statistics)
    assert not hasattr(model, "tqcompress")
    statistics.layers[1]["key"] = fine
    tqcompress.apply(model, recipe, statistics=statistics)
    model.generate(prompt(30), max_new_tokens=2)
