"""Kernels that start while the one before them still runs: programmatic dependent launch, compute capability 9.0 on.

A kernel launched with `launch_pdl` may start as soon as every program of the kernel before it has called
`let_next_start` or ended; whatever it reads of that kernel's results it must read after `wait_for_previous`. The
kernels of a decode use it to have the next one resident, with all that does not depend on the previous one loaded,
when that one ends.

The rule that keeps the chain right: each kernel waits before it ends, also if it needs nothing of the kernel before it,
so that the end of one means the end of all before it; and `let_next_start` comes after the wait in the chain's first
kernel, so that the others may read, at any time, what was written before the chain.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched so."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_properties(device).major >= 9


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of the launch of a kernel that calls `wait_for_previous`."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel before this one has ended and its results can be read."""
    if OVERLAP:
        cuda.gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Let the next kernel start, once every program of this one has said so."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
