"""Bit planes: codes of 1-8 bits in planes of 8, 4, 2 or 1 bits, none of which straddles a byte.

The planes of a width are its binary digits, widest first: 3 bits are a plane of 2 and one of 1. The first plane
holds the lowest bits of a code, each next one the bits above. In a plane of `w` bits, the coordinate in place `i`
occupies bits `(i * w) % 8` and up of byte `(i * w) // 8`. Coordinates lie in their order but for the high bits of
3-bit codes: in every 16 of them coordinate `8 a + 2 b + c` lies in place `4 b + 2 a + c`, so that one shift puts
them beside the low bits of four coordinates apart (fused kernels look levels up by nibbles). All arithmetic is in
int32, which also exports to ONNX (its uint8 shifts do not).
"""

import torch
from torch import Tensor

from .codec import Field
from .constants import cached_constant


def plane_widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes that codes of `bits` bits are stored in, widest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_fields(count: int, bits: int) -> dict[str, Field]:
    """The layout fields of `count` codes of `bits` bits: `codes8`, `codes4`, `codes2`, `codes1`, those there are."""
    places = {width: -(-count // 16) * 16 if _shuffled(bits, width) else count for width in plane_widths(bits)}
    return {f"codes{width}": Field(torch.uint8, -(-count * width // 8)) for width, count in places.items()}


def pack(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """The planes of integer codes `[..., count]`, each below `2**bits`, as uint8 rows of `plane_fields`."""
    codes, count, low, planes = codes.to(torch.int32), codes.shape[-1], 0, {}
    for width, (name, field) in zip(plane_widths(bits), plane_fields(count, bits).items(), strict=True):
        parts = torch.nn.functional.pad(codes & _mask(width, low), (0, field.size * 8 // width - count))
        if _shuffled(bits, width):
            parts = parts.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)
        parts = parts.unflatten(-1, (field.size, 8 // width)) << _shifts(width, codes.device)
        planes[name] = (parts.sum(-1, dtype=torch.int32) >> low).to(torch.uint8)
        low += width
    return planes


def unpack(packed: dict[str, Tensor], bits: int, count: int) -> Tensor:
    """The int32 codes `[..., count]` whose planes `packed` holds, alone or among other fields."""
    codes, low = None, 0
    for width in plane_widths(bits):
        plane = packed[f"codes{width}"].to(torch.int32)
        if width < 8:  # masked in place: a third faster
            parts = (plane << low).unsqueeze(-1) >> _shifts(width, plane.device)
            plane = parts.bitwise_and_(_mask(width, low)).flatten(-2)
            if _shuffled(bits, width):
                plane = plane.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
            plane = plane[..., :count]
        codes = plane if codes is None else codes | plane
        low += width
    return codes


def _shuffled(bits: int, width: int) -> bool:
    """Whether a plane is the one of the high bits of 3-bit codes."""
    return bits == 3 and width == 1


def _mask(width: int, low: int) -> int:
    """Selects bits `low` to `low + width - 1`."""
    return ((1 << width) - 1) << low


@cached_constant
def _shifts(width: int, device: torch.device) -> Tensor:
    """The first bit of each coordinate in a byte."""
    return torch.arange(0, 8, width, dtype=torch.int32, device=device)
