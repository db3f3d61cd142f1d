"""A process that is killed, or whose disk is full, leaves the old output or the new one, whole."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from transformers.utils import logging

import tqcompress
from tqcompress import OutputError, artifacts, output
from tqcompress.calibrate import Moments, Statistics

KILLS = 30
RECIPES = {bits: {"version": 1, "name": f"b{bits}", "key": {"bits": bits}, "value": {"bits": bits}} for bits in (2, 4)}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and rlimits as Linux has them")


@pytest.fixture(scope="module")
def models():
    """Two models, compressed differently, whose weights differ."""
    logging.disable_progress_bar()  # or a killed child could take the lock along that all progress bars share
    made = {bits: tiny_model("llama", seed=bits) for bits in RECIPES}
    for bits, model in made.items():
        tqcompress.apply(model, RECIPES[bits])
    yield made
    logging.enable_progress_bar()


def save(models, bits: int, path: Path, weights: bool) -> None:
    tqcompress.save(models[bits], path, weights=weights, base=f"base{bits}")


def which(models, path: Path, weights: bool) -> int:
    """The bits of the output in `path`; fails if any file is not that output's."""
    artifact = artifacts.read(path)  # checks the sum
    bits = int(artifact.recipe.key.bits)
    assert tqcompress.Recipe.load(path / "recipe.yaml") == artifact.recipe
    config = json.loads((path / "config.json").read_text())
    if not weights:
        assert config["base_model_name_or_path"] == f"base{bits}"
        return bits
    assert config["quantization_config"]["quant_method"] == "tqcompress"
    stored, want = load_file(path / "model.safetensors"), models[bits].state_dict()
    assert stored.keys() == want.keys() and all(torch.equal(stored[name], want[name]) for name in want)
    return bits


def killed_while(work, delay: float) -> None:
    """Run `work` again and again in a child process, and kill it after a while."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)  # it did not fail before


@linux
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_while_saving(models, tmp_path, weights):
    path, found = tmp_path / "out", []
    save(models, 2, path, weights)
    (path / "mine.txt").write_text("not tqcompress's")
    (path / "more").mkdir()
    (path / "more" / "mine.txt").write_text("neither")

    def both():
        for bits in (4, 2):
            save(models, bits, path, weights)

    for kill in range(KILLS):
        killed_while(both, 0.005 + 0.0017 * kill)
        found.append(which(models, path, weights))
        assert (path / "mine.txt").read_text() == "not tqcompress's"
        assert (path / "more" / "mine.txt").read_text() == "neither"
    assert len(set(found)) == 2  # kills hit both
    save(models, 4, path, weights)
    assert which(models, path, weights) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]  # what killed processes left is gone
    assert not list(path.rglob("*.partial"))


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_before_there_was_anything(models, tmp_path):
    """There is nothing then, or all of it."""
    for kill in range(10):
        path = tmp_path / "out"
        killed_while(lambda path=path: save(models, 2, path, False), 0.002 * kill)
        if path.exists():
            assert which(models, path, False) == 2
            shutil.rmtree(path)


def statistics(value: float) -> Statistics:
    eye = torch.eye(64, dtype=torch.float64).repeat(4, 1, 1) * value
    mean = torch.full((4, 64), value, dtype=torch.float64)
    layers = {i: {"key": Moments(9, mean.clone(), eye.clone(), eye.clone())} for i in range(8)}
    return Statistics(layers, {"text": str(value)})


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_while_statistics_are_written(tmp_path):
    path, found = tmp_path / "statistics", set()
    one, two = statistics(1.0), statistics(2.0)
    one.save(path)

    def both():
        two.save(path)
        one.save(path)

    for kill in range(KILLS):
        killed_while(both, 0.003 + 0.0007 * kill)
        read = Statistics.load(path)
        value = float(read.source["text"])
        assert all((sides["key"].mean == value).all() for sides in read.layers.values())
        found.add(value)
    assert len(found) == 2


@linux
@pytest.mark.parametrize("weights", [False, True])
def test_a_full_disk_is_told_and_changes_nothing(models, tmp_path, weights):
    """The limit on a file's size fails like a full disk, in the middle of a file."""
    path = tmp_path / "out"
    save(models, 2, path, weights)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OutputError, match=r"out: cannot be written: .*unchanged"):
                save(models, 4, path, weights)
            with pytest.raises(OutputError, match="cannot be written"):
                statistics(1.0).save(tmp_path / "statistics")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    save(models, 4, path, weights)


def test_a_full_disk_is_one_line_on_the_command_line(tmp_path):
    code = (
        "import resource; from tqcompress import session, cli; from pathlib import Path;"
        "import tqcompress.session as s; resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5));"
        "cli._complete_app = lambda: lambda *a, **k: s.write_json(Path('results.json'), [1] * 99);"
        "cli.main(['x'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "tqcompress: results.json: cannot be written: File too large"
    )
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_file_in_the_way(models, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out: cannot be written: it is a file"):
        save(models, 2, tmp_path / "out", False)
    with pytest.raises(OutputError, match="cannot be written"):
        save(models, 2, tmp_path / "out" / "deeper", False)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("how", ["exchange", "two renames", "one file at a time"])
def test_every_way_to_publish(models, tmp_path, how, monkeypatch):
    """Where the system cannot exchange directories, and where a directory cannot be renamed."""
    if how != "exchange":
        monkeypatch.setattr(output, "_exchanged", lambda one, other: False)
    if how == "one file at a time":
        monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    path = tmp_path / "out"
    for bits in (2, 4, 2):
        save(models, bits, path, True)
        assert which(models, path, True) == bits
        (path / "mine").mkdir(exist_ok=True)
        (path / "mine" / "note").write_text("mine")
        save(models, bits, path, False)
        assert which(models, path, False) == bits
        assert (path / "model.safetensors").is_file() and (path / "mine" / "note").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and not list(path.rglob("*.partial"))


def test_old_weights_do_not_outlive_new_ones(models, tmp_path):
    """Transformers would prefer one old file to new parts."""
    path = tmp_path / "out"
    save(models, 2, path, True)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    save(models, 4, path, True)
    assert [file.name for file in path.glob("model*")] == ["model.safetensors"]
    assert which(models, path, True) == 4


def test_a_symbolic_link_stays_one(models, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    save(models, 2, tmp_path / "out", False)
    assert (tmp_path / "out").is_symlink() and which(models, tmp_path / "real", False) == 2
