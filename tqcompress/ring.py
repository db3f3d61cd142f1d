"""`RingLayer`: a compressed layer whose steps of one token go through kernels that know the length on the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from .cache import CompressedLayer, Returned
from .errors import ModelError
from .masks import in_stored_order, same_for_all, simplest
from .store import replaced
from .view import KVView, LayerCodecs, Pair, RingTokens, each, query_heads, take_heads
from .watch import Watch

BLOCK = 64  # tokens that rings encode at once


class RingLayer(CompressedLayer):
    """A growing layer, or with `max_tokens` one of fixed size whose steps torch can compile.

    Exact tokens are in `sinks` and `recent`, as in `CompressedLayer`, while several tokens come at once, and in the
    rings while it is `stepping`; a layer of fixed size goes back to its rings after every update.
    """

    def __init__(self, codecs: LayerCodecs, max_tokens: int | None = None, room: int = 0):
        super().__init__(codecs, max_tokens, room)
        self.fixed = max_tokens is not None
        if self.sentinel is not None:
            self.sentinel.grows = not self.fixed
        self.rings: list[RingTokens] = []
        self.stepping = False
        self.count = 0  # tokens while stepping, if the host knows: not with a fixed size
        self.shown: Tensor | None = None  # `[batch, tokens]`: what is not hidden of a prompt, with a fixed size
        self.visible: Tensor | None = None  # `[batch, >= tokens]`: the same in the order stored, read by the kernels

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # as in transformers' layers
        """Asked by generate() before it compiles the decoding steps."""
        return self.fixed and self.codecs.compiles

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As `CompressedLayer`; the buffers of a layer of fixed size stay where they are from now on."""
        super().lazy_initialization(key_states, value_states)
        self._make_rings(key_states)
        if self.fixed:
            # More than the kernels ever read.
            width = self.max_tokens + self.codecs.window + 256  # type: ignore[operator]  # fixed
            self.visible = torch.ones(key_states.shape[0], width, dtype=torch.bool, device=self.device)
            stores = (tensor for pair in self.stores for store in pair for tensor in store.buffers.values())
            for tensor in (self.visible, *stores, *(tensor for ring in self.rings for tensor in ring.buffers)):
                torch._dynamo.mark_static_address(tensor)  # as transformers' StaticLayer does: CUDA graphs need it

    def _make_rings(self, states: Tensor) -> None:
        sizes = self.codecs.sinks, self.codecs.window
        self.rings = [
            group.backend.ring(take_heads(states, group), *sizes)  # type: ignore[misc]  # there, as codecs.steps says
            for group in self.codecs.groups
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Returned:
        """As `CompressedLayer.update`; a single token is kept when attention reads the `StepView` that is returned."""
        if not torch.compiler.is_compiling():
            self._look()
        if key_states.shape[2] == 1 and not self._sampled() and (self.stepping or self._starts()):
            return (StepView(self, (key_states, value_states)),) * 2
        returned: Returned = self._update_many(key_states, value_states)
        return returned

    # As CompressedLayer.update.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives no types
    def _update_many(self, key_states: Tensor, value_states: Tensor) -> Returned:
        self.leave()
        if self.fixed and self.is_initialized and not self.holds_tokens and self.batch != key_states.shape[0]:
            self.is_initialized = False
        if self.fixed and self.get_seq_length() + key_states.shape[2] > self.max_tokens:  # type: ignore[operator]  # fixed
            raise ModelError(
                f"layer {self.codecs.layer}: {self.get_seq_length()} tokens and {key_states.shape[2]} new ones are "
                f"more than the cache's {self.max_tokens}; give a larger max_cache_len"
            )
        returned: Returned = super().update(key_states, value_states)
        if self.fixed:
            self.enter()
            if isinstance(returned[0], KVView):
                returned[0].note = self.note_visible
        return returned

    def _sampled(self) -> bool:
        """Whether the guard wants to see, now, what this step encodes: then it takes the way of several tokens."""
        if self.sentinel is None or self.fixed or not self.stepping:
            return False
        if (self.count - self.codecs.layer * BLOCK) % (self.sentinel.every * BLOCK):
            return self.exact
        self.sentinel.ask()
        return True

    def _starts(self) -> bool:
        """Whether the rings can take over for the first of some single tokens."""
        if self.fixed or not self.holds_tokens or self.exact:
            return False
        self.enter()
        return True

    def enter(self) -> None:
        """Move the exact tokens into the rings."""
        for ring, group, stores in zip(self.rings, self.codecs.groups, self.stores, strict=True):
            sinks, recent = ((take_heads(k, group), take_heads(v, group)) for k, v in (self.sinks, self.recent))
            ring.fill(sinks, recent, stores[0].length)
        if self.fixed:
            self._show()
        self.count = None if self.fixed else self.get_seq_length()  # type: ignore[assignment]  # see `__init__`
        empty = self.sinks[0].new_empty(*self.sinks[0].shape[:2], 0, self.sinks[0].shape[3])
        self.sinks = self.recent = (empty, empty)
        self.stepping = True

    def leave(self) -> None:
        """Move the exact tokens from the rings to `sinks` and `recent`."""
        if not self.stepping:
            return
        length = self.tokens
        parts = [ring.read(length) for ring in self.rings]
        self.sinks, self.recent = (self._joined([part[i] for part in parts]) for i in (0, 1))
        self._count_packed(length)
        self.stepping = False
        self._watch_new()

    def _joined(self, pairs: list[Pair]) -> Pair:
        """The heads of all groups, each in its place."""
        if len(pairs) == 1:
            return pairs[0]
        place = self._order(1)
        return each(lambda *parts: torch.cat(parts, dim=1)[:, place], *pairs)

    def _order(self, share: int) -> list[int]:
        """Where each head is among those of all groups, one group after the other; `share` heads for each KV head."""
        heads = [head for group in self.codecs.groups for head in query_heads(group, share)]
        return [heads.index(head) for head in range(len(heads))]

    def _count_packed(self, length: int) -> None:
        for ring, pair in zip(self.rings, self.stores, strict=True):
            for store in pair:
                store.length = ring.packed(length)

    @property
    def batch(self) -> int:
        """Sequences."""
        return next(iter(self.stores[0][0].buffers.values())).shape[0]

    @property
    def tokens(self) -> int:
        """Tokens cached; asks the device if only that knows."""
        if not self.stepping:
            return super().get_seq_length()
        return int(self.rings[0].length) if self.count is None else self.count

    @property
    def holds_tokens(self) -> bool:
        """Whether there are any; never asks the device."""
        return self.stepping or super().get_seq_length() > 0

    def get_seq_length(self) -> "int | Tensor":  # type: ignore[override]  # as in transformers' layers
        """Tokens cached; on the device while a layer of fixed size steps, as in transformers' `StaticLayer`."""
        if self.stepping:
            return self.rings[0].length if self.fixed else self.count
        return super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How wide a mask is, and where it begins."""
        sizes: tuple[int, int] = (self.max_tokens, 0) if self.fixed else super().get_mask_sizes(query_length)  # type: ignore[assignment]  # fixed
        return sizes

    def attend(
        self, new: Pair | None, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """One step: attention of a query `[batch, heads, 1, head_dim]`, with a new token that is kept, or without."""
        if mask is not None and not torch.compiler.is_compiling() and self._is_special(mask):
            return self._view_with(new).attend(query, mask, scaling, softcap)
        visible, share, found = self._prepare(mask, new is not None), query.shape[1] // self.codecs.num_kv_heads, []
        for group, ring, stores in zip(self.codecs.groups, self.rings, self.stores, strict=True):
            pair, part = new, query
            if len(self.rings) > 1:
                pair = None if new is None else (take_heads(new[0], group), take_heads(new[1], group))
                part = query[:, query_heads(group, share)]
            found.append(ring.step(stores, part, pair, self.count, visible, scaling, softcap))
        if not self.fixed and new is not None:
            self.count += 1
        if len(found) == 1:
            return found[0]
        output, lse = (torch.cat(parts, dim=1)[:, self._order(share)] for parts in zip(*found, strict=True))
        return output, lse

    @staticmethod
    def _is_special(mask: Tensor) -> bool:
        """Whether a step's mask differs between heads or adds to scores, which the steps' kernels cannot read."""
        return not same_for_all(mask) and simplest(mask, 1, mask.shape[-1]).dim() != 2

    def _view_with(self, new: Pair | None) -> KVView:
        """What several tokens at once are read from, after a new one."""
        if new is not None:
            view: KVView = self._update_many(*new)[0]
            return view
        self.leave()
        view = self._view()
        if self.fixed:
            self.enter()
        return view

    def _prepare(self, mask: Tensor | None, grows: bool) -> Tensor | None:
        """Which tokens are seen, in the order stored; room for what the step encodes."""
        if self.fixed:
            # A compiled step reads what was noted: transformers' mask only says besides what is not there yet.
            if mask is not None and not torch.compiler.is_compiling():
                self.note_step(simplest(mask, 1, mask.shape[-1]), grows)
            return None if self.shown is None else self.visible
        packed = self.rings[0].packed(self.count)
        coming = self.rings[0].packed(self.count + 1) - packed
        if packed > self.watched:
            self._count_packed(self.count)
            self._watch_new()
        if grows and coming:
            self._count_packed(self.count)
            for store in (store for pair in self.stores for store in pair):
                store.reserve(coming)
        if mask is None:
            return None
        # The layers of a model share the mask, and so its row, until it is for another step or written over.
        state = self.count + grows, None if mask.is_inference() else mask._version
        row, *made = getattr(mask, "row", (None, None, None))
        if row is None or row.made is not made[0] or made[1] != state:
            row = self._row(mask, state[0])
            row.made = object()  # type: ignore[attr-defined]  # kept with the row
            mask.row = row, row.made, state  # type: ignore[attr-defined]  # kept with the mask
        return row

    def _row(self, mask: Tensor, tokens: int) -> Tensor:
        """The mask of a query, bool `[batch, >= tokens]` in the order stored, at a place that stays."""
        row: Tensor = in_stored_order(simplest(mask, 1, tokens), self._positions(tokens), tokens)  # type: ignore[assignment]  # no step's mask is `hides_nothing`
        if self.visible is None or self.visible.shape[0] != self.batch or self.visible.shape[1] < tokens:
            self.visible = row.new_ones(self.batch, tokens + max(tokens // 8, 1024))
        self.visible[:, :tokens] = row
        return self.visible

    def note_prompt(self, shown: Tensor | None, padding: Tensor | None) -> None:
        """As `CompressedLayer`; compiled steps of a layer of fixed size read no other mask."""
        super().note_prompt(shown, padding)
        self.shown = shown if self.fixed else None

    def note_step(self, mask: Tensor, grows: bool = True) -> None:
        """What the mask `[batch or 1, n]` of a step shows of the tokens so far; of later ones it says nothing."""
        mask = mask[:, : self.max_tokens].to(self.device).bool()
        later = torch.arange(mask.shape[1], device=self.device) >= self.get_seq_length() + grows
        self.note_visible((mask | later).expand(self.batch, -1))

    def note_visible(self, shown: Tensor | None) -> None:
        """What the mask of several tokens shows of all so far, `[batch, tokens]` or None for everything."""
        self.shown = shown
        self._show()

    def _show(self) -> None:
        if self.shown is None:
            return
        shown = self.shown.to(self.device)
        place = self._positions(shown.shape[1])
        visible: Tensor = self.visible  # type: ignore[assignment]  # there with a fixed size
        visible.fill_(True)
        visible[:, : shown.shape[1]] = shown if place is None else shown.gather(1, place)

    def crop(self, tokens_to_remove: int) -> None:
        """As `CompressedLayer.crop`."""
        self.leave()
        super().crop(tokens_to_remove)
        if self.fixed and self.holds_tokens:
            self.enter()

    def verify(self) -> None:
        """As `CompressedLayer.verify`."""
        stepping = self.stepping
        self.leave()
        try:
            super().verify()
        finally:
            if stepping:
                self.enter()

    def reset(self) -> None:
        """Forget all tokens. Buffers of a fixed size stay."""
        if not self.fixed or not self.is_initialized:
            super().reset()
            self.rings = []
        else:
            for store in (store for pair in self.stores for store in pair):
                store.crop(0)
            self.sinks = self.recent = each(lambda states: states[:, :, :0], self.sinks)
            self.padding = self.order = self.shown = None
            self.watch, self.watched = Watch(self.device), 0
        self.stepping = False

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map(function)
        if self.is_initialized:
            self.shown = None if self.shown is None else function(self.shown)
            self.visible = None if self.visible is None else replaced(self.visible, function)
            for ring in self.rings:
                ring.map(function)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        if not self.stepping:
            return super().nbytes
        self._count_packed(self.tokens)
        exact = sum(ring.nbytes(self.tokens) for ring in self.rings)
        return exact + sum(store.nbytes for pair in self.stores for store in pair)


class StepView(KVView):
    """What `RingLayer.update` returns for one token: attention appends it and attends, in one go."""

    def __init__(self, layer: RingLayer, new: Pair):
        self.layer = layer
        self.new: Pair | None = new

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """As `KVView.attend`, the output in the query's dtype. Layers that share a cache may attend again."""
        new, self.new = self.new, None
        return self.layer.attend(new, query, mask, scaling, softcap)


class ExactLayer(StaticLayer):
    """A `StaticLayer` beside compressed ones: a prompt attends to itself, not to the whole buffer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """As `StaticLayer`, but an update of the empty layer returns what it was given."""
        first = not self.is_initialized
        kept: Pair = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if first else kept
