"""`optimum-cli tqcompress`, and the wheel that brings it."""

import shutil
import subprocess
import sys
import zipfile
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import tiny_model
from transformers import AutoTokenizer

from tqcompress.models import find_model

ROOT = Path(__file__).parent.parent
# Our own command makes the namespaces `optimum` and `optimum.commands` exist without optimum.
OPTIMUM = find_spec("optimum.commands.optimum_cli") if find_spec("optimum") else None
needs_optimum = pytest.mark.skipif(OPTIMUM is None, reason="optimum is not installed")


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True)


@needs_optimum
def test_optimum_cli_runs_our_commands():
    listed = run("optimum.commands.optimum_cli", "tqcompress", "plugins")
    assert listed.returncode == 0, listed.stderr
    assert "turboquant" in listed.stdout


@needs_optimum
def test_options_reach_us_untouched(monkeypatch):
    from optimum.commands.register.register_tqcompress import TQCompressCommand

    seen = []
    monkeypatch.setattr("tqcompress.cli.main", seen.append)
    root = ArgumentParser("optimum-cli")
    TQCompressCommand(root.add_subparsers())
    for words in (
        ["--help"],
        ["-h"],
        ["apply", "r.yaml", "--model", "llama", "--json=x", "--help"],
        ["inspect", "a b"],
        [],
    ):
        args = root.parse_args(["tqcompress", *words])
        args.func(args).run()
        assert seen.pop() == words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model on disk, with a tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(find_model("llama").path)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@needs_optimum
def test_apply_eval_inspect_and_export_do_their_work(model, tmp_path, monkeypatch, capsys):
    from optimum.commands.optimum_cli import main

    def cli(*words):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "tqcompress", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        output, errors = capsys.readouterr()
        assert not stop.value.code, errors
        return output

    recipe, out, graphs = tmp_path / "mine.yaml", tmp_path / "out", tmp_path / "graphs"
    recipe.write_text("{version: 1, key: {bits: 4}, value: {bits: 4}, keep: {sinks: 4, window: 8}}")
    short = ["--model", model, "--max-tokens", 64]
    cli("apply", recipe, *short, "--device", "cpu", "--max-new-tokens", 2, "--prompt", "Hello", "--out", out)
    assert (out / "tqcompress.safetensors").is_file()
    assert "mine" in cli("eval", recipe, *short, "--device", "cpu")
    assert "turboquant" in cli("inspect", out, "--device", "cpu")
    if find_spec("onnxscript"):
        cli("export", "onnx", graphs, "--dir", out, "--codecs")
        assert len(list(graphs.glob("codecs/*.onnx"))) == 4  # of keys and of values


def test_the_wheel_holds_every_part_and_nothing_of_optimum(tmp_path):
    ignored = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__", "tests")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)  # a build leaves files in its source
    built = run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    assert built.returncode == 0, built.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    parts = {
        "tqcompress": "tqcompress/*.py",
        "tqcompress/data": "tqcompress/data/*.txt",
        "tqcompress/plugins": "plugins/*.py",
        "tqcompress/recipes": "recipes/*.yaml",
        "tqcompress_kernels": "kernels/tqcompress_kernels/*.py",
    }
    for target, pattern in parts.items():
        expected = {f"{target}/{file.name}" for file in ROOT.glob(pattern)}
        assert expected and expected <= names
    assert {name for name in names if name.startswith("optimum/")} == {
        "optimum/commands/register/register_tqcompress.py"
    }
