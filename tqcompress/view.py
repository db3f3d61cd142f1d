"""What a cache layer hands to attention: its packed rows and exact tokens, group by group."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .codec import Codec
from .store import TokenStore


@dataclass(frozen=True)
class Backend:
    """A way to attend to a group's packed tokens: `attend` as in `blockwise.attend`, and why it was chosen.

    `append(codec, vectors, store)`, if there is one, encodes `[batch, heads, tokens, head_dim]` straight into the
    room that was reserved behind the last row of `store`; without it `codec.encode` is called and its rows copied.
    """

    name: str
    attend: Callable[..., tuple[Tensor, Tensor]]
    reason: str
    append: Callable[[Codec, Tensor, TokenStore], None] | None = None


@dataclass(frozen=True)
class GroupCodecs:
    """The heads of a group, its two codecs and its backend."""

    heads: tuple[int, ...]
    key: Codec
    value: Codec
    backend: Backend


@dataclass(frozen=True)
class LayerCodecs:
    """All that a `CompressedLayer` must know; shared by every cache of a model."""

    layer: int
    groups: tuple[GroupCodecs, ...]
    num_kv_heads: int
    head_dim: int
    sinks: int
    window: int
    block: int


@dataclass(frozen=True)
class GroupView:
    """One group as attention reads it: packed rows, then the exact tokens around them."""

    codecs: GroupCodecs
    key: TokenStore
    value: TokenStore
    packed: int  # tokens; the stores may grow after the view was made
    sinks: tuple[Tensor, Tensor]  # exact keys and values [batch, heads, tokens, head_dim]
    recent: tuple[Tensor, Tensor]


class KVView:
    """What `update` returns in place of key and value tensors: handles for tqcompress's attention."""

    def __init__(self, groups: tuple[GroupView, ...], num_kv_heads: int, order: Tensor | None = None):
        self.groups, self.num_kv_heads = groups, num_kv_heads
        self.order = order  # `[batch, tokens]`: the position of each stored token, None if they are in order

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Each group's backend on its share of the query heads; arguments and result as in `blockwise.attend`."""
        if self.order is not None and mask is not None:
            mask = mask.expand(self.order.shape[0], *mask.shape[1:])
            mask = mask.gather(-1, self.order[:, None, None].expand(*mask.shape[:-1], -1))
        if len(self.groups) == 1:
            return self.groups[0].codecs.backend.attend(query, self.groups[0], mask, scaling, softcap)
        share = query.shape[1] // self.num_kv_heads
        output = query.new_empty(query.shape, dtype=torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for group in self.groups:
            heads = [head * share + i for head in group.codecs.heads for i in range(share)]
            part = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
            attend = group.codecs.backend.attend
            output[:, heads], lse[:, heads] = attend(query[:, heads], group, part, scaling, softcap)
        return output, lse

    def __getattr__(self, name: str) -> NoReturn:
        # AttributeError, so that hasattr() probes keep working.
        raise AttributeError(
            f"a compressed KV cache was read as a tensor (.{name}) by another attention implementation; "
            'use model.set_attn_implementation("tqcompress") or tqcompress.remove(model)'
        )


def take_heads(states: Tensor, group: GroupCodecs) -> Tensor:
    """The group's heads of `[batch, kv_heads, tokens, head_dim]`; a view if they are neighbours."""
    first, count = group.heads[0], len(group.heads)
    neighbours = group.heads[-1] - first == count - 1
    return states.narrow(1, first, count) if neighbours else states[:, list(group.heads)]
