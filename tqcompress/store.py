"""`TokenStore`: the packed rows of one side of a group of heads, in buffers that grow without copying often."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .codec import Layout


class TokenStore:
    """Packed tokens, batch first: every field is `[batch, heads, rows, size]`.

    Buffers grow by an eighth (at least `MIN_GROWTH` tokens), so appending is amortised and spare room is
    bounded. Rows below `length` never change until they are cropped, so views of them stay valid.
    """

    MIN_GROWTH = 256
    ALIGNMENT = 64  # tokens that capacities are a multiple of: every head's rows begin at whole cache lines

    def __init__(self, layout: Layout, batch: int, heads: int, device: torch.device, capacity: int = 0):
        self.layout, self.length = layout, 0
        self.moves = 0  # how often buffers were replaced: who keeps them elsewhere must look again
        capacity = -(-capacity // self.ALIGNMENT) * self.ALIGNMENT
        self.buffers = {
            name: torch.empty(batch, heads, -(-capacity // field.tokens), field.size, dtype=field.dtype, device=device)
            for name, field in layout.fields.items()
        }

    def append(self, packed: dict[str, Tensor], tokens: int) -> None:
        """Add encoded tokens; their number is a multiple of the layout's block."""
        self.reserve(tokens)
        for name, field in self.layout.fields.items():
            start = self.length // field.tokens
            self.buffers[name].narrow(2, start, tokens // field.tokens).copy_(packed[name])
        self.length += tokens

    def reserve(self, tokens: int) -> None:
        """Make room for that many more; a kernel may then write them behind the last and add to `length`."""
        self._grow(self.length + tokens)

    def read(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Views of the rows of tokens `start` to `stop`, both multiples of the block."""
        stop = self.length if stop is None else stop
        return {
            name: self.buffers[name].narrow(2, start // field.tokens, (stop - start) // field.tokens)
            for name, field in self.layout.fields.items()
        }

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, a multiple of the block."""
        self.length = min(self.length, length)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer, as reordering the batch or moving between devices does."""
        self.buffers = {name: replaced(buffer, function) for name, buffer in self.buffers.items()}
        self.moves += 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        return sum(view.numel() * view.element_size() for view in self.read().values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers, room to grow included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def _grow(self, tokens: int) -> None:
        multiple = math.lcm(self.layout.block, self.ALIGNMENT)
        for name, field in self.layout.fields.items():
            old = self.buffers[name]
            if old.shape[2] * field.tokens >= tokens:
                continue
            grown = max(tokens, self.length + max(self.length // 8, self.MIN_GROWTH))
            rows = -(-grown // multiple) * multiple // field.tokens
            new = old.new_empty(*old.shape[:2], rows, field.size)
            used = -(-self.length // field.tokens)
            new[:, :, :used] = old[:, :, :used]
            self.buffers[name] = new
            self.moves += 1


def replaced(buffer: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(buffer)`, at the same place if it has the same size: recorded kernels then still find it."""
    new = function(buffer)
    if new.shape != buffer.shape or new.device != buffer.device:
        return new
    return buffer.copy_(new)
