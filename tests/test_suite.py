"""The suite: recipes at equal bytes are what they say, and what a model cannot take is left out by name."""

import pytest
import torch
from recipe_helpers import shape

from tqcompress import Recipe, RecipeError, TQCompressError, session, suite
from tqcompress.recipe import shipped_recipes
from tqcompress.resolve import resolve

EQUAL = suite.at_equal_bytes()


def test_every_budget_has_recipes_of_about_its_bits_and_the_same_exact_tokens():
    assert list(EQUAL) == [2.25, 3.25, 4.25]
    for budget, recipes in EQUAL.items():
        found = {recipe.name: resolve(recipe, shape(head_dim=64)).format_bits(torch.bfloat16) for recipe in recipes}
        assert len(found) == len(recipes) >= 7
        assert all(abs(bits - budget) <= 0.25 for bits in found.values()), found
        assert all(name.endswith(f"@{budget:g}") for name in found)
        assert found[f"tqcompress@{budget:g}"] == min(found.values()) == budget, "nothing else is cheaper"
        assert {(recipe.keep.sinks, recipe.keep.window) for recipe in recipes} == {(4, 128)}


@pytest.mark.parametrize("budget", EQUAL)
def test_no_setting_of_a_baseline_is_nearer_to_its_budget(budget):
    """One bit more or less, where the quantizer has it, is further off."""
    for recipe in EQUAL[budget]:
        distances = {}
        for step in (-1, 0, 1):
            sides = {
                side: getattr(recipe, side).model_copy(update={"bits": getattr(recipe, side).bits + step})
                for side in ("key", "value")
            }
            try:
                plan = resolve(recipe.model_copy(update=sides), shape(head_dim=64))
            except RecipeError:
                continue
            distances[step] = abs(plan.format_bits() - budget)
        assert min(distances, key=distances.get) == 0, recipe.name


def test_the_suite_holds_all_shipped_recipes_but_the_reference():
    assert set(suite.shipped()) == set(shipped_recipes()) - {"reference"}
    assert {"turboquant-paper", "turboquant-prod", "turboquant-prod-orthogonal", "polar"} <= set(suite.shipped())


def test_what_the_model_cannot_take_is_left_out_unless_it_was_named():
    odd = shape(head_dim=80)  # no groups of 64 channels
    kivi = next(recipe for recipe in EQUAL[2.25] if recipe.name == "kivi@2.25")
    planned, left_out = session.plan_each(["balanced", kivi], [], lambda recipe: resolve(Recipe.load(recipe), odd))
    assert list(planned) == ["balanced"]
    assert len(left_out) == 1
    assert left_out[0].startswith("kivi@2.25: value.group: found 64; for values of head_dim 80 use one of")
    with pytest.raises(RecipeError, match=r"^kivi@2\.25: value\.group"):
        session.plan_each([kivi], [kivi], lambda recipe: resolve(Recipe.load(recipe), odd))


def test_two_recipes_of_one_name_are_refused():
    with pytest.raises(TQCompressError, match="the same name: balanced"):
        session.plan_each(["balanced", "recipes/balanced.yaml"], [], lambda recipe: recipe)
