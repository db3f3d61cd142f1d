"""`run_ahead` gives what `generate()` alone gives: tokens, scores, streamed tokens, and the cache it leaves."""

from functools import partial

import pytest
import torch
from tiny import prompt, tiny_model
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import tqcompress

RECIPE = {"version": 1, "key": {"bits": 4}, "value": {"bits": 4}, "keep": {"sinks": 2, "window": 8}}
MASK = {"attention_mask": torch.tensor([[1] * 20, [0] * 3 + [1] * 17])}


class Streamed(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.fixture
def model():
    model = tiny_model("llama")
    tqcompress.apply(model, RECIPE)
    return model


def both(model, ids, **settings):
    """What generate() gives alone, and with run_ahead, from the same seed."""
    results = []
    for custom in (None, tqcompress.run_ahead):
        torch.manual_seed(0)
        results.append(model.generate(ids, custom_generate=custom, **settings))
    return results


def third(model, ids):
    """The token that greedy decoding finds third: as the end of the text it stops a sequence early."""
    return int(model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 4},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prefill_chunk_size": 7},
    ],
    ids=["greedy", "sampling", "processors", "static", "chunks"],
)
@pytest.mark.parametrize("ends", [False, True])
def test_the_tokens_are_those_of_generate(model, settings, ends):
    ids = prompt(20, batch=2)
    stop = {"eos_token_id": third(model, ids[:1]), "pad_token_id": 0} if ends else {}
    alone, ahead = both(model, ids, max_new_tokens=12, **MASK, **settings, **stop)
    assert alone.equal(ahead)


def test_one_sequence_that_ends_early_is_cut_there(model):
    ids = prompt(20)
    end = third(model, ids)
    alone, ahead = both(model, ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert ahead.equal(alone) and ahead[0, -1] == end and ahead.shape[1] < 32


@pytest.mark.parametrize("limit", [1, 3, 12])  # the end by length, by both at once, by the token
def test_outputs_streams_and_the_cache_afterwards(model, limit):
    ids, found = prompt(20), []
    end = third(model, ids)
    for custom in (None, tqcompress.run_ahead):
        cache, streamer = DynamicCache(config=model.config), Streamed()
        streaming = {"custom_generate": partial(custom, streamer=streamer)} if custom else {"streamer": streamer}
        out = model.generate(
            ids, max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=0, past_key_values=cache,
            return_dict_in_generate=True, output_scores=True, output_logits=True, **streaming,
        )  # fmt: skip
        assert streamer.ended
        assert out.past_key_values is cache
        found.append((out, streamer, cache))
    (a, s, c), (b, t, d) = found
    assert a.sequences.equal(b.sequences)
    assert s.parts[0] == ids[0].tolist() and s.parts[1:] == t.parts  # generate() itself streams the prompt
    assert len(a.scores) == len(b.scores) and all(x.equal(y) for x, y in zip(a.scores, b.scores, strict=True))
    assert len(a.logits) == len(b.logits) and all(x.equal(y) for x, y in zip(a.logits, b.logits, strict=True))
    assert c.get_seq_length() == d.get_seq_length()
    follow = prompt(4, seed=5)
    with torch.no_grad():
        assert model(follow, past_key_values=c).logits.equal(model(follow, past_key_values=d).logits)


def test_an_uncompressed_model_can_run_ahead_too():
    model, ids = tiny_model("llama"), prompt(20)
    alone, ahead = both(model, ids, max_new_tokens=6, do_sample=False)
    assert alone.equal(ahead)


def test_what_it_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match="found beam_search: leave custom_generate away"):
        model.generate(prompt(20), num_beams=2, custom_generate=tqcompress.run_ahead, max_new_tokens=2)
    with pytest.raises(ValueError, match="output_attentions asks for: leave custom_generate away"):
        model.generate(
            prompt(20), custom_generate=tqcompress.run_ahead, max_new_tokens=2, return_dict_in_generate=True,
            output_attentions=True,
        )  # fmt: skip


@pytest.mark.parametrize("sample", [False, True])
def test_scores_that_are_not_a_number_are_an_error(model, sample):
    model.lm_head.weight.data[7, 3] = torch.nan
    with pytest.raises(tqcompress.ModelError, match="scores are not a number, though its cache holds nothing of the"):
        model.generate(prompt(20), custom_generate=tqcompress.run_ahead, max_new_tokens=9, do_sample=sample)
