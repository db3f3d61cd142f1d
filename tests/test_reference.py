"""The real cache against a naive one: it encodes what it should, when it should, and once.

The naive cache keeps every key and value exactly and builds the dense tensors of each step anew: all but the
sinks, the window and the new tokens are replaced by `decode(encode(.))`. Rounding may push a coordinate over the
threshold between two levels, so the naive cache encodes the keys and values that the real cache was given, after
checking that they equal its own but for rounding.
"""

import pytest
import torch
from tiny import TOLERANCE, prompt, rounding, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tqcompress
from tqcompress.api import compression_of
from tqcompress.cache import CompressedLayer
from tqcompress.calibrate import calibrate


class NaiveLayer(DynamicLayer):
    def __init__(self, codecs, recorded, limit):
        super().__init__()
        self.codecs, self.recorded, self.limit = codecs, iter(recorded), limit

    def update(self, key_states, value_states, *args, **kwargs):
        before, recorded = self.get_seq_length(), next(self.recorded)
        for mine, theirs in zip((key_states, value_states), recorded, strict=True):
            assert (mine - theirs).abs().max() <= self.limit
        sides = super().update(*recorded)
        spec = self.codecs
        packed = max(0, before - spec.window - spec.sinks) // spec.block * spec.block
        if before == 0 or packed == 0:
            return sides
        keys, values = sides[0].clone(), sides[1].clone()
        span = slice(spec.sinks, spec.sinks + packed)
        for group in spec.groups:
            for codec, dense in ((group.key, keys), (group.value, values)):
                heads = list(group.heads)
                dense[:, heads, span] = codec.decode(codec.encode(dense[:, heads, span]))
        return keys, values


TURBO = {"version": 1, "key": {"bits": 4}, "value": {"bits": 3, "seed": 1}, "keep": {"sinks": 4, "window": 8}}
AFFINE = {
    "version": 1, "quantizer": "affine", "key": {"bits": 2}, "value": {"bits": 2, "group": 16},
    "keep": {"sinks": 3, "window": 5},
}  # fmt: skip
CALIBRATED = {"center": {"key": True, "value": True}, "balance": "key", "calibration": {"text": "x"}}
RULES = [{"layers": 0, "skip": True}, {"layers": -1, "heads": 1, "key": {"bits": 2}}]
RECIPES = {
    "turboquant": TURBO,
    "dense, no window": TURBO | {"key": {"bits": 3, "rotation": "dense"}, "keep": {"sinks": 0, "window": 0}},
    "log8, no sinks": TURBO | {"value": {"bits": 3, "scale": "log8"}, "keep": {"sinks": 0, "window": 8}},
    "skips and groups": TURBO | {"rules": RULES},
    "affine": AFFINE,
    "centred and balanced": TURBO | CALIBRATED,
    "centred values, diagonal, groups": TURBO
    | CALIBRATED
    | {"center": {"value": True}, "balance": "diagonal", "rules": RULES},
    "affine and turboquant": AFFINE | {"rules": [{"layers": 1, "quantizer": "turboquant"}]},
}


@torch.no_grad()
def run(model, cache, pieces):
    return [model(piece, past_key_values=cache).logits for piece in pieces]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*(("llama", recipe) for recipe in RECIPES), *(("gemma3", recipe) for recipe in RECIPES), ("gpt2", "affine")],
)
def test_logits_equal_the_naive_reference(name, recipe, monkeypatch):
    model, plain = tiny_model(name), tiny_model(name)
    ids = prompt(75, batch=2)
    pieces = ids.split([36, *[1] * 8, 7, *[1] * 24], dim=1)  # a prefill, steps, a continuation, steps
    limit = TOLERANCE * rounding(plain, ids)

    statistics = calibrate(model, prompt(400)[0]) if "calibration" in RECIPES[recipe] else None
    tqcompress.apply(model, RECIPES[recipe], statistics=statistics)
    codecs = compression_of(model).layers
    recorded = {index: [] for index in codecs}
    update = CompressedLayer.update

    def record(layer, key_states, value_states, *args, **kwargs):
        recorded[layer.codecs.layer].append((key_states.clone(), value_states.clone()))
        return update(layer, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(CompressedLayer, "update", record)
    got = run(model, DynamicCache(config=model.config), pieces)

    naive = DynamicCache(config=plain.config)
    for index, spec in codecs.items():
        naive.layers[index] = NaiveLayer(spec, recorded[index], limit)
    want = run(plain, naive, pieces)
    exact = plain(ids, use_cache=False).logits
    for step, (mine, reference) in enumerate(zip(got, want, strict=True)):
        assert (mine - reference).abs().max() <= limit, f"piece {step}"
    lossy = (torch.cat(want, dim=1) - exact).abs().max()
    assert lossy > 100 * limit  # the comparison can tell an encoded token from an exact one
