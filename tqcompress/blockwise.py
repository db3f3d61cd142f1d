"""Attention over a group's packed tokens in plain torch, a block of tokens at a time.

The reference for every fused kernel, and the path for devices that have none. Nothing but one block is ever
decoded: workspace is bounded whatever the length. Softmax is accumulated online (Milakov and Gimelshein,
arXiv 1805.02867), in float32.
"""

import math
from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch import Tensor

from .codec import Codec
from .view import GroupView

WORKSPACE_BYTES = 64 << 20
LOWEST = torch.finfo(torch.float32).min  # in place of -inf, for a query that has seen nothing yet
QUERIES_AT_ONCE = 256  # of a longer chunk, so that blocks of tokens stay long enough to be worth a matrix product


def attend(
    query: Tensor, view: GroupView, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to sinks, packed and recent tokens of one group.

    Args:
        query: `[batch, kv_heads * share, queries, head_dim]`, `share` query heads for each KV head.
        mask: None means causal, the last query being the last token; bool `[batch or 1, tokens]` (True = attend)
            hides tokens besides. A mask of four axes, bool or additive float, broadcastable to
            `[batch, heads, queries, tokens]`, says everything itself.
        scaling: factor of the scores; softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        The output `[batch, heads, queries, head_dim]` and the log-sum-exp of the scores
        `[batch, heads, queries]`, both float32. A query that sees no token gets zeros and -inf.
    """
    key, value, sinks = view.codecs.key, view.codecs.value, view.sinks[0].shape[2]
    multiples = (view.key.layout.block, view.value.layout.block)
    alone = mask is None and query.shape[2] == 1

    def part(query: Tensor, scores_of: _Scores) -> tuple[Tensor, Tensor]:
        exact = _OnlineSoftmax(query)
        if alone:  # it sees them all: in one go
            keys, values = (torch.cat(parts, dim=2) for parts in zip(view.sinks, view.recent, strict=True))
            _add_exact(exact, query, keys, values, scores_of, 0)
        else:
            _add_exact(exact, query, *view.sinks, scores_of, 0)
            _add_exact(exact, query, *view.recent, scores_of, sinks + view.packed)
        rotated, coded, few = _by_head(key.rotate, query), exact.apart(), query[0, 0, ..., 0].numel() < query.shape[-1]
        for start, stop in _blocks(view.packed, query, *multiples):
            keys, factors = _decoded(key, view.key.read(start, stop), few)
            scores = scores_of(rotated, keys, sinks + start, factors)
            coded.add(scores, *_decoded(value, view.value.read(start, stop), few))
        coded.total = exact.total_at(coded.top) + _by_head(value.unrotate, coded.total)
        return coded.result()

    tokens = sinks + view.packed + view.recent[0].shape[2]
    return _in_parts(part, query, view.sinks[0].shape[1], tokens, mask, scaling, softcap)


def attend_exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same over ordinary key and value tensors `[batch, kv_heads, tokens, head_dim]`."""

    def part(query: Tensor, scores_of: _Scores) -> tuple[Tensor, Tensor]:
        softmax = _OnlineSoftmax(query)
        _add_exact(softmax, query, key, value, scores_of, 0)
        return softmax.result()

    return _in_parts(part, query, key.shape[1], key.shape[2], mask, scaling, softcap)


def _in_parts(
    part: "Callable[[Tensor, _Scores], tuple[Tensor, Tensor]]",
    query: Tensor,
    kv_heads: int,
    tokens: int,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`part` on up to `QUERIES_AT_ONCE` scaled queries at a time, `[batch, kv_heads, share, queries, head_dim]`."""
    outputs, first = [], tokens - query.shape[2]
    for start in range(0, query.shape[2], QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, query.shape[2])
        rows = mask if mask is None or mask.dim() == 2 or mask.shape[2] == 1 else mask[:, :, start:stop]
        some = (query[:, :, start:stop].float() * scaling).unflatten(1, (kv_heads, -1))
        outputs.append(part(some, _Scores(rows, softcap, first + start)))
    output, lse = (torch.cat(parts, dim=3) for parts in zip(*outputs, strict=True))
    return output.flatten(1, 2), lse.flatten(1, 2)


def _by_head(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A codec's function, which takes `[batch, kv_heads, n, head_dim]`, of `[batch, kv_heads, share, queries, ...]`."""
    found: Tensor = function(x.flatten(2, 3)).unflatten(2, x.shape[2:4])
    return found


def _decoded(codec: Codec, packed: dict[str, Tensor], few: bool) -> tuple[Tensor, Tensor | None]:
    """Decoded vectors and their factors, which a few queries multiply their scores and weights by."""
    return codec.decode_factors(packed) if few else (codec.decode_rotated(packed), None)


def _add_exact(
    softmax: "_OnlineSoftmax", query: Tensor, key: Tensor, value: Tensor, scores_of: "_Scores", offset: int
) -> None:
    """Take in ordinary keys and values, the first of which is token `offset`."""
    seen = int(min(key.shape[2], scores_of.reach(query.shape[3]) - offset))
    for start, stop in _blocks(seen, query):
        scores = scores_of(query, key[:, :, start:stop].float(), offset + start)
        softmax.add(scores, value[:, :, start:stop].float())


class _Scores:
    """Soft-capped, masked scores of a block of keys that starts at a given token."""

    def __init__(self, mask: Tensor | None, softcap: float | None, first_query: int):
        self.mask, self.softcap = mask, softcap
        self.causal = mask is None or mask.dim() == 2
        self.first_query = first_query  # its position, for the causal rule

    def reach(self, queries: int) -> float:
        """How many tokens the last of `queries` queries can see."""
        return self.first_query + queries if self.causal else math.inf

    def __call__(self, query: Tensor, key: Tensor, start: int, factors: Tensor | None = None) -> Tensor:
        """`[batch, kv_heads, share, queries, block]` for query `[.., share, queries, d]` and keys `[.., block, d]`."""
        scores: Tensor = torch.matmul(query.flatten(2, 3), key.transpose(-1, -2)).unflatten(2, query.shape[2:4])
        if factors is not None:
            scores = scores * factors[:, :, None, None]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        stop = start + key.shape[2]
        if self.causal:
            if self.mask is not None:
                scores = scores.masked_fill(~self.mask[:, None, None, None, start:stop], -torch.inf)
            if stop - 1 <= self.first_query:  # every query sees the whole block
                return scores
            positions = torch.arange(self.first_query, self.first_query + scores.shape[3], device=scores.device)
            seen = torch.arange(start, stop, device=scores.device) <= positions[:, None]
            return scores.masked_fill(~seen, -torch.inf)
        mask = self.mask[..., start:stop]  # type: ignore[index]  # None is causal
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3])
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class _OnlineSoftmax:
    """Softmax-weighted values, accumulated block by block."""

    def __init__(self, query: Tensor):
        self.top = query.new_full(query.shape[:-1], -torch.inf)
        self.mass = torch.zeros_like(self.top)
        self.total = torch.zeros_like(query)

    def add(self, scores: Tensor, value: Tensor, factors: Tensor | None = None) -> None:
        """Take in scores `[..., share, queries, block]` and their values `[..., block, d]`, the factors still to do."""
        top = torch.maximum(self.top, scores.amax(-1))
        anchor = top.clamp_min(LOWEST)
        weights = (scores - anchor.unsqueeze(-1)).exp_()
        shrink = (self.top - anchor).exp_()
        self.mass = self.mass * shrink + weights.sum(-1)
        if factors is not None:
            weights = weights.mul_(factors[:, :, None, None])
        weighted = torch.matmul(weights.flatten(2, 3), value).unflatten(2, weights.shape[2:4])
        self.total = self.total * shrink.unsqueeze(-1) + weighted
        self.top = top

    def apart(self) -> "_OnlineSoftmax":
        """One that goes on from here with values of another basis, of which it has none yet."""
        other = copy(self)
        other.total = torch.zeros_like(self.total)
        return other

    def total_at(self, top: Tensor) -> Tensor:
        """The total when the highest score is `top`."""
        return self.total * (self.top - top.clamp_min(LOWEST)).exp_().unsqueeze(-1)

    def result(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        return self.total / self.mass.clamp_min(1).unsqueeze(-1), self.top + self.mass.log()  # mass: 0, or at least 1


def _blocks(tokens: int, query: Tensor, *multiples: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks whose scores, keys and values fit the workspace."""
    batch, kv_heads, share, queries, head_dim = query.shape
    a_token = 4 * batch * kv_heads * (3 * share * queries + 8 * head_dim)  # float32 scores, codes, keys, values
    size = max(1, WORKSPACE_BYTES // a_token)
    for multiple in multiples:
        size = max(multiple, size // multiple * multiple)
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)
