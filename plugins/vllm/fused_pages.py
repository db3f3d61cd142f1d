"""Pages that kernels write and read: the format of `pages`, on devices that Triton has."""

from functools import cache

import torch
from torch import Tensor

from tqcompress import ModelError
from tqcompress.view import LayerCodecs, each
from tqcompress.watch import Watch

from ..fused import FEW_QUERIES, FusedGroup, obstacle_of
from .pages import PageFormat, exact_tokens


def obstacle(codecs: LayerCodecs, device: torch.device) -> str | None:
    """Why no kernels read and write the pages of a layer, or None."""
    found = (obstacle_of(FusedGroup(group.key, group.value, device)) for group in codecs.groups)
    return next((reason for reason in found if reason), None)


class FusedPages(PageFormat):
    """The pages of one layer, all of whose codecs have kernels (see `obstacle`)."""

    def __init__(self, codecs: LayerCodecs, block_size: int, dtype: torch.dtype, device: torch.device):
        super().__init__(codecs, block_size, dtype)
        self.groups = [(group, FusedGroup(group.key, group.value, device)) for group in codecs.groups]
        self.watch = Watch(device)

    def write(self, pages: Tensor, slots: Tensor, key: Tensor, value: Tensor, exact: Tensor | None = None) -> None:
        """As `PageFormat.write`, for int64 slots.

        What cannot be stored is told by a later call, when the host has heard of it: nothing waits for that, nor for
        anything else if `exact` is given.
        """
        from tqcompress_kernels.encode import encode

        if bool(self.watch.arrived):
            raise ModelError(
                f"layer {self.codecs.layer}: keys or values written before cannot be stored, they are infinite, not a "
                "number, or too large for the scale's format; skip the layer in the recipe, or check the model's dtype"
            )
        page, place, kept = slots // self.block_size, slots % self.block_size, slots >= 0
        sides = [side for _, fused in self.groups for side in (fused.key, fused.value)]
        for (_, codec, vectors), side in zip(self._sides(key, value), sides, strict=True):
            fields = self.fields(pages, codec)
            packed = side.packed(fields)
            encode(vectors, packed.planes, packed.scale, 0, side.encoder, slots[None])
            written = fields["scale"][page, :, place].masked_fill(~kept[:, None, None], 0)
            self.watch.note(codec.fits({"scale": written}))
        if exact is None:
            exact = exact_tokens(slots, self.block_size, self.sinks)
        self._write_exact(pages, exact, page, place, key, value)

    def attend(
        self, pages: Tensor, tables: Tensor, past: Tensor, query: Tensor, key: Tensor, value: Tensor,
        scaling: float, softcap: float | None = None, longest: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As `PageFormat.attend`, `tables` and `past` being int32.

        With `longest`, an upper bound of `past`, a step of one token waits for nothing; chunks need it exact.
        """
        from tqcompress_kernels import chunk, decode, plain

        longest = int(past.max()) if longest is None else longest
        share, sinks = query.shape[1] // key.shape[1], min(self.sinks, longest)
        exact = self._exact_of(pages, tables.long(), past, sinks, key)
        few = query.shape[2] * share <= FEW_QUERIES
        mask = _seen(past, sinks, longest, key.shape[2]) if few and sinks else None
        output = query.new_empty(query.shape, dtype=torch.float32)
        for group, fused in self.groups:
            heads, mine = _places(group.heads, share, query.device), _places(group.heads, 1, query.device)
            packed = [side.packed(self.fields(pages, side.codec)) for side in (fused.key, fused.value)]
            first, fresh = (each(lambda x: x[:, mine], pair) for pair in (exact, (key, value)))  # noqa: B023
            if few:
                split = fused.split if self.block_size % 32 == 0 else plain.split
                output[:, heads], _ = decode.decode_attention(
                    query[:, heads], packed[0], packed[1], fused.key.back, fused.value.back, fused.key.mean,
                    fused.value.mean, first, fresh, longest, scaling, softcap, past, mask, tables, split,
                )  # fmt: skip
            else:
                output[:, heads], _ = chunk.chunk_attention(
                    query[:, heads], packed[0], packed[1], fused.key.back, fused.value.back, fused.key.mean,
                    fused.value.mean, first, fresh, longest - sinks, scaling, softcap, block_table=tables, first=sinks,
                )  # fmt: skip
        return output


@cache
def _places(heads: tuple[int, ...], share: int, device: torch.device) -> slice | Tensor:
    """Where the query heads of some KV heads are, `share` each, in a form that needs nothing from the host."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return slice(heads[0] * share, (heads[-1] + 1) * share)
    return torch.tensor([head * share + i for head in heads for i in range(share)], device=device)


def _seen(past: Tensor, sinks: int, longest: int, new: int) -> Tensor:
    """Which of the exact first tokens, the packed ones and the new ones a sequence sees, bool `[batch, all of them]`.

    The first `sinks` tokens are there twice; they count as exact. Packed tokens that are not there end with `past`.
    """
    place = torch.cat([torch.arange(sinks, device=past.device), torch.arange(longest + new, device=past.device)])
    seen = place < past[:, None]
    seen[:, sinks : 2 * sinks] = False
    seen[:, sinks + longest :] = True
    return seen
