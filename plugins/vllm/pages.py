"""The format of a packed page, and attention over pages in plain torch.

A page holds `block_size` tokens: an array `[heads, block_size, size]` for every field of every group of the layer's
heads, keys before values, one behind the other, as kernels read them. Behind these, its first `sinks` tokens once more,
as they came; that part is read of a sequence's first page only, and costs `sinks / block_size` of an uncompressed page
everywhere.

So a page means the same whoever points to it, whatever else the engine does: sharing of prefixes, preemption, any
order of allocation. That is also why there is no window: when a token leaves one, its page may be shared.
"""

from math import prod
from typing import cast

import torch
from torch import Tensor

from tqcompress import ModelError
from tqcompress.codec import Codec, Field
from tqcompress.store import TokenStore
from tqcompress.view import GroupCodecs, GroupView, KVView, LayerCodecs, take_heads


def exact_tokens(slots: Tensor, block_size: int, sinks: int) -> Tensor:
    """Indices of the slots that are among the first `sinks` of a page; those below 0 are none."""
    return ((slots >= 0) & (slots % block_size < sinks)).nonzero().flatten()


class PageFormat:
    """Where everything is in the pages of one layer, `[pages, 1, block_size, content_bytes]`, uint8."""

    def __init__(self, codecs: LayerCodecs, block_size: int, dtype: torch.dtype):
        self.codecs, self.block_size, self.dtype = codecs, block_size, dtype
        self.sinks = min(codecs.sinks, block_size)
        self.places: dict[Codec, dict[str, tuple[int, int, Field]]] = {}  # of fields: first byte in a page, heads
        start = 0
        for group in codecs.groups:
            for codec in (group.key, group.value):
                self.places[codec] = {}
                for name, field in codec.layout().fields.items():
                    self.places[codec][name] = start, len(group.heads), field
                    start += len(group.heads) * block_size * field.nbytes
        self.packed_bytes, _, exact_bytes = self.sizes(codecs, dtype)
        self.exact_shape = (self.sinks, 2, codecs.num_kv_heads, codecs.head_dim)
        self.content_bytes = self.content(self.packed_bytes, codecs.sinks, exact_bytes, block_size)

    @staticmethod
    def sizes(codecs: LayerCodecs, dtype: torch.dtype) -> tuple[int, int, int]:
        """Bytes of a packed token, how many tokens of a page are there exactly too, and the bytes of such a one."""
        layouts = ((len(group.heads), codec.layout()) for group in codecs.groups for codec in (group.key, group.value))
        packed = sum(heads * field.nbytes for heads, layout in layouts for field in layout.fields.values())
        return packed, codecs.sinks, 2 * codecs.num_kv_heads * codecs.head_dim * dtype.itemsize

    @staticmethod
    def content(packed_bytes: int, sinks: int, exact_bytes: int, block_size: int) -> int:
        """Bytes of a token, the exact ones spread over the page, as vLLM counts."""
        return packed_bytes + -(-min(sinks, block_size) * exact_bytes // block_size)

    def fields(self, pages: Tensor, codec: Codec) -> dict[str, Tensor]:
        """The fields of one side of a group, views `[pages, heads, block_size, size]`."""
        found, flat = {}, pages.flatten(1)
        for name, (start, heads, field) in self.places[codec].items():
            raw = flat[:, start : start + heads * self.block_size * field.nbytes].view(field.dtype)
            found[name] = raw.unflatten(1, (heads, self.block_size, field.size))
        return found

    def exact(self, pages: Tensor) -> Tensor:
        """The bytes of the exact tokens, a view `[pages, sinks, bytes of a token]`."""
        start, size = self.block_size * self.packed_bytes, prod(self.exact_shape) * self.dtype.itemsize
        held: Tensor = pages.flatten(1)[:, start : start + size].unflatten(1, (self.sinks, -1))
        return held

    def write(self, pages: Tensor, slots: Tensor, key: Tensor, value: Tensor, exact: Tensor | None = None) -> None:
        """Encode tokens `[tokens, kv_heads, head_dim]` into their slots, page * block_size + place; below 0: none.

        `exact` are the indices of those that pages keep exact, which kernels need not wait for then. Raises
        `ModelError` if a codec cannot store them.
        """
        kept = slots >= 0
        if not kept.all():
            slots, key, value = slots[kept], key[kept], value[kept]
        page, place = slots // self.block_size, slots % self.block_size
        rows = [(codec, self._encode(group, codec, states)) for group, codec, states in self._sides(key, value)]
        for codec, packed in rows:  # all of them could be encoded
            for name, field in self.fields(pages, codec).items():
                field[page, :, place] = packed[name][0].transpose(0, 1)
        self._write_exact(pages, exact_tokens(slots, self.block_size, self.sinks), page, place, key, value)

    def _sides(self, key: Tensor, value: Tensor) -> "list[tuple[GroupCodecs, Codec, Tensor]]":
        """Every group and side, with its vectors `[1, heads, tokens, head_dim]` of `[tokens, kv_heads, head_dim]`."""
        return [
            (group, codec, take_heads(states.transpose(0, 1)[None], group))
            for group in self.codecs.groups
            for states, codec in ((key, group.key), (value, group.value))
        ]

    def _encode(self, group: GroupCodecs, codec: Codec, vectors: Tensor) -> dict[str, Tensor]:
        packed = codec.encode(vectors)
        if not (vectors.isfinite().all() and codec.fits(packed)):
            raise ModelError(
                f"layer {self.codecs.layer}, KV heads {list(group.heads)}: {codec.name} cannot store these "
                f"{codec.shape.side}s, they are infinite, not a number, or too large for the scale's format; "
                "skip the layer in the recipe, or check the model's dtype"
            )
        return packed

    def _write_exact(
        self, pages: Tensor, which: Tensor, page: Tensor, place: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store those tokens of these places of these pages as they are."""
        exact = torch.stack([key[which], value[which]], dim=1).to(self.dtype)
        self.exact(pages)[page[which], place[which]] = exact.flatten(1).view(torch.uint8)

    def attend(
        self, pages: Tensor, tables: Tensor, past: Tensor, query: Tensor, key: Tensor, value: Tensor,
        scaling: float, softcap: float | None = None, longest: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a batch of sequences to what their pages hold and to their new tokens.

        Args:
            tables: `[batch, pages of a sequence]`, page numbers; entries past a sequence's length are not read.
            past: `[batch]`, tokens that were there before this step.
            query, key, value: `[batch, heads, new, head_dim]`; the new tokens are seen as they are, causally. Past
                lengths must be equal if there is more than one.
            longest: the largest of `past`, or more for one new token each; found by waiting if it is not given.

        Returns:
            `[batch, heads, new, head_dim]`, float32.
        """
        longest = int(past.max()) if longest is None else longest
        sinks, mask = min(self.sinks, longest), None
        if int(past.min()) < longest:
            mask = torch.arange(longest + 1, device=past.device) < past[:, None]
            mask[:, -1] = True  # the new token
        tables = tables[:, : -(-longest // self.block_size)].long()
        exact = self._exact_of(pages, tables, past, sinks, key)

        def side(codec: Codec) -> TokenStore:
            # Backends that are not for pages read more of a store than `_Side` has; `artifact` chose one that does not.
            return cast(TokenStore, _Side(self, pages, tables, past, sinks, codec))

        views = tuple(
            GroupView(
                group,
                side(group.key),
                side(group.value),
                longest - sinks,
                (take_heads(exact[0], group), take_heads(exact[1], group)),
                (take_heads(key, group), take_heads(value, group)),
            )
            for group in self.codecs.groups
        )
        return KVView(views, self.codecs.num_kv_heads).attend(query, mask, scaling, softcap)[0]

    def _exact_of(self, pages: Tensor, tables: Tensor, past: Tensor, sinks: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens, `[batch, kv_heads, sinks, head_dim]`."""
        if not sinks:
            none = like[:, :, :0]
            return none, none
        held = self.exact(pages)[tables[:, 0], :sinks]
        held.masked_fill_(
            (torch.arange(sinks, device=past.device) >= past[:, None])[..., None], 0
        )  # as in `_Side.read`
        held = held.contiguous().view(self.dtype)
        key, value = held.unflatten(-1, self.exact_shape[1:]).permute(2, 0, 3, 1, 4)
        return key, value


class _Side:
    """The packed keys or values of a group, read from pages as `TokenStore` reads buffers."""

    def __init__(self, form: PageFormat, pages: Tensor, tables: Tensor, past: Tensor, skipped: int, codec: Codec):
        self.layout, self.fields, self.block_size = codec.layout(), form.fields(pages, codec), form.block_size
        self.tables, self.past, self.skipped = tables, past, skipped

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Fields `[batch, heads, tokens, size]` of tokens `start` to `stop`, counted after the skipped ones."""
        places = torch.arange(start + self.skipped, stop + self.skipped, device=self.tables.device)
        page, place = self.tables[:, places // self.block_size], places % self.block_size
        # Past a sequence's end a page may hold anything, NaN included, which no weight of 0 would hide.
        past = (places >= self.past[:, None])[..., None, None]
        return {
            name: field[page, :, place].masked_fill_(past, 0).transpose(1, 2) for name, field in self.fields.items()
        }
