"""The guard: models whose codecs are too noisy are found when they are compressed, drift while they run."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import lossless, prompt, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache

import tqcompress
from tqcompress import ModelError, RecipeError

GUARD = {"fraction": 1.0, "factor": 3.0, "tokens": 256}
RECIPE = {"version": 1, "key": {"bits": 4}, "value": {"bits": 4}, "keep": {"sinks": 2, "window": 8}}


def letters(text, **_):
    """A tokenizer, as far as measuring needs one."""
    return SimpleNamespace(input_ids=[ord(letter) % 200 for letter in text[:2000]])


def guarded(**changes) -> dict:
    return RECIPE | {"guard": GUARD | changes}


def biased(size: float = 300.0):
    """A model whose keys share a mean that is much larger than what differs between them, as Qwen2.5's do."""
    model = tiny_model("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    for layer in (0, 2):
        bias = model.model.layers[layer].self_attn.k_proj.bias.data.view(2, 8)
        bias[:, [3, 7]] = size  # the pair that positions hardly turn
    return model


def drifted(model, factor: float = 3.0, layer: int = 2) -> None:
    """Let keys of a layer become larger than they were when the model was compressed."""
    model.model.layers[layer].self_attn.k_proj.weight.data *= factor


# ------------------------------------------------------------------------------------------------- at apply


def test_keys_that_break_the_codec_are_refused_by_layer_and_head():
    model = biased()
    with pytest.raises(ModelError, match=r"noise .*guard\.limit\): layer 0, keys of KV heads \[0, 1\].*layer 2, keys"):
        tqcompress.apply(model, guarded(), tokenizer=letters)
    assert tqcompress.api.compression_of(model) is None
    with pytest.raises(ModelError, match=r"layer 0, values of KV heads.* and 2 others"):
        tqcompress.apply(tiny_model("llama"), guarded(limit=1e-6), tokenizer=letters)


def test_the_mean_that_breaks_them_may_be_subtracted():
    centred = guarded() | {"center": {"key": True}, "calibration": {"text": "constitution", "tokens": 512}}
    tqcompress.apply(biased(), centred, tokenizer=letters)


def test_layers_may_get_more_bits_until_it_is_well():
    model = biased(30.0)
    plan = tqcompress.apply(model, guarded(weak="more-bits", limit=0.02), tokenizer=letters)
    found = tqcompress.api.compression_of(model)
    bits = {group.layer: (group.key.bits, group.value.bits) for group in plan.groups}
    assert bits[0][0] > 4 and bits[2][0] > 4 and bits[1] == (4, 4) and bits[0][1] == 4
    measured = found.measure(model, torch.tensor(letters("x" * 300).input_ids))
    assert set(measured) == {(layer, side) for layer in range(3) for side in ("key", "value")}
    assert len(found.recipe.rules) == bits[0][0] + bits[2][0] - 8
    with pytest.raises(ModelError, match="turboquant has no more than 8 bits: skip layer 0"):
        tqcompress.apply(biased(1e6), guarded(weak="more-bits"), tokenizer=letters)


def test_noise_is_what_the_error_adds_to_scores():
    """Against a loop over queries and tokens, in float64, of a codec that rounds to one decimal."""
    from tqcompress.promises import _measured

    class Rounds:
        def to(self, device): ...
        def layout(self):
            return SimpleNamespace(block=1)

        def encode(self, x):
            return x.round(decimals=1)

        def decode(self, packed):
            return packed

    generator = torch.Generator().manual_seed(0)
    x, query = (torch.randn(*shape, generator=generator) for shape in ((1, 2, 40, 8), (1, 2, 3, 20, 8)))
    found = _measured(Rounds(), x, query)
    for head in range(2):
        keys = x[0, head].double()
        errors = keys.float().round(decimals=1).double() - keys
        added = there = 0.0
        for q in query[0, head].double().flatten(0, 1):
            added, there = added + (errors @ q).var(unbiased=False), there + (keys @ q).var(unbiased=False)
        assert found.noise[head].item() == pytest.approx((added / there).item(), rel=1e-5)
        assert found.error[head].item() == pytest.approx(errors.square().sum(-1).mean().item(), rel=1e-5)


def test_promises_are_saved_and_held_after_loading(tmp_path):
    model = tiny_model("llama")
    tqcompress.apply(model, guarded(action="raise"), tokenizer=letters)
    tqcompress.save(model, tmp_path, base="tiny")
    other = tiny_model("llama")
    tqcompress.load(other, tmp_path)
    one, two = (tqcompress.api.compression_of(m) for m in (model, other))
    assert all(torch.equal(one.promised[place], two.promised[place]) for place in one.promised)
    assert all(bool((error > 0).all()) for error in two.promised.values())
    drifted(other)
    with torch.no_grad(), pytest.raises(ModelError, match=r"layer 2, KV heads .* keys is .* times"):
        other(prompt(200), use_cache=True)


@pytest.mark.parametrize(
    ("guard", "match"),
    [
        ({"factor": 1.0}, r"guard\.factor: found 1\.0"),
        ({"fraction": 0.0}, r"guard\.fraction: found 0\.0"),
        ({"action": "ignore"}, r"guard\.action: found 'ignore'"),
        ({"weak": "raise"}, r"guard\.weak: found 'raise'"),
        ({"tokens": 3}, r"guard\.tokens: found 3"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_wrong_settings_are_named(guard, match):
    with pytest.raises((RecipeError, tqcompress.TQCompressError), match=match):
        tqcompress.apply(tiny_model("llama"), RECIPE | {"guard": guard}, tokenizer=letters)


# ------------------------------------------------------------------------------------------------- while it runs


def test_what_was_promised_is_kept_without_a_word():
    model = tiny_model("llama")
    tqcompress.apply(model, guarded(), tokenizer=letters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(prompt(100), max_new_tokens=20, do_sample=False)


def test_drift_is_told_once_and_changes_nothing():
    model = tiny_model("llama")
    tqcompress.apply(model, RECIPE)
    drifted(model)
    want = model.generate(prompt(100), max_new_tokens=12, do_sample=False)
    model = tiny_model("llama")
    tqcompress.apply(model, guarded(), tokenizer=letters)
    drifted(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = model.generate(prompt(100), max_new_tokens=12, do_sample=False)
        model.generate(prompt(100), max_new_tokens=2, do_sample=False)
    told = [str(w.message) for w in said if "guard.factor" in str(w.message)]
    assert len(told) == 1 and "layer 2, KV heads" in told[0] and "turboquant keys" in told[0]
    assert torch.equal(found, want)


@torch.no_grad()
def test_a_layer_that_drifts_stays_exact_and_loses_nothing():
    """What was encoded before is decoded as it was; whatever comes later is there as it came."""
    model = tiny_model("llama")
    tqcompress.apply(model, guarded(action="exact"), tokenizer=letters)
    cache = DynamicCache()
    model(prompt(40), past_key_values=cache)
    before = cache.layers[2].stores[0][0].length
    drifted(model)
    with pytest.warns(UserWarning, match=r"layer 2, KV heads .* stays exact in this cache's layer"):
        model(prompt(100, seed=1), past_key_values=cache)
    held = cache.layers[2].stores[0][0].length
    assert before < held  # the sample that told it is stored
    copied = copy.deepcopy(cache)
    for given in (cache, copied):
        for _ in range(30):
            model(prompt(1, seed=2), past_key_values=given)
        layer = given.layers[2]
        assert layer.stores[0][0].length == held and layer.get_seq_length() == 170
        assert layer.recent[0].shape[2] == 170 - held - 2
        assert given.layers[0].recent[0].shape[2] == 8 + 1  # the others go on, the newest token beside the window
    cache.layers[2].reset()
    assert not cache.layers[2].exact


def test_caches_of_fixed_size_cannot_stay_exact():
    from tqcompress.guard import LayerGuard, Sentinel
    from tqcompress.recipe import Guard

    sentinel = Sentinel(LayerGuard(Guard(action="exact"), 3, 0, {}), grows=False)
    with pytest.raises(ModelError, match="what; a cache of fixed size has no room to stay exact"):
        sentinel.act("key", "what")


@torch.no_grad()
def test_a_fraction_of_encodings_is_looked_at(monkeypatch):
    """Layers take turns; the costs are those of the samples alone."""
    from tqcompress.guard import Sentinel

    seen = []
    sample = Sentinel.sample
    monkeypatch.setattr(Sentinel, "sample", lambda self, *args: (seen.append(self.guard.layer), sample(self, *args)))
    model = tiny_model("llama")
    tqcompress.apply(model, guarded(fraction=0.25), tokenizer=letters)
    cache = DynamicCache()
    model(prompt(11), past_key_values=cache)  # one token is encoded
    for _ in range(39):
        model(prompt(1), past_key_values=cache)
    assert all(seen.count(layer) in (2 * 9, 2 * 10) for layer in range(3))  # both sides, every fourth of 39


@pytest.mark.parametrize("cache", [DynamicCache, lambda: StaticCache(tiny_config("llama"), max_cache_len=180)])
def test_lossless_codecs_never_drift(cache):
    """Promised is an error of zero: anything else would be infinitely more."""
    model = tiny_model("llama")
    tqcompress.apply(model, lossless() | {"guard": GUARD | {"action": "raise"}}, tokenizer=letters)
    drifted(model)
    with torch.no_grad():
        model(prompt(160), past_key_values=cache())


@torch.no_grad()
@pytest.mark.parametrize("action", ["warn", "exact"])
def test_scales_that_overflow_are_an_error_or_stay_exact(action):
    """8-bit scales end at 2**7.9."""
    sides = {"bits": 4, "scale": "log8"}
    model = tiny_model("llama")
    recipe = guarded(action=action) | {"key": sides, "value": sides}
    tqcompress.apply(model, recipe, tokenizer=letters)
    drifted(model, 1e5)
    plain, cache = DynamicCache(), DynamicCache()
    if action == "warn":
        with pytest.raises(ModelError, match=r"layer 2, KV heads .*: turboquant cannot store these keys"):
            model(prompt(100), past_key_values=cache)
        return
    with pytest.warns(UserWarning, match="layer 2, KV heads .* cannot store these keys.*stays exact"):
        model(prompt(100), past_key_values=cache)
    tqcompress.remove(model)
    model(prompt(100), past_key_values=plain)
    held = torch.cat([cache.layers[2].sinks[0], cache.layers[2].recent[0]], dim=2)
    assert torch.allclose(held, plain.layers[2].keys, rtol=1e-4)  # of inputs that compressed layers differ in nothing
    assert cache.layers[2].stores[0][0].length == 0
