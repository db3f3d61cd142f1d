"""Ways to call a model: dtypes, forms of masks, training, gradients, packed sequences, compiled steps."""

import copy
from functools import partial

import pytest
import torch
from scenario import feed, generate, padded_batch
from setups import LENGTH, SETUPS, setups
from tiny import TOLERANCE, lossless, prompt, rounding, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache

import tqcompress
from tqcompress import ModelError

EXACT = SETUPS[0]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_dtypes(dtype, fixed):
    """The cache adds no more error than the model's own arithmetic in that dtype has."""
    plain = tiny_model("llama")
    low = copy.deepcopy(plain).to(dtype)
    ids = prompt(60, batch=2)
    want = copy.deepcopy(low).double()(ids, use_cache=False).logits
    limit = max(TOLERANCE * rounding(plain, ids), 2 * (low(ids, use_cache=False).logits.double() - want).abs().max())
    recipe = lossless() if dtype == torch.float32 else lossless(key={"bits": 16}, value={"bits": 16})
    tqcompress.apply(low, recipe)
    cache = StaticCache(config=low.config, max_cache_len=60) if fixed else DynamicCache(config=low.config)
    got = feed(low, cache, ids, [20, 7])
    assert got.dtype == dtype and cache.layers[0].stores[0][0].read()["values"].dtype == dtype
    assert (got - want).abs().max() <= limit


def as_mask(shown: torch.Tensor, queries: int, form: str) -> torch.Tensor:
    """`[batch, tokens]` that are not padding, for the last `queries` tokens, in a form that callers use."""
    tokens = shown.shape[1]
    seen = shown[:, None, None].bool() & torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    lowest = torch.finfo(torch.float32).min
    return {"2D": shown, "2D bool": shown.bool(), "bool": seen, "float": torch.where(seen, 0.0, lowest)}[form]


@setups(lambda setup: "own" not in setup.name, architectures=["llama"])
@pytest.mark.parametrize("form", ["2D", "2D bool", "bool", "float"])
@torch.no_grad()
def test_forms_of_a_mask(setup, architecture, form):
    pair = setup.pair(architecture)
    ids, mask = padded_batch()
    tail = prompt(6, batch=3, seed=1)
    text, shown = torch.cat([ids, tail], 1), torch.cat([mask, torch.ones_like(tail)], 1)
    want = feed(pair.plain, pair.reference(mask), text, [26, 1, 3], shown)
    cache, out, last = pair.cache(), [], 0
    for part in text.split([26, 1, 3, 1, 1], dim=1):
        last += part.shape[1]
        places = (shown[:, :last].cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
        given = as_mask(shown[:, :last], part.shape[1], form)
        out.append(pair.compressed(part, attention_mask=given, position_ids=places, past_key_values=cache).logits)
    assert (torch.cat(out, 1) - want)[shown.bool()].abs().max() <= pair.limit


@torch.no_grad()
def test_a_mask_that_hides_any_tokens_from_any_query():
    """Trees of drafts, for example: neither causal nor the same for all."""
    pair = EXACT.pair()
    ids, tail = prompt(30, batch=2), prompt(7, batch=2, seed=1)
    seen = torch.rand(2, 1, 7, 37, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[..., 0] = True
    places = torch.tensor([30, 31, 31, 32, 32, 32, 33]).expand(2, -1)
    got = []
    for model, cache in ((pair.plain, pair.reference()), (pair.compressed, pair.cache())):
        model(ids, past_key_values=cache)
        got.append(model(tail, attention_mask=seen, position_ids=places, past_key_values=cache).logits)
    assert (got[0] - got[1]).abs().max() <= pair.limit


def test_calls_in_training_mode_and_with_gradients_enabled():
    pair = EXACT.pair(attention_dropout=0.0)
    want, ids = generate(pair.plain, prompt(30)), prompt(30)
    pair.compressed.train()
    assert torch.equal(generate(pair.compressed, ids), want)
    with torch.enable_grad():
        logits = [
            torch.cat([model(part, past_key_values=cache).logits for part in prompt(40).split([20, 1, 12, 7], 1)], 1)
            for model, cache in ((pair.plain, pair.reference()), (pair.compressed, pair.cache()))
        ]
    assert logits[1].requires_grad
    assert (logits[1] - logits[0]).abs().max() <= pair.limit
    with pytest.raises(ModelError, match="use_cache=False"):
        logits[1].sum().backward()


def test_training_without_a_cache_is_unchanged():
    pair = EXACT.pair()
    ids = prompt(30, batch=2)
    for model in (pair.plain, pair.compressed):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    for plain, compressed in zip(pair.plain.parameters(), pair.compressed.parameters(), strict=True):
        assert (plain.grad - compressed.grad).abs().max() <= 1e-4 * plain.grad.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_never_meets_the_cache(reentrant):
    """Recomputing a layer would add its tokens again. Transformers then uses no cache; one that is given is refused."""
    pair = EXACT.pair()
    ids = prompt(30)
    for model in (pair.plain, pair.compressed):
        model.train()
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=reentrant))
        out = model(ids, labels=ids)
        out.loss.backward()
        assert out.past_key_values is None or out.past_key_values.get_seq_length() == 0
    grads = [model.get_output_embeddings().weight.grad for model in (pair.plain, pair.compressed)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[0].abs().max()
    with pytest.raises(ModelError, match=r"gradient checkpointing .*model\.eval"):
        pair.compressed(ids, past_key_values=pair.cache(), use_cache=True)


@torch.no_grad()
def test_packed_sequences_are_refused_with_a_cache_and_right_without():
    """Two sequences in one row, told apart by positions that begin anew."""
    pair = EXACT.pair()
    ids = prompt(30)
    places = torch.cat([torch.arange(18), torch.arange(12)])[None]
    want, got = (model(ids, position_ids=places, use_cache=False).logits for model in (pair.plain, pair.compressed))
    apart = torch.cat([pair.plain(part, use_cache=False).logits for part in ids.split([18, 12], dim=1)], dim=1)
    assert (got - want).abs().max() <= pair.limit
    assert (got - apart).abs().max() <= pair.limit
    for cache in (None, pair.cache()):
        with pytest.raises(ModelError, match=r"packed .*use_cache=False"):
            pair.compressed(ids, position_ids=places, past_key_values=cache, use_cache=True)
    # Positions that begin later, or that a mask explains, are no packed sequences.
    pair.compressed(ids, position_ids=torch.arange(5, 35)[None], past_key_values=pair.cache())
    padded, mask = padded_batch()
    pair.compressed(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["growing", "fixed", "compiled"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_fused_kernels_generate_the_same_tokens(architecture, mode):
    """8-bit codes lose so little that the tokens of these models stay."""
    model = tiny_model(architecture).cuda()
    ids, mask = (tensor.cuda() for tensor in padded_batch())
    plain = generate(model, ids, attention_mask=mask)
    tqcompress.apply(model, {"version": 1, "key": {"bits": 8}, "value": {"bits": 8}, "keep": {"sinks": 3, "window": 8}})
    assert all(group.backend.name.startswith("triton") for c in model.tqcompress.layers.values() for group in c.groups)
    settings = {} if mode == "growing" else {"cache_implementation": "static", "disable_compile": mode == "fixed"}
    assert torch.equal(generate(model, ids, attention_mask=mask, **settings), plain)


@torch.no_grad()
def test_a_compiled_forward_pass_gives_the_same_logits():
    """Where there are no fused kernels, compressed layers run eagerly inside it."""
    pair, ids = EXACT.pair(), prompt(30)
    compressed = pair.compressed
    compiled = torch.compile(compressed.forward, backend="eager")
    caches = [StaticCache(config=compressed.config, max_cache_len=LENGTH) for _ in range(2)]
    for cache in caches:
        compressed(ids, past_key_values=cache)
    for i in range(12):
        step = ids[:, i : i + 1]
        got, want = (f(step, past_key_values=c).logits for f, c in zip((compiled, compressed), caches, strict=True))
        assert (got - want).abs().max() <= pair.limit  # torch 2.11 compiles to operations that round otherwise
