"""Which sequences of an engine's step are attended to together: what its metadata says, as pages take it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import exact_tokens


class Batch(NamedTuple):
    """Sequences with equally many new tokens.

    Attributes:
        tokens: where their new tokens are among those of the step, one sequence behind the other.
        tables: int32 `[sequences, pages]`, the pages of each.
        past: int32 `[sequences]`, tokens before this step.
        longest: the largest of `past`, or more if each has one new token.
    """

    tokens: slice | Tensor
    tables: Tensor
    past: Tensor
    longest: int


class Step:
    """A step of an engine.

    Attributes:
        batches: sequences with one new token, all of them together, and every other one by itself.
    """

    def __init__(self, starts: Sequence[int], lengths: Tensor, longest: Sequence[int], tables: Tensor, slots: Tensor):
        """Nothing here waits for the device.

        Args:
            starts: `[sequences + 1]`, where the new tokens of each begin; sequences without any are left out.
            lengths: int32 `[sequences]`, all tokens of each, the new ones included.
            longest: the same on the host: exact for sequences with several new tokens, no less for the others.
            tables: int32 `[sequences, pages]`; entries past a sequence's length are not read.
            slots: int64 `[tokens or more]`, where new tokens are written, page * block_size + place; below 0: nowhere.
        """
        counts = [stop - start for start, stop in pairwise(starts)]
        self.slots, self._exact = slots, dict[tuple[int, int], Tensor]()
        self.batches = []
        if steps := [i for i, count in enumerate(counts) if count == 1]:
            rows, tokens = (_indices(places, lengths.device) for places in (steps, [starts[i] for i in steps]))
            self.batches.append(Batch(tokens, tables[rows], lengths[rows] - 1, max(longest[i] for i in steps) - 1))
        for i, count in enumerate(counts):
            if count > 1:
                tokens, past = slice(starts[i], starts[i + 1]), lengths[i : i + 1] - count
                self.batches.append(Batch(tokens, tables[i : i + 1], past, longest[i] - count))

    def exact(self, block_size: int, sinks: int) -> Tensor:
        """Which of `slots` are among the first `sinks` of a page, which are kept exact. Waits once for all layers."""
        if (block_size, sinks) not in self._exact:
            self._exact[block_size, sinks] = exact_tokens(self.slots, block_size, sinks)
        return self._exact[block_size, sinks]


def _indices(places: list[int], device: torch.device) -> slice | Tensor:
    """A slice if they follow each other: it needs no copy to the device."""
    if places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)
