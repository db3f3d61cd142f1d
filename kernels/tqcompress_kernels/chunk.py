"""Attention of a chunk of queries to packed tokens, decoded a bounded block at a time in the stored basis.

For many queries the products dominate and reading the codes once a block is cheap: a block of keys and values is
decoded into a workspace, torch's flash attention runs over it, and the blocks are merged by their log-sum-exp. Every
packed token is older than every query, so no mask is needed there; the exact tokens are the sinks and the recent
ones, of which the last `queries` are the queries' own. The naive version is `reference.decode_attention`.
"""

import torch
from torch import Tensor

from .dequantize import dequantize
from .packed import Packed

WORKSPACE_BYTES = 64 << 20
BLOCK = 128  # tokens that a block is a multiple of


def takes(query: Tensor, softcap: float | None) -> bool:
    """Whether flash attention can do this: half precision, no soft cap."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and softcap is None


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
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """Causal attention of `query` `[batch, heads, queries, head_dim]`, the last query being the last recent token.

    The other arguments are those of `decode.decode_attention`. Returns the output `[batch, heads, queries,
    head_dim]` and the natural log-sum-exp `[batch, heads, queries]`, float32.
    """
    batch, _, queries, dim = query.shape
    kv_heads = key.planes[0].shape[1]
    columns = query.reshape(batch, kv_heads, -1, dim)  # of a KV head: its query heads one after the other
    merged = _Merged()
    if tokens:
        merged = _packed(columns, key, value, key_back, key_mean, tokens, scaling, workspace_bytes)
        merged.out = merged.out @ value_back
        if value_mean is not None:
            merged.out += value_mean[:, None]
    old = recent[0].shape[2] - queries
    exact = [torch.cat([sink, new[:, :, :old]], dim=2) for sink, new in zip(sinks, recent, strict=True)]
    if exact[0].shape[2]:
        merged.add(*_flash(columns, *exact, scaling))
    own = [states[:, :, old:] for states in recent]
    out, lse = _flash(query, *own, scaling, causal=True)
    merged.add(out.reshape(columns.shape), lse.reshape(columns.shape[:3]))
    return merged.out.view(query.shape), merged.lse.view(query.shape[:3])


def _packed(
    columns: Tensor,
    key: Packed,
    value: Packed,
    key_back: Tensor,
    key_mean: Tensor | None,
    tokens: int,
    scaling: float,
    workspace_bytes: int,
) -> "_Merged":
    """All packed tokens, a block at a time; the output stays in the stored basis."""
    batch, kv_heads, _, dim = columns.shape
    rotated = (columns.float() @ key_back.transpose(-1, -2)).to(columns.dtype)
    size = workspace_bytes // (2 * batch * kv_heads * dim * columns.element_size()) // BLOCK * BLOCK
    size = min(max(size, BLOCK), -(-tokens // BLOCK) * BLOCK)
    workspace = columns.new_empty(2, batch, kv_heads, size, dim)
    merged = _Merged()
    for start in range(0, tokens, size):
        keys, values = workspace[:, :, :, : min(size, tokens - start)]
        dequantize(key, keys, start)
        dequantize(value, values, start)
        merged.add(*_flash(rotated, keys, values, scaling))
    if key_mean is not None:  # one more term of every score of a query: it moves the sum only
        merged.lse += (columns.float() * key_mean[:, None]).sum(-1) * scaling
    return merged


class _Merged:
    """Attention over the tokens seen so far."""

    def __init__(self):
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.out is None:
            self.out, self.lse = out.float(), lse
            return
        both = torch.logaddexp(self.lse, lse)
        self.out.mul_((self.lse - both).exp_().unsqueeze(-1)).addcmul_(out.float(), (lse - both).exp_().unsqueeze(-1))
        self.lse = both


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of torch's flash attention, which takes fewer KV heads than query heads."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return out, lse
