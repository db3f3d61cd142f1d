"""What tests of the kernels for trellis codes need: tables, packed sides, encoders."""

import torch
from decode_helpers import HEADS  # first: it decides how the kernels run
from kernels_helpers import DEVICE
from tqcompress.plugins.trellis import shipped_table

from tqcompress_kernels.packed import Packed


def table_of(states: int, bits: int) -> tuple[torch.Tensor, float]:
    """A shipped table and its step."""
    table = shipped_table(states, bits).to(DEVICE)
    return table, float(table.abs().max() / 127)


def trellis_side(states: int, bits: int, batch: int, rows: int, dim: int, log8=True, seed: int = 0) -> Packed:
    """Random strings; scales spread over two octaves, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (batch, HEADS, rows, dim * bits // 8), generator=generator, dtype=torch.uint8)
    log = (torch.rand(batch, HEADS, rows, 1, generator=generator) - 0.5) * 2
    zero = torch.rand(batch, HEADS, rows, 1, generator=generator) < 0.02
    if log8:
        scale = (log * 16 + 128).round().masked_fill(zero, 0).to(torch.uint8)
    else:
        scale = log.exp2().masked_fill(zero, 0).half()
    table, step = table_of(states, bits)
    window = states.bit_length() - 1
    return Packed((codes.to(DEVICE),), scale.to(DEVICE), table, bits, step, False, window)
