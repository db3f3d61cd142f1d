"""Bit packing: codes of 1-8 bits as a little-endian bit stream in bytes.

Code `i` occupies bits `i*bits` to `(i+1)*bits - 1` of its row; bit `j` of a row is bit `j % 8` of byte
`j // 8`. All arithmetic is in int32, which also exports to ONNX (its uint8 shifts do not).
"""

from functools import reduce

import torch
from torch import Tensor

from .constants import cached_constant


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits occupy."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes `[..., count]`, each below `2**bits`, into uint8 `[..., packed_size]`."""
    count = codes.shape[-1]
    groups = -(-count // 8)  # 8 codes fill `bits` whole bytes
    codes = (
        torch.nn.functional.pad(codes.to(torch.int32), (0, groups * 8 - count)).unflatten(-1, (groups, 8)).unbind(-1)
    )
    packed = []
    for byte in range(bits):
        first, last = byte * 8 // bits, (byte * 8 + 7) // bits  # the codes that have bits in this byte
        parts = [_shifted(codes[i], i * bits - byte * 8) for i in range(first, last + 1)]
        packed.append(reduce(torch.bitwise_or, parts) & 255)
    return torch.stack(packed, -1).flatten(-2)[..., : packed_size(count, bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The int32 codes `[..., count]` that `pack` put into `packed` `[..., packed_size]`."""
    if bits == 8:
        return packed[..., :count].to(torch.int32)
    first, second, shift = _positions(bits, count, packed.device)
    low = packed.index_select(-1, first).to(torch.int32)
    if 8 % bits:  # a code may straddle two bytes
        low |= packed.index_select(-1, second).to(torch.int32) << 8
    return (low >> shift) & ((1 << bits) - 1)


def _shifted(codes: Tensor, left: int) -> Tensor:
    return codes << left if left >= 0 else codes >> -left


@cached_constant
def _positions(bits: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each code: its first byte, the next byte (clamped to the row) and its shift in the first."""
    start = torch.arange(count, device=device) * bits
    first = start // 8
    return first, (first + 1).clamp(max=packed_size(count, bits) - 1), (start % 8).to(torch.int32)
