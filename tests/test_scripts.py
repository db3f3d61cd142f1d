"""What the scripts rest on: they are run by hand, and must not be found broken then."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

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
