"""Allocation: the integer program is exact, sensitivities are what `evaluate` measures, the better setting is kept."""

import logging
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_helpers import shape, spec
from tiny import prompt, tiny_model

import tqcompress
from tqcompress import ModelError, Recipe, RecipeError, allocate, api
from tqcompress.allocate import Sizes, solve, units
from tqcompress.api import compression_of
from tqcompress.artifacts import read
from tqcompress.calibrate import Calibrator, choose_windows
from tqcompress.cli import main
from tqcompress.evaluate import evaluate
from tqcompress.resolve import resolve
from tqcompress.sharding import HeadShard
from tqcompress.texts import load_text

SCALE = 1  # bits of a scale for each coordinate: 16 over a head_dim of 16
RECIPE = {
    "version": 1,
    "name": "mine",
    "key": {"seed": 1},
    "value": {},
    "keep": {"sinks": 2, "window": 4},
    "calibration": {"text": "wikitext-validation", "tokens": 200, "length": 100},
    "budget": {"bits": 2.5 + SCALE, "choices": [1, 2, 4], "tokens": 60},
}


def letters(text, **_):
    """A tokenizer, as far as calibration needs one."""
    return SimpleNamespace(input_ids=[ord(letter) % 200 for letter in text[:2000]])


def recipe(changes: dict | None = None, **budget) -> dict:
    """RECIPE with other keys, and with other keys of its budget."""
    return RECIPE | (changes or {}) | {"budget": RECIPE["budget"] | budget}


def compress(model, given: dict):
    return api.plan_compression(model, given, Calibrator(model, letters))


def plan_of(given: dict, model=None):
    """What `Sizes` asks: the plan of given bits."""
    return lambda allocated: resolve(Recipe.parse(given), model or shape("fff", 2, 16), "mine", allocated)


def sizes_of(given: dict, model=None) -> Sizes:
    return Sizes(Recipe.parse(given).budget, plan_of(given, model), "mine")


# -------------------------------------------------------------------------------------------- the choice itself


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_the_integer_program_is_as_good_as_brute_force(count, choices, seed, share):
    random = np.random.default_rng(seed)
    losses = random.normal(size=(count, choices)) * 10.0 ** random.integers(-6, 1)  # nats, of any order
    sizes = np.cumsum(random.integers(1, 9, (count, choices)), 1) * random.choice([0.5, 64, 1000])
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    room = least + share * (most - least)
    rows = np.arange(count)

    def total(table, chosen):
        return table[rows, list(chosen)].sum()

    def best(within):
        return min(total(losses, c) for c in product(range(choices), repeat=count) if total(sizes, c) <= within)

    found = solve(losses, sizes, room)
    # HiGHS calls a constraint met within 1e-6, so it may take what exceeds the room by rounding alone.
    loose = room * (1 + 2e-6)
    assert total(sizes, found) <= loose
    # Its gap of 1e-6 is taken of losses scaled to 1e4.
    gap = 1e-9 * np.abs(losses).max()
    assert best(loose) - gap <= total(losses, found) <= best(room) + gap


def test_what_cannot_fit_is_refused():
    with pytest.raises(tqcompress.TQCompressError, match="no choice of bits fits"):
        solve(np.zeros((2, 2)), np.array([[2.0, 3.0], [2.0, 3.0]]), 3.9)


def test_units_are_what_over_tells_apart():
    slots = list(product(range(3), range(2), ("key", "value")))
    for over, count in {
        ("layers",): 3, ("sides",): 2, ("layers", "sides"): 6, ("heads", "layers"): 6, ("sides", "heads", "layers"): 12,
    }.items():  # fmt: skip
        found = units(slots, over)
        assert len(found) == count
        assert sorted(slot for unit in found for slot in unit) == sorted(slots)
        places = [("layers", "heads", "sides").index(name) for name in over]
        assert all(len({tuple(slot[i] for i in places) for slot in unit}) == 1 for unit in found)


# ----------------------------------------------------------------------------------------------------- its size


def test_uniform_settings_use_the_budget():
    sizes = sizes_of(recipe(bits=2.5 + SCALE, choices=[4, 3, 1, 2]))
    found = sizes.uniform()
    assert set(found) == {(4, 1), (3, 2), (2, 3), (1, 4)}
    assert all(sizes.mean(bits) == 2.5 + SCALE for bits in found.values())
    assert set(sizes_of(recipe(bits=2 + SCALE)).uniform()) == {(2, 2)}, "choices 1, 2, 4: nothing else is maximal"


def test_what_is_left_of_the_budget_goes_to_keys_first_evenly():
    model = shape("f" * 8, 2, 16)
    sizes = sizes_of(recipe(bits=2.25 + SCALE, choices=[1, 2, 3]), model)
    bits = sizes.filled(sizes.uniform()[2, 2])
    assert [bits[layer, 0, "key"] for layer in range(8)] == [2, 3, 2, 3, 2, 3, 2, 3]
    assert {bits[slot] for slot in bits if slot[2] == "value"} == {2}
    assert sizes.mean(bits) == 2.25 + SCALE
    more = sizes_of(recipe(bits=2.625 + SCALE, choices=[1, 2, 3]), model)
    bits = more.filled(more.uniform()[3, 2])
    assert {bits[slot] for slot in bits if slot[2] == "key"} == {3}
    assert sum(bits[layer, 0, "value"] == 3 for layer in range(8)) == 2
    assert more.mean(bits) == 2.625 + SCALE


def test_given_bits_stay_and_count():
    rules = [{"layers": 0, "key": {"bits": 8}}, {"layers": 2, "skip": True}]
    sizes = sizes_of(recipe({"rules": rules}, bits=3 + SCALE))
    assert set(sizes.of) == {(layer, h, side) for layer in (0, 1) for h in (0, 1) for side in ("key", "value")} - {
        (0, 0, "key"), (0, 1, "key")
    }  # fmt: skip
    # Of four layer sides one has 8 bits and three share (4 * 3 - 8) = 4: 2 + 1 + 1 fits, 2 + 2 + 1 does not.
    bits = dict.fromkeys(sizes.of, 1)
    assert sizes.fits(bits | {(0, h, "value"): 2 for h in (0, 1)})
    assert not sizes.fits(bits | {(layer, h, "value"): 2 for layer in (0, 1) for h in (0, 1)})


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({}, {"bits": 1.5}, "mine: budget.bits: found 1.5; the least that budget.choices allow is 2.000"),
        ({}, {"bits": 5.5}, "mine: budget.bits: found 5.5; the most that budget.choices can use is 5.000"),
        ({}, {"choices": [2, 9]}, "mine: budget.choices: found 9; turboquant supports 1, 2, 3, 4, 5, 6, 7, 8"),
        ({"quantizer": "fp8"}, {}, "mine: budget.choices: found 1; fp8 supports 8"),
        ({"quantizer": "trellis"}, {"choices": [2, 2.5]}, "budget.choices: found 2.5; trellis supports 1, 2, 3, 4"),
        ({"key": {"bits": 2}, "value": {"bits": 2}}, {}, "mine: budget: all bits are given; leave out"),
        ({"rules": [{"key": {"bits": 8}}]}, {"bits": 4}, "found 4; the least that budget.choices allow is 5.500"),
        ({}, {"choices": [2]}, "recipe: budget.choices: found [2]; allowed: List should have at least 2 items"),
        ({}, {"choices": [2, 2]}, "recipe: budget.choices: found [2.0, 2.0]; allowed: each of them once"),
        ({}, {"choices": [2, 2.3]}, "mine: budget.choices: found 2.3; head_dim 16 allows 2, 3"),
        ({}, {"over": ["tokens"]}, "recipe: budget.over[0]: found 'tokens'; allowed: 'layers', 'heads' or 'sides'"),
        ({}, {"over": []}, "recipe: budget.over: found []; allowed: layers, sides, or both"),
        ({}, {"over": ["heads", "sides"]}, "heads only together with layers"),
        ({}, {"allocator": "greedy"}, "recipe: budget.allocator: unknown key; allowed: bits, over, choices, tokens"),
        ({"calibration": None}, {}, "mine: calibration: missing; a budget needs a text"),
        ({}, {"tokens": 101}, "mine: budget.tokens: found 101; a window of the calibration text has 100"),
        ({}, {"tokens": 7}, "mine: budget.tokens: found 7; all of them are kept exact here: sinks 2, window 4"),
        ({"calibration": {"text": "wikitext-validation", "tokens": 1900, "length": 100}}, {}, "has 1 windows that"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(monkeypatch, changes, budget, message):
    monkeypatch.setattr(allocate, "divergences", None)
    model = tiny_model("llama")
    with pytest.raises(RecipeError) as error:
        compress(model, recipe(changes, **budget))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_without_budget_still_needs_all_bits():
    with pytest.raises(RecipeError, match=r"key.bits: missing; give the bits of a key, or a budget"):
        compress(tiny_model("llama"), {k: v for k, v in RECIPE.items() if k not in ("budget", "calibration")})


def test_inspecting_the_recipe_alone_says_what_to_do():
    with pytest.raises(RecipeError, match="budget: its bits are measured on the model; `tqcompress apply"):
        resolve(Recipe.parse(RECIPE), shape())


def test_a_model_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(HeadShard, "of", classmethod(lambda cls, model: cls(0, 2)))
    with pytest.raises(ModelError, match="apply the recipe in one process, save, and load that here"):
        compress(tiny_model("llama"), RECIPE)


# --------------------------------------------------------------------------------------------- what is measured


def pieces(model, given: dict) -> list[torch.Tensor]:
    windows = Calibrator(model, letters).other_windows(Recipe.parse(given))
    return [window[: given["budget"]["tokens"]] for window in windows[: 1 + allocate.HELD_OUT]]


def kl_of(model, ids, rules: list[dict]) -> float:
    """By `evaluate`, of a recipe whose rules give everything its bits."""
    plain = {key: RECIPE[key] for key in ("version", "key", "value", "keep")} | {"rules": rules}
    (quality,) = evaluate(model, ids, {"r": api.plan_compression(model, plain)}, RECIPE["budget"]["tokens"])
    return quality.kl_mean


def by_layer(bits: dict) -> list[dict]:
    """Rules that give every layer its bits of keys and values."""
    return [{"layers": layer, "key": {"bits": k}, "value": {"bits": v}} for layer, (k, v) in bits.items()]


def test_windows_are_of_text_that_statistics_are_not_taken_from():
    model = tiny_model("llama")
    text = torch.tensor(letters(load_text("wikitext-validation")).input_ids)
    others = Calibrator(model, letters).other_windows(Recipe.parse(RECIPE))
    assert len(others) == 20 - 2  # windows of 100 in 2,000 tokens, less those of `tokens`
    used, left = choose_windows(model, text, 200, 100, 0)
    assert len(used) == 2 and all(torch.equal(a, b) for a, b in zip(left, others, strict=True))
    assert sorted(torch.cat([*used, *left]).tolist()) == sorted(text.tolist())
    assert not any(torch.equal(a, b) for a in used for b in left)


EXACT = {"quantizer": "exact", "bits": 32}


@pytest.mark.parametrize("over", [["layers", "sides"], ["layers", "heads", "sides"]])
def test_sensitivities_are_what_evaluate_measures_with_all_else_exact(monkeypatch, over):
    model, seen = tiny_model("llama"), []
    monkeypatch.setattr(allocate, "solve", lambda *given: seen.append(given) or solve(*given))
    given = recipe(over=over)
    compress(model, given)
    ((losses, sizes, room),) = seen
    heads = (0, 1) if "heads" in over else ([0, 1],)
    assert losses.shape == sizes.shape == (6 * len(heads), 3)
    ids = pieces(model, given)[0]
    rest = {"key": EXACT, "value": EXACT}
    for row, (layer, head, side) in enumerate(product(range(3), heads, ("key", "value"))):
        for column, choice in enumerate((1, 2, 4)):
            own = {side: {"quantizer": "turboquant", "bits": choice} | RECIPE[side]}
            rules = [rest, {"layers": layer, "heads": head} | own]
            # The same float32 arithmetic, but for what is exact and goes another way.
            assert losses[row, column] == pytest.approx(kl_of(model, ids, rules), rel=1e-3, abs=1e-6)
    assert (losses > 1e-4).all()
    assert sizes[0].tolist() == [2 / len(heads) * 16 * (b + SCALE) for b in (1, 2, 4)]
    assert room == 3 * 2 * 2 * 16 * (2.5 + SCALE)


def test_both_settings_are_measured_on_the_same_held_out_text():
    model = tiny_model("llama")
    compression = compress(model, RECIPE)
    outcome, plan = compression.allocation, compression.plan
    held_out = torch.cat(pieces(model, RECIPE)[1:])
    assert outcome.tokens == len(held_out) == 4 * 60
    table = {
        layer: tuple(getattr(plan.layer_groups(layer)[0], side).bits for side in ("key", "value")) for layer in range(3)
    }
    used = outcome.allocated_kl if outcome.kept else outcome.uniform_kl
    assert (
        used
        == min(outcome.allocated_kl, outcome.uniform_kl)
        == pytest.approx(kl_of(model, held_out, by_layer(table)), abs=1e-9)
    )
    assert plan.format_bits() == (outcome.allocated_bits if outcome.kept else outcome.uniform_bits) <= 2.5 + SCALE


@pytest.mark.parametrize(("choice", "kept"), [(2, True), (0, False)])
def test_the_better_setting_is_used_and_said_so(monkeypatch, caplog, choice, kept):
    """Two answers in place of the integer program's: one with more bits than the budget has, one with fewer."""
    monkeypatch.setattr(allocate, "solve", lambda losses, sizes, room: [choice] * len(losses))
    model = tiny_model("llama")
    caplog.set_level(logging.INFO, "tqcompress")
    plan = tqcompress.apply(model, RECIPE, tokenizer=letters)
    (said,) = [record for record in caplog.records if record.name == "tqcompress"]
    outcome = compression_of(model).allocation
    assert outcome.kept is kept
    assert (outcome.allocated_kl < outcome.uniform_kl) is kept
    assert said.levelno == (logging.INFO if kept else logging.WARNING)
    assert f"the {'allocated' if kept else 'uniform'} bits are used" in said.getMessage()
    assert f"{outcome.allocated_kl:.4f} allocated" in said.getMessage()
    assert f"{outcome.uniform_kl:.4f} uniform" in said.getMessage()
    if kept:
        assert {group.key.bits for group in plan.groups} == {group.value.bits for group in plan.groups} == {4}
    else:
        assert plan.format_bits() == outcome.uniform_bits
        assert {group.key.bits for group in plan.groups} != {1}


def test_heads_that_get_the_same_bits_are_one_group(monkeypatch):
    answer = [0, 1, 2, 2, 0, 0, 1, 1, 0, 1, 1, 1]  # of 1, 2, 4 bits: layer by layer, head by head, keys and values
    monkeypatch.setattr(allocate, "solve", lambda losses, sizes, room: answer)
    monkeypatch.setattr(allocate, "divergences", lambda m, windows, candidates, *_: list(range(len(candidates))))
    plan = compress(tiny_model("llama"), recipe(over=["layers", "heads", "sides"])).plan
    found = [[(group.heads, group.key.bits, group.value.bits) for group in plan.layer_groups(i)] for i in range(3)]
    assert found == [[((0,), 1, 2), ((1,), 4, 4)], [((0,), 1, 1), ((1,), 2, 2)], [((0,), 1, 2), ((1,), 2, 2)]]
    answer[8:] = [1, 2, 1, 2]
    plan = compress(tiny_model("llama"), recipe(over=["layers", "heads", "sides"])).plan
    assert [group.heads for group in plan.layer_groups(2)] == [(0, 1)]


@pytest.mark.parametrize("over", [["layers"], ["sides"], ["layers", "heads"]])
def test_other_units(over):
    model = tiny_model("llama")
    compression = compress(model, recipe(over=over))
    if compression.allocation.kept and "sides" not in over:
        assert all(group.key.bits == group.value.bits for group in compression.plan.groups)
    assert compression.allocation.allocated_bits <= 2.5 + SCALE


def test_choices_may_be_fractions():
    """head_dim 32: halves."""
    compression = compress(tiny_model("llama", head_dim=32), recipe(choices=[1.5, 2.5, 4], bits=2.5 + 16 / 32))
    outcome, found = compression.allocation, {group.key.bits for group in compression.plan.groups}
    assert found <= {1.5, 2.5, 4}
    assert outcome.uniform.startswith(("2.5-bit keys, 2.5-bit values", "4-bit keys", "1.5-bit keys"))
    assert max(outcome.allocated_bits, outcome.uniform_bits) <= 2.5 + 16 / 32 + 1e-9


def test_given_bits_and_the_rest_of_the_recipe_stay():
    model = tiny_model("gemma3")  # layers 0 and 2 are sliding
    rules = [{"layers": 1, "heads": 1, "key": {"bits": 8, "rotation": "dense"}}]
    plan = compress(model, recipe({"rules": rules, "center": {"key": True}})).plan
    assert spec(plan, 1, 1, "key").bits == 8
    assert spec(plan, 1, 1, "key").options["rotation"] == "dense"
    assert all(group.key.options["center"] and group.key.options["seed"] == 1 for group in plan.groups)
    assert set(plan.exact) == {0, 2}
    assert model.config._attn_implementation == "sdpa" and not model.training


# ---------------------------------------------------------------------------------------------- and what is kept


def test_saved_bits_are_loaded_without_measuring(tmp_path, monkeypatch, capsys):
    model = tiny_model("llama")
    plan = tqcompress.apply(model, recipe({"center": {"key": True}}), tokenizer=letters)
    outcome, ids = compression_of(model).allocation, prompt(40)
    tqcompress.save(model, tmp_path, weights=True)
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(allocate, "divergences", None)
    other = tiny_model("llama")
    assert tqcompress.load(other, tmp_path).groups == plan.groups
    assert compression_of(other).allocation == outcome
    assert torch.equal(other.generate(ids, max_new_tokens=8, do_sample=False), want)
    assert read(tmp_path).recipe == Recipe.parse(recipe({"center": {"key": True}}))
    assert Recipe.load(tmp_path / "recipe.yaml") == read(tmp_path).recipe
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"mine: {outcome}" in printed and f"{plan.groups[0].key.bits:g} bit" in printed


def test_a_model_that_rounds_too_much_is_warned_of_and_takes_bits_measured_in_float32(tmp_path, caplog):
    model = tiny_model("llama")
    plan = tqcompress.apply(model, RECIPE, tokenizer=letters)
    assert "measure the model in float32" not in caplog.text
    tqcompress.save(model, tmp_path, weights=True)
    other = tiny_model("llama").to(torch.bfloat16)
    assert tqcompress.load(other, tmp_path).groups == plan.groups
    other.generate(prompt(20), max_new_tokens=2, do_sample=False)
    tqcompress.apply(other, RECIPE, tokenizer=letters)
    assert "mine: budget: torch.bfloat16 rounds more than most units disturb; measure the model in float" in caplog.text


def test_the_same_budget_gives_the_same_plan():
    first, second = (compress(tiny_model("llama"), RECIPE) for _ in range(2))
    assert first.plan == second.plan and first.allocation == second.allocation


@given(
    st.floats(1, 8),
    st.lists(st.integers(1, 8), min_size=2, max_size=4, unique=True),
    st.sampled_from([["layers"], ["sides"], ["layers", "sides"], ["layers", "heads"], ["sides", "heads", "layers"]]),
)
def test_dump_loads_to_an_equal_recipe(bits, choices, over):
    given = Recipe.parse(recipe(bits=bits, choices=choices, over=over))
    assert Recipe.parse(yaml.safe_load(given.dump())) == given
