"""Passes of a model that begin behind layers whose outputs are known.

What a compressed cache changes begins in its first compressed layer: up to there a pass repeats, to the bit, what the
model does without compression. So the pass that gives the reference keeps what every layer returns, and a later one
over the same tokens goes through the layers from the first compressed one on.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("tqcompress")


class Prefix:
    """What the layers of a decoder returned in one pass, for later passes over the same tokens.

    Memory: one hidden state `[batch, tokens, hidden_size]` a layer. Where layers cannot be told apart, or share what
    they cache, every pass is whole, which is logged.
    """

    def __init__(self, model: "PreTrainedModel", layers: int):
        """`layers`: how many of them have a cache."""
        self.blocks = _blocks(model, layers)
        self.outputs: list[Any] = []
        if not self.blocks:
            log.info("%s: its layers are not one list; every pass goes through all of them", type(model).__name__)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The pass within is the one that later passes repeat the beginning of."""
        self.outputs = []
        hooks = [
            block.register_forward_hook(lambda module, args, output: self.outputs.append(output))
            for block in self.blocks
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def replayed(self, count: int) -> Iterator[None]:
        """In the pass within, the first `count` layers return what they returned before, without being run."""
        replaced = []
        try:
            for block, output in zip(self.blocks[:count], self.outputs, strict=False):
                replaced.append((block, block.__dict__.get("forward")))  # accelerate puts its own there
                block.forward = lambda *args, output=output, **kwargs: output
            yield
        finally:
            for block, forward in replaced:
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def _blocks(model: "PreTrainedModel", layers: int) -> list[nn.Module]:
    """The decoder's layers, in order; none if they are not found for sure."""
    for found in model.get_decoder().children():
        if isinstance(found, nn.ModuleList) and len(found) == layers:
            blocks = list(found)
            if all(_index(block) == index for index, block in enumerate(blocks)):
                return blocks
    return []


def _index(block: nn.Module) -> int | None:
    """The number of the cache layer that the block's attention uses."""
    indices = {module.layer_idx for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    return indices.pop() if len(indices) == 1 else None  # type: ignore[return-value]  # an int, as was asked
