"""Triton kernels in tests: compiled where there is a CUDA device, interpreted on the CPU elsewhere.

Import this before any module of the kernels. Triton decides how to run a function when it is defined, so its own
library, which may have been imported long before, is defined again for the interpreter.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="needs triton")


def _interpret_library() -> None:
    compiled = triton.JITFunction
    for module in (triton.language.standard, triton.language):
        for name, function in list(vars(module).items()):
            if isinstance(function, compiled):
                setattr(module, name, triton.jit(function.fn))


def _patch_once() -> None:
    """Prepare the language once a module and not at every call of a function: twice as fast."""
    from triton.runtime import interpreter

    done = set()

    def call(function, *args, **kwargs):
        if id(function.fn.__globals__) not in done:
            interpreter._patch_lang(function.fn)
            done.add(id(function.fn.__globals__))
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if DEVICE == "cpu":
    _interpret_library()
    _patch_once()
