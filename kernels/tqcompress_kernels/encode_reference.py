"""What the encoding kernels do, naively, in the precision of `x`: float64 for truth."""

import torch
from torch import Tensor

from .packed import Wide, plane_widths


def quantize(
    x: Tensor, into: Tensor, mean: Tensor | None, levels: Tensor, norm_correction: bool = True, wide: Wide | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of vectors, and the scales of the codes.

    Args:
        x: `[batch, kv_heads, tokens, head_dim]`.
        into: `[1 or kv_heads, head_dim, head_dim]`; mean: `[kv_heads, head_dim]` or None.
        levels: `[2**bits]`, ascending; wide: the first coordinates, if they have other ones.

    Returns:
        int64 codes `[batch, kv_heads, tokens, head_dim]`, what they are the nearest levels of, and scales
        `[batch, kv_heads, tokens, 1]`, both in the precision of `x`.
    """
    into = into.to(x.dtype)
    y = (x if mean is None else x - mean.to(x.dtype)[:, None]) @ into
    norm, width = y.norm(dim=-1, keepdim=True), x.shape[-1] ** 0.5
    unit = y * (width / norm.clamp_min(1e-30))
    borders = [(part, (book[1:] + book[:-1]) / 2) for part, book in books(levels.to(x.dtype), wide)]
    codes = torch.cat([torch.bucketize(unit[..., part].contiguous(), border) for part, border in borders], dim=-1)
    length = decoded(codes, levels.to(x.dtype), wide).norm(dim=-1, keepdim=True)
    return codes, unit, norm / (length if norm_correction else width)


def books(levels: Tensor, wide: Wide | None) -> list[tuple[slice, Tensor]]:
    """The coordinates of each part and their levels, in the precision of `levels`."""
    rest = (slice(wide.dim if wide else 0, None), levels)
    return [(slice(wide.dim), wide.levels.to(levels)), rest] if wide else [rest]


def decoded(codes: Tensor, levels: Tensor, wide: Wide | None = None) -> Tensor:
    """The levels of codes."""
    return torch.cat([book[codes[..., part]] for part, book in books(levels, wide)], dim=-1)


def encode_scale(scale: Tensor, scale_format: str) -> Tensor:
    """Scales as they are stored: float16, or "log8", `2**((stored - 128) / 16)` in 8 bits, 0 for 0, 255 too large."""
    if scale_format == "fp16":
        return scale.to(torch.float16)
    return ((scale.log2() * 16).round() + 128).nan_to_num(255).clamp(0, 255).to(torch.uint8)


def decode_scale(stored: Tensor) -> Tensor:
    """The float32 scales that were stored in either format."""
    if stored.dtype == torch.float16:
        return stored.float()
    return torch.where(stored == 0, 0.0, ((stored.float() - 128) / 16).exp2())


def shuffle(digits: Tensor) -> Tensor:
    """The order of the high bits of 3-bit codes: of 16, coordinate 8 a + 2 b + c has place 4 b + 2 a + c."""
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[-1] % 16))
    return digits.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def unshuffle(digits: Tensor) -> Tensor:
    """Undo `shuffle`."""
    return digits.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def pack(codes: Tensor, bits: int, wide: Wide | None = None) -> tuple[Tensor, ...]:
    """The planes of integer codes `[..., head_dim]`: uint8 `[..., ceil(head_dim * width / 8)]`, widest first."""
    if wide:
        return pack(codes[..., : wide.dim], wide.bits) + pack(codes[..., wide.dim :], bits)
    planes, low = [], 0
    for width in plane_widths(bits):
        digits = torch.nn.functional.pad((codes >> low) & ((1 << width) - 1), (0, -codes.shape[-1] % (8 // width)))
        if (bits, width) == (3, 1):
            digits = shuffle(digits)
        places = torch.arange(0, 8, width, device=codes.device)
        planes.append((digits.unflatten(-1, (-1, 8 // width)) << places).sum(-1).to(torch.uint8))
        low += width
    return tuple(planes)


def unpack(planes: tuple[Tensor, ...], bits: int, head_dim: int, wide: Wide | None = None) -> Tensor:
    """The int64 codes `[..., head_dim]` of `pack`."""
    if wide:
        count = len(plane_widths(wide.bits))
        parts = unpack(planes[:count], wide.bits, wide.dim), unpack(planes[count:], bits, head_dim - wide.dim)
        return torch.cat(parts, dim=-1)
    codes, low = torch.zeros((), dtype=torch.int64, device=planes[0].device), 0
    for plane, width in zip(planes, plane_widths(bits), strict=True):
        places = torch.arange(0, 8, width, device=plane.device)
        digits = ((plane.to(torch.int64)[..., None] >> places) & ((1 << width) - 1)).flatten(-2)
        if (bits, width) == (3, 1):
            digits = unshuffle(digits)
        codes = codes | (digits[..., :head_dim] << low)
        low += width
    return codes


def write(target: Tensor, rows: Tensor, start: int, slots: Tensor | None = None) -> None:
    """Put rows `[batch, kv_heads, tokens, size]` where `encode` puts them."""
    if slots is None:
        target[:, :, start : start + rows.shape[2]] = rows
        return
    for batch, token in (slots >= 0).nonzero().tolist():
        page, row = divmod(int(slots[batch, token]), target.shape[2])
        target[page, :, row] = rows[batch, :, token]


def read(stored: Tensor, start: int, stop: int, block_table: Tensor | None = None) -> Tensor:
    """Rows `start` to `stop` `[batch, kv_heads, stop - start, size]`, through a block table or not."""
    if block_table is None:
        return stored[:, :, start:stop]
    tokens = torch.arange(start, stop, device=stored.device)
    pages = block_table.long()[:, tokens // stored.shape[2]]
    return stored[pages, :, tokens % stored.shape[2]].transpose(1, 2)


def encode(
    x: Tensor,
    planes: tuple[Tensor, ...],
    scale: Tensor,
    start: int,
    into: Tensor,
    mean: Tensor | None,
    levels: Tensor,
    scale_format: str,
    norm_correction: bool = True,
    slots: Tensor | None = None,
    wide: Wide | None = None,
) -> None:
    """`tqcompress_kernels.encode.encode`, with what its `Encoder` is made of."""
    codes, _, scales = quantize(x, into, mean, levels, norm_correction, wide)
    for plane, rows in zip(planes, pack(codes, levels.shape[0].bit_length() - 1, wide), strict=True):
        write(plane, rows, start, slots)
    write(scale, encode_scale(scales, scale_format), start, slots)


def dequantize(
    planes: tuple[Tensor, ...],
    scale: Tensor,
    levels: Tensor,
    out: Tensor,
    start: int,
    block_table: Tensor | None = None,
    wide: Wide | None = None,
) -> None:
    """`tqcompress_kernels.dequantize.dequantize`."""
    stop, bits = start + out.shape[2], levels.shape[0].bit_length() - 1
    codes = unpack(tuple(read(plane, start, stop, block_table) for plane in planes), bits, out.shape[3], wide)
    out.copy_(decoded(codes, levels, wide) * decode_scale(read(scale, start, stop, block_table)))
