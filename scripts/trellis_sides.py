"""Trellis codes for scripts that check and time kernels; a kind is written `T256.3`: 256 states, 3 bits."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from tqcompress_kernels import lookups
from tqcompress_kernels.packed import Packed

TABLES = Path(__file__).parent.parent / "tqcompress" / "data" / "trellis.safetensors"


def parse(kind: str) -> tuple[int, int]:
    """States and bits."""
    states, bits = kind[1:].split(".")
    return int(states), int(bits)


@cache
def table_of(kind: str, device: str = "cuda") -> tuple[torch.Tensor, float]:
    """The shipped table, float32, and its step."""
    tables, (states, bits) = load_file(TABLES), parse(kind)
    step = float(tables[f"states{states}.bits{bits}.step"])
    return (tables[f"states{states}.bits{bits}"].float() * step).to(device), step


def random_codes(kind: str, rows: tuple[int, ...], dim: int, device: str = "cuda") -> torch.Tensor:
    """uint8 `[*rows, dim * bits / 8]`."""
    return torch.randint(0, 256, (*rows, dim * parse(kind)[1] // 8), dtype=torch.uint8, device=device)


def as_packed(kind: str, codes: torch.Tensor, scale: torch.Tensor) -> Packed:
    """Codes and scales as kernels read them."""
    table, step = table_of(kind, codes.device.type)
    states, bits = parse(kind)
    return Packed((codes,), scale, table, bits, step, False, states.bit_length() - 1)


def lookup_of(side: Packed, per: int | None = None, copies: int | None = None, of_keys: bool = True) -> lookups.Lookup:
    """How the int8 kernel reads a side, of trellis codes or not."""
    if side.window:
        dim = side.planes[0].shape[-1] * 8 // side.bits
        return lookups.trellis_lookup(side.levels, side.step, side.bits, dim, per, copies, of_keys)
    return lookups.lookup(side.levels, side.levels.device, side.wide)
