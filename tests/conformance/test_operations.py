"""What callers do with a cache between two calls of the model: the logits afterwards are as with plain tensors."""

import copy
import threading

import pytest
import torch
from scenario import feed, padded_batch
from setups import KINDS, Pair, growing, setups
from tiny import prompt
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def both(pair: Pair, ids: torch.Tensor, pieces: list[int], mask: torch.Tensor | None = None):
    """Both caches after some tokens, having compared the logits."""
    caches = pair.reference(mask), pair.cache()
    want, got = (feed(*side, ids, pieces, mask) for side in zip((pair.plain, pair.compressed), caches, strict=True))
    seen = slice(None) if mask is None else mask[:, -ids.shape[1] :].bool()  # what padding becomes is nobody's concern
    assert (got[seen] - want[seen]).abs().max() <= pair.limit
    return caches


def assert_goes_on(pair: Pair, caches: tuple, ids: torch.Tensor, pieces: list[int], mask: torch.Tensor | None = None):
    """The logits of more tokens are the same with both caches."""
    want, got = (feed(*side, ids, pieces, mask) for side in zip((pair.plain, pair.compressed), caches, strict=True))
    assert (got - want).abs().max() <= pair.limit


@setups(every=True)
def test_prompt_then_single_tokens(setup, architecture):
    both(setup.pair(architecture), prompt(48), [20])


@setups(growing, architectures=["llama"])
def test_long_texts(setup, architecture):
    """So long that storage grows several times, in chunks and token by token."""
    both(setup.pair(architecture), prompt(480), [300, 1, 150, 1, 20])


@setups(architectures=["llama"])
def test_a_prompt_of_one_token(setup, architecture):
    both(setup.pair(architecture), prompt(20), [1])


@setups(lambda setup: "fixed" not in setup.name, architectures=["llama"])
def test_chunk_boundaries_everywhere(setup, architecture):
    """The first chunk ends before, at and behind the sinks and the window, the second is short, odd and long."""
    pair = setup.pair(architecture)
    for first in (1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 16, 20):
        for second in (1, 3, 14):
            both(pair, prompt(36), [first, second, 36 - first - second])


@setups(architectures=["llama", "gpt2"])
def test_rows_padded_on_the_left(setup, architecture):
    ids, mask = padded_batch()
    pair = setup.pair(architecture)
    caches = both(pair, ids, [26], mask)
    tail = prompt(9, batch=3, seed=1)
    assert_goes_on(pair, caches, tail, [1, 1, 5], torch.cat([mask, torch.ones_like(tail)], dim=1))


@setups(architectures=["llama", "gpt2"])
def test_rows_padded_on_the_right(setup, architecture):
    """Shorter rows end in padding, which stays in the cache, hidden; what follows stands at each row's own position."""
    ids, tail = prompt(24, batch=3), prompt(8, batch=3, seed=1)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11)):
        ids[row, 24 - padding :], mask[row, 24 - padding :] = 0, 0
    pair = setup.pair(architecture)
    assert_goes_on(pair, both(pair, ids, [24], mask), tail, [1, 1, 4], torch.cat([mask, torch.ones_like(tail)], dim=1))


@setups(growing, architectures=KINDS)
def test_crop_to_every_length(setup, architecture):
    pair = setup.pair(architecture)
    ids, tail = prompt(40), prompt(4, seed=1)
    first = both(pair, ids, [30, 1, 9])
    for left in range(0, 41, 2 if setup.lossy else 1) if architecture == "llama" else (0, 21, 25, 39):
        caches = copy.deepcopy(first)
        if architecture == "gemma3" and left < 40:  # transformers' sliding layers take no crop once they are full
            continue
        for cache in caches:
            cache.crop(left - 40)
            assert cache.get_seq_length() == left
        assert_goes_on(pair, caches, tail, [1, 3])
        assert [cache.get_seq_length() for cache in caches] == [left + 4] * 2


@setups(growing, architectures=["llama"], every=True)
def test_drafts_are_rejected_again_and_again(setup, architecture):
    """As many as leave the window, a step between; each time the accepted ones are what was kept."""
    pair = setup.pair(architecture)
    caches = both(pair, prompt(30), [30])
    for turn, (drafts, rejected) in enumerate([(5, 5), (5, 2), (1, 1), (12, 11), (30, 29), (3, 0)]):
        assert_goes_on(pair, caches, prompt(drafts, seed=turn), [drafts])
        for cache in caches:
            cache.crop(-rejected)
        assert_goes_on(pair, caches, prompt(1, seed=turn + 50), [1])


@setups(lambda setup: not setup.fixed, architectures=KINDS, every=True)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_reordered_selected_and_repeated(setup, architecture, padded):
    pair = setup.pair(architecture)
    ids, mask = padded_batch()
    mask = mask if padded else torch.ones_like(mask)
    tail = prompt(9, batch=6, seed=1)
    operations = {
        "reorder_cache": (torch.tensor([2, 0, 0]), torch.tensor([2, 0, 0])),
        "batch_select_indices": (torch.tensor([2, 1]), torch.tensor([2, 1])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    first = both(pair, ids, [26], mask)
    for method, (argument, rows) in operations.items():
        caches = copy.deepcopy(first)
        for cache in caches:
            getattr(cache, method)(argument)
        text = tail[: len(rows)]
        assert_goes_on(pair, caches, text, [1, 6], torch.cat([mask[rows], torch.ones_like(text)], dim=1))


@setups(architectures=KINDS)
def test_a_prefix_is_copied_and_continued_twice(setup, architecture):
    """Neither continuation, nor a crop of it, changes the prefix."""
    pair = setup.pair(architecture)
    prefix = both(pair, prompt(40), [40])
    for seed in (1, 2, 1):
        caches = copy.deepcopy(prefix)
        assert_goes_on(pair, caches, prompt(25, seed=seed), [9, 1])
        if growing(setup) and architecture != "gemma3":
            for cache in caches:
                cache.crop(-60)
        assert [int(cache.get_seq_length()) for cache in prefix] == [40, 40]
    assert_goes_on(pair, prefix, prompt(3, seed=3), [2])


def _empties(plain) -> bool:
    """Whether an uncompressed cache is empty after a reset."""
    plain.reset()
    return int(plain.get_seq_length()) == 0


@setups(architectures=["llama"])
def test_a_cache_is_emptied_and_used_again(setup, architecture):
    """Of a padded batch; what comes then is not padded, and is as many rows."""
    pair = setup.pair(architecture)
    ids, mask = padded_batch()
    plain, used = both(pair, ids, [20], mask)
    if any(type(layer) is DynamicLayer for layer in used.layers) and not _empties(plain):
        pytest.skip("this transformers fills its own growing layers with zeros and keeps their length (5.17)")
    used.reset()
    assert int(used.get_seq_length()) == 0
    ids = prompt(30, batch=3, seed=1)
    want = feed(pair.plain, pair.reference(), ids, [20])
    assert (feed(pair.compressed, used, ids, [20]) - want).abs().max() <= pair.limit


@setups(architectures=["llama"])
def test_threads_share_a_model(setup, architecture):
    """Each with a cache of its own, all at once: what each gets, it gets alone."""
    pair = setup.pair(architecture)
    texts = [prompt(34, seed=seed) for seed in range(4)]
    alone = [feed(pair.compressed, pair.cache(), ids, [20, 7]) for ids in texts]
    found: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        found[number] = feed(pair.compressed, pair.cache(), texts[number], [20, 7])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(len(texts)))


@torch.no_grad()
def test_cache_positional_keyword_or_none():
    from setups import SETUPS

    pair = SETUPS[0].pair()
    ids = prompt(30)
    want = pair.plain(ids, use_cache=False).logits
    positional, keyword = DynamicCache(config=pair.plain.config), DynamicCache()
    decoder, head = pair.compressed.model, pair.compressed.lm_head
    assert decoder(ids[:, :29], None, None, positional).past_key_values is positional
    decoder(ids[:, :29], past_key_values=keyword)
    made = decoder(ids[:, :29], None, None, None).past_key_values
    for cache in (positional, keyword, made, decoder(ids[:, :29], past_key_values=None).past_key_values):
        assert cache.get_seq_length() == 29
        last = head(decoder(ids[:, 29:], None, None, cache).last_hidden_state)
        assert (last[:, 0] - want[:, -1]).abs().max() <= pair.limit
    assert decoder(ids, None, None, None, use_cache=False).past_key_values is None
