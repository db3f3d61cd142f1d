"""The format of a packed page, and attention over pages in plain torch.

A page is `block_size` rows, then an exact part. A row holds one token: all fields of all groups of the layer's heads,
keys before values, byte after byte. The exact part holds the page's first `sinks` tokens once more, as they came; it
is read of a sequence's first page only, and costs `sinks / block_size` of an uncompressed page everywhere.

So a page means the same whoever points to it, whatever else the engine does: sharing of prefixes, preemption, any
order of allocation. That is also why there is no window: when a token leaves one, its page may be shared.
"""

from math import prod
from typing import cast

import torch
from torch import Tensor

from tqcompress import ModelError
from tqcompress.codec import Layout
from tqcompress.store import TokenStore
from tqcompress.view import GroupCodecs, GroupView, KVView, LayerCodecs, take_heads


class PageFormat:
    """Where everything is in the pages of one layer, `[pages, 1, block_size, content_bytes]`, uint8."""

    def __init__(self, codecs: LayerCodecs, block_size: int, dtype: torch.dtype):
        self.codecs, self.block_size, self.dtype = codecs, block_size, dtype
        self.sinks = min(codecs.sinks, block_size)
        self.columns: dict[tuple[int, str], int] = {}  # first byte of a group's keys or values in a row
        start = 0
        for index, group in enumerate(codecs.groups):
            for side, codec in (("key", group.key), ("value", group.value)):
                self.columns[index, side] = start
                start += len(group.heads) * int(codec.layout().nbytes_per_token)
        self.row_bytes = start
        self.exact_shape = (self.sinks, 2, codecs.num_kv_heads, codecs.head_dim)
        exact_bytes = prod(self.exact_shape) * dtype.itemsize
        self.content_bytes = self.row_bytes + -(-exact_bytes // block_size)  # of a token, as vLLM counts

    def rows(self, pages: Tensor) -> Tensor:
        """The rows, a view `[pages, block_size, row_bytes]`."""
        rows: Tensor = pages.flatten(1)[:, : self.block_size * self.row_bytes].unflatten(1, (self.block_size, -1))
        return rows

    def exact(self, pages: Tensor) -> Tensor:
        """The bytes of the exact tokens, a view `[pages, sinks, bytes of a token]`."""
        start, size = self.block_size * self.row_bytes, prod(self.exact_shape) * self.dtype.itemsize
        held: Tensor = pages.flatten(1)[:, start : start + size].unflatten(1, (self.sinks, -1))
        return held

    def write(self, pages: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Encode tokens `[tokens, kv_heads, head_dim]` into their slots, page * block_size + place; below 0: none.

        Raises `ModelError` if a codec cannot store them.
        """
        kept = slots >= 0
        if not kept.all():
            slots, key, value = slots[kept], key[kept], value[kept]
        page, place = slots // self.block_size, slots % self.block_size
        self.rows(pages)[page, place] = self._encode(key, value)
        first = place < self.sinks
        if first.any():
            exact = torch.stack([key[first], value[first]], dim=1).to(self.dtype)
            self.exact(pages)[page[first], place[first]] = exact.flatten(1).view(torch.uint8)

    def _encode(self, key: Tensor, value: Tensor) -> Tensor:
        """The rows of tokens, `[tokens, row_bytes]`."""
        parts = []
        for group in self.codecs.groups:
            for states, codec in ((key, group.key), (value, group.value)):
                vectors = take_heads(states.transpose(0, 1)[None], group)
                packed = codec.encode(vectors)
                if not (vectors.isfinite().all() and codec.fits(packed)):
                    raise ModelError(
                        f"layer {self.codecs.layer}, KV heads {list(group.heads)}: {codec.name} cannot store these "
                        f"{codec.shape.side}s, they are infinite, not a number, or too large for the scale's format; "
                        "skip the layer in the recipe, or check the model's dtype"
                    )
                for field in packed.values():  # [1, heads, tokens, size]
                    parts.append(field[0].transpose(0, 1).contiguous().flatten(1).view(torch.uint8))
        return torch.cat(parts, dim=1)

    def attend(
        self, pages: Tensor, tables: Tensor, past: Tensor, query: Tensor, key: Tensor, value: Tensor,
        scaling: float, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a batch of sequences to what their pages hold and to their new tokens.

        Args:
            tables: `[batch, pages of a sequence]`, page numbers; entries past a sequence's length are not read.
            past: `[batch]`, tokens that were there before this step.
            query, key, value: `[batch, heads, new, head_dim]`; the new tokens are seen as they are, causally. Past
                lengths must be equal if there is more than one.

        Returns:
            `[batch, heads, new, head_dim]`, float32.
        """
        longest = int(past.max())
        sinks, mask = min(self.sinks, longest), None
        if int(past.min()) < longest:
            mask = torch.arange(longest + 1, device=past.device) < past[:, None]
            mask[:, -1] = True  # the new token
        tables = tables[:, : -(-longest // self.block_size)].long()
        exact = self._exact_of(pages, tables, past, sinks, key)

        def side(index: int, name: str) -> TokenStore:
            # Backends that are not for pages read more of a store than `_Side` has; `artifact` chose one that does not.
            return cast(TokenStore, _Side(self, pages, tables, past, sinks, index, name))

        views = tuple(
            GroupView(
                group,
                side(index, "key"),
                side(index, "value"),
                longest - sinks,
                (take_heads(exact[0], group), take_heads(exact[1], group)),
                (take_heads(key, group), take_heads(value, group)),
            )
            for index, group in enumerate(self.codecs.groups)
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

    def __init__(
        self, form: PageFormat, pages: Tensor, tables: Tensor, past: Tensor, skipped: int, index: int, side: str
    ):
        group: GroupCodecs = form.codecs.groups[index]
        self.layout: Layout = getattr(group, side).layout()
        self.heads, self.first = len(group.heads), form.columns[index, side]
        self.form, self.pages, self.tables, self.past, self.skipped = form, pages, tables, past, skipped

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Fields `[batch, heads, tokens, size]` of tokens `start` to `stop`, counted after the skipped ones."""
        places = torch.arange(start + self.skipped, stop + self.skipped, device=self.tables.device)
        size, nbytes = self.form.block_size, self.heads * int(self.layout.nbytes_per_token)
        rows = self.form.rows(self.pages)[:, :, self.first : self.first + nbytes]
        held = rows[self.tables[:, places // size], places % size]
        # Past a sequence's end a page may hold anything, NaN included, which no weight of 0 would hide.
        held.masked_fill_((places >= self.past[:, None])[..., None], 0)
        fields, at = {}, 0
        for name, field in self.layout.fields.items():
            width = self.heads * field.nbytes
            raw = held[..., at : at + width].contiguous().view(field.dtype)
            fields[name] = raw.unflatten(-1, (self.heads, field.size)).transpose(1, 2)
            at += width
        return fields
