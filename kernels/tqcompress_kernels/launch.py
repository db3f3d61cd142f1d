"""Launches that are recorded once and then repeated: a Triton launch from Python costs more than a short kernel.

`launch` runs a kernel as usual. While a `Tape` is made it also notes the compiled kernel and its arguments; `replay`
hands them to the driver again, with the addresses of the tensors that differ from call to call in place of those that
were recorded. All others must be the same tensors: caches that move need a new tape.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_recording: list[tuple[Any, tuple[int, ...], list[Any]]] | None = None  # compiled kernels, grids and arguments
T = TypeVar("T")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; see above."""
    compiled = kernel[grid](*args, **options)
    if _recording is not None:
        named = [options[name] for name in kernel.arg_names[len(args) :]]
        _recording.append((compiled, (*grid, 1, 1)[:3], [*args, *named]))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context whose launches go to the tensor's device: Triton launches on the current one, whatever it is given."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class Scratch:
    """Memory for intermediate results, the same at every step: as `Tensor.new_empty`, in a fixed order of requests.

    What is handed out is valid until the next step, so steps that share it must run one after the other.
    """

    def __init__(self, device: torch.device):
        self.device, self.place = device, 0
        self.buffers: list[Tensor] = []

    def restart(self) -> "Scratch":
        """For the next step."""
        self.place = 0
        return self

    def new_empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        count, place = math.prod(shape), self.place
        self.place += 1
        if place == len(self.buffers):
            self.buffers.append(torch.empty(0, dtype=dtype, device=self.device))
        if self.buffers[place].numel() < count or self.buffers[place].dtype != dtype:
            self.buffers[place] = torch.empty(count, dtype=dtype, device=self.device)
        return self.buffers[place][:count].view(shape)


def _address(arg: Any) -> Any:
    """What the driver's launcher takes fastest: an address for a tensor, also within a tuple."""
    if isinstance(arg, tuple):
        return tuple(map(_address, arg))
    return arg.data_ptr() if isinstance(arg, Tensor) else arg


def _aligned(tensors: Sequence[Tensor]) -> list[bool]:
    return [tensor.data_ptr() % 16 == 0 for tensor in tensors]


class Tape(Generic[T]):
    """The launches of one call, to be repeated for other tensors in the place of `varying`."""

    def __init__(self, call: Callable[[], T], varying: Sequence[Tensor]):
        """Run `call` and record it. Every tensor of `varying` is told from others by its address.

        If two of them have the same one, it cannot be repeated, and nothing fits it.
        """
        global _recording
        outer, _recording = _recording, []
        try:
            self.result = call()
            launches = _recording
        finally:
            _recording = outer
        places = {tensor.data_ptr(): i for i, tensor in enumerate(varying)}
        self.aligned = _aligned(varying) if len(places) == len(varying) else None
        self.launches, self.patches, self.kept = [], [], launches
        for compiled, grid, args in launches:
            addresses = [_address(arg) for arg in args]
            head = (compiled.run, *grid), (compiled.function, compiled.packed_metadata, None, None, None)
            self.launches.append((*head, addresses))
            self.patches += [
                (addresses, i, places[addresses[i]])
                for i, arg in enumerate(args)
                if isinstance(arg, Tensor) and addresses[i] in places
            ]

    def fits(self, varying: Sequence[Tensor]) -> bool:
        """Whether the recorded kernels, compiled for aligned or for any addresses, can take these."""
        return _aligned(varying) == self.aligned

    def replay(self, varying: Sequence[Tensor], stream: int) -> None:
        """Launch everything again."""
        pointers = [tensor.data_ptr() for tensor in varying]
        for args, i, which in self.patches:
            args[i] = pointers[which]
        for (run, x, y, z), rest, args in self.launches:
            run(x, y, z, stream, *rest, *args)
