"""Naive torch versions of the decoding kernels, in the precision of their inputs: what each must compute."""

import math

import torch
from torch import Tensor

from .encode_reference import unshuffle
from .packed import Packed, plane_widths


def unpack(side: Packed, head_dim: int) -> Tensor:
    """The codes `[N, kv_heads, rows, head_dim]` of one part, int64, one bit at a time; of a trellis its states."""
    if side.window:
        return states(side.planes[0], side.bits, side.window, head_dim)
    codes: Tensor = 0  # type: ignore[assignment]  # planes are added
    at = 0
    for plane, width in zip(side.planes, plane_widths(side.bits), strict=True):
        bits = (plane.unsqueeze(-1).long() >> torch.arange(8, device=plane.device)) & 1
        if (side.bits, width) == (3, 1):
            bits = unshuffle(bits.flatten(-2)).unsqueeze(-1)
        bits = bits.flatten(-2)[..., : head_dim * width].unflatten(-1, (head_dim, width))
        codes = codes + ((bits << torch.arange(width, device=plane.device)).sum(-1) << at)
        at += width
    return codes


def states(codes: Tensor, bits: int, window: int, head_dim: int) -> Tensor:
    """The states of a trellis, int64 `[..., head_dim]`, of codes uint8 `[..., head_dim * bits / 8]`."""
    string = ((codes.unsqueeze(-1).long() >> torch.arange(8, device=codes.device)) & 1).flatten(-2)
    places = torch.arange(window, device=codes.device)
    first = torch.arange(head_dim, device=codes.device) * bits
    return (string[..., (first[:, None] + places) % string.shape[-1]] << places).sum(-1)


def scales(side: Packed, dtype: torch.dtype) -> Tensor:
    """The scales `[N, kv_heads, rows, 1]` as numbers."""
    if side.scale.dtype != torch.uint8:
        return side.scale.to(dtype)
    return torch.where(side.scale == 0, 0.0, 2 ** ((side.scale.to(dtype) - 128) / 16))


def stored(side: Packed, head_dim: int, dtype: torch.dtype, block_table: Tensor | None = None) -> Tensor:
    """The vectors `[batch, kv_heads, tokens, head_dim]` in the stored basis."""
    parts = [part.levels.to(dtype)[unpack(part, dim)] for _, dim, part in side.parts(head_dim)]
    x = torch.cat(parts, dim=-1) * scales(side, dtype)
    if block_table is not None:  # the pages of a sequence, one after the other
        x = x[block_table.long()].transpose(1, 2).flatten(2, 3)
    return x


def prepare(
    query: Tensor, key_back: Tensor, key_mean: Tensor | None, kv_heads: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Rotated queries `[batch, kv_heads, columns, head_dim]` and their bias `[batch, kv_heads, columns]`."""
    columns = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    rotated = columns @ key_back.to(query).transpose(-1, -2)
    if key_mean is None:
        return rotated, torch.zeros_like(rotated[..., 0])
    return rotated, (columns * key_mean.to(query).unsqueeze(1)).sum(-1) * scaling


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax average and natural log-sum-exp; of nothing: zeros and -inf."""
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()
    return weights @ values, lse


def _seen(tokens: int, lengths: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """Which packed tokens are attended to, bool `[batch, 1, 1, tokens]`."""
    seen = torch.ones(like.shape[0], tokens, dtype=torch.bool, device=like.device)
    if lengths is not None:
        seen &= torch.arange(tokens, device=like.device) < lengths.unsqueeze(1)
    if mask is not None:
        seen &= mask[:, :tokens]
    return seen[:, None, None]


def split(
    rotated: Tensor,
    bias: Tensor,
    key: Packed,
    value: Packed,
    splits: int,
    block: int,
    tokens: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`partial` and `lse` (log2) of `plain.split`; `block` is what spans are multiples of."""
    dim = rotated.shape[-1]
    k, v = (stored(side, dim, rotated.dtype, block_table)[:, :, :tokens] for side in (key, value))
    scores = _cap(rotated @ k.transpose(-1, -2) * scaling + bias.unsqueeze(-1), softcap)
    scores = scores.masked_fill(~_seen(tokens, lengths, mask, rotated), -math.inf)
    span = math.ceil(math.ceil(tokens / splits) / block) * block
    spans = [slice(s * span, (s + 1) * span) for s in range(splits)]
    parts = [_attend(scores[..., span], v[..., span, :]) for span in spans]
    return torch.stack([p[0] for p in parts], 2), torch.stack([p[1] for p in parts], 2) / math.log(2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`flash.attention`."""
    queries, tokens = query.shape[2], key.shape[2]
    key, value = (x.to(query).repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    scores = _cap(scores if bias is None else scores + bias.unsqueeze(-1), softcap)
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=query.device)
    seen = seen.tril(tokens - queries) if causal else seen
    seen = seen if mask is None else seen & mask[:, None, None]
    return _attend(scores.masked_fill(~seen, -math.inf), value)


def decode_attention(
    query: Tensor,
    key: Packed,
    value: Packed,
    key_back: Tensor,
    value_back: Tensor,
    key_mean: Tensor | None,
    value_mean: Tensor | None,
    sinks: tuple[Tensor, Tensor] | None,
    recent: tuple[Tensor, Tensor] | None,
    tokens: int,
    scaling: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode.decode_attention`: dequantize everything, one softmax over all tokens in their order."""
    batch, heads, queries, dim = query.shape
    kv_heads = key.planes[0].shape[1]
    k, v = (stored(side, dim, query.dtype, block_table)[:, :, :tokens] for side in (key, value))
    k, v = k @ key_back.to(k), v @ value_back.to(v)
    k = k if key_mean is None else k + key_mean.to(k).unsqueeze(1)
    v = v if value_mean is None else v + value_mean.to(v).unsqueeze(1)
    empty = query.new_zeros(batch, kv_heads, 0, dim)
    (sink_k, sink_v), (recent_k, recent_v) = ((empty, empty) if part is None else part for part in (sinks, recent))
    k = torch.cat([sink_k.to(k), k, recent_k.to(k)], 2)
    v = torch.cat([sink_v.to(v), v, recent_v.to(v)], 2)
    n_sinks, n_recent = sink_k.shape[2], recent_k.shape[2]
    seen = torch.ones(batch, 1, queries, k.shape[2], dtype=torch.bool, device=query.device)
    seen[..., n_sinks : n_sinks + tokens] &= _seen(tokens, lengths, None, query)
    order = torch.arange(n_recent, device=query.device) - torch.arange(queries, device=query.device).unsqueeze(1)
    seen[..., n_sinks + tokens :] &= order <= n_recent - queries
    if mask is not None:
        seen = seen & mask[:, None, None]
    k, v, seen = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, seen))
    scores = _cap(query @ k.transpose(-1, -2) * scaling, softcap).masked_fill(~seen, -math.inf)
    return _attend(scores, v)
