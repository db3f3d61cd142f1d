"""Batches of different lengths, beams and assisted decoding on the fused path, and every form of a mask.

Kernels are interpreted on the CPU, compiled on CUDA.
"""

import pytest
import torch
from kernels_helpers import DEVICE
from test_steps import RECIPE, close, compressed, fused_everywhere, make_cache  # first: how the kernels run
from tiny import prompt, tiny_model
from transformers.masking_utils import sdpa_mask

import tqcompress
from tqcompress import blockwise, masks

__all__ = ["fused_everywhere"]
PADS = [0, 5]
TINY = RECIPE | {"keep": {"sinks": 3, "window": 8}}


@pytest.fixture
def fused_only(monkeypatch):
    """Whatever falls back to torch fails."""

    def fail(*args):
        raise AssertionError("attended in plain torch")

    monkeypatch.setattr(blockwise, "attend", fail)


def padded(tokens: int, pads=PADS, seed: int = 0):
    """Prompts `[batch, tokens]` with padding on the left, and their mask."""
    ids = prompt(tokens, len(pads), seed)
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    return (ids * mask).to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 9}], ids=str)
def test_padded_batches_generate_on_the_fused_path(settings, cache, fused_only):
    model = tiny_model("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1).to(DEVICE)
    ids, mask = padded(24)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    } | settings
    plain = model.generate(ids, attention_mask=mask, **settings)
    tqcompress.apply(model, TINY)
    assert model.generate(ids, attention_mask=mask, **settings).equal(plain)


@pytest.mark.parametrize("how", ["lookup", "draft"])
def test_assisted_decoding_on_the_fused_path(how, fused_only):
    model = tiny_model("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1).to(DEVICE)
    ids = prompt(12).repeat(1, 2).to(DEVICE)
    settings = {"max_new_tokens": 10, "do_sample": False}
    plain = model.generate(ids, **settings)
    tqcompress.apply(model, TINY)
    if how == "lookup":
        settings["prompt_lookup_num_tokens"] = 4
    else:
        settings["assistant_model"] = tiny_model("llama", num_hidden_layers=1, seed=1).to(DEVICE)
    assert model.generate(ids, **settings).equal(plain)


def test_beams_may_be_reordered_repeated_and_selected(fused_only):
    model = compressed(recipe=TINY)
    ids, mask = padded(30)
    step = prompt(3, batch=2, seed=1).to(DEVICE)
    for kind in ("growing", "fixed"):
        with torch.no_grad():
            cache, places = make_cache(kind, model, 50), (mask.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            rows = torch.tensor([1, 0, 1], device=DEVICE)
            for layer in cache.layers:
                layer.batch_repeat_interleave(2)
                layer.batch_select_indices(torch.tensor([0, 2, 3], device=DEVICE))
                layer.reorder_cache(torch.tensor([2, 0, 1], device=DEVICE))
            got, seen = [], mask[rows]
            for part in step[rows].split([1, 2], dim=1):
                seen = torch.cat([seen, seen.new_ones(3, part.shape[1])], 1)
                places = seen.cumsum(1)[:, -part.shape[1] :] - 1
                got.append(model(part, attention_mask=seen, position_ids=places, past_key_values=cache).logits)
            tqcompress.remove(model)
            places = (seen.cumsum(1) - 1).clamp(min=0)
            whole = torch.cat([ids[rows], step[rows]], 1)
            want = model(whole, attention_mask=seen, position_ids=places, use_cache=False).logits[:, -3:]
            tqcompress.apply(model, TINY)
        assert close(torch.cat(got, 1), want)


def as_given(mask: torch.Tensor, queries: int, form: str):
    """A 2D mask as a caller may give it."""
    if form == "2D":
        return mask
    causal = torch.ones(queries, mask.shape[1], dtype=torch.bool, device=DEVICE).tril(mask.shape[1] - queries)
    seen = mask.bool()[:, None, None] & causal
    if form == "bool":
        return seen
    lowest = torch.finfo(torch.float32).min
    return torch.where(seen, 0.0, lowest if form == "additive" else -1e9)


def conversation(model, cache, form, turns, change=None):
    """Logits of turns `[(ids, mask)]` with what the caller says of them, and the whole mask; `cache` may be None."""
    ids, mask = (torch.cat(parts, 1) for parts in zip(*turns, strict=True))
    if change is not None:
        ids = change(ids.clone())
    places = (mask.cumsum(1) - 1).clamp(min=0)
    if cache is None:
        return model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits, mask
    out, first = [], 0
    for part, _ in turns:
        last = first + part.shape[1]
        given = as_given(mask[:, :last], part.shape[1], form if first else "2D")
        here = slice(first, last)
        out.append(
            model(ids[:, here], attention_mask=given, position_ids=places[:, here], past_key_values=cache).logits
        )
        first = last
    return torch.cat(out, 1), mask


def turns():
    """A padded prompt, a long turn padded on the left, a short one padded too, and two single tokens."""
    single = [(prompt(1, 2, seed), torch.ones(2, 1, dtype=torch.long)) for seed in (3, 4)]
    single = [(ids.to(DEVICE), mask.to(DEVICE)) for ids, mask in single]
    return [padded(24), padded(40, [9, 0], 1), padded(3, [0, 1], 2), *single]


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("form", ["2D", "bool", "additive", "lower"])
@torch.no_grad()
def test_turns_of_different_lengths_in_every_form_of_a_mask(form, kind, fused_only):
    model = compressed(recipe=TINY)
    got, mask = conversation(model, make_cache(kind, model, 80), form, turns())
    tqcompress.remove(model)
    want, _ = conversation(model, None, form, turns())
    assert close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_padding_and_later_tokens_change_nothing(name, kind, fused_only):
    """To the bit, in chunks, in drafts and in steps, with a soft cap and without."""
    sizes = {"num_hidden_layers": 1, "layer_types": ["full_attention"]} if name == "gemma2" else {}
    model = compressed(name, recipe=TINY, **sizes)

    def run(change=None):
        return conversation(model, make_cache(kind, model, 80), "2D", turns(), change)

    def other_padding(ids):
        return torch.where(mask == 0, 17, ids)

    def other_end(ids):  # of the long turn, and what comes after it
        ids[:, 60:] = 17
        return ids

    want, mask = run()
    assert (mask == 0).sum() == 5 + 9 + 1
    assert torch.equal(run(other_padding)[0][mask.bool()], want[mask.bool()])
    got, seen = run(other_end)[0], mask.bool()
    assert torch.equal(got[:, :60][seen[:, :60]], want[:, :60][seen[:, :60]])
    assert not torch.equal(got[:, 60:], want[:, 60:])
    tqcompress.remove(model)
    assert close(want[seen], conversation(model, None, "2D", turns())[0][seen])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("form", ["2D", "bool", "additive"])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_a_step_reads_a_mask_that_hides_older_tokens(kind, form, skip, fused_only):
    """Sinks, packed and recent ones; with layers that stay exact transformers makes a mask, without it makes none."""
    rules = [{"layers": 1, "skip": True}] if skip else []
    model = compressed(recipe=TINY | {"rules": rules}, num_hidden_layers=2)
    ids, mask = padded(30)
    step = prompt(1, 2, 1).to(DEVICE)
    cache = make_cache(kind, model, 40)
    model(ids, attention_mask=mask, past_key_values=cache)
    seen = torch.cat([mask, mask.new_ones(2, 1)], 1)
    hidden = seen.clone()
    hidden[:, [6, 15, 28]] = 0
    got = []
    for now in (hidden, torch.cat([seen, seen.new_ones(2, 1)], 1)):  # and then shown again
        given = as_given(now, 1, form)
        if kind == "fixed" and form != "2D":  # as wide as the cache
            given = torch.nn.functional.pad(given, (0, 40 - now.shape[1]), value=False if form == "bool" else -1e9)
        got.append(model(step, attention_mask=given, past_key_values=cache, position_ids=now[:, -1:] + 29).logits)
    tqcompress.remove(model)
    cache = make_cache("growing", model, 40)
    model(ids, attention_mask=mask, past_key_values=cache)
    for logits, now in zip(got, (hidden, torch.cat([seen, seen.new_ones(2, 1)], 1)), strict=True):
        given = as_given(now, 1, "bool")
        want = model(step, attention_mask=given, past_key_values=cache, position_ids=now[:, -1:] + 29).logits
        assert close(logits, want)
    assert not close(got[0], got[1])


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.filterwarnings("ignore:fused kernels do not take")
@torch.no_grad()
def test_a_step_with_a_mask_of_any_other_kind_is_right_too(kind):
    """One that differs between heads, or adds to scores: slowly, through torch."""
    model = compressed(recipe=TINY)
    ids, step = prompt(30, 2).to(DEVICE), prompt(1, 2, 1).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(2, 2, 1, 31, generator=generator) < 0.7
    heads[..., -1] = True
    added = torch.randn(2, 1, 1, 32, generator=generator) * 3
    runs = []
    for compress in (True, False):
        cache = make_cache(kind if compress else "growing", model, 40)
        model(ids, past_key_values=cache)
        runs.append([model(step, attention_mask=m.to(DEVICE), past_key_values=cache).logits for m in (heads, added)])
        runs[-1].append(model(step, past_key_values=cache).logits)
        if compress:
            tqcompress.remove(model)
    assert close(torch.cat(runs[0]), torch.cat(runs[1]))


@pytest.mark.parametrize("pads", [[0, 0], PADS])
@torch.no_grad()
def test_chunks_in_a_fixed_cache_whose_other_layers_stay_exact(pads, fused_only):
    model = compressed(recipe=TINY | {"rules": [{"layers": 0, "skip": True}]}, num_hidden_layers=2)
    parts = [padded(24, pads), *(padded(n, [0, 0], n) for n in (20, 3, 1))]
    got, mask = conversation(model, make_cache("fixed", model, 60), "2D", parts)
    tqcompress.remove(model)
    assert close(got[mask.bool()], conversation(model, None, "2D", parts)[0][mask.bool()])


def options(queries, first, mask=None, tokens=None, batch=2):
    return {
        "batch_size": batch, "q_length": queries, "kv_length": tokens or first + queries, "q_offset": first,
        "attention_mask": mask, "device": DEVICE,
    }  # fmt: skip


def test_causal_mask_makes_no_mask_of_queries_times_tokens():
    _, mask = padded(20)
    ones = torch.ones_like(mask)
    assert masks.causal_mask(**options(8, 12)) is None
    assert masks.causal_mask(**options(8, 12, ones)) is None
    assert masks.causal_mask(**options(8, 0, ones[:, :8], tokens=50)) is None
    assert masks.causal_mask(**options(8, 12, mask)).equal(mask.bool())
    assert masks.causal_mask(**options(8, 6, torch.cat([mask, mask], 1), tokens=50)).equal(mask[:, :14].bool())
    inner = masks.causal_mask(**options(8, 12, ones, tokens=50))
    assert inner.shape == (2, 20) and masks.hides_nothing(inner) and not masks.hides_nothing(mask)
    assert masks.dense(inner, 8) is None
    short = masks.causal_mask(**options(8, 12, ones[:, :15].bool()))
    assert short.equal(sdpa_mask(**options(8, 12, ones[:, :15].bool())))
    assert masks.causal_mask(**options(1, 12, mask[:, :13].bool())).shape == (2, 1, 1, 13)


def test_dense_and_simplest_are_inverse():
    _, mask = padded(20)
    mask = mask.bool()
    full = masks.dense(mask, 8)
    assert full.equal(sdpa_mask(**options(8, 12, mask)))
    assert masks.dense(mask, 8) is full
    for given in (full, torch.where(full, 0.0, -torch.inf), torch.where(full, 0.0, -65504.0).half()):
        assert masks.simplest(given, 8, 20).equal(mask)
        assert masks.simplest(given, 8, 20) is masks.simplest(given, 8, 20)
    wide = torch.cat([full, torch.zeros_like(full)], -1)
    assert masks.simplest(wide, 8, 20).equal(mask)


def test_simplest_leaves_what_says_more():
    full = masks.dense(padded(20)[1].bool(), 8).clone()
    tree = full.clone()
    tree[:, :, 5, 13] = False
    later = full.clone()
    later[:, :, 5, 19] = True
    added = torch.where(full, 0.0, -torch.inf)
    added[0, 0, 3, 10] = -2.0
    heads = torch.cat([full, tree], 1)
    for mask in (tree, later, added, heads):
        assert masks.simplest(mask, 8, 20) is mask
    same = torch.cat([full, full], 1)
    assert masks.simplest(same, 8, 20).equal(full[:, 0, -1])
    same[:, 1] = tree[:, 0]  # written over: looked at again
    assert masks.simplest(same, 8, 20) is same
    assert masks.shown_by(heads, 20).equal(full[:, 0, -1])
    assert masks.shown_by(added, 20).equal(full[:, 0, -1])
