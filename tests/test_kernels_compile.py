"""The kernels compile for GPUs that are not there, to machine code: ptxas and AMD's assembler come with Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

# Two processes, about as long each.
PROCESSES = [["sm_80", "sm_100", "gfx942"], ["sm_89", "sm_90"]]


def test_kernels_compile_for_every_target(tmp_path):
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # nothing compiled before counts
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *targets],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for targets in PROCESSES
    ]
    for targets, process in zip(PROCESSES, processes, strict=True):
        output, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors[-4000:]
        for target in targets:
            kernels = [line for line in output.splitlines() if line.startswith(target.removeprefix("sm_") + " ")]
            assert len(kernels) >= 4, output
