"""What the scripts rest on: they are run by hand, and must not be found broken then."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from tiny import lossless

import tqcompress
from tqcompress.cache import CompressedLayer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", script("inject_faults").FAULTS, ids=lambda fault: fault[0].replace(" ", "-"))
def test_faults_can_be_planted(fault):
    """The code that a fault replaces is there, once, and what stands there instead is Python."""
    compile(script("inject_faults").with_fault(fault), fault[1], "exec")


def test_endurance_sees_what_grows(monkeypatch):
    """Some sequences of a sound cache, then of one whose tokens outlive a reset."""
    endurance = script("endurance")
    model = endurance.tiny()
    tqcompress.apply(model, endurance.RECIPE)
    steps, length = 3 * 8, endurance.PROMPT + 8
    _, tensors, same = zip(*endurance.run(model, steps, "cpu", length), strict=True)
    assert tensors[1] == tensors[2] and all(same)
    kept, reset = [], CompressedLayer.reset
    monkeypatch.setattr(CompressedLayer, "reset", lambda layer: (kept.append(layer.sinks), reset(layer)))
    _, tensors, _ = zip(*endurance.run(model, steps, "cpu", length), strict=True)
    assert tensors[1] < tensors[2]


def test_endurance_sees_compiled_steps_that_drift(monkeypatch):
    """What a compiler makes of the model is off by a ten thousandth: beyond what rounding allows."""
    endurance = script("endurance")
    model, compiled = endurance.tiny(), []

    def step(*args, **kwargs):
        compiled.append(model(*args, **kwargs))
        compiled[-1].logits *= 1.0001
        return compiled[-1]

    monkeypatch.setattr(model, "get_compiled_call", lambda config: step)
    found = endurance.drift(model, lossless(keep=endurance.KEEP), 4, "cpu")
    assert len(compiled) == 4 and found.early > found.limit < found.late
