"""Split-KV decoding with `fast_kernel`: what it can read, and its launch.

Needs CUDA with int8 tensor cores reached by mma.sync m16n8k32 (compute capability 8.0 and later).
"""

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from . import overlap, tuning
from .fast_kernel import decode_kernel
from .launch import launch
from .lookups import Lookup
from .packed import Packed

STATIC_BYTES = 47 << 10  # of shared memory that a program can have without asking, but for scales
RESERVED = 1024  # bytes of shared memory that the system takes of each program


def padded(dim: int, kind: str, key: bool) -> int:
    """Of `dim` coordinates, how many the kernel's tile of one side covers."""
    least = 128 if kind == "u1" or (kind == "u2" and not key) else 32 if kind[1] == "4" and key else 64
    return max(least, 1 << (dim - 1).bit_length())


def kind_of(found: Lookup, dim: int, key: bool) -> str:
    """The kind that reads `dim` coordinates: a lane has half a word of each row of 64 values of 2 or 3 bits."""
    half = not key and found.kind in ("t2", "t3") and padded(dim, found.kind, key) == 64
    return f"h{found.bits}" if half else found.kind


def obstacle(key: "Lookup | str", value: "Lookup | str", dim: int, device: torch.device) -> str | None:
    """Why the kernel cannot read keys and values with these lookups and head_dim `dim`, or None if it can."""
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability below 8.0 has no int8 mma.sync m16n8k32"
    for side, found in (("key", key), ("value", value)):
        if isinstance(found, str):
            return f"{side}s have {found}"
        if found.trellis:
            if dim not in (64, 128, 256):
                return f"{side} rows of {dim} trellis codes: the int8 kernel reads those of 64, 128 and 256"
            continue
        for count, one in found.parts(dim):
            if count * (1 if one.bits == 3 else one.bits) % 32:
                return f"{side} rows of {count} codes are not whole 32-bit words"
    return None


class FastSplit:
    """`plain.split` for keys and values of these lookups, on int8 tensor cores."""

    def __init__(self, key: Lookup, value: Lookup):
        self.key, self.value = key, value
        if value.trellis and (key.kind != value.kind or not torch.equal(key.table, value.table)):  # not one for both
            self.value = replace(value, kind=value.trellis._replace(name="tq_trellis_of_values").text)

    def __call__(
        self, rotated: Tensor, bias: Tensor | None, key: Packed, value: Packed, partial: Tensor, lse: Tensor,
        tokens: int, lengths: Tensor | None, mask: Tensor | None, block_table: Tensor | None, scaling: float,
        softcap: float | None, tile: int | None = None, stages: int = 2,
    ) -> None:  # fmt: skip
        """Fill `partial` `[batch, kv_heads, splits, columns, head_dim]` and `lse`; see `plain.split`.

        Raises `ValueError` if rows are not aligned to 4 bytes or pages are no multiple of 32 tokens.
        """
        columns, dim = rotated.shape[2:]
        at_once = 16 if columns > 8 and dim <= 128 else 8
        page = 0 if block_table is None else key.planes[0].shape[2]
        for first in range(0, columns, at_once):
            count = min(at_once, columns - first)
            size = tile or self._tile(key, value, count, page, dim, stages)
            self._launch(
                rotated[:, :, first:], None if bias is None else bias[:, :, first:], key, value,
                partial[:, :, :, first:], lse[:, :, :, first:], count, tokens, lengths, mask, block_table, page,
                scaling, softcap, size, stages,
            )  # fmt: skip

    def _launch(
        self, rotated: Tensor, bias: Tensor | None, key: Packed, value: Packed, partial: Tensor, lse: Tensor,
        columns: int, tokens: int, lengths: Tensor | None, mask: Tensor | None, block_table: Tensor | None, page: int,
        scaling: float, softcap: float | None, tile: int, stages: int,
    ) -> None:  # fmt: skip
        batch, kv_heads, _, dim = rotated.shape
        _check(key, "key", page, tile)
        _check(value, "value", page, tile)
        stages, rings = self._rings(key, value, dim, tile, stages)
        none = lse  # stands for tensors that are not there
        (*wide_keys, (_, _, keys)), (*wide_values, (_, _, values)) = key.parts(dim), value.parts(dim)
        kc, kh, vc, vh = keys.planes[0], keys.planes[-1], values.planes[0], values.planes[-1]
        wide_key, k_constants = _wide(self.key, wide_keys, True, none)
        wide_value, v_constants = _wide(self.value, wide_values, False, none)
        launch(
            decode_kernel, (batch * kv_heads, partial.shape[2]),
            rotated, none if bias is None else bias, kc, kh, key.scale, self.key.table, vc, vh, value.scale,
            self.value.table, none if mask is None else mask.view(torch.uint8), none if lengths is None else lengths,
            none if block_table is None else block_table, partial, lse,
            tokens, kv_heads, partial.stride(2) // dim, scaling, softcap or 1.0, self.key.step, self.value.step,
            *kc.stride()[:2], *kh.stride()[:2], *key.scale.stride()[:2],
            *vc.stride()[:2], *vh.stride()[:2], *value.scale.stride()[:2],
            0 if mask is None else mask.stride(0), 0 if block_table is None else block_table.stride(0),
            wide_key, wide_value,
            KEY=self.key.kind, VALUE=kind_of(self.value, dim - self.value.wide_dim, False), D=dim,
            KD=self._padded(dim, True), VD=self._padded(dim, False),
            COLUMNS=columns, C=max(4, 1 << (columns - 1).bit_length()), T=tile, PAGE=page,
            KR=kc.stride(2), KHR=kh.stride(2), KSR=key.scale.stride(2),
            VR=vc.stride(2), VHR=vh.stride(2), VSR=value.scale.stride(2), STAGES=stages,
            SOFTCAP=softcap is not None, MASK=mask is not None, LENGTHS=lengths is not None, BIAS=bias is not None,
            BUFFERS=self._buffers(key, value, dim, tile, stages), RINGS=rings,
            PIECES=(_piece(key, self.key, dim), _piece(value, self.value, dim)), WIDE_KEY=k_constants,
            WIDE_VALUE=v_constants, num_warps=1,
            **overlap.launch_options(rotated.device),
        )  # fmt: skip

    def _buffers(self, key: Packed, value: Packed, dim: int, tile: int, stages: int) -> int:
        """Buffers of the ring: `stages`, and unused ones, such that a multiprocessor holds `PROGRAMS` programs.

        When a kernel starts while another one runs, programs go where there is room, as many as fit, and leave other
        multiprocessors idle; the shared memory they claim is what spreads them evenly.
        """
        device = key.scale.device
        if not overlap.overlaps(device) or self.key.trellis or self.value.trellis:
            return stages
        scales = key.scale.element_size() + value.scale.element_size()
        codes = self._row(dim, True) + self._row(dim, False)
        return max(stages, _room(device) // (tile * (codes + scales)))

    def _padded(self, dim: int, key: bool) -> int:
        """How many coordinates one side's tile covers, wide ones left out."""
        side = self.key if key else self.value
        return dim if side.trellis else padded(dim - side.wide_dim, side.kind, key)

    def _row(self, dim: int, key: bool) -> int:
        """Bytes of a row of one side's codes in shared memory."""
        side = self.key if key else self.value
        wide = padded(side.wide_dim, side.wide.kind, key) * side.wide.bits if side.wide else 0
        return (self._padded(dim, key) * side.bits + wide) // 8

    def _used(self, key: Packed, value: Packed, dim: int, tile: int, stages: int) -> list[int]:
        """Bytes of shared memory, where one side has trellis codes: of keys, of values, of scales and of tables."""
        tables = {side.kind: side.trellis.nbytes for side in (self.key, self.value) if side.trellis}
        rows = [self._row(dim, True), self._row(dim, False)]
        rows.append(key.scale.element_size() + value.scale.element_size())
        return [stages * tile * row for row in rows] + [sum(tables.values())]

    def _rings(self, key: Packed, value: Packed, dim: int, tile: int, stages: int) -> tuple[int, tuple[int, int]]:
        """How many stages there is room for, and the bytes of the arrays of strings of keys and of values.

        One of them claims what is left of a program's share of the shared memory, for the reason of `_buffers`.
        """
        if not (self.key.trellis or self.value.trellis):
            return stages, (0, 0)
        if sum(self._used(key, value, dim, tile, stages)) > STATIC_BYTES:
            stages = 1
        used = self._used(key, value, dim, tile, stages)
        rings, device = used[:2], key.scale.device
        if overlap.overlaps(device):
            rings[0 if self.key.trellis else 1] += max(0, _room(device) - sum(used)) // 16 * 16
        return stages, (rings[0], rings[1])

    def _tile(self, key: Packed, value: Packed, columns: int, page: int, dim: int, stages: int) -> int:
        """Tokens of a tile: 64 if registers, pages and shared memory allow for as many."""
        if dim > 128 or columns > 8 or page % 64:
            return 32
        if not (self.key.trellis or self.value.trellis) or key.scale.device.type != "cuda":
            return 64
        return 64 if sum(self._used(key, value, dim, 64, stages)) <= _room(key.scale.device) else 32


def _wide(
    found: Lookup, parts: list[tuple[int, int, Packed]], key: bool, none: Tensor
) -> tuple[tuple[Tensor | float, ...], tuple[str | int, ...]]:
    """What `fast_wide` knows of the first coordinates of a side: tensors and numbers, and constants."""
    if not parts:
        return (none,), ("", 0, 0, 0, 0)
    _, count, part = parts[0]
    one: Lookup = found.wide  # type: ignore[assignment]  # as its part is there
    main, high = part.planes[0], part.planes[-1]
    constants = kind_of(one, count, key), count, padded(count, one.kind, key), main.stride(2), high.stride(2)
    return (main, high, one.table, one.step, *main.stride()[:2], *high.stride()[:2]), constants


def _piece(side: Packed, found: Lookup, dim: int) -> int:
    """Bytes of a row of strings that are copied at once: they and addresses are multiples of it; 0: scalar codes."""
    codes = side.planes[0]
    return math.gcd(16, dim * side.bits // 8, codes.data_ptr(), *codes.stride()[:3]) if found.trellis else 0


@functools.cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory that each of `PROGRAMS` programs of a multiprocessor can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor // tuning.PROGRAMS - RESERVED


def _check(side: Packed, name: str, page: int, tile: int) -> None:
    """Refuse storage that the kernel's 4-byte copies would misread."""
    if page % tile:
        raise ValueError(f"pages of {page} tokens: the int8 kernel reads pages of a multiple of {tile}")
    for plane in side.planes:
        if any(stride % 4 for stride in plane.stride()[:3]) or plane.data_ptr() % 4:
            raise ValueError(f"{name} codes with strides {plane.stride()}: rows must begin at multiples of 4 bytes")
    size, strides = side.scale.element_size(), side.scale.stride()
    if strides[2] != 1 or strides[0] * size % 4 or strides[1] * size % 4 or side.scale.data_ptr() % 4:
        raise ValueError(
            f"{name} scales with strides {strides}: those of a head must be contiguous and begin at a "
            "multiple of 4 bytes"
        )
