"""What a cache layer hands to attention: its packed rows and exact tokens, group by group."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
from torch import Tensor

from .codec import Codec
from .masks import in_stored_order, shown_by, simplest
from .store import TokenStore

if TYPE_CHECKING:
    from .guard import LayerGuard

Pair = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class Backend:
    """A way to attend to a group's packed tokens: `attend` as in `blockwise.attend`, and why it was chosen.

    `append(codec, vectors, store)`, if there is one, encodes `[batch, heads, tokens, head_dim]` straight into the
    room that was reserved behind the last row of `store`; without it `codec.encode` is called and its rows copied.
    `ring(states, sinks, window)`, if there is one, makes an empty `RingTokens` for keys or values like `states`
    `[batch, heads, tokens, head_dim]`; steps of one token then go through it.
    """

    name: str
    attend: Callable[..., tuple[Tensor, Tensor]]
    reason: str
    append: Callable[[Codec, Tensor, TokenStore], None] | None = None
    ring: "Callable[[Tensor, int, int], RingTokens] | None" = None


class RingTokens(Protocol):
    """The exact tokens of a group, in buffers that never move, and the kernels of a step of one token.

    Only the device needs to know how many tokens there are, so a step can be compiled or captured.
    """

    def fill(self, sinks: Pair, recent: Pair, packed: int) -> None:
        """Hold these keys and values `[batch, heads, n, head_dim]`: all exact tokens, `packed` others between them."""

    def read(self, length: int) -> tuple[Pair, Pair]:
        """Copies of the sinks and the recent tokens when there are `length` tokens in all."""

    def packed(self, length: int) -> int:
        """Tokens in the stores when there are `length` in all."""

    def step(
        self, stores: "tuple[TokenStore, TokenStore]", query: Tensor, new: Pair | None, length: int | None,
        mask: Tensor | None, scaling: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attend to all tokens and the `new` one, which is kept; None: only attend.

        `length` is None if the host does not know it. `mask` is bool `[batch, tokens]`. Returns the output, of the
        query's shape and dtype, and the log-sum-exp `[batch, heads, 1]`, valid until the next step.
        """

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by what `function` makes of it with the batch as its first axis."""

    def nbytes(self, length: int) -> int:
        """Bytes of the exact tokens held when there are `length` tokens in all."""

    @property
    def buffers(self) -> list[Tensor]:
        """Everything that must stay where it is."""

    @property
    def length(self) -> Tensor:
        """All tokens, packed ones included, int64 `[]`, on the device."""


@dataclass(frozen=True)
class GroupCodecs:
    """The heads of a group, its two codecs and its backend."""

    heads: tuple[int, ...]
    key: Codec
    value: Codec
    backend: Backend


@dataclass(frozen=True)
class LayerCodecs:
    """All that a `CompressedLayer` must know of the heads that it holds; shared by every cache of a model."""

    layer: int
    groups: tuple[GroupCodecs, ...]
    num_kv_heads: int
    head_dim: int
    sinks: int
    window: int
    block: int
    steps: bool  # whether steps of one token go through rings
    first_head: int = 0  # the number in the model of the head that is 0 here
    compiles: bool = True  # whether steps in a cache of fixed size may be compiled
    guard: "LayerGuard | None" = None  # what watches over the codecs' errors


@dataclass(frozen=True)
class GroupView:
    """One group as attention reads it: packed rows, then the exact tokens around them."""

    codecs: GroupCodecs
    key: TokenStore
    value: TokenStore
    packed: int  # tokens; the stores may grow after the view was made
    sinks: Pair  # exact keys and values [batch, heads, tokens, head_dim]
    recent: Pair


class KVView:
    """What `update` returns in place of key and value tensors: handles for tqcompress's attention."""

    def __init__(self, groups: tuple[GroupView, ...], num_kv_heads: int, order: Tensor | None = None):
        self.groups, self.num_kv_heads = groups, num_kv_heads
        self.order = order  # `[batch, tokens]`: the position of each stored token, None if they are in order
        self.note: Callable[[Tensor | None], None] | None = None  # told what the mask shows, `[batch, tokens]` or None

    @property
    def tokens(self) -> int:
        """How many there are."""
        group = self.groups[0]
        return group.sinks[0].shape[2] + group.packed + group.recent[0].shape[2]

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Each group's backend on its share of the query heads; arguments and result as in `blockwise.attend`."""
        if self.note is not None:
            self.note(shown_by(mask, self.tokens))
        mask = in_stored_order(simplest(mask, query.shape[2], self.tokens), self.order, self.tokens)
        if len(self.groups) == 1:
            return self.groups[0].codecs.backend.attend(query, self.groups[0], mask, scaling, softcap)
        share = query.shape[1] // self.num_kv_heads
        output = query.new_empty(query.shape, dtype=torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for group in self.groups:
            heads = query_heads(group.codecs, share)
            part = mask if mask is None or mask.dim() == 2 or mask.shape[1] == 1 else mask[:, heads]
            attend = group.codecs.backend.attend
            output[:, heads], lse[:, heads] = attend(query[:, heads], group, part, scaling, softcap)
        return output, lse

    def __getattr__(self, name: str) -> NoReturn:
        # AttributeError, so that hasattr() probes keep working.
        raise AttributeError(
            f"a compressed KV cache was read as a tensor (.{name}) by another attention implementation; "
            'use model.set_attn_implementation("tqcompress") or tqcompress.remove(model)'
        )


def each(function: Callable[..., Tensor], *pairs: Iterable[Tensor]) -> Pair:
    """What `function` makes of the keys of one or more pairs, and of their values."""
    keys, values = map(function, *pairs)
    return keys, values


def query_heads(group: GroupCodecs, share: int) -> list[int]:
    """The query heads that read the group's KV heads, `share` each."""
    return [head * share + i for head in group.heads for i in range(share)]


def take_heads(states: Tensor, group: GroupCodecs) -> Tensor:
    """The group's heads of `[batch, kv_heads, tokens, head_dim]`; a view if they are neighbours."""
    first, count = group.heads[0], len(group.heads)
    neighbours = group.heads[-1] - first == count - 1
    return states.narrow(1, first, count) if neighbours else states[:, list(group.heads)]
