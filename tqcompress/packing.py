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


def plane_fields(count: int, bits: int, name: str = "codes") -> dict[str, Field]:
    """The layout fields of `count` codes of `bits` bits: `codes8`, `codes4`, `codes2`, `codes1`, those there are."""
    places = {width: -(-count // 16) * 16 if _shuffled(bits, width) else count for width in plane_widths(bits)}
    return {f"{name}{width}": Field(torch.uint8, -(-count * width // 8)) for width, count in places.items()}


def pack(codes: Tensor, bits: int, name: str = "codes") -> dict[str, Tensor]:
    """The planes of integer codes `[..., count]`, each below `2**bits`, as uint8 rows of `plane_fields`."""
    codes, count, low, planes = codes.to(torch.int32), codes.shape[-1], 0, {}
    for width, (plane_name, field) in zip(plane_widths(bits), plane_fields(count, bits, name).items(), strict=True):
        parts, places = codes & _mask(width, low) if width < bits else codes, field.size * 8 // width
        if places > count:  # a step encodes single vectors: every operation counts
            parts = torch.nn.functional.pad(parts, (0, places - count))
        if _shuffled(bits, width):
            parts = parts.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)
        parts = parts.unflatten(-1, (field.size, 8 // width)) << _shifts(width, codes.device)
        plane = parts.sum(-1, dtype=torch.int32)
        planes[plane_name] = (plane >> low if low else plane).to(torch.uint8)
        low += width
    return planes


def unpack(packed: dict[str, Tensor], bits: int, count: int, name: str = "codes") -> Tensor:
    """The int32 codes `[..., count]` whose planes `packed` holds, alone or among other fields."""
    codes, low = None, 0
    for width in plane_widths(bits):
        plane = packed[f"{name}{width}"].to(torch.int32)
        if width < 8:  # masked in place: a third faster
            parts = (plane << low).unsqueeze(-1) >> _shifts(width, plane.device)
            plane = parts.bitwise_and_(_mask(width, low)).flatten(-2)
            if _shuffled(bits, width):
                plane = plane.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
            plane = plane[..., :count]
        codes = plane if codes is None else codes | plane
        low += width
    return codes  # type: ignore[return-value]  # of 1 bit or more


def look_up(packed: dict[str, Tensor], bits: int, count: int, levels: Tensor, name: str = "codes") -> Tensor:
    """`levels[unpack(packed, bits, count)]`, float32: at 2 to 4 bits a byte's 2 or 4 levels are one lookup."""
    whole = bits in (2, 3, 4) and count % 16 == 0 and levels.device.type in ("cpu", "cuda")  # others lack complex128
    if not whole or torch.compiler.is_compiling():
        codes = unpack(packed, bits, count, name)
        return levels.index_select(0, codes.flatten()).view(codes.shape)
    kind = torch.complex64 if bits == 4 else torch.complex128  # as wide as the levels of a byte
    index = packed[f"{name}{4 if bits == 4 else 2}"].to(torch.int32)
    if bits == 3:  # four high bits above each byte of low ones; two bytes of high bits, looked up at once, serve four
        words = packed[f"{name}1"].view(torch.uint16).to(torch.int32)
        index.bitwise_or_(_high(words.device).index_select(0, words.flatten()).view(torch.int32).view(index.shape))
    table = levels.index_select(0, _bytes(bits, index.device)).view(kind)
    return table.index_select(0, index.flatten()).view(torch.float32).view(*index.shape[:-1], count)


@cached_constant
def _bytes(bits: int, device: torch.device) -> Tensor:
    """The codes in each byte of the first plane, one byte after the other; of 3 bits with the high ones above it."""
    index = torch.arange(4096 if bits == 3 else 256, dtype=torch.int32, device=device)[:, None]
    if bits != 3:
        return ((index >> _shifts(bits, device)) & _mask(bits, 0)).flatten()
    high = (index >> torch.arange(8, 12, dtype=torch.int32, device=device)) & 1
    return ((index >> _shifts(2, device)) & 3 | high << 2).flatten()


@cached_constant
def _high(device: torch.device) -> Tensor:
    """For two bytes of the high bits of 3-bit codes their four groups of four in bits 8 to 11: int32, as a complex."""
    word = torch.arange(1 << 16, dtype=torch.int32, device=device)[:, None]
    word = word >> torch.tensor([0, 8, 2, 10], dtype=torch.int32, device=device)
    return ((word & 3 | word >> 2 & 12) << 8).view(torch.complex128).flatten()


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
