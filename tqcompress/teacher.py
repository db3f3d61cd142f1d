"""A whole window in one pass, each query seeing what it sees when the text is fed token by token through the cache.

That is: sinks, itself and the `window` tokens before it exact, every other token decoded. Used to measure quality.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .codec import Codec
from .errors import ModelError
from .plan import SIDES, Slot, packed_tokens
from .store import TokenStore
from .view import KVView, LayerCodecs, take_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES_AT_ONCE = 256  # bounds the score matrices of a window

# Of each compressed layer `[2, 2, kv_heads]`, float64: keys and values; |x - decoded|^2 and |x|^2 of all packed tokens.
Losses = dict[int, Tensor]


def teacher_cache(
    model: "PreTrainedModel",
    layers: dict[int, LayerCodecs],
    losses: Losses | None = None,
    only: frozenset[Slot] | None = None,
) -> Cache:
    """A cache for one forward pass over a whole window; what its codecs lose is added to `losses`.

    With `only`, everything but these slots is exact.
    """
    cache = DynamicCache(config=model.config)
    for index, codecs in layers.items():
        cache.layers[index] = TeacherLayer(codecs, losses, only)
    return cache


class TeacherLayer(DynamicLayer):
    """Takes one window of tokens; its attention decodes, query by query, what the real cache would have packed."""

    def __init__(self, codecs: LayerCodecs, losses: Losses | None, only: frozenset[Slot] | None):
        super().__init__()
        self.codecs, self.losses, self.only = codecs, losses, only

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[KVView, KVView]:
        """See `TeacherView`."""
        view = TeacherView(self.codecs, key_states, value_states, self.only)
        if self.losses is not None and (lost := view.losses()) is not None:
            self.losses[self.codecs.layer] = self.losses.get(self.codecs.layer, 0) + lost
        return view, view


def _packed(
    codec: Codec, append: Callable[[Codec, Tensor, TokenStore], None] | None, vectors: Tensor
) -> dict[str, Tensor]:
    """The rows that a cache stores for `[1, kv_heads, tokens, head_dim]`, made by what the backend has for it."""
    if append is None:
        return codec.encode(vectors)
    store = TokenStore(codec.layout(), vectors.shape[0], vectors.shape[1], vectors.device, vectors.shape[2])
    append(codec, vectors, store)
    store.length += vectors.shape[2]
    return store.read()


class TeacherView(KVView):
    """Exact and decoded keys and values `[1, kv_heads, tokens, head_dim]` of a window."""

    def __init__(self, codecs: LayerCodecs, keys: Tensor, values: Tensor, only: frozenset[Slot] | None = None):
        super().__init__((), codecs.num_kv_heads)
        self.codecs, self.exact = codecs, (keys.float(), values.float())
        count = packed_tokens(keys.shape[2], codecs.sinks, codecs.window, codecs.block)
        self.decoded = tuple(states.clone() for states in self.exact)
        place = slice(codecs.sinks, codecs.sinks + count)
        for group in codecs.groups if count else ():
            for i, codec in enumerate((group.key, group.value)):
                lossy = [
                    j for j, head in enumerate(group.heads) if only is None or (codecs.layer, head, SIDES[i]) in only
                ]
                if not lossy:
                    continue
                states = (keys, values)[i]
                rows = _packed(codec.to(states.device), group.backend.append, take_heads(states, group)[:, :, place])
                self.decoded[i][:, [group.heads[j] for j in lossy], place] = codec.decode(rows)[:, lossy]

    def losses(self) -> Tensor | None:
        """`[2, 2, kv_heads]`, as in `Losses`; None if nothing is packed."""
        count = packed_tokens(self.exact[0].shape[2], self.codecs.sinks, self.codecs.window, self.codecs.block)
        if not count:
            return None
        rows = []
        for pair in zip(self.exact, self.decoded, strict=True):
            exact, decoded = (states.narrow(2, self.codecs.sinks, count) for states in pair)
            rows += [(exact - decoded).square().sum((0, 2, 3)), exact.square().sum((0, 2, 3))]
        lost: Tensor = torch.stack(rows).cpu().double().unflatten(0, (2, 2))
        return lost

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """As `KVView.attend`, for a whole causal window without padding."""
        if mask is not None:
            raise ModelError("evaluation reads one unpadded window at a time; it takes no attention mask")
        parts = [
            self._attend(query[:, :, start : start + QUERIES_AT_ONCE].float(), start, scaling, softcap)
            for start in range(0, query.shape[2], QUERIES_AT_ONCE)
        ]
        return torch.cat([output for output, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)

    def _attend(self, query: Tensor, first: int, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        queries = query.shape[2]
        stop = first + queries
        query = query.unflatten(1, (self.num_kv_heads, -1)).flatten(2, 3)
        exact, decoded = ([s[:, :, :stop] for s in pair] for pair in (self.exact, self.decoded))
        position = torch.arange(first, stop, device=query.device)[:, None]
        token = torch.arange(stop, device=query.device)
        c = self.codecs
        counts = [packed_tokens(i + 1, c.sinks, c.window, c.block) for i in range(first, stop)]
        packed = torch.tensor(counts, device=query.device)[:, None]
        old = ((token >= c.sinks) & (token < c.sinks + packed)).repeat(query.shape[2] // queries, 1)
        seen = (token <= position).repeat(query.shape[2] // queries, 1)
        scores = torch.where(old, query @ decoded[0].transpose(-1, -2), query @ exact[0].transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        output = weights.masked_fill(~old, 0) @ decoded[1] + weights.masked_fill(old, 0) @ exact[1]
        return output.unflatten(2, (-1, queries)).flatten(1, 2), lse.unflatten(2, (-1, queries)).flatten(1, 2)
