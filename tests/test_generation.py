"""Generation with a lossless compressed cache is generation without it, token for token."""

import copy

import pytest
import torch
from tiny import TOLERANCE, lossless, prompt, rounding, tiny_model
from transformers import DynamicCache, StaticCache

import tqcompress
from tqcompress.cache import CompressedLayer
from tqcompress.registry import plugins

MAIN = ["llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt2"]
KINDS = ["llama", "gemma3", "gpt2"]  # one of each kind of cache and position embedding
ALL = [*MAIN, "gemma2", "gpt_oss", "phi3"]
NEW = 14


def pair(name, recipe=None, **overrides):
    """The same model twice: plain and compressed."""
    plain = tiny_model(name, **overrides)
    if name in ("gemma2", "gpt_oss"):
        plain.set_attn_implementation("eager")  # their soft cap and sinks: torch's fused attention has neither
    compressed = tiny_model(name, **overrides)
    tqcompress.apply(compressed, recipe or lossless())
    return plain, compressed


def generate(model, ids, **settings):
    # With a mask: transformers would take a generated token that equals the padding token for padding.
    defaults = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **defaults | settings)


def assert_same_tokens(plain, compressed, ids, **settings):
    torch.manual_seed(1)
    want = generate(plain, ids, **settings)
    torch.manual_seed(1)
    got = generate(compressed, ids, **settings)
    assert torch.equal(got, want)
    assert want.shape[1] > ids.shape[1] and len(set(want[0, ids.shape[1] :].tolist())) > 3  # not one token repeated


def packed_tokens(cache):
    return [sum(store.length for store, _ in layer.stores[:1]) for layer in compressed_layers(cache)]


def compressed_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


@torch.no_grad()
def logits_in_steps(model, ids, steps, cache=None, **inputs):
    """Logits of all tokens, given to the model in pieces of the given sizes (the rest one by one)."""
    assert sum(steps) <= ids.shape[1]
    steps = [*steps, *[1] * (ids.shape[1] - sum(steps))]
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces = [model(part, past_key_values=cache, **inputs).logits for part in ids.split(steps, dim=1)]
    return torch.cat(pieces, dim=1), cache


def padded_batch():
    """Three prompts of different lengths, padded on the left, and their mask."""
    ids = prompt(26, batch=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 15)):  # 15 pads: the sinks and the first packed tokens are padding
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", ALL)
def test_greedy(name):
    plain, compressed = pair(name)
    assert_same_tokens(plain, compressed, prompt(30))
    out = generate(compressed, prompt(30), return_dict_in_generate=True)
    assert all(count >= 30 for count in packed_tokens(out.past_key_values))  # the packed path was really used


@pytest.mark.parametrize("name", ALL)
def test_logits_step_by_step(name):
    plain, compressed = pair(name)
    ids = prompt(60)
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
    got, _ = logits_in_steps(compressed, ids, [20])
    assert (got - want).abs().max() <= TOLERANCE * rounding(plain, ids)


@pytest.mark.parametrize("name", KINDS)
def test_sampling(name):
    assert_same_tokens(*pair(name), prompt(20), do_sample=True, top_k=50)


@pytest.mark.parametrize("name", MAIN)
def test_beam_search(name):
    assert_same_tokens(*pair(name), prompt(20, batch=2), num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("name", MAIN)
def test_left_padded_batch(name):
    plain, compressed = pair(name)
    ids, mask = padded_batch()
    assert_same_tokens(plain, compressed, ids, attention_mask=mask)
    alone = generate(compressed, ids[2:, 15:])  # padding must not change what a sequence generates
    assert torch.equal(generate(compressed, ids, attention_mask=mask)[2, 26:], alone[0, 11:])


@pytest.mark.parametrize("name", MAIN)
def test_prompt_lookup_crops_rejected_drafts(name):
    ids = prompt(12).repeat(1, 3)  # repetition, so that there is something to look up
    assert_same_tokens(*pair(name), ids, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("name", MAIN)
def test_assisted_decoding(name):
    plain, compressed = pair(name)
    assistant = copy.deepcopy(plain)  # a little different, so that some drafts are accepted and some rejected
    with torch.no_grad():
        head = assistant.get_output_embeddings().weight
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    assert_same_tokens(plain, compressed, prompt(20), assistant_model=assistant)


def test_both_models_of_assisted_decoding_compressed():
    plain, compressed = pair("llama")
    assistant = tiny_model("llama", seed=5)
    tqcompress.apply(assistant, lossless(keep={"sinks": 0, "window": 0}))
    assert_same_tokens(plain, compressed, prompt(20), assistant_model=assistant)


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3}])
def test_several_sequences_returned(settings):
    assert_same_tokens(*pair("llama"), prompt(20, batch=2), num_return_sequences=3, **settings)


@pytest.mark.parametrize("name", KINDS)
def test_chunked_prefill(name):
    assert_same_tokens(*pair(name), prompt(40), prefill_chunk_size=7)


@pytest.mark.parametrize("keep", [(4, 8), (0, 0), (4, 0), (0, 8)])
def test_chunk_boundaries_everywhere(keep):
    sinks, window = keep
    plain, compressed = pair("llama", lossless(keep={"sinks": sinks, "window": window}))
    ids = prompt(24)
    limit = TOLERANCE * rounding(plain, ids)
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
    for first in range(1, 15):
        for second in (1, 3, 9):
            got, cache = logits_in_steps(compressed, ids, [first, second, 24 - first - second])
            assert (got - want).abs().max() <= limit, (first, second)
            assert cache.get_seq_length() == 24


@pytest.mark.parametrize(("name", "chunk"), [*((name, None) for name in MAIN), ("llama", 16), ("gemma3", 16)])
def test_static_cache(name, chunk):
    ids, mask = padded_batch()
    settings = {"cache_implementation": "static", "prefill_chunk_size": chunk, "disable_compile": True}
    assert_same_tokens(*pair(name), ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("skipped", [0, 1, -1])
@pytest.mark.parametrize(("cache", "chunk"), [("static", None), ("static", 16), ("dynamic", None)])
def test_layers_that_stay_exact(skipped, cache, chunk):
    recipe = lossless(rules=[{"layers": skipped, "skip": True}])
    ids, mask = padded_batch()
    settings = {"cache_implementation": cache, "prefill_chunk_size": chunk, "disable_compile": True}
    assert_same_tokens(*pair("llama", recipe), ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("skipped", [0, -1])
def test_layers_that_stay_exact_see_several_new_tokens(skipped):
    """Drafts: no mask is made for them, and none of them may see a later one."""
    recipe = lossless(rules=[{"layers": skipped, "skip": True}])
    assert_same_tokens(*pair("llama", recipe), prompt(30), prompt_lookup_num_tokens=3)


def test_heads_with_their_own_settings(monkeypatch):
    exact = plugins().registry.codec("exact")
    monkeypatch.setitem(plugins().registry._codecs, "exact_too", type("ExactToo", (exact,), {"name": "exact_too"}))
    rules = [{"layers": [0, 2], "heads": [1, 3], "key": {"quantizer": "exact_too"}}]
    plain, compressed = pair("llama", lossless(rules=rules), num_key_value_heads=6)
    assert [len(codecs.groups) for codecs in compressed.tqcompress.layers.values()] == [2, 1, 2]
    ids, mask = padded_batch()
    assert_same_tokens(plain, compressed, ids, attention_mask=mask)


@pytest.mark.parametrize("keep", [{"sinks": 0, "window": 0}, {"sinks": 0, "window": 8}, {"sinks": 4, "window": 0}])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_no_sinks_or_window(name, keep):
    plain, compressed = pair(name, lossless(keep=keep))
    assert_same_tokens(plain, compressed, prompt(30))
    assert_same_tokens(plain, compressed, prompt(30), prompt_lookup_num_tokens=3)


def test_without_a_cache():
    plain, compressed = pair("llama")
    assert_same_tokens(plain, compressed, prompt(20), use_cache=False)
    assert compressed(prompt(20), use_cache=False).past_key_values is None


@torch.no_grad()
def test_cache_positional_keyword_or_none():
    plain, compressed = pair("llama")
    ids = prompt(30)
    want = plain.model(ids, use_cache=False).last_hidden_state
    limit = TOLERANCE * rounding(plain.model, ids, read=lambda out: out.last_hidden_state)
    positional, keyword = DynamicCache(config=plain.config), DynamicCache()
    first = compressed.model(ids[:, :29], None, None, positional)
    assert first.past_key_values is positional
    made = compressed.model(ids[:, :29], None, None, None).past_key_values
    compressed.model(ids[:, :29], past_key_values=keyword)
    for cache in (positional, keyword, made, compressed.model(ids[:, :29], past_key_values=None).past_key_values):
        assert len(compressed_layers(cache)) == 3 and cache.get_seq_length() == 29
        last = compressed.model(ids[:, 29:], None, None, cache).last_hidden_state
        assert (last[:, 0] - want[:, -1]).abs().max() <= limit
    assert compressed.model(ids, None, None, None, use_cache=False).past_key_values is None


@pytest.mark.parametrize("name", KINDS)
def test_prefix_reuse(name):
    plain, compressed = pair(name)
    ids = prompt(70)
    with torch.no_grad():  # or the exact layers hold tensors with a graph, which cannot be copied
        prefix = compressed(ids[:, :40], use_cache=True).past_key_values
    for tail in (ids[:, 40:55], ids[:, 55:]):
        text = torch.cat([ids[:, :40], tail], dim=1)
        got = generate(compressed, text, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(got, generate(plain, text))
    assert prefix.get_seq_length() == 40
    owner = compressed.tqcompress.layers
    copied = copy.deepcopy(prefix)
    assert all(layer.codecs is owner[layer.codecs.layer] for layer in compressed_layers(copied))


@pytest.mark.parametrize("name", KINDS)
def test_conversation_continues_with_the_returned_cache(name):
    plain, compressed = pair(name)
    text, cache = prompt(20), None
    for turn in range(3):
        want = generate(plain, text)
        out = generate(compressed, text, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(out.sequences, want)
        cache = out.past_key_values
        text = torch.cat([want, prompt(9, seed=turn + 1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_batch_operations(name):
    plain, compressed = pair(name)
    ids = prompt(40, batch=3)
    operations = {
        "reorder_cache": (torch.tensor([2, 0, 0]), torch.tensor([2, 0, 0])),
        "batch_select_indices": (torch.tensor([2, 1]), torch.tensor([2, 1])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    for method, (argument, rows) in operations.items():
        _, cache = logits_in_steps(compressed, ids[:, :30], [20])
        getattr(cache, method)(argument)
        tail = ids[rows, 30:].flip(1)
        got = torch.cat([compressed(part, past_key_values=cache).logits for part in tail.split([1, 6, 3], 1)], 1)
        text = torch.cat([ids[rows, :30], tail], dim=1)
        want = plain(text, use_cache=False).logits[:, 30:]
        assert (got - want).abs().max() <= TOLERANCE * rounding(plain, text), method


def test_lossy_recipe_differs():
    """The models are such that their tokens depend on what the cache holds: equality above means something."""
    for name in MAIN:
        plain, lossy = pair(name, lossless(quantizer="turboquant", key={"bits": 1}, value={"bits": 1}))
        assert not torch.equal(generate(plain, prompt(30)), generate(lossy, prompt(30))), name


def test_a_compiled_model_gives_the_same_logits():
    """The compressed layers run eagerly inside a compiled forward pass."""
    _, compressed = pair("llama")
    ids = prompt(30)
    compiled = torch.compile(compressed.forward, backend="eager")
    with torch.no_grad():
        caches = [StaticCache(config=compressed.config, max_cache_len=48) for _ in range(2)]
        for cache in caches:
            compressed(ids, past_key_values=cache)
        for i in range(12):
            step = ids[:, i : i + 1]
            got, want = (f(step, past_key_values=c).logits for f, c in zip((compiled, compressed), caches, strict=True))
            assert torch.equal(got, want)
