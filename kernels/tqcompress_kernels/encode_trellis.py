"""Encoding for trellis codes: rotate and normalise as `encode` does, then Viterbi's algorithm (`viterbi`)."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .encode import INTERPRETED, Encoder, encoder, run
from .launch import Scratch, launch
from .ring import BLOCK, Ring
from .storage import units
from .viterbi import viterbi_kernel

NOTES = 4  # bits of symbols that costs carry along, if one symbol has no more
CHUNK = 1 << 17  # vectors that are rotated before their paths are searched
IN_REGISTERS, MOST_OVERLAPS = 128, 256  # costs of a vector that a lane's registers hold, and with some of them spilled
LANES = 32  # vectors of a program
PROGRAMS = 12  # a multiprocessor, as many as registers allow with 64 overlaps; of half as many overlaps:
MORE_PROGRAMS = 16


class TrellisEncoder(NamedTuple):
    """What `encode` needs to know of a side with trellis codes; made once by `trellis_encoder`.

    Attributes:
        unit: rotates, and makes the integers that `viterbi_kernel` reads.
        values: float32 `[states]`, the table in units of `step`; `table`: the same, known when kernels are compiled.
        point: the bit of a cost that is worth `step**2`, so vectors are rounded to `step / 2**(point - group * bits)`.
        lowest, far: costs of the right and the wrong beginnings of paths.
        group: steps whose symbols a cost carries along.
        reach: coordinates on either side of the seam that the first pass looks at.
        ptx: whether costs are compared by PTX.
    """

    unit: Encoder
    values: Tensor
    table: tuple[int, ...]
    step: float
    bits: int
    log_scale: bool
    norm_correction: bool
    point: int
    lowest: int
    far: int
    group: int
    reach: int
    ptx: bool

    def launch(
        self, x: Tensor, planes: tuple[Tensor, ...], scale: Tensor, start: int, slots: Tensor | None,
        ring: Ring | None = None, count: bool = False, memory: Scratch | None = None,
    ) -> None:  # fmt: skip
        """As `Encoder.launch`."""
        batch, heads, tokens, _ = x.shape
        size = max(BLOCK.value, CHUNK // (batch * heads))
        for first in range(0, tokens, size):
            part = x[:, :, first : first + size]
            where = None if slots is None else slots[:, first : first + size]
            self._launch(part, planes[0], scale, start + first, where, ring, count, memory or x)

    def _launch(
        self, x: Tensor, codes: Tensor, scale: Tensor, start: int, slots: Tensor | None, ring: Ring | None, count: bool,
        memory: Tensor | Scratch,
    ) -> None:  # fmt: skip
        batch, heads, tokens, dim = x.shape
        vectors = batch * heads * tokens
        tiles = -(-vectors // LANES)
        overlaps, note = len(self.table) >> self.bits, self.bits * self.group
        programs = min(tiles, _programs(x.device, overlaps))
        words = -(-overlaps // (32 // note))
        unit = memory.new_empty(1, 1, dim, vectors, dtype=torch.int32)
        norms = memory.new_empty(1, 1, vectors, 1, dtype=torch.float32)
        notes = memory.new_empty(programs, dim // self.group, words, LANES, dtype=torch.int32)
        run(self.unit, x, (unit,), norms, 0, None, ring, count, scale.shape[2])
        unit_of_codes, strides = units(codes.stride()[:3], 16)
        launch(
            viterbi_kernel,
            (programs,),
            unit,
            norms,
            self.values,
            notes,
            codes,
            scale,
            slots,
            None if ring is None else ring.state,
            strides,
            units(scale.stride()[:3], 1)[1],
            0 if slots is None else slots.stride(0),
            0 if ring is None else ring.sinks,
            scale.shape[2],
            tokens,
            heads,
            start,
            vectors,
            tiles,
            self.step,
            TABLE=self.table,
            BITS=self.bits,
            POINT=self.point,
            LOWEST=self.lowest,
            FAR=self.far,
            GROUP=self.group,
            REACH=self.reach,
            DIM=dim,
            LOG_SCALE=self.log_scale,
            CORRECT=self.norm_correction,
            PAGE_TOKENS=0 if slots is None else codes.shape[2],
            CODE_UNIT=unit_of_codes,
            BLOCK=LANES,
            ROOM=0 if ring is None else ring.room,
            PTX=self.ptx,
            **({} if INTERPRETED else {"num_warps": LANES // 32}),
        )


@functools.cache
def _programs(device: torch.device, overlaps: int) -> int:
    """As many as run at once."""
    each = PROGRAMS if overlaps > 32 else MORE_PROGRAMS
    return 4 if INTERPRETED else each * torch.cuda.get_device_properties(device).multi_processor_count


def obstacle(states: int, bits: int) -> str | None:
    """Why there is no kernel to encode such a trellis, or None."""
    if states >> bits > MOST_OVERLAPS:
        return f"{states} states at {bits} bits have {states >> bits} path costs a vector, more than {MOST_OVERLAPS}"
    return None


def trellis_encoder(
    into: Tensor, mean: Tensor | None, table: Tensor, step: float, bits: int, scale_format: str,
    norm_correction: bool = True, group: int | None = None, reach: int | None = None,
) -> TrellisEncoder:  # fmt: skip
    """Prepare a `TrellisEncoder`; reads values on the host, so not while a CUDA graph is captured.

    Args:
        into, mean, scale_format: as `encode.encoder` takes them.
        reach: as `TrellisEncoder` has it; chosen if None.
        table: float32 `[states]`, integers up to 127 times `step`, and `table == -table.flip(0)`.
    """
    dim, window = into.shape[-1], len(table).bit_length() - 1
    whole = (table.double() / step).round().cpu()
    if reason := obstacle(len(table), bits):
        raise ValueError(reason)
    if not torch.equal(whole, -whole.flip(0)):
        raise ValueError("table: values of states must be the negatives of those with all bits inverted")
    if group is None:
        group = max(1, NOTES // bits) if len(table) >> bits <= IN_REGISTERS else 1
    lowest, far, most = _bounds(whole, dim, step, bits)
    point = math.floor(math.log2(2**32 / (lowest + most + far)))
    negative = torch.tensor([-1.0, 1.0], device=table.device)
    unit = encoder(into, mean, negative, scale_format)
    unit = unit._replace(table=torch.tensor(-(2.0 ** (point - group * bits + 1)) / step, device=table.device))
    return TrellisEncoder(
        unit, whole.to(table.device, torch.float32), tuple(whole.int().tolist()), step, bits, scale_format == "log8",
        norm_correction, point, -(2**31) + (math.ceil(lowest) << point), math.ceil(far) << point, group,
        reach or min(dim // 2, max(24, 3 * window, 6 * -(-window // bits))),
        not INTERPRETED and torch.version.hip is None,
    )  # fmt: skip


def _bounds(values: Tensor, dim: int, step: float, bits: int) -> tuple[float, float, float]:
    """Bounds on costs of vectors of variance 1 a coordinate, in squared steps.

    How far below its beginning a path can get; how much the least costs to two overlaps can differ; and how far the
    least cost can get above the beginning: some path or its negative costs no more than its own square, whatever the
    vector.
    """
    fan, overlaps = 2**bits, len(values) >> bits
    least = torch.zeros(overlaps, dtype=torch.float64)
    for _ in range(dim):
        least = (least.repeat(fan) + values.square()).view(overlaps, fan).amin(1)
    away = -(-(overlaps.bit_length() - 1) // bits) + 1  # steps in which a path gets anywhere
    spread = (math.sqrt(away) * values.abs().max().item() + math.sqrt(dim) / step) ** 2
    return dim / step**2 + 1, spread, least.min().item() + spread
