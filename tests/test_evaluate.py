"""The evaluation must say what generation really loses: it is checked against the real cache, token by token."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

import tqcompress
from tqcompress import TQCompressError, api
from tqcompress.evaluate import HeadMap, Quality, _attention, evaluate, passes
from tqcompress.report import pareto_front
from tqcompress.teacher import teacher_cache

KEEP = {"sinks": 2, "window": 5}
RECIPES = {
    "turboquant": {"version": 1, "keep": KEEP, "key": {"bits": 3}, "value": {"bits": 2}},
    "groups": {
        "version": 1,
        "keep": KEEP,
        "key": {"bits": 3},
        "value": {"bits": 2},
        "rules": [{"layers": 0, "skip": True}, {"heads": 0, "key": {"bits": 2, "rotation": "dense"}}],
    },
    "affine": {
        "version": 1,
        "keep": KEEP,
        "quantizer": "affine",
        "key": {"bits": 2, "group": 8},
        "value": {"bits": 2, "group": 8},
    },
    "trellis-heads": {
        "version": 1,
        "keep": KEEP,
        "quantizer": "trellis",
        "key": {"bits": 2, "states": 16},
        "value": {"bits": 2, "states": 16},
        "rules": [{"heads": 1, "key": {"bits": 3}}, {"layers": 1, "heads": 0, "value": {"bits": 4}}],
    },
    "no-window": {"version": 1, "keep": {"sinks": 0, "window": 0}, "key": {"bits": 3}, "value": {"bits": 3}},
}
LOSSLESS = {"version": 1, "keep": KEEP, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}}


def logits_at_once(model, recipe, ids):
    compression = api.plan_compression(model, recipe)
    with torch.no_grad(), _attention(model):
        return model(ids, past_key_values=teacher_cache(model, compression.layers), use_cache=True).logits


def logits_token_by_token(model, recipe, ids):
    tqcompress.apply(model, recipe)
    rows, cache = [], None
    with torch.no_grad():
        for i in range(ids.shape[1]):
            output = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits)
    tqcompress.remove(model)
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma2", "gpt2"])
def test_one_pass_equals_feeding_the_real_cache_token_by_token(architecture, name):
    model = tiny_model(architecture)
    ids = torch.randint(0, model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    once, stepwise = (f(model, RECIPES[name], ids) for f in (logits_at_once, logits_token_by_token))
    plain = model(ids, use_cache=False).logits
    loss = (once - plain).abs().max()
    # Both do the same float32 arithmetic in another order. A rounding error of 2^-24 grows with the few hundred
    # additions of a layer; 1e-4 of the logits' scale leaves room for that and is far below the codec's effect.
    allowed = 1e-4 * plain.abs().max()
    assert (once - stepwise).abs().max() < allowed
    assert loss > 10 * allowed, "the codec must have an effect, or the test shows nothing"


def test_what_is_stored_is_made_by_the_backend():
    model, said = tiny_model("llama"), []
    layers = api.plan_compression(model, RECIPES["groups"]).layers
    ids = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))

    def append(codec, vectors, store):
        assert store.length == 0
        for name, rows in codec.encode(vectors).items():
            store.buffers[name][:, :, : vectors.shape[2]] = rows
        said.append((codec, vectors.shape[2]))

    def logits(given):
        with torch.no_grad(), _attention(model):
            return model(ids, past_key_values=teacher_cache(model, given), use_cache=True).logits

    groups = {
        index: tuple(replace(group, backend=replace(group.backend, append=append)) for group in codecs.groups)
        for index, codecs in layers.items()
    }
    other = {index: replace(codecs, groups=groups[index]) for index, codecs in layers.items()}
    assert torch.equal(logits(other), logits(layers))
    assert said == [
        (codec, 40 - 1 - 7) for index in groups for group in groups[index] for codec in (group.key, group.value)
    ]


def test_a_lossless_codec_loses_nothing():
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (64,), generator=torch.Generator().manual_seed(1))
    (quality,) = evaluate(model, ids, {"exact": api.plan_compression(model, LOSSLESS)}, window_tokens=32)
    assert quality.kl_mean == pytest.approx(0, abs=1e-6)
    assert quality.top1 == 1
    assert quality.perplexity == pytest.approx(quality.perplexity_uncompressed, rel=1e-6)


def test_perplexity_is_that_of_independent_windows_without_the_first_token():
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (81,), generator=torch.Generator().manual_seed(2))
    (quality,) = evaluate(model, ids, {"r": api.plan_compression(model, RECIPES["turboquant"])}, window_tokens=40)
    windows = [ids[:40], ids[40:80]]  # the 81st token predicts nothing and is predicted from nothing
    with torch.no_grad():
        loss = sum(model(w[None], labels=w[None], use_cache=False).loss.double() * 39 for w in windows) / 78
    assert quality.perplexity_uncompressed == pytest.approx(math.exp(loss), rel=1e-5)
    assert quality.tokens == 80


def test_fewer_bits_lose_more_and_the_statistics_agree():
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (128,), generator=torch.Generator().manual_seed(3))
    recipes = {b: {"version": 1, "keep": KEEP, "key": {"bits": b}, "value": {"bits": b}} for b in (8, 4, 1)}
    calls = []
    results = evaluate(
        model, ids, {str(b): api.plan_compression(model, r) for b, r in recipes.items()}, 64, lambda: calls.append(1)
    )
    assert len(calls) == passes(128, 64, 3) == 8
    assert results[0].kl_mean < results[1].kl_mean < results[2].kl_mean
    for result in results:
        assert 0 <= result.kl_mean <= result.kl_p99
        assert result.kl_stderr > 0
        assert result.perplexity_uncompressed == results[0].perplexity_uncompressed


def test_bits_are_those_of_the_plan_at_the_length_of_a_window():
    model = tiny_model("llama")
    compression = api.plan_compression(model, RECIPES["turboquant"])
    (quality,) = evaluate(model, torch.arange(96) % 50, {"r": compression}, window_tokens=48)
    assert quality.effective_bits == compression.plan.effective_bits(48)
    assert quality.format_bits == compression.plan.format_bits()


def test_maps_hold_the_bits_and_the_errors_of_every_head():
    """Errors are those of the codecs on the keys and values of the uncompressed model's first layer, packed tokens."""
    model = tiny_model("llama")
    rules = list(reversed(RECIPES["groups"]["rules"]))  # skips all of layer 0
    compression = api.plan_compression(model, RECIPES["groups"] | {"rules": rules})
    ids = torch.randint(0, model.config.vocab_size, (96,), generator=torch.Generator().manual_seed(4))
    (quality,) = evaluate(model, ids, {"r": compression}, window_tokens=48)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    scale = 16 / dim
    assert quality.key.bits == [[16.0] * heads] + [[2 + scale] + [3 + scale] * (heads - 1)] * 2
    assert quality.value.bits == [[16.0] * heads] + [[2 + scale] * heads] * 2
    assert quality.key.error[0] == quality.value.error[0] == [0.0] * heads
    assert (quality.sinks, quality.window) == (KEEP["sinks"], KEEP["window"])

    packed = slice(KEEP["sinks"], 48 - 1 - KEEP["window"])
    with torch.no_grad():  # layer 1 follows the exact layer 0, so it sees what it sees in the uncompressed model
        caches = [model(w[None], use_cache=True).past_key_values.layers[1] for w in (ids[:48], ids[48:])]
    for side, states in (("key", "keys"), ("value", "values")):
        x = torch.cat([getattr(cache, states)[:, :, packed] for cache in caches])
        for group in compression.layers[1].groups:
            codec, mine = getattr(group, side), x[:, list(group.heads)]
            lost = (codec.decode(codec.encode(mine)) - mine).square().sum((0, 2, 3)) / mine.square().sum((0, 2, 3))
            found = [getattr(quality, side).error[1][head] for head in group.heads]
            # The same float32 arithmetic; sums of a few thousand terms in another order.
            assert found == pytest.approx(lost.tolist(), rel=1e-3)


def test_a_window_too_short_to_pack_anything_has_no_errors():
    model = tiny_model("llama")
    (quality,) = evaluate(model, torch.arange(8), {"r": api.plan_compression(model, RECIPES["turboquant"])}, 8)
    assert quality.key.error == [[None] * model.config.num_key_value_heads] * model.config.num_hidden_layers


def test_the_model_is_left_as_it_was_compressed_or_not():
    model = tiny_model("llama")
    ids = torch.arange(40) % 50
    compression = api.plan_compression(model, RECIPES["turboquant"])
    plain = evaluate(model, ids, {"r": compression}, 40)
    assert model.config._attn_implementation == "sdpa"
    tqcompress.apply(model, RECIPES["affine"])
    assert evaluate(model, ids, {"r": compression}, 40) == plain
    assert model.config._attn_implementation == "tqcompress"


def test_impossible_requests_are_refused():
    model = tiny_model("llama")
    compressions = {"r": api.plan_compression(model, RECIPES["turboquant"])}
    limit = model.config.max_position_embeddings
    with pytest.raises(TQCompressError, match=f"window-tokens: found {limit + 1}; the model's context is {limit}"):
        evaluate(model, torch.arange(40), compressions, limit + 1)
    with pytest.raises(TQCompressError, match="the text has 1 tokens"):
        evaluate(model, torch.arange(1), compressions, 32)


def test_the_pareto_front_holds_what_nothing_beats():
    def result(name, bits, kl):
        none = HeadMap([[bits]], [[None]])
        return Quality(name, 9 - bits, bits, 1.0, 1.0, kl, 0.0, 0.0, 1.0, 1, 1, 0, 0, none, none)

    results = [result("a", 2, 0.5), result("b", 3, 0.1), result("c", 3, 0.2), result("d", 4, 0.1), result("e", 5, 0.05)]
    assert [r.recipe for r in pareto_front(results)] == ["a", "b", "e"]
    assert [r.recipe for r in pareto_front(results, "effective_bits")] == ["e"], "its 9 - 5 bits are the fewest"
    twins = [result("x", 2, 0.5), result("y", 2, 0.5)]
    assert pareto_front(twins) == twins
