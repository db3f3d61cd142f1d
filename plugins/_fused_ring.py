"""Steps of one token on CUDA: the exact tokens of a group in a ring that its kernels keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqcompress.store import TokenStore, replaced
from tqcompress.view import Pair
from tqcompress_kernels.ring import empty_ring, packed_at, recent_rows
from tqcompress_kernels.step import Constants, Stepper, step_op


class FusedRing:
    """The `RingTokens` of a group of heads; `planes` names the fields of the stores that hold codes."""

    def __init__(
        self, constants: Constants, planes: tuple[tuple[str, ...], ...], states: Tensor, sinks: int, window: int
    ):
        self.constants, self.planes, self.base = constants, planes, 0
        self.ring = empty_ring(states, sinks, window)
        self.stepper: Stepper | None = None
        self.seen = (0, 0)  # how often the stores had moved when the stepper recorded its launches

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedRing":
        new = object.__new__(FusedRing)
        new.__dict__ = self.__dict__ | {"stepper": None}
        new.ring = self.ring._replace(exact=self.ring.exact.clone(), state=self.ring.state.clone())
        return new

    def fill(self, sinks: Pair, recent: Pair, packed: int) -> None:
        """See `RingTokens`."""
        exact = torch.stack([torch.cat(pair, dim=2) for pair in zip(sinks, recent, strict=True)])
        count = exact.shape[3]
        self.base = packed
        self.ring.exact[:, :, :, :count] = exact
        self.ring.state.fill_(packed)
        self.ring.state[0] += count  # numbers of the host go into launches: copying them would wait for the device

    def read(self, length: int) -> tuple[Pair, Pair]:
        """See `RingTokens`."""
        sinks = min(self.ring.sinks, length)
        first, count = recent_rows(length, self.base, self.ring.sinks, self.ring.room)
        recent = self.ring.exact[:, :, :, self.ring.sinks :]
        parts = recent[:, :, :, first : first + count], recent[:, :, :, : max(0, first + count - self.ring.room)]
        return tuple(self.ring.exact[:, :, :, :sinks].clone()), tuple(torch.cat(parts, dim=3))

    def packed(self, length: int) -> int:
        """See `RingTokens`."""
        return packed_at(length, self.base, self.ring.sinks, self.ring.room)

    def step(
        self, stores: tuple[TokenStore, TokenStore], query: Tensor, new: Pair | None, length: int | None,
        mask: Tensor | None, scaling: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `RingTokens`."""
        if torch.compiler.is_compiling():
            (key, key_scale), (value, value_scale) = self._rows(stores)
            ring = self.ring
            found: tuple[Tensor, Tensor] = step_op(
                query, list(new or ()), ring.exact, ring.state, ring.sinks, key, key_scale, value, value_scale,
                self.constants.id, mask, scaling, softcap,
            )  # fmt: skip
            return found
        seen = stores[0].moves, stores[1].moves
        if self.stepper is None or seen != self.seen:
            keys, values = self._rows(stores)
            self.stepper, self.seen = Stepper(self.ring, keys, values, self.constants), seen
        return self.stepper(query, new, length, self.base, mask, scaling, softcap)

    def _rows(self, stores: tuple[TokenStore, TokenStore]) -> list[tuple[list[Tensor], Tensor]]:
        """Planes and scale of each side."""
        return [
            ([store.buffers[name] for name in names], store.buffers["scale"])
            for names, store in zip(self.planes, stores, strict=True)
        ]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """See `RingTokens`."""
        exact = replaced(self.ring.exact, lambda states: function(states.transpose(0, 1)).transpose(0, 1).contiguous())
        state = self.ring.state
        if exact.shape[1] != state.shape[0] - 2:
            state = torch.cat([state[:2], state[2:3].expand(exact.shape[1])])
        if exact is not self.ring.exact or state is not self.ring.state:
            self.ring, self.stepper = self.ring._replace(exact=exact, state=state.to(exact.device)), None

    def nbytes(self, length: int) -> int:
        """See `RingTokens`."""
        exact = self.ring.exact
        return exact[:, :, :, 0].numel() * exact.element_size() * (length - self.packed(length))

    @property
    def buffers(self) -> list[Tensor]:
        """See `RingTokens`."""
        return [self.ring.exact, self.ring.state]

    @property
    def length(self) -> Tensor:
        """See `RingTokens`."""
        return self.ring.state[0]
