"""Split-KV decoding with `fast_kernel`: what it can read, and its launch.

Needs CUDA with int8 tensor cores reached by mma.sync m16n8k32 (compute capability 8.0 and later).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .fast_kernel import decode_kernel

LANES = 32


@dataclass(frozen=True)
class Lookup:
    """How a side's codes become integers: `kind` of `fast_kernel`, its table on the device, and the unit.

    Kind "u4" means uniform levels `(code - 7.5) * step`; "t4" any levels that are integers times `step`.
    """

    kind: str
    table: Tensor
    step: float

    @property
    def bits(self) -> int:
        """Bits a code."""
        return int(self.kind[1])


def lookup(levels: Tensor, device: torch.device) -> "Lookup | str":
    """The lookup for ascending symmetric `levels` `[2**bits]`, or why there is none."""
    values = levels.double().cpu()
    count = len(values)
    bits = count.bit_length() - 1
    gaps = values.diff()
    if bits in (1, 2, 4, 8) and torch.allclose(gaps, gaps.mean(), rtol=1e-5):
        return Lookup(f"u{bits}", torch.zeros(1, LANES, dtype=torch.int32, device=device), float(gaps.mean()))
    if bits not in (2, 3, 4):
        return f"{bits}-bit levels that are not uniform"
    step = integer_step(values)
    if step is None:
        return "levels that are not integers of one byte times a common step"
    whole = (values / step).round().to(torch.int64)
    words = {2: _words(whole), 3: _words(whole), 4: _words(whole[8:] + 1) + _words(whole[:8])}[bits]
    table = torch.tensor(words, dtype=torch.int64).to(torch.int32)[:, None].expand(-1, LANES).contiguous()
    return Lookup(f"t{bits}", table.to(device), step)


def integer_step(levels: Tensor, largest: int = 126) -> float | None:
    """The unit of which all `levels` are whole multiples up to `largest`, or None."""
    for top in range(1, largest + 1):
        whole = levels / levels.abs().max() * top
        if (whole - whole.round()).abs().max() < 1e-3 * min(1.0, top / 100):
            return float(levels.abs().max() / top)
    return None


def _words(numbers: Tensor) -> list[int]:
    """Signed bytes, four to a little-endian 32-bit word."""
    data = (numbers & 255).tolist() + [0] * (-len(numbers) % 4)
    return [int.from_bytes(bytes(data[i : i + 4]), "little", signed=True) for i in range(0, len(data), 4)]


def padded(dim: int, bits: int, key: bool) -> int:
    """The head_dim that the kernel's tile of one side covers."""
    least = 128 if bits in (1, 3) or (not key and bits == 2) else 64
    return max(least, 1 << (dim - 1).bit_length())


def split(
    rotated: Tensor, bias: Tensor | None, key, value, key_lookup: Lookup, value_lookup: Lookup, partial: Tensor,
    lse: Tensor, tokens: int, lengths: Tensor | None, mask: Tensor | None, block_table: Tensor | None, scaling: float,
    softcap: float | None, tile: int = 64, stages: int = 2,
) -> None:  # fmt: skip
    """Fill `partial` `[batch, kv_heads, splits, columns, head_dim]` and `lse` (log2 units); see `plain.split`."""
    batch, kv_heads, columns, dim = rotated.shape
    splits = partial.shape[2]
    kc, vc = key.planes[0], value.planes[0]
    kh, vh = key.planes[-1], value.planes[-1]
    page = 0 if block_table is None else kc.shape[2]
    flag = lse  # stands for tensors that are not there
    decode_kernel[batch * kv_heads, splits](
        rotated, flag if bias is None else bias, kc, kh, key.scale, key_lookup.table, vc, vh, value.scale,
        value_lookup.table, flag if mask is None else mask.view(torch.uint8), flag if lengths is None else lengths,
        flag if block_table is None else block_table, partial, lse,
        tokens, kv_heads, scaling, softcap or 1.0, key_lookup.step, value_lookup.step,
        *kc.stride()[:2], *kh.stride()[:2], *key.scale.stride()[:2],
        *vc.stride()[:2], *vh.stride()[:2], *value.scale.stride()[:2],
        0 if mask is None else mask.stride(0), 0 if block_table is None else block_table.stride(0),
        KEY=key_lookup.kind, VALUE=value_lookup.kind, D=dim,
        KD=padded(dim, key_lookup.bits, True), VD=padded(dim, value_lookup.bits, False),
        COLUMNS=columns, C=4 if columns <= 4 else 8, T=tile, PAGE=page,
        KR=kc.stride(2), KHR=kh.stride(2), KSR=key.scale.stride(2),
        VR=vc.stride(2), VHR=vh.stride(2), VSR=value.scale.stride(2),
        STAGES=stages, SOFTCAP=softcap is not None, MASK=mask is not None, LENGTHS=lengths is not None, BIAS=bias is not None,
        num_warps=1,
    )  # fmt: skip
