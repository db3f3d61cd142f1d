"""Attention over a group's packed tokens in plain torch, a block of tokens at a time.

The reference for every fused kernel, and the path for devices that have none. Nothing but one block is ever
decoded: workspace is bounded whatever the length. Softmax is accumulated online (Milakov and Gimelshein,
arXiv 1805.02867), in float32.
"""

import torch
from torch import Tensor

from .view import GroupView

WORKSPACE_BYTES = 32 << 20


def attend(
    query: Tensor, view: GroupView, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to sinks, packed and recent tokens of one group.

    Args:
        query: `[batch, kv_heads * share, queries, head_dim]`, `share` query heads for each KV head.
        mask: bool (True = attend) or additive float, broadcastable to `[batch, heads, queries, tokens]`; None
            means causal, the last query being the last token.
        scaling: factor of the scores; softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        The output `[batch, heads, queries, head_dim]` and the log-sum-exp of the scores
        `[batch, heads, queries]`, both float32. A query that sees no token gets zeros and -inf.
    """
    codecs, sinks, packed = view.codecs, view.sinks[0].shape[2], view.packed
    tokens = sinks + packed + view.recent[0].shape[2]
    kv_heads, share = view.sinks[0].shape[1], query.shape[1] // view.sinks[0].shape[1]
    query = query.float().unflatten(1, (kv_heads, share))
    scores_of = _Scores(mask, scaling, softcap, query.shape[3], tokens)

    exact = _OnlineSoftmax(query)
    for (key, value), offset in ((view.sinks, 0), (view.recent, sinks + packed)):
        for start, stop in _blocks(key.shape[2], query, key.shape[3]):
            block = key[:, :, start:stop].float()
            exact.add(scores_of(query, block, offset + start), value[:, :, start:stop].float())

    rotated = codecs.key.rotate(query)
    coded = _OnlineSoftmax(query)
    for start, stop in _blocks(packed, query, query.shape[4], codecs.key.layout().block, codecs.value.layout().block):
        block = codecs.key.decode_rotated(view.key.read(start, stop))
        coded.add(scores_of(rotated, block, sinks + start), codecs.value.decode_rotated(view.value.read(start, stop)))
    coded.total = codecs.value.unrotate(coded.total)

    output, lse = exact.merged(coded)
    return output.flatten(1, 2), lse.flatten(1, 2)


def attend_exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same over ordinary key and value tensors `[batch, kv_heads, tokens, head_dim]`."""
    query = query.float().unflatten(1, (key.shape[1], -1))
    scores_of = _Scores(mask, scaling, softcap, query.shape[3], key.shape[2])
    softmax = _OnlineSoftmax(query)
    for start, stop in _blocks(key.shape[2], query, key.shape[3]):
        softmax.add(scores_of(query, key[:, :, start:stop].float(), start), value[:, :, start:stop].float())
    output, lse = softmax.merged(_OnlineSoftmax(query))
    return output.flatten(1, 2), lse.flatten(1, 2)


class _Scores:
    """Scaled, soft-capped, masked scores of a block of keys that starts at a given token."""

    def __init__(self, mask: Tensor | None, scaling: float, softcap: float | None, queries: int, tokens: int):
        self.mask, self.scaling, self.softcap = mask, scaling, softcap
        self.first_query = tokens - queries  # its position, for the causal rule

    def __call__(self, query: Tensor, key: Tensor, start: int) -> Tensor:
        """`[batch, kv_heads, share, queries, block]` for query `[.., share, queries, d]` and keys `[.., block, d]`."""
        scores = torch.matmul(query.flatten(2, 3), key.transpose(-1, -2)).unflatten(2, query.shape[2:4]) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        stop = start + key.shape[2]
        if self.mask is None:
            if stop - 1 <= self.first_query:  # every query sees the whole block
                return scores
            positions = torch.arange(self.first_query, self.first_query + scores.shape[3], device=scores.device)
            seen = torch.arange(start, stop, device=scores.device) <= positions[:, None]
            return scores.masked_fill(~seen, -torch.inf)
        mask = self.mask[..., start:stop]
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3])
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class _OnlineSoftmax:
    """Softmax-weighted values, accumulated block by block."""

    def __init__(self, query: Tensor):
        self.top = query.new_full(query.shape[:-1], -torch.inf)
        self.mass = torch.zeros_like(self.top)
        self.total = torch.zeros_like(query)

    def add(self, scores: Tensor, value: Tensor) -> None:
        """Take in scores `[..., share, queries, block]` and their values `[..., block, d]`."""
        top = torch.maximum(self.top, scores.amax(-1))
        anchor = torch.where(top == -torch.inf, 0.0, top)  # a query that has seen nothing yet
        weights = (scores - anchor.unsqueeze(-1)).exp()
        shrink = (self.top - anchor).exp()
        weighted = torch.matmul(weights.flatten(2, 3), value).unflatten(2, weights.shape[2:4])
        self.mass = self.mass * shrink + weights.sum(-1)
        self.total = self.total * shrink.unsqueeze(-1) + weighted
        self.top = top

    def merged(self, other: "_OnlineSoftmax") -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over the tokens of both."""
        top = torch.maximum(self.top, other.top)
        anchor = torch.where(top == -torch.inf, 0.0, top)
        mine, theirs = (self.top - anchor).exp(), (other.top - anchor).exp()
        mass = self.mass * mine + other.mass * theirs
        total = self.total * mine.unsqueeze(-1) + other.total * theirs.unsqueeze(-1)
        return total / torch.where(mass == 0, 1.0, mass).unsqueeze(-1), anchor + mass.log()


def _blocks(tokens: int, query: Tensor, head_dim: int, *multiples: int):
    """(start, stop) of blocks whose scores, keys and values fit the workspace."""
    batch, kv_heads, share, queries, _ = query.shape
    a_token = 4 * batch * kv_heads * (3 * share * queries + 8 * head_dim)  # float32 scores, codes, keys, values
    size = max(1, WORKSPACE_BYTES // a_token)
    for multiple in multiples:
        size = max(multiple, size // multiple * multiple)
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)
