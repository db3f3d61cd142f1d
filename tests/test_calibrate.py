"""Calibration: moments are those of what attention sees, artifacts are reproducible, bad input is refused by name."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import prompt, tiny_model
from transformers import DynamicCache

import tqcompress
from tqcompress import ArtifactError, ModelError, RecipeError, TQCompressError
from tqcompress.api import compression_of
from tqcompress.artifacts import FILE_NAME, read
from tqcompress.calibrate import Calibrator, Statistics, calibrate
from tqcompress.texts import load_text

RECIPE = {
    "version": 1,
    "name": "mine",
    "key": {"bits": 3},
    "value": {"bits": 2},
    "keep": {"sinks": 2, "window": 4},
    "center": {"key": True, "value": True},
    "balance": "key",
    "calibration": {"text": "wikitext-validation", "tokens": 200, "length": 50},
}


def letters(text, **_):
    """A tokenizer, as far as calibration needs one."""
    return SimpleNamespace(input_ids=[ord(letter) % 200 for letter in text[:2000]])


@pytest.mark.parametrize(
    ("architecture", "context", "starts"),
    [
        ("llama", None, (0, 118, 472)),  # over all 512 positions
        ("llama", 100, (0, 15, 60)),
        ("llama", 40, (0, 0, 0)),
        ("qwen3", None, (0, 118, 472)),
        ("gemma3", None, (0, 118, 472)),
        ("gpt2", None, (0, 0, 0)),  # its positions are learned: elsewhere it computes something else
    ],
)
def test_moments_are_those_of_the_cache(architecture, context, starts):
    """Keys and values are compared with what an ordinary cache holds, window by window, without the first tokens."""
    model, ids, skip = tiny_model(architecture).double(), prompt(120)[0], 3
    found = calibrate(model, ids, length=40, skip=skip, context=context)
    caches = []
    for window, start in zip(ids.split(40), starts, strict=True):
        caches.append(DynamicCache(config=model.config))
        model(window[None], past_key_values=caches[-1], position_ids=torch.arange(start, start + 40)[None])
    for index, sides in found.layers.items():
        for side in ("keys", "values"):
            layers = [cache.layers[index] for cache in caches]
            if type(layers[0]).__name__ != "DynamicLayer":
                continue  # a sliding layer forgets
            x = torch.cat([getattr(layer, side)[0, :, skip:] for layer in layers], 1)
            moments = sides[side.removesuffix("s")]
            assert moments.count == x.shape[1]
            assert torch.allclose(moments.mean, x.mean(1), rtol=1e-9, atol=1e-12)
            centred = x - x.mean(1, keepdim=True)
            assert torch.allclose(moments.covariance, centred.mT @ centred / x.shape[1], rtol=1e-7, atol=1e-10)
    assert set(found.layers) == set(range(model.config.num_hidden_layers))


def test_query_moments_are_summed_over_the_heads_that_share_a_kv_head():
    """The scores' second moment per KV head: sum over heads of E[(q . x)^2] = x^T W x, against queries seen anew."""
    model, ids = tiny_model("llama").double(), prompt(60)[0]
    seen = []
    project = model.model.layers[0].self_attn.q_proj
    project.register_forward_hook(lambda module, args, out: seen.append(out))
    moments = calibrate(model, ids, skip=0).layers[0]["key"]
    query = seen[0][0].unflatten(-1, (2, 3, 16))  # tokens, KV heads, heads, head_dim
    # Rotary embedding keeps norms, but for the rounding of its float32 sines.
    energy = query.square().sum((2, 3)).mean(0)
    assert torch.allclose(
        moments.query.diagonal(dim1=1, dim2=2).sum(-1), energy, rtol=1e-5
    )  # sine and cosine are float32


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    before = model.config._attn_implementation
    calibrate(model, prompt(60)[0])
    assert model.training
    assert model.config._attn_implementation == before


def test_the_seed_chooses_windows_and_the_digest_names_them():
    model, ids = tiny_model("llama"), prompt(400)[0]
    first, again, other = (calibrate(model, ids, tokens=100, length=20, seed=seed) for seed in (0, 0, 1))
    assert first.source == again.source
    assert first.source["tokens"] == 100
    assert first.source["sha256"] != other.source["sha256"]
    for index, sides in first.layers.items():
        assert torch.equal(sides["key"].covariance, again.layers[index]["key"].covariance)


def test_the_same_recipe_makes_the_same_artifact(tmp_path):
    digests = []
    for name in ("a", "b"):
        model = tiny_model("llama")
        tqcompress.apply(model, RECIPE, tokenizer=letters)
        tqcompress.save(model, tmp_path / name, base="base")
        digests.append((tmp_path / name / FILE_NAME).read_bytes())
    assert digests[0] == digests[1]
    artifact = read(tmp_path / "a")
    assert artifact.calibration["text"] == "wikitext-validation"
    assert artifact.calibration["tokens"] == 200
    assert len(artifact.calibration["sha256"]) == 64
    assert {"mean", "into", "back"} <= {name.rpartition(".")[2] for name in artifact.tensors}

    loaded, ids = tiny_model("llama"), prompt(40)
    tqcompress.load(loaded, tmp_path / "a")
    assert compression_of(loaded).calibration == artifact.calibration
    assert torch.equal(loaded.generate(ids, do_sample=False), model.generate(ids, do_sample=False))


def test_statistics_survive_a_file(tmp_path):
    model = tiny_model("qwen2")
    taken = calibrate(model, prompt(80)[0])
    taken.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.source == json.loads(json.dumps(taken.source))
    assert loaded.layers.keys() == taken.layers.keys()
    states = []
    for statistics in (taken, loaded):
        tqcompress.apply(model, RECIPE, statistics=statistics)
        states.append(compression_of(model).state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a file of statistics"):
        Statistics.load(tmp_path / "other")


def test_a_text_is_read_once_for_several_recipes():
    calls = []
    calibrator = Calibrator(tiny_model("llama"), lambda text, **_: calls.append(1) or letters(text))
    for bits in (2, 3):
        recipe = tqcompress.Recipe.parse(RECIPE | {"key": {"bits": bits}})
        tqcompress.api.plan_compression(calibrator.model, recipe, calibrator)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"calibration": None},
            RecipeError,
            "mine: calibration: missing; center, balance and outliers need",
        ),
        ({"center": {}, "balance": "none"}, RecipeError, "mine: calibration: nothing here uses it"),
        ({"quantizer": "affine"}, RecipeError, "center.key: quantizer affine of keys cannot do that"),
        (
            {"value": {"bits": 2, "balance": "key"}},
            RecipeError,
            "value.balance: found 'key'; only keys can be balanced",
        ),
        ({"calibration": {"text": "nope"}}, TQCompressError, "nope: no such text file"),
        ({"calibration": {"text": "wikitext-validation", "tokens": 3}}, TQCompressError, "at least 4 are needed"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_unchanged(change, error, match):
    model = tiny_model("llama")
    with pytest.raises(error, match=match):
        tqcompress.apply(model, RECIPE | change, tokenizer=letters)
    assert compression_of(model) is None


def test_statistics_of_another_model_are_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ModelError, match=r"layer 0: the statistics have 2x16 for keys; the model has 3x16"):
        tqcompress.apply(model, RECIPE, statistics=calibrate(tiny_model("llama"), prompt(60)[0]))


def test_a_model_without_a_tokenizer_asks_for_one():
    with pytest.raises(ModelError, match="no tokenizer to calibrate with; give tokenizer="):
        tqcompress.apply(tiny_model("llama"), RECIPE)


def test_numbers_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TQCompressError, match="layer 1: keys are not finite"):
        calibrate(model, prompt(60)[0])


def test_data_sets(monkeypatch):
    rows = [{"text": "one"}, {"text": "two"}]
    calls = []
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: calls.append((a, k)) or iter(rows))
    )
    assert load_text("datasets:some/set:config:validation") == "one\ntwo"
    assert calls == [(("some/set", "config"), {"split": "validation", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TQCompressError, match="needs the package datasets"):
        load_text("datasets:some/set")
