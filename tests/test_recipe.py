"""Recipes: every mistake gets a message of one line that says where, what was found and what is allowed."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_helpers import BASE, SOURCE, bits, plan_of, shape

from tqcompress import Recipe, RecipeError
from tqcompress.recipe import shipped_recipes
from tqcompress.resolve import resolve


def check(message: str, source: str, *parts: str) -> None:
    """One line that starts with the source and has every part."""
    assert "\n" not in message
    assert message.startswith(f"{source}: "), message
    for part in parts:
        assert part in message, (part, message)


# ------------------------------------------------------------------------------------------ what is refused

TOP = (
    "version, name, quantizer, key, value, keep, max_cache_len, rules, center, balance, outliers, budget, calibration, "
    "guard, tiers"
)
RULE = "layers, heads, skip, quantizer, key, value"
TURBOQUANT = "turboquant allows bits, quantizer, rotation, seed, center, balance"
INSTALLED = "affine, exact, fp8, nvfp4, polar, qjl, trellis"
GOOD = [{"layers": 0, "key": {"bits": 4}}]  # a valid rule, so that the bad one is not the first

# Changes to BASE, then what the message must contain: path, what was found, what is allowed.
WRONG = {
    "unknown_top": ({"bit": 3}, "bit: unknown key", f"allowed: {TOP}"),
    "no_room": ({"max_cache_len": 0}, "max_cache_len: found 0", "greater than 0"),
    "unknown_nested": ({"keep": {"sink": 4}}, "keep.sink: unknown key", "allowed: sinks, window"),
    "unknown_in_rule": ({"rules": [*GOOD, {"layer": 1}]}, "rules[1].layer: unknown key", f"allowed: {RULE}"),
    "unknown_in_key": ({"key": {"bits": 3, "rotate": 1}}, "key.rotate: unknown key", TURBOQUANT),
    "unknown_in_value": ({"value": {"bits": 3, "rotate": 1}}, "value.rotate: unknown key", TURBOQUANT),
    "unknown_in_rules_value": (
        {"rules": [*GOOD, {"value": {"bitz": 3}}]},
        "rules[1].value.bitz: unknown key",
        TURBOQUANT,
    ),
    "key_is_no_string": ({3: 4}, "[3]: found 3", "strings"),
    "missing_version": ({"version": None}, "version: found None", "allowed: 1"),
    "wrong_version": ({"version": 2}, "version: found 2", "allowed: 1"),
    "version_as_text": ({"version": "1"}, "version: found '1'", "allowed: 1"),
    "side_is_a_number": ({"key": 3}, "key: found 3", "a valid dictionary"),
    "bits_as_text": ({"key": {"bits": "3"}}, "key.bits: found '3'", "a valid number"),
    "bits_as_bool": ({"key": {"bits": True}}, "key.bits: found True", "a valid number"),
    "bits_zero": ({"key": {"bits": 0}}, "key.bits: found 0", "greater than 0"),
    "bits_negative_in_rule": ({"rules": [{"key": {"bits": -1}}]}, "rules[0].key.bits: found -1", "greater than 0"),
    "bits_nan": ({"key": {"bits": float("nan")}}, "key.bits: found nan", "allowed: less than or equal to 32"),
    "bits_missing": ({"value": {}}, "value.bits: missing"),
    "window_as_text": ({"keep": {"window": "long"}}, "keep.window: found 'long'", "a valid integer"),
    "window_negative": ({"keep": {"window": -1}}, "keep.window: found -1", "greater than or equal to 0"),
    "sinks_half": ({"keep": {"sinks": 1.5}}, "keep.sinks: found 1.5", "integer"),
    "name_is_a_number": ({"name": 3}, "name: found 3", "a valid string"),
    "rules_are_a_mapping": ({"rules": {"layers": 0}}, "rules: found {'layers': 0}", "a valid list"),
    "rule_is_a_number": ({"rules": [7]}, "rules[0]: found 7", "a valid dictionary"),
    "skip_as_text": ({"rules": [{"skip": "yes"}]}, "rules[0].skip: found 'yes'", "a valid boolean"),
    "option_of_the_wrong_type": ({"key": {"bits": 3, "seed": "x"}}, "key.seed: found 'x'", "a valid integer"),
    "option_not_in_the_list": (
        {"key": {"bits": 3, "rotation": "fft"}},
        "key.rotation: found 'fft'",
        "'hadamard', 'dense' or 'identity'",
    ),
    "layer_too_big": ({"rules": [{"layers": 6, "skip": True}]}, "rules[0].layers: found 6", "layers 0 to 5"),
    "layer_too_negative": ({"rules": [{"layers": -7, "skip": True}]}, "rules[0].layers: found -7", "-6 to -1"),
    "layer_in_a_list": ({"rules": [{"layers": [0, 6], "skip": True}]}, "rules[0].layers[1]: found 6", "0 to 5"),
    "layer_as_text": ({"rules": [{"layers": "6", "skip": True}]}, "rules[0].layers: found 6", "layers 0 to 5"),
    "layer_as_bool": ({"rules": [{"layers": True, "skip": True}]}, "rules[0].layers: found True", "allowed: "),
    "layers_misspelt": ({"rules": [{"layers": "last", "skip": True}]}, "rules[0].layers: found 'last'", "odd, even"),
    "range_too_long": ({"rules": [{"layers": "4-6", "skip": True}]}, "rules[0].layers: found '4-6'", "within 0-5"),
    "range_backwards": ({"rules": [{"layers": "4-2", "skip": True}]}, "rules[0].layers: found '4-2'", "first <= last"),
    "range_negative": ({"rules": [{"layers": "-3--1", "skip": True}]}, "rules[0].layers: found '-3--1'", "allowed: "),
    "head_too_big": ({"rules": [{"heads": 4, "key": {"bits": 4}}]}, "rules[0].heads: found 4", "KV heads 0 to 3"),
    "head_in_a_list": ({"rules": [{"heads": [0, 9], "skip": True}]}, "rules[0].heads: found 9", "KV heads 0 to 3"),
    "head_negative": ({"rules": [{"heads": -1, "skip": True}]}, "rules[0].heads: found -1", "0 or more"),
    "no_layers": ({"rules": [{"layers": [], "skip": True}]}, "rules[0].layers: found an empty list"),
    "no_heads": ({"rules": [{"heads": [], "skip": True}]}, "rules[0].heads: found an empty list"),
    "rule_of_empty_key": ({"rules": [{"key": {}}]}, "rules[0]: the rule changes nothing"),
    "empty_quantizer": ({"rules": [{"quantizer": "", "key": {"bits": 2}}]}, "rules[0].quantizer: found ''"),
    "version_as_bool": ({"version": True}, "version: found True", "allowed: 1"),
    "seed_as_text": ({"key": {"bits": 3, "seed": "3"}}, "key.seed: found '3'", "a valid integer"),
    "quantizer_unknown": ({"quantizer": "turbo"}, "quantizer: found 'turbo'", INSTALLED),
    "quantizer_unknown_in_key": (
        {"key": {"bits": 3, "quantizer": "turbo"}},
        "key.quantizer: found 'turbo'",
        INSTALLED,
    ),
    "quantizer_unknown_in_rule": (
        {"rules": [*GOOD, {"quantizer": "turbo"}]},
        "rules[1].quantizer: found 'turbo'",
        INSTALLED,
    ),
    "quantizer_unknown_in_rules_value": (
        {"rules": [{"value": {"quantizer": "turbo"}}]},
        "rules[0].value.quantizer: found 'turbo'",
        INSTALLED,
    ),
    "bits_unsupported": ({"key": {"bits": 9}}, "key.bits: found 9", "turboquant supports 1, 2, 3, 4, 5, 6, 7, 8"),
    "bits_fractional": ({"value": {"bits": 2.3}}, "value.bits: found 2.3", "head_dim 64 allows 2, 2.25, 2.5, 2.75, 3"),
    "bits_fractional_elsewhere": (
        {"value": {"bits": 2.5, "quantizer": "trellis"}},
        "value.bits: found 2.5",
        "trellis supports 1, 2, 3, 4",
    ),
    "bits_fractional_beside_outliers": (
        {"key": {"bits": 2.5}, "outliers": {"channels": 16, "bits": 4}},
        "key.bits: found 2.5",
        "whole numbers",
    ),
    "outliers_of_too_few_bits": (
        {"rules": [{"key": {"bits": 5}}], "outliers": {"channels": 16, "bits": 4}},
        "outliers.bits: found 4",
        "more than the 5",
    ),
    "outliers_that_do_not_pack": (
        {"key": {"bits": 2, "outliers": {"channels": 10, "bits": 4}}},
        "key.outliers.channels: found 10",
        "head_dim 64 allows 16, 32, 48",
    ),
    "outliers_that_are_not_there": (
        {"outliers": {"channels": [3, 64], "bits": 4}},
        "outliers.channels: found 64",
        "0 to 63",
    ),
    "outliers_twice": ({"outliers": {"channels": [3, 3], "bits": 4}}, "outliers.channels: found [3, 3]", "each once"),
    "outliers_as_text": ({"outliers": {"channels": "3", "bits": 4}}, "outliers.channels: found '3'", "how many"),
    "outliers_selected_twice": (
        {"outliers": {"channels": [3], "bits": 4, "select": "calibration"}},
        "outliers: select: found 'calibration'",
        "listed",
    ),
    "outliers_with_an_unknown_key": (
        {"value": {"bits": 2, "outliers": {"channels": 16, "bits": 4, "seed": 1}}},
        "value.outliers.seed: unknown key",
    ),
    "outliers_listed_in_another_basis": (
        {"balance": "key", "outliers": {"channels": [3], "bits": 4}},
        "outliers.channels: found a list",
        "balance: key",
    ),
    "outliers_of_another_quantizer": (
        {"quantizer": "polar", "outliers": {"channels": 16, "bits": 4}},
        "outliers: quantizer polar of keys cannot do that",
    ),
    "bits_unsupported_in_rule": (
        {"rules": [*GOOD, {"layers": -1, "value": {"bits": 9}}]},
        "rules[1].value.bits: found 9",
        "turboquant supports",
    ),
    "bits_unsupported_after_a_change_of_quantizer": (
        {"rules": [{"layers": -1, "quantizer": "exact"}]},
        "key.bits: found 3",
        "exact supports 16, 32",
    ),
    "options_of_another_quantizer": (
        {"value": {"bits": 2, "group": 32}},
        "value.group: unknown key",
        TURBOQUANT,
    ),
    "options_of_another_quantizer_in_rule": (
        {"rules": [{"quantizer": "affine", "key": {"seed": 1}}]},
        "rules[0].key.seed: unknown key",
        "affine allows bits, quantizer, group",
    ),
    "option_that_does_not_fit": (
        {"quantizer": "affine", "value": {"bits": 2, "group": 48}},
        "value.group: found 48",
        "[1, 2, 4, 8, 16, 32, 64]",
    ),
    "e4m3_of_too_many_bits": (
        {"key": {"bits": 8, "levels": "e4m3"}},
        "key.levels: found 'e4m3'",
        "too few numbers",
    ),
    "skip_and_key": ({"rules": [{"skip": True, "key": {"bits": 4}}]}, "rules[0]: skip: true contradicts", "key"),
    "skip_and_quantizer": ({"rules": [{"skip": True, "quantizer": "affine"}]}, "rules[0]: skip: true contradicts"),
    "empty_rule": ({"rules": [*GOOD, {}]}, "rules[1]: the rule changes nothing", "skip: true, quantizer, key"),
    "rule_without_effect": ({"rules": [{"layers": 0, "heads": 1}]}, "rules[0]: the rule changes nothing"),
    "no_skip": ({"rules": [{"layers": 0, "skip": False}]}, "rules[0]: the rule changes nothing"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), [(c, p) for c, *p in WRONG.values()], ids=WRONG)
def test_mistakes(changes, parts):
    with pytest.raises(RecipeError) as error:
        resolve(Recipe.parse(BASE | changes, SOURCE), shape(), SOURCE)
    check(str(error.value), SOURCE, *parts)


UNFINISHED = {
    "tiers": [{"after": 8192, "key": {"bits": 2}, "value": {"bits": 2}}],
}


@pytest.mark.parametrize("key", UNFINISHED)
def test_keys_that_are_not_implemented_are_refused_and_never_ignored(key):
    with pytest.raises(RecipeError) as error:
        plan_of(**{key: UNFINISHED[key]})
    check(str(error.value), SOURCE, f"{key}: part of the schema but not implemented")


def test_several_mistakes_are_all_told_in_one_line():
    with pytest.raises(RecipeError) as error:
        Recipe.parse({"version": 2, "key": {"bits": 3}, "nam": "x\ny"}, SOURCE)
    check(str(error.value), SOURCE, "version: found 2", "value: missing", "nam: unknown key")


def test_an_option_default_that_does_not_fit_names_the_option():
    """The user did not write `group`, so its path is where it would have to be written."""
    with pytest.raises(RecipeError) as error:
        plan_of(shape(head_dim=80), quantizer="affine")
    check(str(error.value), SOURCE, "value.group: found 32", "[1, 2, 4, 5, 8, 10, 16, 20, 40, 80]")


def test_a_rule_for_a_layer_that_stays_exact_is_refused():
    with pytest.raises(RecipeError) as error:
        plan_of(shape("sfsf"), rules=[{"layers": 2, "key": {"bits": 4}}])
    check(str(error.value), SOURCE, "rules[0].layers", "layer 2 is sliding", "[1, 3]")
    # Skipping it, or selecting it along with others, asks for nothing impossible.
    plan = plan_of(shape("sfsf"), rules=[{"layers": 2, "skip": True}, {"layers": "even", "key": {"bits": 4}}])
    assert bits(plan, "key") == [None, 3, None, 3]


# ------------------------------------------------------------------------------------------------- the file


def load_text(tmp_path, text: str | bytes):
    """Load a recipe file; returns the path and the error message, or the recipe."""
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        return str(path), Recipe.load(path)
    except RecipeError as error:
        return str(path), str(error)


BAD_FILES = {
    "not_yaml": ("version: 1\nkey: {bits: 3\n", ["not valid YAML", "line 3"]),
    "tab": ("version: 1\nkey:\n\tbits: 3\n", ["not valid YAML", "line 3"]),
    "not_text": (b"\x00\xff\xfe", ["not valid YAML"]),
    "duplicate_key": ("version: 1\nkey: {bits: 3}\nkey: {bits: 2}\n", ["key 'key' is given twice", "line 3"]),
    "duplicate_nested": ("version: 1\nkey: {bits: 3, bits: 2}\n", ["key 'bits' is given twice", "line 2"]),
    "duplicate_in_rule": ("rules:\n- {layers: 0, layers: 1}\n", ["key 'layers' is given twice", "line 2"]),
    "list_as_key": ("? [a, b]\n: 1\n", ["not valid YAML", "line 1"]),
    "object": ("!!python/object/apply:os.getcwd []\n", ["not valid YAML", "python/object"]),
    "empty": ("", ["the recipe: found None"]),
    "list": ("- version: 1\n", ["the recipe: found [{'version': 1}]"]),
    "text": ("balanced\n", ["the recipe: found 'balanced'"]),
    "two_documents": ("version: 1\n---\nversion: 1\n", ["not valid YAML"]),
    "schema": ("version: 1\nkey: {bits: 3}\nvalue: {bits: 2}\nkeep: {sink: 1}\n", ["keep.sink: unknown key"]),
}


@pytest.mark.parametrize(("text", "parts"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, text, parts):
    path, message = load_text(tmp_path, text)
    assert isinstance(message, str)
    check(message, path, *parts)


def test_a_good_file(tmp_path):
    _, recipe = load_text(
        tmp_path, "version: 1\nkey: {bits: 3, seed: 5}\nvalue: {bits: 2}\nrules:\n- {layers: 0-1, skip: true}\n"
    )
    assert recipe == Recipe.parse(
        {"version": 1, "key": {"bits": 3, "seed": 5}, "value": {"bits": 2}, "rules": [{"layers": "0-1", "skip": True}]}
    )
    assert recipe.key.options == {"seed": 5}
    assert (recipe.keep.sinks, recipe.keep.window, recipe.quantizer) == (4, 128, "turboquant")


@pytest.mark.parametrize("name", ["no_such_recipe", "no/such/recipe.yaml", "../recipes/balanced"])
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        Recipe.load(name)
    check(str(error.value), name, "no such file", *shipped_recipes())


def test_a_directory_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load(tmp_path)


def test_a_recipe_or_plain_data_can_be_given_instead():
    recipe = Recipe.load(BASE)
    assert Recipe.load(recipe) is recipe
    with pytest.raises(RecipeError, match=r"^recipe: foo: unknown key"):
        Recipe.load(BASE | {"foo": 1})


def test_shipped_recipes_resolve():
    assert shipped_recipes()
    for name in shipped_recipes():
        recipe = Recipe.load(name)
        measured = None if recipe.budget is None else lambda *unit: 2
        assert resolve(recipe, shape("f" * 32), allocated=measured).groups
        assert Recipe.parse(yaml.safe_load(recipe.dump())) == recipe


# ---------------------------------------------------------------------------------------------- round trip

scalars = st.one_of(st.integers(-9, 9), st.booleans(), st.floats(allow_nan=False), st.text(max_size=8))
option_names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda name: name not in ("bits", "quantizer"))
sides = st.builds(
    dict,
    st.dictionaries(option_names, scalars, max_size=2),
    bits=st.one_of(st.integers(1, 8), st.floats(0.5, 8)),
)
selectors = st.one_of(
    st.integers(-4, 9), st.sampled_from(["all", "odd", "even", "0-3", "07", "-1", "8"]), st.just("10-12")
)
changes = st.fixed_dictionaries(
    {}, optional={"key": sides, "value": sides, "quantizer": st.text(min_size=1, max_size=8)}
)
rules = st.builds(
    lambda layers, heads, change: {"layers": layers} | ({} if heads is None else {"heads": heads}) | change,
    st.one_of(selectors, st.lists(selectors, min_size=1, max_size=3)),
    st.one_of(st.none(), st.integers(0, 7), st.lists(st.integers(0, 7), min_size=1, max_size=3)),
    st.one_of(st.just({"skip": True}), changes.filter(bool)),
)
recipes = st.fixed_dictionaries(
    {"version": st.just(1), "key": sides, "value": sides},
    optional={
        "name": st.text(max_size=10),
        "quantizer": st.text(min_size=1, max_size=8),
        "keep": st.fixed_dictionaries({}, optional={"sinks": st.integers(0, 9), "window": st.integers(0, 999)}),
        "rules": st.lists(rules, max_size=3),
    },
)


@settings(deadline=None, max_examples=60)
@given(recipes)
def test_dump_loads_to_an_equal_recipe(tmp_path_factory, data):
    recipe = Recipe.parse(data)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(recipe.dump(), encoding="utf-8")
    loaded = Recipe.load(path)
    assert loaded == recipe
    # 1 == True == 1.0 in Python: compare what was written too.
    assert loaded.dump() == recipe.dump()


def test_dump_is_short_and_says_the_version():
    text = Recipe.parse(BASE).dump()
    assert yaml.safe_load(text) == BASE
    assert re.search(r"^version: 1$", text, re.MULTILINE)
