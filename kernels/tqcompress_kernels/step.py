"""One new token of a sequence: encode what must leave the ring, attend to everything, keep the new token.

The length is known to the device only, so the launches are the same at every step: a step can be captured in a CUDA
graph, compiled by torch (`step_op`), or recorded on a `Tape` and repeated without Triton's launch overhead. The naive
version is `reference.decode_attention` over the tokens that `ring.tokens_of` tells.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .combine import RingStep
from .decode import decode_attention
from .encode import AnyEncoder, encode_due
from .launch import Scratch, Tape
from .packed import Packed, Wide
from .ring import Ring, is_due


class Constants:
    """What a step needs to know of a group of KV heads, whatever the cache.

    Attributes:
        id: what `step_op` finds it by.
        key, value: `Packed` without the planes and the scale (`describe`), encoder, back, mean of each side.
        split: the kernel that reads packed tokens.
    """

    def __init__(self, key: "Side", value: "Side", split: Callable[..., None]):
        self.key, self.value, self.split = key, value, split
        self.id = next(_IDS)
        _CONSTANTS[self.id] = self


class Side(NamedTuple):
    """Keys or values of `Constants`.

    Attributes:
        levels, bits, step, uniform, window, wide: see `Packed`.
        back, mean: see `decode_attention`.
        encoder: see `encode`.
    """

    levels: Tensor
    bits: int
    step: float | None
    uniform: bool
    back: Tensor
    mean: Tensor | None
    encoder: AnyEncoder
    window: int = 0
    wide: Wide | None = None

    def packed(self, planes: Sequence[Tensor], scale: Tensor) -> Packed:
        """The tokens in these buffers."""
        own = self.levels, self.bits, self.step, self.uniform, self.window, self.wide
        return Packed(tuple(planes), scale, *own)


# Of a `Stepper`'s steps: query, new, mask, scaling, softcap, due, out.
Arguments = tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None, float, float | None, bool, Tensor]
_IDS = count()
_CONSTANTS: WeakValueDictionary[int, Constants] = WeakValueDictionary()
_SCRATCH: dict[tuple[torch.device, int], Scratch] = {}


def ring_step(
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    ring: Ring,
    key: tuple[Sequence[Tensor], Tensor],
    value: tuple[Sequence[Tensor], Tensor],
    constants: Constants,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    due: bool = True,
    out: Tensor | None = None,
    memory: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with one query a sequence to all tokens and the new one, which the ring then holds.

    Args:
        query: `[batch, heads, 1, head_dim]`, last stride 1.
        new: key and value of the new token, `[batch, kv_heads, 1, head_dim]`, last stride 1. None: there is none, and
            the query sees what the last one saw (layers that share a cache).
        key, value: planes and scale of the packed tokens, as `Packed` has them; their rows are the capacity.
        mask: bool `[batch, tokens]`, True = attend, at least as many as there are.
        due: False if the host knows that no block leaves the ring; then that is not asked of the device.
        out, memory: as `decode_attention` takes them.

    Returns:
        The output `[batch, heads, 1, head_dim]` in the query's dtype, NaN if the cache has no room for the token, and
        the log-sum-exp of the scores.
    """
    capacity = key[1].shape[2]
    if new is not None and due and capacity:
        for i, (side, (planes, scale)) in enumerate(((constants.key, key), (constants.value, value))):
            encode_due(ring, i, tuple(planes), scale, side.encoder, memory)
    step = RingStep(ring, new, ring.sinks + ring.room + capacity)
    return decode_attention(
        query, constants.key.packed(*key), constants.value.packed(*value), constants.key.back, constants.value.back,
        constants.key.mean, constants.value.mean, None, None, capacity, scaling, softcap, ring.lengths, mask,
        split=constants.split, step=step, memory=memory, out=torch.empty_like(query) if out is None else out,
    )  # fmt: skip


@torch.library.custom_op(
    "tqcompress::ring_step", mutates_args={"exact", "state", "key_planes", "key_scale", "value_planes", "value_scale"}
)
def step_op(
    query: Tensor,
    new: Sequence[Tensor],
    exact: Tensor,
    state: Tensor,
    sinks: int,
    key_planes: Sequence[Tensor],
    key_scale: Tensor,
    value_planes: Sequence[Tensor],
    value_scale: Tensor,
    constants: int,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`ring_step` for torch.compile, with the id of the constants; `new` may be empty."""
    query, *new = map(_readable, (query, *new))
    return ring_step(
        query, (new[0], new[1]) if new else None, Ring(exact, state, sinks), (key_planes, key_scale),
        (value_planes, value_scale), _CONSTANTS[constants], mask, scaling, softcap, out=query.new_empty(query.shape),
    )  # fmt: skip


def _readable(states: Tensor) -> Tensor:
    """With the last stride 1, as kernels read it."""
    return states if states.stride(3) == 1 else states.contiguous()


@step_op.register_fake
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


class Stepper:
    """`ring_step` again and again for one cache, with its launches recorded at the first step.

    Good as long as the buffers are the same tensors; `due` steps are recorded apart.
    """

    def __init__(
        self,
        ring: Ring,
        key: tuple[Sequence[Tensor], Tensor],
        value: tuple[Sequence[Tensor], Tensor],
        constants: Constants,
    ):
        self.ring, self.key, self.value, self.constants = ring, key, value, constants
        self.tapes: dict[tuple[object, ...], Tape[Tensor]] = {}

    def __call__(
        self, query: Tensor, new: tuple[Tensor, Tensor] | None, length: int | None, base: int, mask: Tensor | None,
        scaling: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`ring_step` after `length` tokens, None if only the device knows.

        The log-sum-exp that it returns is overwritten by its own next step, and by no other.
        """
        due = new is not None and (length is None or is_due(length, base, self.ring.sinks, self.ring.room))
        query, new = _readable(query), None if new is None else (_readable(new[0]), _readable(new[1]))
        out = query.new_empty(query.shape)
        varying = (query, out) if new is None else (query, out, *new)
        arguments = (query, new, mask, scaling, softcap, due, out)
        if not query.is_cuda:
            return self._run(*arguments, None)
        if query.device.index == torch.cuda.current_device():
            return out, self._repeat(varying, arguments)
        with torch.cuda.device(query.device):
            return out, self._repeat(varying, arguments)

    def _repeat(self, varying: tuple[Tensor, ...], arguments: Arguments) -> Tensor:
        """Replay the tape for such arguments, or make it; returns the log-sum-exp."""
        query, _, mask, scaling, softcap, due, _ = arguments
        stream = torch._C._cuda_getCurrentRawStream(query.device.index)  # as Triton asks: no Python object is made
        place = None if mask is None else mask.data_ptr()
        name = (query.shape, query.dtype, *(x.stride() for x in varying), place, scaling, softcap, due, stream)
        tape = self.tapes.get(name)
        if tape is not None and tape.fits(varying):
            tape.replay(varying, stream)
            return tape.result
        memory = _SCRATCH.setdefault((query.device, stream), Scratch(query.device)).restart()
        tape = self.tapes[name] = Tape(lambda: self._run(*arguments, memory)[1], varying)
        return tape.result

    def _run(
        self, query: Tensor, new: tuple[Tensor, Tensor] | None, mask: Tensor | None, scaling: float,
        softcap: float | None, due: bool, out: Tensor, memory: Scratch | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return ring_step(
            query, new, self.ring, self.key, self.value, self.constants, mask, scaling, softcap, due, out, memory
        )
