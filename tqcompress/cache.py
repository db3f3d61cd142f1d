"""`CompressedLayer`: one layer's KV cache, packed but for the sinks and the recent window.

Tokens live in this order: sinks (exact) | packed | recent (exact). New tokens enter `recent`; what has
left the window moves to the sinks until those are full, and is encoded, once, from then on.
"""

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .errors import ModelError
from .guard import Sentinel
from .store import TokenStore
from .view import GroupView, KVView, LayerCodecs, Pair, each, take_heads
from .watch import CannotStore, Watch, fits_on_device, refuse_rows, refuse_states

# Up to this many new tokens of one step are kept exact until the next step, so that rejecting a few drafts
# (assisted decoding crops them) never reaches into what is already encoded.
DRAFT_ROOM = 64

Returned = Pair | tuple[KVView, KVView]  # what `update` returns: keys and values, or a view of both, twice


class CompressedLayer(DynamicLayer):
    """A growing cache layer; with `max_tokens` its packed storage is allocated once, with `room` at first for so many.

    An update of the empty cache returns the dense keys and values (a prefill is exact), later ones a
    `KVView`. Positions are counted as in `DynamicLayer`: crop, reorder and the rest work as there.
    """

    is_croppable = True
    is_compileable = False

    def __init__(self, codecs: LayerCodecs, max_tokens: int | None = None, room: int = 0):
        super().__init__()
        self.codecs, self.max_tokens, self.room = codecs, max_tokens, room
        self.stores: list[tuple[TokenStore, TokenStore]] = []
        self.sinks: Pair = None  # type: ignore[assignment]  # until there are tokens
        self.recent: Pair = None  # type: ignore[assignment]  # likewise
        self.padding: Tensor | None = None  # `[batch]`: padding tokens on the left of the prompt, set before it comes
        self.order: Tensor | None = None  # `[batch, prompt]`: positions in the order stored, if that is another
        self.watch: Watch | None = None  # where asking whether codes fit would wait for the device
        self.watched = 0  # packed tokens that it was asked about
        self.sentinel = Sentinel(codecs.guard) if codecs.guard else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = copy(self)
        memo[id(self)] = new
        memo[id(self.codecs)] = self.codecs  # a copied cache belongs to the same model
        new.__dict__ = deepcopy(self.__dict__, memo)
        return new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, device and dtype from the first tokens. Raises `ModelError` on a wrong shape."""
        want = (self.codecs.num_kv_heads, self.codecs.head_dim)
        for name, states in (("keys", key_states), ("values", value_states)):
            if (states.shape[1], states.shape[3]) != want:
                raise ModelError(
                    f"layer {self.codecs.layer}: {name} have shape {list(states.shape)}; the plan was made for "
                    f"[batch, {want[0]} KV heads, tokens, head_dim {want[1]}]"
                )
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.sinks = self.recent = (empty, empty)
        capacity = max(0, (self.max_tokens or self.room) - self.codecs.sinks)
        self.stores = []
        for group in self.codecs.groups:
            key, value = (
                TokenStore(codec.to(self.device).layout(), key_states.shape[0], len(group.heads), self.device, capacity)
                for codec in (group.key, group.value)
            )
            self.stores.append((key, value))
        kernels = any(group.backend.append is not None for group in self.codecs.groups)
        self.watch, self.watched = Watch(self.device) if kernels or self.device.type != "cpu" else None, 0
        self.is_initialized = True

    # Python-side lengths; generate() runs this layer eagerly.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives no types
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Returned:
        """Add tokens `[batch, kv_heads, tokens, head_dim]`; return what attention reads, twice.

        Raises `ModelError` for what is not finite, the cache being as it was; `verify` says when on other devices.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._look()
        new = (key_states.detach(), value_states.detach())
        if self.watch is None:
            refuse_states(self.codecs, dict(zip(("keys", "values"), new, strict=True)))
        empty, count = self.get_seq_length() == 0, key_states.shape[2]
        self._release(keep=self.codecs.window)
        if empty and self.padding is not None and count > self.codecs.sinks:
            self.order = _sinks_first(self.padding.to(self.device), self.codecs.sinks, count)
            order = self.order[:, None, :, None]
            new = each(lambda states: states.take_along_dim(order, dim=2), new)
        self.recent = each(lambda *states: torch.cat(states, dim=2), self.recent, new)
        returned = (key_states, value_states) if empty else (self._view(),) * 2
        self._release(keep=self.codecs.window + min(count, DRAFT_ROOM))
        self._heed()
        return returned

    def note_prompt(self, shown: Tensor | None, padding: Tensor | None) -> None:
        """Tell an empty layer what its prompt hides: `[batch, tokens]` what is shown, and how far it is padded."""
        self.padding = padding

    def _view(self) -> KVView:
        groups = []
        for group, (key, value) in zip(self.codecs.groups, self.stores, strict=True):
            exact = [(take_heads(k, group), take_heads(v, group)) for k, v in (self.sinks, self.recent)]
            groups.append(GroupView(group, key, value, key.length, *exact))
        return KVView(tuple(groups), self.codecs.num_kv_heads, self._positions(self.get_seq_length()))

    def _positions(self, tokens: int) -> Tensor | None:
        if self.order is None:
            return None
        batch, prompt = self.order.shape
        later = torch.arange(prompt, tokens, device=self.order.device)
        return torch.cat([self.order, later.expand(batch, -1)], dim=1)

    def _release(self, keep: int) -> None:
        """Move all but the last `keep` recent tokens into the sinks and, in whole blocks, the stores."""
        excess = self.recent[0].shape[2] - keep
        if excess <= 0:
            return
        to_sinks = min(excess, self.codecs.sinks - self.sinks[0].shape[2])
        to_packed = 0 if self.exact else (excess - to_sinks) // self.codecs.block * self.codecs.block
        if to_packed:  # before the sinks: if it fails, the tokens are still where they were
            try:
                self._encode(*(states.narrow(2, to_sinks, to_packed) for states in self.recent))
            except CannotStore as error:
                if self.sentinel is None or not self.sentinel.spares(error):
                    raise
                to_packed = 0
        if not to_sinks and not to_packed:
            return
        if to_sinks:
            self.sinks = each(
                lambda sink, recent: torch.cat([sink, recent[:, :, :to_sinks]], dim=2), self.sinks, self.recent
            )
        # Cloned, or a slice of a few tokens would keep a whole prefill alive.
        self.recent = each(lambda states: states[:, :, to_sinks + to_packed :].clone(), self.recent)

    @torch.no_grad()
    def _encode(self, keys: Tensor, values: Tensor) -> None:
        # Everything before anything is stored: an error leaves the cache as it was.
        encoded: list[tuple[TokenStore, dict[str, Tensor] | None]] = []
        for group, stores in zip(self.codecs.groups, self.stores, strict=True):
            for codec, states, store in zip((group.key, group.value), (keys, values), stores, strict=True):
                vectors = take_heads(states, group)
                if group.backend.append is not None:
                    store.reserve(vectors.shape[2])
                    group.backend.append(codec, vectors, store)
                    encoded.append((store, None))
                else:
                    packed = codec.encode(vectors)
                    encoded.append((store, packed))
                    if self.watch is None:
                        refuse_rows(self.codecs, group, codec, packed)
        for store, rows in encoded:
            if rows is None:
                store.length += keys.shape[2]
            else:
                store.append(rows, keys.shape[2])
        self._watch_new()
        if self.sentinel is not None and self.sentinel.wants():
            self._sample(self.sentinel, keys, values)

    def _sample(self, sentinel: Sentinel, keys: Tensor, values: Tensor) -> None:
        """Have the sentinel compare what was just encoded with what is stored."""
        for group, stores in zip(self.codecs.groups, self.stores, strict=True):
            for codec, states, store in zip((group.key, group.value), (keys, values), stores, strict=True):
                first = store.length - keys.shape[2]
                rows = lambda start, stop, store=store, first=first: store.read(first + start, first + stop)  # noqa: E731
                sentinel.sample(codec, group.heads, take_heads(states, group), rows)

    @property
    def exact(self) -> bool:
        """Whether the guard has this layer keep everything exact from now on."""
        return self.sentinel is not None and self.sentinel.exact

    def _watch_new(self) -> None:
        """Have the device check the codes stored since the last time, without waiting for it."""
        if self.watch is None or self.stores[0][0].length <= self.watched:
            return
        for group, stores in zip(self.codecs.groups, self.stores, strict=True):
            for codec, store in zip((group.key, group.value), stores, strict=True):
                fits = fits_on_device(codec, store, self.watched)
                if fits is not None:
                    self.watch.note(fits)
        self.watched = self.stores[0][0].length

    def _look(self) -> None:
        """Raise `ModelError` if the host has heard of codes that do not hold what was encoded; never waits to hear."""
        if self.watch is not None and bool(self.watch.arrived):
            self.verify()
        self._heed()

    def _heed(self) -> None:
        """Do what the guard was told to do about what its samples showed."""
        if self.sentinel is not None and self.sentinel.due:
            self.sentinel.heed()

    def verify(self) -> None:
        """Wait for the device, and raise `ModelError` if anything held is infinite, not a number or too large.

        On a CPU nothing of the kind is ever held. Elsewhere it is found without this some steps after it was encoded.
        """
        if not self.is_initialized:
            return
        for name, i in (("keys", 0), ("values", 1)):
            for states in (self.sinks[i], self.recent[i]):
                refuse_states(self.codecs, {name: states})
        for group, stores in zip(self.codecs.groups, self.stores, strict=True):
            for codec, store in zip((group.key, group.value), stores, strict=True):
                refuse_rows(self.codecs, group, codec, store.read())
        if self.watch is not None:  # what raised the flag has been cropped
            self.watch = Watch(self.device)

    def get_seq_length(self) -> int:
        """Tokens cached."""
        if not self.is_initialized:
            return 0
        return self.sinks[0].shape[2] + self.stores[0][0].length + self.recent[0].shape[2]

    @property
    def holds_tokens(self) -> bool:
        """Whether there are any; never asks the device."""
        return self.get_seq_length() > 0

    def get_max_length(self) -> int:
        """The length that storage was allocated for, or -1."""
        return self.max_tokens or -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (give a negative number, as for `DynamicLayer`)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}; give a negative number of tokens to remove")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        if self.order is not None and left < self.order.shape[1]:
            raise ModelError(f"crop: {left} tokens are fewer than the left-padded prompt's {self.order.shape[1]}")
        sinks, packed = self.sinks[0].shape[2], self.stores[0][0].length
        if left < sinks + packed:
            self._unpack_tail(max(0, left - sinks))
        keep = max(0, left - sinks - self.stores[0][0].length)
        self.sinks = each(lambda states: states[:, :, :left], self.sinks)
        self.recent = each(lambda states: states[:, :, :keep], self.recent)

    def _unpack_tail(self, length: int) -> None:
        """Crop the stores to whole blocks within `length`, what is left of a block becomes recent again.

        Only codecs that encode tokens in blocks ever leave a rest; it is encoded anew with its new block.
        """
        whole = length // self.codecs.block * self.codecs.block
        shape = (*self.recent[0].shape[:2], length - whole, self.recent[0].shape[3])
        rest = each(lambda states: states.new_empty(shape), self.recent)
        for group, stores in zip(self.codecs.groups, self.stores, strict=True):
            for codec, store, states in zip((group.key, group.value), stores, rest, strict=True):
                if length > whole:
                    decoded = codec.decode(store.read(whole, whole + self.codecs.block))
                    states[:, list(group.heads)] = decoded[:, :, : length - whole].to(states.dtype)
                store.crop(whole)
        self.recent, self.watched = rest, min(self.watched, whole)

    def reset(self) -> None:
        """Forget all tokens."""
        self.stores, self.is_initialized = [], False
        self.sinks = self.recent = None  # type: ignore[assignment]  # as at first
        self.padding = self.order = None
        if self.sentinel is not None:
            self.sentinel = Sentinel(self.sentinel.guard, self.sentinel.grows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._map(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        self._map(lambda states: states[indices.to(states.device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Bring everything back to the layer's device."""
        self._map(lambda states: states.to(self.device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace all that has a batch, which is its first axis."""
        if not self.is_initialized:
            return
        self.sinks, self.recent = each(function, self.sinks), each(function, self.recent)
        if self.order is not None:
            self.order = function(self.order)
        for store in (store for pair in self.stores for store in pair):
            store.map(function)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held (codec state and room to grow not counted)."""
        if not self.is_initialized:
            return 0
        exact = sum(states.nbytes for pair in (self.sinks, self.recent) for states in pair)
        return exact + sum(store.nbytes for pair in self.stores for store in pair)


def _sinks_first(padding: Tensor, sinks: int, prompt: int) -> Tensor:
    """`[batch, prompt]`: positions with each row's first `sinks` real tokens, then its padding, then the rest."""
    padding = padding.clamp(max=prompt - sinks)[:, None]
    place = torch.arange(prompt, device=padding.device).expand(padding.shape[0], -1)
    moved = torch.where(place < sinks, place + padding, place - sinks)
    return torch.where(place < sinks + padding, moved, place)
