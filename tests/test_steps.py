"""Steps of one token through rings, in models: growing caches, caches of fixed size, and what happens in between.

Kernels are interpreted on the CPU, compiled on CUDA.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from kernels_helpers import DEVICE  # first: it decides how the kernels run
from tiny import prompt, tiny_model
from tqcompress.plugins import fused
from transformers import DynamicCache, StaticCache

import tqcompress
from tqcompress import ModelError
from tqcompress.ring import BLOCK, RingLayer
from tqcompress_kernels import plain, ring

RECIPE = {
    "version": 1, "key": {"bits": 8, "center": False}, "value": {"bits": 8}, "keep": {"sinks": 3, "window": 60},
}  # fmt: skip
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def fused_everywhere(monkeypatch):
    """The fused backend on the CPU too, its kernels interpreted."""
    if DEVICE == "cuda":
        yield
        return

    def backend(group, codecs, device):
        made = fused.FusedGroup(codecs["key"], codecs["value"], device)
        made.split = plain.split
        return made.backend()

    monkeypatch.setattr(fused, "tqcompress_backend", tqcompress.hookimpl(backend))
    tqcompress.registry.plugins.cache_clear()
    yield
    tqcompress.registry.plugins.cache_clear()


def compressed(name="llama", recipe=RECIPE, **overrides):
    model = tiny_model(name, **(SMALL | overrides)).to(DEVICE)
    tqcompress.apply(model, recipe)
    return model


@torch.no_grad()
def steps(model, cache, ids, mask=None, prefill=20):
    """Logits of a prompt and then of single tokens `[batch, tokens, vocabulary]`."""
    ids = ids.to(DEVICE)
    shown = torch.ones_like(ids) if mask is None else mask.to(DEVICE)
    places = (shown.cumsum(1) - 1).clamp(min=0)
    out, first = [], 0
    for last in (prefill, *range(prefill + 1, ids.shape[1] + 1)):
        given = {"position_ids": places[:, first:last]} | ({} if mask is None else {"attention_mask": shown[:, :last]})
        out.append(model(ids[:, first:last], past_key_values=cache, **given).logits)
        first = last
    return torch.cat(out, 1)


def make_cache(kind, model, tokens):
    if kind == "growing":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=tokens)


def close(got, want):
    """8-bit codes move a logit by a few thousandths of the largest one; a lost, doubled or misplaced token by more."""
    return (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_steps_give_the_logits_of_the_plain_model(kind, name):
    """From before the sinks are full, and while a block leaves the ring."""
    model = compressed() if name == "llama" else compressed_gpt2()
    for tokens, prefill, packed in ((6, 2, 0), (147, 140, 13 + 64)):
        ids = prompt(tokens)
        cache = make_cache(kind, model, 170)
        got = steps(model, cache, ids, prefill=prefill)
        layer = cache.layers[0]
        assert isinstance(layer, RingLayer) and layer.stepping and int(layer.get_seq_length()) == tokens
        assert layer.rings[0].packed(tokens) == packed
        tqcompress.remove(model)
        want = model(ids.to(DEVICE), use_cache=False).logits
        assert close(got, want)
        tqcompress.apply(model, RECIPE)


def compressed_gpt2():
    model = tiny_model("gpt2", n_layer=2, n_head=2, n_embd=32).to(DEVICE)
    tqcompress.apply(model, RECIPE)
    return model


def test_steps_over_vectors_of_two_parts():
    recipe = RECIPE | {"key": {"bits": 7.5}, "value": {"bits": 7.5}}
    model, ids = compressed(recipe=recipe, head_dim=32), prompt(147)
    got = steps(model, make_cache("growing", model, 170), ids, prefill=140)
    tqcompress.remove(model)
    assert close(got, model(ids.to(DEVICE), use_cache=False).logits)


def test_a_growing_and_a_fixed_cache_agree_to_the_bit():
    ids, model = prompt(146, batch=2), compressed()
    runs = [steps(model, make_cache(kind, model, 200), ids, prefill=140) for kind in ("growing", "fixed")]
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_padded_rows_get_what_they_get_alone(kind):
    """Without codes that depend on the neighbours, which these do not: a row's logits are its own."""
    ids, pads, model = prompt(146, batch=2), 9, compressed()
    ids[1, :pads] = 0
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    got = steps(model, make_cache(kind, model, 170), ids, mask, prefill=140)
    alone = steps(model, make_cache(kind, model, 170), ids[1:, pads:], prefill=140 - pads)
    assert close(got[1:, pads:], alone)
    assert close(got[:1], steps(model, make_cache(kind, model, 170), ids[:1], prefill=140))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_chunks_crops_copies_and_reordering_between_steps(kind):
    ids, model = prompt(156, batch=2), compressed()
    with torch.no_grad():
        cache = make_cache(kind, model, 200)
        steps(model, cache, ids[:, :100], prefill=97)
        model(ids[:, 100:150].to(DEVICE), past_key_values=cache)  # a chunk
        model(ids[:, :1].to(DEVICE), past_key_values=cache)  # a draft
        cache.crop(-1)
        for layer in cache.layers:
            layer.reorder_cache(torch.tensor([1, 0], device=DEVICE))
        ids = ids.flip(0)
        twin = copy.deepcopy(cache)
        rest = [
            torch.cat([model(ids[:, i : i + 1].to(DEVICE), past_key_values=c).logits for i in range(150, 156)], 1)
            for c in (cache, twin)
        ]
    assert torch.equal(*rest)
    tqcompress.remove(model)
    want = model(ids.to(DEVICE), use_cache=False).logits[:, 150:]
    assert close(rest[0], want)


def test_heads_with_their_own_settings():
    rules = [{"layers": [0], "heads": [0, 2], "key": {"bits": 7}}, {"layers": 1, "skip": True}]
    model = compressed(
        recipe=RECIPE | {"rules": rules}, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2
    )
    ids, runs = prompt(146), []
    for kind in ("growing", "fixed"):
        cache = make_cache(kind, model, 160)
        runs.append(steps(model, cache, ids, prefill=140))
        assert len(cache.layers[0].rings) == 2
    # The layer that stays exact reads a whole buffer in one and as much as there is in the other.
    assert close(runs[0], runs[1])
    tqcompress.remove(model)
    assert close(runs[0], model(ids.to(DEVICE), use_cache=False).logits)


def test_a_fixed_cache_that_is_full_says_so():
    model = compressed()
    cache = make_cache("fixed", model, 30)
    with pytest.raises(ModelError, match=r"layer 0: 0 tokens and 31 new ones are more than the cache's 30"):
        model(prompt(31).to(DEVICE), past_key_values=cache)


@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("gemma3", 2)])  # two: sliding layers fill, then slide
def test_generate_compiles_the_steps(name, graphs):
    """One graph, whatever the length, and the tokens of the eager steps."""
    sizes = {} if name == "llama" else {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = compressed(name, **sizes)
    ids = prompt(24).to(DEVICE)
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    eager = model.generate(ids, disable_compile=True, **settings)
    counters = torch._dynamo.utils.counters
    counters.clear()
    step = torch.compile(model.__call__, fullgraph=True, backend="eager" if DEVICE == "cpu" else "inductor")
    cache = StaticCache(config=model.config, max_cache_len=36)
    out = ids
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        for _ in range(12):
            out = torch.cat([out, logits[:, -1:].argmax(-1)], 1)
            logits = step(out[:, -1:].clone(memory_format=torch.contiguous_format), past_key_values=cache).logits
    assert out.equal(eager)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@torch.no_grad()
def test_the_guard_takes_its_turns_among_steps():
    """Every 64th step goes the way of several tokens, so that what it encodes is looked at; nothing is lost."""
    letters = lambda text, **_: SimpleNamespace(input_ids=[ord(letter) % 200 for letter in text[:500]])  # noqa: E731
    guard = {"fraction": 1.0, "factor": 3.0, "tokens": 200, "action": "raise"}
    ids, model = prompt(132), tiny_model("llama", **SMALL).to(DEVICE)
    want = model(ids.to(DEVICE), use_cache=False).logits
    tqcompress.apply(model, RECIPE | {"guard": guard}, tokenizer=letters)
    got = steps(model, cache := make_cache("growing", model, 0), ids, prefill=126)
    assert close(got, want)
    layer = cache.layers[0]
    # At the step from 128 tokens on all but the window was encoded; without a guard it would be the ring's 124.
    assert layer.stepping and layer.get_seq_length() == 132 and layer.rings[0].packed(132) == 129 - 3 - 60 - 1
    model.model.layers[0].self_attn.k_proj.weight *= 4
    with pytest.raises(ModelError, match=r"layer 0, KV heads \[0\]: the error of turboquant keys is .* times"):
        steps(model, make_cache("growing", model, 0), ids, prefill=126)  # no prompt long enough to be encoded


def test_the_guard_knows_how_many_tokens_rings_encode_at_once():
    assert ring.BLOCK.value == BLOCK
