"""Split-KV decoding over bit planes in plain Triton: any bits, any head_dim, any device Triton has.

The naive version is `reference.split`.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import launch
from .packed import Packed
from .plain_kernel import split_kernel
from .tiles import AFFINE, BITWISE, LOAD, SHUFFLE, WINDOW, word_bytes


def mode(side: Packed) -> int:
    """How the kernel turns the codes of `side` into levels."""
    if side.window:
        return WINDOW.value + side.window
    if side.uniform or side.bits == 1:
        return AFFINE.value
    return BITWISE.value if side.bits == 2 else SHUFFLE.value if side.bits <= 5 else LOAD.value


def _load_bytes(side: Packed, per: int) -> tuple[int, ...]:
    """Bytes that a load of each plane may take: a word, or one where rows are not aligned to words."""
    if side.window:
        return (1,)
    sizes = [word_bytes.fn(side.bits, per, k) for k in range(len(side.planes))]
    return tuple(
        1 if any(n % size for n in (plane.data_ptr(), *plane.stride()[:3])) else size
        for plane, size in zip(side.planes, sizes, strict=True)
    )


def _strides(side: Packed) -> tuple[int, ...]:
    return sum((plane.stride()[:3] for plane in side.planes), ())


class _Parts(NamedTuple):
    """Of the parts of a side: their coordinates, how these become operands, and their first planes."""

    first: tuple[int, ...]
    dim: tuple[int, ...]
    bits: tuple[int, ...]
    mode: tuple[int, ...]
    per: tuple[int, ...]
    words: tuple[int, ...]
    plane: tuple[int, ...]
    bytes: tuple[int, ...]  # of each plane
    levels: tuple[Tensor, ...]

    def constants(self, name: str) -> dict[str, tuple[int, ...]]:
        """As the kernel takes them."""
        return {f"{name}_{field.upper()}": getattr(self, field) for field in self._fields[:-1]}


def _parts(side: Packed, dim: int, windows: bool, key: bool) -> _Parts:
    """`windows`: whether a side has trellis codes."""
    found, planes = [], 0
    loads: tuple[int, ...] = ()
    for first, count, part in side.parts(dim):
        per = 4 if count <= 64 and not windows else 8
        sizes = _load_bytes(part, per)
        # Triton spreads operands that come from loads of single bytes over at least 32 elements of the sum, and repeats
        # them if there are fewer (seen with Triton 3.6 on sm_90: wrong scores).
        words = max(32 if key and 1 in sizes else 16, triton.next_power_of_2(count // per))
        found.append((first, count, part.bits, mode(part), per, words, planes, part.levels))
        loads, planes = loads + sizes, planes + len(sizes)
    *numbers, levels = zip(*found, strict=True)
    return _Parts(*numbers, loads, levels)  # type: ignore[call-arg]  # the numbers of each part, field by field


def split(
    rotated: Tensor,
    bias: Tensor,
    key: Packed,
    value: Packed,
    partial: Tensor,
    lse: Tensor,
    tokens: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> None:
    """Attend to the packed tokens, in `partial.shape[2]` spans; writes every element of `partial` and `lse`.

    Args:
        rotated: queries in the basis of the stored keys, float32 `[batch, kv_heads, columns, head_dim]`.
        bias: added to the scores of a column, float32 `[batch, kv_heads, columns]`.
        key, value: the packed tokens.
        partial: float32 `[batch, kv_heads, splits, columns, head_dim]`: the average of the stored values.
        lse: float32 `[batch, kv_heads, splits, columns]`: log2 of the sum of exp(score), -inf of nothing.
        tokens: how many tokens to walk at most; the same for all of the batch.
        lengths: how many tokens each sequence has, integers `[batch]`.
        mask: bool `[batch, >= tokens]`, True = attend.
        block_table: int32 `[batch, max_pages]`: the pages of a sequence (then N of `key` and `value` is pages).
    """
    batch, kv_heads, splits, columns, dim = partial.shape
    if partial.numel() == 0:
        return
    windows = bool(key.window or value.window)
    keys, values = _parts(key, dim, windows, True), _parts(value, dim, windows, False)
    words = max(*keys.words, *values.words)
    tile = 8 if columns <= 8 and torch.version.hip is None else 16
    big = words * tile >= 512
    launch(
        split_kernel, (batch * kv_heads, splits, triton.cdiv(columns, tile)),
        rotated, bias, key.planes, key.scale, keys.levels, value.planes, value.scale, values.levels,
        partial, lse, lengths, mask, block_table, _strides(key), _strides(value),
        *key.scale.stride()[:2], *value.scale.stride()[:2], 0 if mask is None else mask.stride(0),
        0 if block_table is None else block_table.stride(0), tokens, kv_heads, columns, scaling, softcap or 0.0,
        DIM=dim, **keys.constants("KEY"), **values.constants("VALUE"),
        KEY_LOG8=key.scale.dtype == torch.uint8, VALUE_LOG8=value.scale.dtype == torch.uint8,
        KEY_SCALE_ROW=key.scale.stride(2), VALUE_SCALE_ROW=value.scale.stride(2), SOFTCAP=bool(softcap),
        PAGE=0 if block_table is None else key.planes[0].shape[2], COLUMNS=tile,
        BLOCK=32 if words > 16 and not big else 64,
        num_warps=2 if big else 1, num_stages=1 if max(keys.mode + values.mode) >= LOAD.value else 2,
    )  # fmt: skip
