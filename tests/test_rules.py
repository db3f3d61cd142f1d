"""The rules of a recipe: which layers and heads they select, and what they change."""

import pytest
from recipe_helpers import bits, plan_of, spec

from tqcompress import TensorSpec

SELECTORS = {
    "int": (1, [1]),
    "negative": (-1, [5]),
    "most_negative": (-6, [0]),
    "text": ("2", [2]),
    "negative_text": ("-2", [4]),
    "range": ("1-3", [1, 2, 3]),
    "range_of_one": ("3-3", [3]),
    "odd": ("odd", [1, 3, 5]),
    "even": ("even", [0, 2, 4]),
    "all": ("all", [0, 1, 2, 3, 4, 5]),
    "list": ([0, -1, "2-3"], [0, 2, 3, 5]),
}


@pytest.mark.parametrize(("selector", "layers"), SELECTORS.values(), ids=SELECTORS)
def test_layer_selectors(selector, layers):
    plan = plan_of(rules=[{"layers": selector, "key": {"bits": 4}}])
    assert bits(plan, "key") == [4 if layer in layers else 3 for layer in range(6)]
    assert bits(plan, "value") == [2] * 6


def test_a_rule_without_layers_covers_all():
    assert bits(plan_of(rules=[{"key": {"bits": 5}}]), "key") == [5] * 6


@pytest.mark.parametrize(("heads", "changed"), [(2, [2]), ([0, 3], [0, 3])])
def test_heads(heads, changed):
    plan = plan_of(rules=[{"layers": 1, "heads": heads, "value": {"bits": 4}}])
    assert [spec(plan, 1, head, "value").bits for head in range(4)] == [4 if h in changed else 2 for h in range(4)]
    assert {spec(plan, 0, head, "value").bits for head in range(4)} == {2}


def test_keys_and_values_apart():
    plan = plan_of(
        rules=[{"layers": 0, "key": {"bits": 4}}, {"layers": 1, "value": {"bits": 4}}],
    )
    assert bits(plan, "key") == [4, 3, 3, 3, 3, 3]
    assert bits(plan, "value") == [2, 4, 2, 2, 2, 2]


def test_later_rules_win():
    plan = plan_of(
        rules=[
            {"layers": "0-3", "key": {"bits": 4}},
            {"layers": "2-5", "key": {"bits": 5}},
            {"layers": 3, "heads": 1, "key": {"bits": 6}},
        ]
    )
    assert bits(plan, "key") == [4, 4, 5, 5, 5, 5]
    assert bits(plan, "key", head=1) == [4, 4, 5, 6, 5, 5]


def test_rules_change_only_the_keys_they_give():
    plan = plan_of(key={"bits": 3, "seed": 7, "rotation": "dense"}, rules=[{"layers": 0, "key": {"seed": 8}}])
    assert spec(plan, 0, 0, "key") == TensorSpec("turboquant", 3, {"seed": 8, "rotation": "dense"})
    assert spec(plan, 1, 0, "key") == TensorSpec("turboquant", 3, {"seed": 7, "rotation": "dense"})


def test_skipped_layers_stay_exact_and_say_why():
    plan = plan_of(rules=[{"layers": 1, "key": {"bits": 4}}, {"layers": [0, -1], "skip": True}])
    assert bits(plan, "key") == [None, 4, 3, 3, 3, None]
    assert plan.exact == {0: "skipped by rules[1]", 5: "skipped by rules[1]"}


def test_a_later_rule_brings_a_skipped_layer_back():
    plan = plan_of(rules=[{"layers": "0-2", "skip": True}, {"layers": 1, "key": {"bits": 4}}])
    assert bits(plan, "key") == [None, 4, None, 3, 3, 3]


def test_skipped_heads_become_an_exact_group():
    plan = plan_of(rules=[{"layers": 0, "heads": 1, "skip": True}, {"layers": 0, "heads": 3, "skip": True}])
    groups = {group.heads: group for group in plan.layer_groups(0)}
    assert groups.keys() == {(0, 2), (1, 3)}
    assert groups[1, 3].key == groups[1, 3].value == TensorSpec("exact", 32)  # enough for any dtype
    assert 0 not in plan.exact


def test_skipping_all_heads_one_by_one_is_skipping_the_layer():
    plan = plan_of(rules=[{"layers": 0, "heads": [0, 1, 2], "skip": True}, {"layers": 0, "heads": 3, "skip": True}])
    assert plan.layer_groups(0) == []
    assert 0 in plan.exact


def test_skipping_everything_is_refused():
    with pytest.raises(ValueError, match=r"tiny: nothing to compress.*skipped by rules\[0\]"):
        plan_of(rules=[{"skip": True}])


def test_another_quantizer_drops_the_old_ones_options_but_keeps_bits():
    plan = plan_of(
        key={"bits": 3, "seed": 7, "rotation": "dense"},
        rules=[{"layers": 0, "quantizer": "affine"}, {"layers": 1, "key": {"quantizer": "affine", "group": 16}}],
    )
    assert spec(plan, 0, 0, "key") == TensorSpec("affine", 3)
    assert spec(plan, 0, 0, "value") == TensorSpec("affine", 2)
    assert spec(plan, 1, 0, "key") == TensorSpec("affine", 3, {"group": 16})
    assert spec(plan, 1, 0, "value") == TensorSpec("turboquant", 2)
    assert spec(plan, 2, 0, "key") == TensorSpec("turboquant", 3, {"seed": 7, "rotation": "dense"})


def test_naming_the_same_quantizer_again_keeps_its_options():
    plan = plan_of(key={"bits": 3, "seed": 7}, rules=[{"layers": 0, "quantizer": "turboquant"}])
    assert spec(plan, 0, 0, "key") == TensorSpec("turboquant", 3, {"seed": 7})


def test_a_sides_own_quantizer_beats_that_of_the_rule_and_of_the_recipe():
    plan = plan_of(
        quantizer="affine",
        key={"bits": 3, "quantizer": "turboquant", "seed": 7},
        rules=[{"layers": 0, "quantizer": "turboquant", "value": {"quantizer": "exact", "bits": 16}}],
    )
    assert spec(plan, 1, 0, "key") == TensorSpec("turboquant", 3, {"seed": 7})
    assert spec(plan, 1, 0, "value") == TensorSpec("affine", 2)
    assert spec(plan, 0, 0, "value") == TensorSpec("exact", 16)
    assert spec(plan, 0, 0, "key") == TensorSpec("turboquant", 3, {"seed": 7})


def test_keep_reaches_the_plan():
    plan = plan_of(keep={"sinks": 2, "window": 7})
    assert (plan.sinks, plan.window) == (2, 7)
