"""Finding what a cache cannot hold: infinities, what is not a number, what is too large for a scale's format.

On a CPU such keys and values are refused before anything is stored. Elsewhere asking would make the host wait for the
device at every step: there a flag on the device is raised when codes are stored, and read once it has reached the host.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .codec import Codec
from .errors import ModelError
from .store import TokenStore
from .view import GroupCodecs, LayerCodecs


class CannotStore(ModelError):
    """A codec cannot hold these vectors; nothing of them was stored."""


class Watch:
    """Whether any codes stored on a device do not hold what was encoded."""

    def __init__(self, device: torch.device):
        self.raised = torch.zeros((), dtype=torch.bool, device=device)
        # The host reads what has arrived: this never waits, and may be a few steps old.
        self.arrived = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        new = Watch(self.raised.device)  # a copy of pinned memory would not be pinned
        new.raised.copy_(self.raised)
        new.arrived.copy_(self.arrived)
        return new

    def note(self, fits: Tensor) -> None:
        """Raise the flag unless `fits`, a boolean scalar on the device."""
        self.raised |= ~fits
        self.arrived.copy_(self.raised, non_blocking=True)


def finite(states: Tensor) -> bool:
    """Whether all are; waits for the device."""
    # The largest magnitude is not a number if any is not: one operation, not the five of `isfinite().all()`.
    return not states.numel() or math.isfinite(torch.linalg.vector_norm(states, math.inf))


def refuse_states(codecs: LayerCodecs, sides: dict[str, Tensor]) -> None:
    """Raise `ModelError` for keys or values `[batch, kv_heads, tokens, head_dim]` that are not finite."""
    for side, states in sides.items():
        if not finite(states):
            bad = ~states.isfinite().all(-1)
            heads = [codecs.first_head + head for head in bad.any(2).any(0).nonzero().flatten().tolist()]
            raise ModelError(
                f"layer {codecs.layer}, KV heads {heads}: {side} of {int(bad.any(1).sum())} tokens are infinite or not "
                "a number; check the model's dtype and weights"
            )


def refuse_rows(
    codecs: LayerCodecs, group: GroupCodecs, codec: Codec, rows: dict[str, Tensor], checked: bool = False
) -> None:
    """Raise `ModelError` for rows of a group that do not hold what was encoded; `checked`: some are known not to."""
    if not checked and bool(codec.fits(rows)):
        return
    one_head = ({name: row[:, i : i + 1] for name, row in rows.items()} for i in range(len(group.heads)))
    bad = [
        codecs.first_head + head for head, row in zip(group.heads, one_head, strict=True) if not bool(codec.fits(row))
    ]
    raise CannotStore(
        f"layer {codecs.layer}, KV heads {bad}: {codec.name} cannot store these {codec.shape.side}s, they are too "
        "large for the scale's format, infinite or not a number; skip the layer or the heads in the recipe, choose "
        "scale: fp16 if it has log8, or check the model's dtype"
    )


def fits_on_device(codec: Codec, store: TokenStore, start: int) -> Tensor | None:
    """Whether the rows from `start` on hold what was encoded, on their device; None if any row does."""
    fits = codec.fits(store.read(start))
    return None if fits.device != next(iter(store.buffers.values())).device else fits
