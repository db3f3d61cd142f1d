"""A naive cache that holds, in plain tensors, what a compressed one stands for: the reference of lossy set-ups.

Every token is kept in order, as transformers keeps it. When one leaves the window it is encoded, decoded, and
written back over itself. All else (attention, masks, beams, copies) is transformers' own code for plain tensors.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tqcompress.view import LayerCodecs

DRAFTS = 64  # the newest tokens of one call stay exact until the next one, up to so many


class DecodedLayer(DynamicLayer):
    """One layer; `padding` `[batch]` is how far each prompt is padded on the left."""

    def __init__(self, codecs: LayerCodecs, padding: Tensor | None = None):
        super().__init__()
        self.codecs, self.padding, self.packed = codecs, padding, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """The keys and values that attention sees; new ones, and those of a prompt, as they came."""
        batch, _, new, _ = key_states.shape
        if self.is_initialized:
            self._leave(self.codecs.window)
        elif self.padding is not None:  # beams are rows repeated
            self.padding = self.padding.repeat_interleave(batch // len(self.padding))
        seen = super().update(key_states, value_states)
        self._leave(self.codecs.window + min(new, DRAFTS))
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """What is left of a cropped block stays decoded, and is encoded anew with its new block."""
        super().crop(tokens_to_remove)
        kept = max(0, self.get_seq_length() - self.codecs.sinks)
        self.packed = min(self.packed, kept // self.codecs.block * self.codecs.block)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows take their padding along."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows take their padding along."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Rows take their padding along."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(self.keys.shape[0]) // repeats)

    def _select(self, rows: Tensor) -> None:
        self.padding = None if self.padding is None else self.padding[rows]

    @torch.no_grad()
    def _leave(self, keep: int) -> None:
        """Encode and decode all but the sinks and the last `keep` tokens, those that were not yet."""
        block, sinks = self.codecs.block, self.codecs.sinks
        stop = max(0, self.keys.shape[2] - sinks - keep) // block * block
        if stop <= self.packed:
            return
        rows = self._order()[:, None, sinks + self.packed : sinks + stop, None]
        for side in ("keys", "values"):
            states = getattr(self, side)
            leaving = states.take_along_dim(rows, dim=2)
            for group in self.codecs.groups:
                heads = list(group.heads)
                codec = group.key if side == "keys" else group.value
                leaving[:, heads] = codec.decode(codec.encode(leaving[:, heads])).to(states.dtype)
            setattr(self, side, states.scatter(2, rows.expand_as(leaving), leaving))
        self.packed = stop

    def _order(self) -> Tensor:
        """`[batch, tokens]`: each row's first real tokens, the sinks, and then all others as they came."""
        batch, tokens = self.keys.shape[0], self.keys.shape[2]
        places = torch.arange(tokens).expand(batch, -1)
        if self.padding is None:
            return places
        begin = self.padding[:, None]
        sink = (places >= begin) & (places < begin + self.codecs.sinks)
        return (~sink).long().argsort(dim=1, stable=True)


class DecodedCache(Cache):
    """Such layers for all of a model."""

    def __init__(self, layers: dict[int, LayerCodecs], padding: Tensor | None = None):
        super().__init__(layers=[DecodedLayer(codecs, padding) for codecs in layers.values()])
