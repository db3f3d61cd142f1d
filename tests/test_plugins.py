"""Plugins: the example as a user would install it, broken ones, their order, and what the framework knows of them."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

from tqcompress import RecipeError, hookspecs
from tqcompress.registry import ALLOW_LIST, Plugins

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "plugins" / "example"
RECIPE = """
version: 1
name: with-sign
quantizer: turboquant
key: {bits: 4}
value: {bits: 3}
keep: {sinks: 2, window: 8}
rules:
  - {layers: [1, 2], value: {quantizer: sign, bits: 1, scale: rms}}
"""


def run(*command, path: Path, **variables) -> subprocess.CompletedProcess:
    """Run a command of this Python with the distributions in `path` installed."""
    environment = {name: value for name, value in os.environ.items() if name != ALLOW_LIST}
    environment |= {"PYTHONPATH": str(path), "COLUMNS": "200", **variables}
    return subprocess.run([sys.executable, "-m", *map(str, command)], env=environment, capture_output=True, text=True)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution of one module for this test: `install(name, source, **entry_points)`."""
    monkeypatch.delenv(ALLOW_LIST, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    installed = []

    def add(name: str, source: str, **entry_points: str) -> None:
        installed.append(name)
        points = "\n".join(f"{key} = {value}" for key, value in (entry_points or {name: name}).items())
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[tqcompress]\n{points}\n")
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    yield add
    for name in installed:
        sys.modules.pop(name, None)


# The example, end to end


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """A folder that pip installed the example into."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files in its source
    pip = run("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder / "site", source, path="")
    assert pip.returncode == 0, pip.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """The directory of a tiny llama, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    tiny_model("llama", vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


def test_the_example_is_listed_beside_a_broken_plugin(example, install, tmp_path):
    install("broken", "import nothing_of_that_name")
    listed = run("tqcompress.cli", "plugins", path=f"{example}{os.pathsep}{tmp_path}")
    assert listed.returncode == 0, listed.stderr
    row = {name: next(line for line in listed.stdout.splitlines() if name in line) for name in ("example", "broken")}
    assert "tqcompress-example 0.1.0" in row["example"] and "sign" in row["example"]
    assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in row["broken"]


def test_apply_with_a_recipe_that_uses_the_example(example, llama, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out, result = tmp_path / "out", tmp_path / "result.json"
    small = ("--prompt", "We the people", "--max-new-tokens", 16, "--max-tokens", 96, "--window-tokens", 48)
    apply = ("tqcompress.cli", "apply", tmp_path / "recipe.yaml", "--model", llama, "--out", out, "--json", result)
    applied = run(*apply, *small, path=example)
    assert applied.returncode == 0, applied.stderr
    data = json.loads(result.read_text())
    # Keys of 4 bits, values of 3 bits in one layer and of 1 bit in two, 16 values a head, 16 bits a scale.
    assert data["format_bits"] == pytest.approx((4 + (3 + 1 + 1) / 3) / 2 + 16 / 16)
    assert data["effective_bits"] > data["format_bits"]
    assert data["kl_mean"] > 0

    inspected = run("tqcompress.cli", "inspect", out, path=example)
    assert inspected.returncode == 0, inspected.stderr
    assert "sign" in inspected.stdout

    without = run(*apply, *small, path=example, TQCOMPRESS_PLUGINS="")
    assert without.returncode == 2
    assert "rules[0].value.quantizer: found 'sign'" in without.stderr


def test_the_tests_of_the_example_pass(example):
    tests = run("pytest", "-p", "no:cacheprovider", "--rootdir", EXAMPLE, EXAMPLE / "tests", path=example)
    assert tests.returncode == 0, tests.stdout


# Loading


def codec(name: str, more: str = "") -> str:
    """The source of a plugin that adds a quantizer called `name`, and `more`."""
    return (
        "from tqcompress import Codec, hookimpl\n"
        f"class Mine(Codec):\n    name = {name!r}\n"
        f"@hookimpl\ndef tqcompress_register(registry):\n    registry.add_codec(Mine)\n{more}"
    )


def source_of(plugins: Plugins, name: str):
    return next(source for source in plugins.sources if source.name == name)


def test_a_plugin_says_where_it_came_from_and_what_it_added(install):
    install("good", codec("mine"))
    plugins = Plugins()
    found = source_of(plugins, "good")
    assert (found.origin, found.error, found.codecs) == ("good 1.0", None, ["mine"])
    assert plugins.registry.codec("mine").__module__ == "good"


@pytest.mark.parametrize(
    "value, loaded, missing", [("", [], []), ("one", ["one"], []), (" two , nobody", ["two"], ["nobody"])]
)
def test_the_variable_limits_installed_plugins(install, monkeypatch, value, loaded, missing):
    for name in ("one", "two"):
        install(name, codec(name))
    monkeypatch.setenv(ALLOW_LIST, value)
    plugins = Plugins()
    assert [source.name for source in plugins.sources if source.codecs and source.origin != "built-in"] == loaded
    assert [source.name for source in plugins.sources if source.error] == missing
    assert "turboquant" in plugins.registry.names()


BROKEN = {
    "missing_import": ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "syntax": ("def broken(:", "SyntaxError"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "misspelt_hook": (codec("other", "@hookimpl\ndef tqcompress_aply(model): ..."), "tqcompress_aply"),
    "wrong_argument": (codec("other", "@hookimpl\ndef tqcompress_cli(apps): ..."), "apps"),
    "taken_name": (codec("affine"), "quantizer 'affine' is already registered by tqcompress.plugins.affine"),
    "no_codec": (codec("other").replace("(Mine)", "('Mine')"), "'Mine' is not a subclass of tqcompress.Codec"),
    "raises": (codec("other", "    raise RuntimeError('not today')"), "RuntimeError: not today"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_leaves_nothing_behind(install, name):
    source, error = BROKEN[name]
    known = Plugins().registry
    install(name, source)
    install("zgood", codec("mine"))  # loaded after it
    plugins = Plugins()
    found = source_of(plugins, name)
    assert error in found.error and found.codecs == []
    assert plugins.registry.names() == sorted([*known.names(), "mine"])
    assert plugins.registry.codec("affine") is known.codec("affine")
    assert not any(name in plugin for plugin, _ in plugins.manager.list_name_plugin())
    assert source_of(plugins, "zgood").error is None
    with pytest.raises(RecipeError, match="found 'other'"):
        plugins.registry.codec("other")


def test_a_module_named_twice_stays_registered_once(install):
    install("twice", codec("mine"), first="twice", second="twice")
    plugins = Plugins()
    first, second = source_of(plugins, "first"), source_of(plugins, "second")
    assert (first.error, first.codecs) == (None, ["mine"])
    assert "already registered" in second.error
    assert "twice 1.0:first" in dict(plugins.manager.list_name_plugin())


def test_installed_plugins_come_first_in_the_call_order(install):
    for name in ("early", "late"):
        answer = f"{name!r} if path == 'both' else path.get({name!r})"
        install(name, codec(name, f"@hookimpl\ndef tqcompress_export(path): return {answer}"))
    plugins = Plugins()
    origins = [source.origin == "built-in" for source in plugins.sources]
    assert origins == sorted(origins, reverse=True)
    called = [impl.plugin_name for impl in reversed(plugins.hook.tqcompress_register.get_hookimpls())]
    assert called[:2] == ["late 1.0:late", "early 1.0:early"]
    assert all(name.startswith("built-in:") for name in called[2:])
    export = plugins.hook.tqcompress_export
    assert export(model=None, plan=None, format="x", path="both") == "late"
    assert export(model=None, plan=None, format="x", path={"early": 1}) == 1  # None asks the next one


# What the framework knows


def test_every_hook_is_on_one_screen_and_documented():
    assert len(Path(hookspecs.__file__).read_text().splitlines()) < 60
    hooks = {name for name in vars(hookspecs) if name.startswith("tqcompress_")}
    assert hooks == set(vars(Plugins().hook)) - {name for name in vars(Plugins().hook) if name.startswith("_")}
    assert all(getattr(hookspecs, name).__doc__ for name in hooks)


def test_the_framework_names_no_quantizer_and_no_plugin():
    built_in = {name for source in Plugins().sources if source.origin == "built-in" for name in source.codecs}
    built_in.remove("exact")  # also the framework's own word, for what a rule skips
    named, imported = set(), set()
    for file in (ROOT / "tqcompress").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                words = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                words = ["." * node.level + (node.module or "")]
            else:
                words = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            named |= {(file.name, word) for word in words if word in built_in}
            if any(re.match(r"(tqcompress)?(\.plugins|_kernels)\b", word) for word in words):
                imported.add(file.name)
    assert named == {("recipe.py", "turboquant")}  # the schema's default
    assert imported == {"registry.py"}
