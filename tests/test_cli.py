"""The command line: what it prints, and that every mistake is one line and exit status 2."""

import json

import pytest
import torch
from rich.console import Console
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import tqcompress
from tqcompress.calibrate import calibrate
from tqcompress.cli import main
from tqcompress.evaluate import HeadMap, Quality
from tqcompress.records import Record, plain


def run(capsys, *words):
    """Exit status, standard output and standard error of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return (stop.value.code or 0, *capsys.readouterr())


@pytest.fixture
def llama(tmp_path):
    """A tiny random model on disk, without a tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["apply"], "recipe"),
        (["apply", "balanced"], "--model"),
        (["apply", "nope", "--model", "x"], "nope: no such file; shipped recipes: allocated-2bit, balanced"),
        (["apply", "balanced", "--model", "./nope"], "./nope: no such directory"),
        (["apply", "balanced", "--model", "nope.gguf"], "nope.gguf: no such file"),
        (["apply", "balanced", "--model", "llama", "--max-tokens", "many"], "--max-tokens"),
        (["apply", "balanced", "--model", "llama", "--text", "nope"], "nope: no such text file"),
        (["eval", "balanced", "nope", "--model", "llama"], "nope: no such file"),
        (["eval", "balanced", "--model", "llama", "--text", "wikitext-validation"], "balanced: calibration.text: "),
        (["eval", "--model", "llama"], "name recipes to measure, or give --suite"),
        (["apply", "balanced", "--model", "llama", "--statistics", "nope"], "nope: not a file of statistics"),
        (["calibrate", "--model", "llama", "--out", "x", "--text", "nope"], "nope: no such text file"),
        (["eval", "--model", "llama"], "recipes"),
        (["needle", "balanced", "--model", "llama", "--lengths", "8k"], "lengths: found '8k'; numbers of tokens"),
        (["report", "/nope.json", "--out", "x.html"], "/nope.json: cannot be read: No such file"),
        (["report", "constraints.txt", "--out", "x.html"], "constraints.txt: not JSON"),
        (["report", "/nope.json"], "--out"),
        (["inspect", "balanced"], "give --model"),
        (["inspect", "/nope"], "/nope"),
        (["bogus"], "bogus"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, words, named):
    status, _, errors = run(capsys, *words)
    assert status == 2
    assert named in errors
    assert errors.startswith("tqcompress: ")
    assert errors.count("\n") == 1


def test_debug_shows_the_traceback_too(capsys):
    for words in (["--debug", "inspect", "nope"], ["inspect", "nope", "--debug"]):
        status, _, errors = run(capsys, *words)
        assert status == 2
        assert "Traceback" in errors


def test_help_and_version(capsys):
    assert run(capsys)[0] == 0
    status, printed, _ = run(capsys, "--version")
    assert (status, printed.strip()) == (0, f"tqcompress {tqcompress.__version__}")


def test_a_recipe_error_names_file_path_found_and_allowed(capsys, tmp_path, llama):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("version: 1\nkey: {bits: 4}\nvalue: {bits: 3}\nrules:\n  - {layers: 3, skip: true}\n")
    status, _, errors = run(capsys, "inspect", recipe, "--model", llama)
    assert status == 2
    assert f"{recipe}: rules[0].layers: found 3; the model has layers 0 to 2" in errors


def test_inspect_shows_a_recipe_against_a_model(capsys, tmp_path, llama, monkeypatch):
    monkeypatch.setattr("tqcompress.cli.console", Console(width=160))
    recipe = tmp_path / "mine.yaml"
    rules = "rules: [{layers: 0, skip: true}, {layers: 2, heads: 1, key: {bits: 8}}]"
    recipe.write_text(f"version: 1\nname: mine\nkey: {{bits: 4}}\nvalue: {{bits: 3}}\n{rules}\n")
    status, printed, _ = run(capsys, "inspect", recipe, "--model", llama)
    assert status == 0
    for words in ("mine on llama", "exact: skipped by", "4 bit", "8 bit", "backend torch", "Bits a value", "128K"):
        assert words in printed


def test_inspect_shows_a_saved_directory_like_its_recipe(capsys, tmp_path, llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    statistics = calibrate(model, torch.arange(100) % model.config.vocab_size)
    tqcompress.apply(model, "balanced", statistics=statistics)
    tqcompress.save(model, tmp_path / "out")
    saved = run(capsys, "inspect", tmp_path / "out")
    assert saved[0] == 0
    assert saved[1] == run(capsys, "inspect", "balanced", "--model", llama)[1]


def test_report_writes_a_page(capsys, tmp_path):
    sides = HeadMap([[3.25, 3.25]], [[0.03, 0.04]])
    quality = Quality("mine", 4.0, 3.25, 20.5, 20.0, 0.01, 0.001, 0.1, 0.95, 512, 256, 4, 128, sides, sides)
    (tmp_path / "eval.json").write_text(json.dumps(plain([Record.of(quality, "model", "text")])))
    page = tmp_path / "new" / "report.html"
    status, printed, _ = run(capsys, "report", tmp_path / "eval.json", "--out", page)
    assert status == 0
    assert "1 measurements" in " ".join(printed.split())
    assert "model on text" in page.read_text()
