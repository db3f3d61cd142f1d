"""The same promises on a CUDA device; skipped where there is none."""

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache, StaticCache

import tqcompress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LOSSLESS = {"version": 1, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}, "keep": {"window": 8}}
REAL = {"version": 1, "key": {"bits": 8}, "value": {"bits": 8}, "keep": {"window": 8}}


@pytest.fixture
def ids():
    return torch.randint(1, 200, (2, 160), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "cache_implementation": "static"}],
    ids=["greedy", "beam", "static"],
)
def test_lossless_generation_is_token_identical(architecture, settings, ids):
    model = tiny_model(architecture).cuda()
    plain = model.generate(ids, max_new_tokens=20, **settings)
    tqcompress.apply(model, LOSSLESS)
    assert model.generate(ids, max_new_tokens=20, **settings).equal(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_device_and_dtype_reads_the_same_cache(dtype, ids):
    model = tiny_model("llama").to("cuda", dtype)
    tqcompress.apply(model, REAL)
    codecs = model.tqcompress
    assert all(tensor.is_cuda for tensor in codecs.state().values())
    assert all(t.dtype in (torch.float32, torch.int8) for t in codecs.state().values()), "state keeps its dtype"
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        logits = model(ids[:, -1:], past_key_values=cache).logits
        reference = tiny_model("llama")
        tqcompress.apply(reference, REAL)
        cache = reference(ids[:, :-1].cpu(), use_cache=True).past_key_values
        expected = reference(ids[:, -1:].cpu(), past_key_values=cache).logits
    # The model's own arithmetic in `dtype` moves the logits by up to some percent, 8-bit codes, or that they keep more
    # exact tokens on CUDA, by less; a wrong scale, rotation or layout would move them many times as far.
    scale = expected.abs().max()
    assert (logits.cpu().float() - expected).abs().max() < 0.1 * scale


def test_decoding_does_not_wait_for_the_device(ids):
    model = tiny_model("llama").cuda()
    tqcompress.apply(model, REAL)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        step = torch.full((2, 1), 7, device="cuda")
        model(step, past_key_values=cache)
        layer = cache.layers[0]
        keys = torch.randn(2, layer.codecs.num_kv_heads, 1, layer.codecs.head_dim, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            view, _ = layer.update(keys, keys)
            view.attend(keys.repeat_interleave(3, 1), None, 0.25, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_padding_does_not_wait_for_the_device(ids):
    """A step, a draft and a chunk with a mask; in a cache of fixed size the step's mask is read, too."""
    model = tiny_model("llama", num_hidden_layers=1).cuda()
    tqcompress.apply(model, REAL)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=260)):
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        layer, total = cache.layers[0], ids.shape[1]
        for queries in (1, 3, 40, 1):
            keys = torch.randn(2, layer.codecs.num_kv_heads, queries, layer.codecs.head_dim, device="cuda")
            view, _ = layer.update(keys, keys)
            total += queries
            seen = torch.nn.functional.pad(mask, (0, total - 40), value=1).bool()
            seen = seen[:, None, None] if queries == 1 else seen
            query = keys.repeat_interleave(3, 1)
            for _ in range(2):  # compiles, with a new token and without
                view.attend(query, seen, 0.25, None)
            torch.cuda.set_sync_debug_mode("error")
            try:
                view.attend(query, seen, 0.25, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
