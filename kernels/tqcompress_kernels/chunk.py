"""Attention of a chunk of queries to packed tokens, decoded a bounded block at a time in the stored basis.

For many queries the products dominate and reading the codes once a block is cheap: a block of keys and values is
decoded into a workspace, flash attention runs over it, and the blocks are merged by their log-sum-exp. That is torch's,
and a kernel of our own (`flash`) for what it does not take: hidden tokens, a soft cap, float32. Every packed token is
older than every query; the exact tokens are the sinks and the recent ones, of which the last `queries` are the queries'
own. The naive version is `reference.decode_attention`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import flash
from .dequantize import dequantize
from .packed import Packed

WORKSPACE_BYTES = 64 << 20
BLOCK = 128  # tokens that a block is a multiple of


def chunk_attention(
    query: Tensor,
    key: Packed,
    value: Packed,
    key_back: Tensor,
    value_back: Tensor,
    key_mean: Tensor | None,
    value_mean: Tensor | None,
    sinks: tuple[Tensor, Tensor],
    recent: tuple[Tensor, Tensor],
    tokens: int,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    block_table: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of `query` `[batch, heads, queries, head_dim]`, the last query being the last recent token.

    The other arguments are those of `decode.decode_attention`; of the packed tokens, `tokens` from `first` on are
    attended to. Returns the output `[batch, heads, queries,
    head_dim]` and the natural log-sum-exp `[batch, heads, queries]`, float32. A query that sees nothing gets zeros
    and -inf.
    """
    batch, _, queries, dim = query.shape
    kv_heads, n_sinks, n_recent = key.planes[0].shape[1], sinks[0].shape[2], recent[0].shape[2]
    columns = query.reshape(batch, kv_heads, -1, dim)  # of a KV head: its query heads one after the other
    attend = partial(_attend, scaling=scaling, softcap=softcap)
    old, merged = n_recent - queries, _Merged()
    split = [n_sinks, tokens, old, queries]
    parts: tuple[Tensor, ...] = (None,) * 4 if mask is None else mask.split(split, dim=1)  # type: ignore[assignment]  # None without a mask
    if tokens:
        merged = _packed(
            columns, key, value, key_back, key_mean, parts[1], tokens, scaling, attend, workspace_bytes,
            block_table, first,
        )  # fmt: skip
        merged.out = merged.out @ value_back
        if value_mean is not None:
            merged.out += value_mean[:, None]
    exact = [torch.cat([sink, new[:, :, :old]], dim=2) for sink, new in zip(sinks, recent, strict=True)]
    if exact[0].shape[2]:
        merged.add(*attend(columns, *exact, mask=None if mask is None else torch.cat(parts[::2], dim=1)))
    own = [states[:, :, old:] for states in recent]
    out, lse = attend(query, *own, mask=parts[3], causal=True)
    merged.add(out.reshape(columns.shape), lse.reshape(columns.shape[:3]))
    return merged.out.view(query.shape), merged.lse.view(query.shape[:3])


def _packed(
    columns: Tensor,
    key: Packed,
    value: Packed,
    key_back: Tensor,
    key_mean: Tensor | None,
    mask: Tensor | None,
    tokens: int,
    scaling: float,
    attend: Callable[..., tuple[Tensor, Tensor]],
    workspace_bytes: int,
    block_table: Tensor | None,
    first: int,
) -> "_Merged":
    """All packed tokens, a block at a time; the output stays in the stored basis."""
    batch, kv_heads, _, dim = columns.shape
    rotated = (columns.float() @ key_back.transpose(-1, -2)).to(columns.dtype)
    # The mean is one more term of every score of a query.
    bias = None if key_mean is None else (columns.float() * key_mean[:, None]).sum(-1) * scaling
    size = workspace_bytes // (2 * batch * kv_heads * dim * columns.element_size()) // BLOCK * BLOCK
    size = min(max(size, BLOCK), -(-tokens // BLOCK) * BLOCK)
    workspace = columns.new_empty(2, batch, kv_heads, size, dim)
    merged = _Merged()
    for start in range(0, tokens, size):
        keys, values = workspace[:, :, :, : min(size, tokens - start)]
        dequantize(key, keys, first + start, block_table)
        dequantize(value, values, first + start, block_table)
        seen = None if mask is None else mask[:, start : start + size]
        merged.add(*attend(rotated, keys, values, mask=seen, bias=bias))
    return merged


class _Merged:
    """Attention over the tokens seen so far."""

    def __init__(self) -> None:
        self.out: Tensor = None  # type: ignore[assignment]  # until something is added
        self.lse: Tensor = None  # type: ignore[assignment]  # likewise

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.out is None:
            self.out, self.lse = out.float(), lse
            return
        both = torch.logaddexp(self.lse, lse)
        anchor = both.masked_fill(both == -torch.inf, 0.0)  # of queries that have seen nothing yet
        mine, theirs = ((x - anchor).exp_().unsqueeze(-1) for x in (self.lse, lse))
        self.out.mul_(mine).addcmul_(out.float(), theirs)
        self.lse = both


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    mask: Tensor | None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`flash.attention`, by torch's kernel, which takes fewer KV heads than query heads, where that can do it."""
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if not half or softcap or mask is not None:
        return flash.attention(query, key, value, scaling, softcap, mask, bias, causal)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return out, lse if bias is None else lse + bias
