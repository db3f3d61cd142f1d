"""Attention of a few new queries over packed tokens, and exact ones before and after: three or four launches.

`prepare` rotates the queries, a split kernel (`plain` or a faster one with the same signature) walks the packed
tokens, `combine` attends to the exact tokens, if there are any, and merges everything. Nothing waits for the device
and no shape depends on values on it, so a decode can be captured in a CUDA graph. The naive version is
`reference.decode_attention`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain, tuning
from .combine import Exact, RingStep, combine
from .launch import Scratch, on_device
from .packed import Packed, unflat
from .prepare import empty, prepare


def decode_attention(
    query: Tensor,
    key: Packed,
    value: Packed,
    key_back: Tensor,
    value_back: Tensor,
    key_mean: Tensor | None,
    value_mean: Tensor | None,
    sinks: Exact,
    recent: Exact,
    tokens: int,
    scaling: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    split: Callable[..., None] = plain.split,
    splits: int | None = None,
    step: RingStep | None = None,
    memory: Scratch | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to `sinks`, packed tokens and `recent`, in this order.

    Args:
        query: float16, bfloat16 or float32 `[batch, kv_heads * share, queries, head_dim]`, last stride 1; the last
            query is the last recent token, and each sees no later recent token. All see all packed tokens.
        key, value: the packed tokens, in the stored basis.
        key_back, value_back: float32 `[1 or kv_heads, head_dim, head_dim]`: vector = stored @ back + mean.
        key_mean, value_mean: float32 `[kv_heads, head_dim]`.
        sinks, recent: exact keys and values `[batch, kv_heads, n, head_dim]`, last stride 1.
        tokens: how many packed tokens there are (at most, with `lengths`).
        scaling, softcap: score = scaling * query . key, then softcap * tanh(score / softcap).
        lengths: packed tokens of each sequence, integers `[batch]`.
        mask: bool `[batch, sinks + tokens + recent]`, True = attend.
        block_table: int32 `[batch, max_pages]`: token t is row t % rows of page `block_table[b, t // rows]` of the
            packed tensors, whose first axis is then pages.
        split: the kernel that walks the packed tokens.
        splits: into how many spans it splits them; chosen by `tuning.splits` if None.
        step: the ring that holds the exact tokens, in place of `sinks` and `recent`; the query is one.
        memory: where all but what is returned lies; new tensors if None.
        out: where the output goes, if not to a new tensor.

    Returns:
        The output, float32 `[batch, kv_heads * share, queries, head_dim]`, and the natural logarithm of the sum of
        exp(score), float32 `[batch, kv_heads * share, queries]`. A query that sees nothing gets zeros and -inf.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = key.planes[0].shape[1]
    own: Tensor | Scratch = query if memory is None else memory
    out = query.new_empty(batch, heads, queries, dim, dtype=torch.float32) if out is None else out
    out_lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if splits is None:
        splits = tuning.splits(query.device, batch * kv_heads, dim, tokens)
    rotated, bias = empty(query, kv_heads, own)
    columns = rotated.shape[2]
    partial = own.new_empty(batch, kv_heads, splits, columns, dim, dtype=torch.float32)
    lse = own.new_empty(batch, kv_heads, splits, columns, dtype=torch.float32)
    with on_device(query):
        if splits:
            early = tuning.spread(query.device, batch * kv_heads * splits, -(-tokens // splits))
            prepare(query, key_back, key_mean, rotated, bias, scaling, early)
            before = step.ring.sinks if step else 0 if sinks is None else sinks[0].shape[2]
            packed_mask = None if mask is None else mask[:, before:]
            split(
                rotated, bias, key, value, partial, lse, tokens, lengths, packed_mask, block_table, scaling, softcap
            )  # fmt: skip
        combine(
            partial, lse, value_back, value_mean, query, sinks, recent, mask, tokens, scaling, softcap, out, out_lse,
            step, own,
        )  # fmt: skip
    return out, out_lse


def paged_attention(
    query: Tensor,
    pages: tuple[Packed, Packed],
    block_table: Tensor,
    lengths: Tensor,
    key_back: Tensor,
    value_back: Tensor,
    scaling: float,
    key_mean: Tensor | None = None,
    value_mean: Tensor | None = None,
    sinks: Exact = None,
    recent: Exact = None,
    softcap: float | None = None,
    max_tokens: int | None = None,
    split: Callable[..., None] = plain.split,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` over a paged cache, each sequence with its own length.

    Args:
        pages: keys and values; planes `[pages, kv_heads, rows, bytes]`, any strides but the last.
        block_table: int32 `[batch, max_pages]`; entries past a sequence's length are not read.
        lengths: packed tokens of each sequence, integers `[batch]`; 0 is allowed.
        max_tokens: an upper bound of `lengths` known to the host; fewer splits are empty the tighter it is.
    """
    rows = pages[0].planes[0].shape[2]
    tokens = block_table.shape[1] * rows
    if max_tokens is not None:
        tokens = min(tokens, max_tokens)
    return decode_attention(
        query, *pages, key_back, value_back, key_mean, value_mean, sinks, recent, tokens, scaling, softcap,
        lengths, None, block_table, split, splits,
    )  # fmt: skip


# What the custom op can name as its split kernel; a module with a faster one may add it.
SPLITS: dict[str, Callable[..., None]] = {"plain": plain.split}


@torch.library.custom_op("tqcompress::decode_attention", mutates_args=())
def decode_attention_op(
    query: Tensor,
    key_planes: Sequence[Tensor],
    key_scale: Tensor,
    key_levels: Tensor,
    key_bits: int,
    key_step: float | None,
    key_uniform: bool,
    key_window: int,
    key_wide_levels: Tensor | None,
    key_wide_dim: int,
    key_wide_bits: int,
    key_wide_uniform: bool,
    value_planes: Sequence[Tensor],
    value_scale: Tensor,
    value_levels: Tensor,
    value_bits: int,
    value_step: float | None,
    value_uniform: bool,
    value_window: int,
    value_wide_levels: Tensor | None,
    value_wide_dim: int,
    value_wide_bits: int,
    value_wide_uniform: bool,
    key_back: Tensor,
    value_back: Tensor,
    key_mean: Tensor | None,
    value_mean: Tensor | None,
    sinks: Sequence[Tensor],
    recent: Sequence[Tensor],
    tokens: int,
    scaling: float,
    softcap: float | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    split: str,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` for torch.compile and export; `sinks` and `recent` are empty or keys and values."""
    key = unflat(
        key_planes, key_scale, key_levels, key_bits, key_step, key_uniform, key_window,
        key_wide_levels, key_wide_dim, key_wide_bits, key_wide_uniform,
    )  # fmt: skip
    value = unflat(
        value_planes, value_scale, value_levels, value_bits, value_step, value_uniform, value_window,
        value_wide_levels, value_wide_dim, value_wide_bits, value_wide_uniform,
    )  # fmt: skip
    return decode_attention(
        query, key, value, key_back, value_back, key_mean, value_mean,
        (sinks[0], sinks[1]) if sinks else None, (recent[0], recent[1]) if recent else None,
        tokens, scaling, softcap, lengths, mask, block_table, SPLITS[split], splits,
    )  # fmt: skip


@decode_attention_op.register_fake
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape, dtype=torch.float32)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def through_op(
    query: Tensor, key: Packed, value: Packed, key_back: Tensor, value_back: Tensor, key_mean: Tensor | None,
    value_mean: Tensor | None, sinks: Exact, recent: Exact, tokens: int, scaling: float, softcap: float | None = None,
    lengths: Tensor | None = None, mask: Tensor | None = None, block_table: Tensor | None = None,
    split: str = "plain", splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode_attention` through the custom op: what code that is compiled or exported calls."""
    return decode_attention_op(
        query, *key.flat, *value.flat, key_back, value_back, key_mean, value_mean,
        list(sinks or ()), list(recent or ()), tokens, scaling, softcap, lengths, mask, block_table, split, splits,
    )  # fmt: skip
