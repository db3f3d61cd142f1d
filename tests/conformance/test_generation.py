"""Everything that generate() offers gives the same tokens with a tested cache as with plain tensors."""

import copy

import pytest
import torch
from scenario import assert_same_tokens, generate, padded_batch
from setups import KINDS, SETUPS, growing, setups
from tiny import prompt, tiny_model

import tqcompress

SOME = [*KINDS, "qwen2", "cohere", "gpt_oss"]


@setups(every=True)
def test_greedy(setup, architecture):
    pair = setup.pair(architecture)
    cache = pair.cache()
    assert_same_tokens(pair, prompt(40))
    assert_same_tokens(pair, prompt(40), given=True)
    settings = {"disable_compile": True} if setup.fixed else {}
    generate(pair.compressed, prompt(40), past_key_values=cache, **settings)
    assert setup.packed(cache) >= 32  # the packed path was really used


@setups(architectures=["llama"])
def test_sampling(setup, architecture):
    pair = setup.pair(architecture)
    assert_same_tokens(pair, prompt(20), do_sample=True, top_k=50)
    assert_same_tokens(pair, prompt(20, batch=2), do_sample=True, num_return_sequences=3)


@setups(growing, architectures=SOME)
def test_beams_of_different_lengths(setup, architecture):
    """Beams that end early, at a token that the greedy search meets, and a bonus for long or short ones."""
    pair = setup.pair(architecture)
    ids, mask = padded_batch()
    ends = assert_same_tokens(pair, ids, attention_mask=mask)[0, -5].item()
    beams = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": ends, "pad_token_id": 0}
    for early, penalty in ((False, 1.0), (True, -1.0), ("never", 2.0)):
        assert_same_tokens(pair, ids, attention_mask=mask, early_stopping=early, length_penalty=penalty, **beams)


@setups(lambda setup: setup.fixed)
def test_beams_in_a_cache_of_fixed_size(setup, architecture):
    ids, mask = padded_batch()
    assert_same_tokens(setup.pair(architecture), ids, attention_mask=mask, num_beams=3)


@setups(architectures=SOME)
def test_left_padded_rows_get_what_they_get_alone(setup, architecture):
    pair = setup.pair(architecture)
    ids, mask = padded_batch()
    together = assert_same_tokens(pair, ids, attention_mask=mask)
    alone = assert_same_tokens(pair, ids[2:, 15:])
    # Codes of a block of tokens depend on the neighbours, which padding shifts.
    if pair.compressed.tqcompress.plan.block(0) == 1 or not setup.lossy:
        assert torch.equal(together[2, 26:], alone[0, 11:])


@setups(growing, architectures=SOME)
def test_rejected_drafts_are_cropped(setup, architecture):
    pair = setup.pair(architecture)
    ids = prompt(12).repeat(1, 3)  # repetition, so that there is something to look up
    assert_same_tokens(pair, ids, prompt_lookup_num_tokens=4)
    assistant = copy.deepcopy(pair.plain)  # a little different, so that some drafts are accepted and some rejected
    with torch.no_grad():
        head = assistant.get_output_embeddings().weight
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    assert_same_tokens(pair, prompt(20), assistant_model=assistant)


def test_an_assistant_may_be_compressed_too():
    pair = SETUPS[0].pair()
    assistant = tiny_model("llama", seed=5)
    SETUPS[2].prepare(assistant)
    assert_same_tokens(pair, prompt(20), assistant_model=assistant)


@setups(architectures=KINDS)
def test_prompts_in_chunks(setup, architecture):
    pair = setup.pair(architecture)
    ids, mask = padded_batch()
    assert_same_tokens(pair, prompt(40), prefill_chunk_size=7)
    if not setup.lossy:  # a chunk's own sinks are then padding
        assert_same_tokens(pair, ids, attention_mask=mask, prefill_chunk_size=16)


@setups(growing, architectures=KINDS)
def test_a_conversation_goes_on_with_the_returned_cache(setup, architecture):
    pair = setup.pair(architecture)
    text, caches = prompt(20), [pair.reference(), pair.cache()]
    for turn in range(3):
        want, got = (
            generate(model, text, past_key_values=cache)
            for model, cache in zip((pair.plain, pair.compressed), caches, strict=True)
        )
        assert torch.equal(got, want)
        text = torch.cat([want, prompt(9, seed=turn + 1)], dim=1)


@setups(architectures=["llama"])
def test_without_a_cache(setup, architecture):
    pair = setup.pair(architecture)
    want = generate(pair.plain, prompt(20), use_cache=False)
    assert torch.equal(generate(pair.compressed, prompt(20), use_cache=False), want)
    assert pair.compressed(prompt(20), use_cache=False).past_key_values is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt2"])
def test_the_tokens_depend_on_what_the_cache_holds(name):
    """Or equality above would mean nothing."""
    plain, rough = tiny_model(name), tiny_model(name)
    tqcompress.apply(rough, {"version": 1, "key": {"bits": 1}, "value": {"bits": 1}, "keep": {"sinks": 4, "window": 8}})
    assert not torch.equal(generate(plain, prompt(30)), generate(rough, prompt(30)))
