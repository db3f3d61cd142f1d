"""The guard of a running model: whether codecs err no more than they did when it was compressed (`promises`).

`Sentinel`s decode a few of the tokens that a cache encodes and compare. On CUDA nothing waits for the device: what it
found is heard some steps later.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .codec import Codec
from .errors import ModelError
from .recipe import Guard

SAMPLE = 64  # tokens that are decoded at once, and that an error is the mean of: single ones differ tenfold


@dataclass
class LayerGuard:
    """What the sentinels of a layer know: the settings, and the errors promised, `[kv_heads]`, of both sides."""

    settings: Guard
    layer: int
    first_head: int
    promised: dict[str, Tensor]
    said: set[str] = field(default_factory=set)  # sides that were warned of


class Sentinel:
    """Compares, for one layer of one cache, some of what is encoded with what was promised."""

    def __init__(self, guard: LayerGuard, grows: bool = True):
        self.guard, self.grows = guard, grows  # `grows`: whether the cache could hold everything as it is
        self.exact = False  # nothing is encoded any more
        self.every = max(1, round(1 / guard.settings.fraction))
        self.calls = guard.layer  # layers take turns
        self.sums: dict[tuple[str, tuple[int, ...]], tuple[Tensor, int]] = {}  # of errors, and of how many tokens
        self.due: list[tuple[str, str, tuple[int, ...], Tensor, torch.cuda.Event | None]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sentinel":
        new = Sentinel(self.guard, self.grows)
        new.exact, new.calls = self.exact, self.calls
        return new

    def ask(self) -> None:
        """Look at what is encoded next."""
        self.calls = (self.calls // self.every + 1) * self.every - 1

    def wants(self) -> bool:
        """Whether what is encoded now is looked at; asked once for each encoding."""
        self.calls += 1
        return self.calls % self.every == 0

    def sample(
        self, codec: Codec, heads: tuple[int, ...], x: Tensor, read: Callable[[int, int], dict[str, Tensor]]
    ) -> None:
        """Compare some of the vectors `x` `[batch, heads, tokens, head_dim]`; `read(start, stop)` gives their rows."""
        block, tokens = codec.layout().block, x.shape[2]
        count = min(tokens, -(-SAMPLE // block) * block)
        start = self.calls // self.every * 61 % (tokens - count + 1) // block * block
        error = codec.decode(read(start, start + count)) - x[:, :, start : start + count].float()
        side, seen = codec.shape.side, count * x.shape[0]
        total, before = self.sums.pop((side, heads), (0.0, 0))
        total, seen = total + error.square().sum((0, 2, 3)), before + seen
        if seen < SAMPLE:
            self.sums[side, heads] = total, seen
            return
        promised = self.guard.promised[side].to(x.device)[list(heads)]
        ratio = total / seen / promised.clamp_min(torch.finfo(torch.float32).tiny)
        event = None
        if ratio.is_cuda:
            ratio = torch.empty(ratio.shape, pin_memory=True).copy_(ratio, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.due.append((codec.name, side, heads, ratio, event))

    def heed(self) -> None:
        """Do what the recipe says about what has been heard of; never waits. Raises `ModelError` if it says so."""
        waiting, self.due = self.due, []
        for one in waiting:
            name, side, heads, ratio, event = one
            if event is not None and not event.query():
                self.due.append(one)
                continue
            over = (~(ratio <= self.guard.settings.factor)).nonzero().flatten().tolist()
            if over:
                where = [self.guard.first_head + heads[i] for i in over]
                self.act(
                    side,
                    f"layer {self.guard.layer}, KV heads {where}: the error of {name} {side}s is "
                    f"{ratio[over].max().item():.3g} times what it was when the model was compressed (guard.factor: "
                    f"{self.guard.settings.factor:g})",
                )

    def spares(self, error: ModelError) -> bool:
        """Whether what could not be stored, nothing of which was, stays exact with all that comes."""
        if self.guard.settings.action != "exact" or not self.grows:
            return False
        self.exact = True
        warnings.warn(f"{error}; until then this cache's layer stays exact", stacklevel=2)
        return True

    def act(self, side: str, what: str) -> None:
        """Warn once, keep the layer exact, or raise `ModelError`."""
        action = self.guard.settings.action
        if action == "raise":
            raise ModelError(what)
        if action == "exact" and not self.grows:
            raise ModelError(f"{what}; a cache of fixed size has no room to stay exact: use one that grows")
        self.exact = self.exact or action == "exact"
        if side not in self.guard.said:
            self.guard.said.add(side)
            then = "; what comes from now on stays exact in this cache's layer" if self.exact else ""
            warnings.warn(what + then, stacklevel=2)
