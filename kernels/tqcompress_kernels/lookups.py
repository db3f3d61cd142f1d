"""How the int8 kernel turns codes into integers: tables for scalar levels and for the states of a trellis."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import trellis_asm
from .packed import Wide, is_uniform

LANES = 32
TABLE_BYTES = 16 << 10  # of shared memory for the table of a trellis; for copies of it half of that above 2 bits


@dataclass(frozen=True)
class Lookup:
    """How a side's codes become integers: `kind` of `fast_kernel`, its table on the device, and the unit.

    Kind "u4" means uniform levels `(code - 7.5) * step`; "t4" any levels that are integers times `step`; "w4..." codes
    of a trellis, see `trellis_asm.Kind`. `wide`: that of the first `wide_dim` coordinates, if they have other levels.
    """

    kind: str
    table: Tensor
    step: float
    wide: "Lookup | None" = None
    wide_dim: int = 0

    @property
    def bits(self) -> int:
        """Bits a code."""
        return int(self.kind[1])

    @property
    def trellis(self) -> trellis_asm.Kind | None:
        """The kind of trellis codes, None for others."""
        return trellis_asm.parse(self.kind) if self.kind[0] == "w" else None

    def to(self, device: torch.device) -> "Lookup":
        """The same on another device."""
        return replace(self, table=self.table.to(device), wide=self.wide and self.wide.to(device))

    def parts(self, dim: int) -> "list[tuple[int, Lookup]]":
        """The number of coordinates, of `dim`, of each part and its lookup, the wide one last."""
        return [(dim - self.wide_dim, self)] + ([(self.wide_dim, self.wide)] if self.wide else [])


def lookup(levels: Tensor, device: torch.device, wide: Wide | None = None) -> "Lookup | str":
    """The lookup for ascending symmetric `levels` `[2**bits]`, or why there is none; `wide` has those of wide codes."""
    if wide is not None:
        first, rest = lookup(wide.levels, device), lookup(levels, device)
        if isinstance(first, str):
            return first
        return rest if isinstance(rest, str) else replace(rest, wide=first, wide_dim=wide.dim)
    values = levels.double().cpu()
    count = len(values)
    bits = count.bit_length() - 1
    if bits in (1, 2, 4, 8) and is_uniform(values):
        none = torch.zeros(1, LANES, dtype=torch.int32, device=device)
        return Lookup(f"u{bits}", none, float(values.diff().mean()))
    if bits not in (2, 3, 4):
        return f"{bits}-bit levels that are not uniform"
    step = integer_step(values)
    if step is None:
        return "levels that are not integers of one byte times a common step"
    whole = (values / step).round().to(torch.int64)
    words = {2: _words(whole), 3: _words(whole), 4: _words(whole[8:] + 1) + _words(whole[:8])}[bits]
    return Lookup(f"t{bits}", _for_lanes(words).to(device), step)


def trellis_lookup(
    levels: Tensor, step: float, bits: int, dim: int = 128, per: int | None = None, copies: int | None = None,
    registers: bool = True,
) -> Lookup:  # fmt: skip
    """The lookup for trellis codes whose states have these `levels` `[2**window]`, integers times `step`.

    Args:
        dim: head_dim, which decides how much of a row a lane reads at once.
        per: coordinates that are looked up at once, 1 to 4.
        copies: of the table, a power of two up to 32; 0 for one in registers, where there can be one.
        registers: whether they are chosen, where they can be. Best is the table of keys there, which keeps the integer
            unit busy, and that of values in shared memory, which is another.

    What is None is chosen; of tables in shared memory the one that costs least and fits into `TABLE_BYTES`.
    """
    window = len(levels).bit_length() - 1
    codes = trellis_asm.CODES if dim % (4 * trellis_asm.CODES) == 0 else trellis_asm.CODES // 2
    whole = (levels.double().cpu() / step).round().to(torch.int64)
    halves = _halves(whole.tolist()) if window == 4 and bits in (2, 3) and codes == trellis_asm.CODES else None
    if halves and not per and (copies == 0 or (copies is None and registers)):
        kind = trellis_asm.Kind(bits, window, 1, 0, codes, "tq_trellis")
        return Lookup(kind.text, _for_lanes(_words(halves[0]) + _words(halves[1])).to(levels.device), step)
    kinds = [
        trellis_asm.Kind(bits, window, n, 1, codes, "tq_trellis") for n in ((1, 2, 3, 4) if per is None else (per,))
    ]
    kinds = [kind._replace(copies=copies or _copies(kind)) for kind in kinds]
    kind = min((kind for kind in kinds if kind.nbytes <= TABLE_BYTES or per), key=_cost)
    entry = torch.arange(kind.entries)
    numbers: Tensor = sum(  # type: ignore[assignment]  # of one or more
        (whole[(entry >> (bits * i)) & (len(levels) - 1)] & 255) << (8 * i) for i in range(kind.per)
    )
    lanes = torch.arange(LANES) % kind.copies * 4
    small = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.size]
    table = numbers.repeat_interleave(kind.copies).to(small).view(torch.int32)
    return Lookup(kind.text, torch.cat([lanes.int(), table]).to(levels.device), step)


def _halves(values: list[int]) -> "tuple[Tensor, Tensor] | None":
    """Signed bytes for values 0-7 and 8-15 such that what `prmt` finds in both adds up to each value, or None.

    Where a half is not meant it contributes the sign of its number, 0 or -1.
    """
    found = []
    for low, high in zip(values[:8], values[8:], strict=True):
        signs = [(a, b) for a in (0, -1) for b in (0, -1) if (low - b < 0) == (a < 0) and (high - a < 0) == (b < 0)]
        pairs = [(low - b, high - a) for a, b in signs if max(low - b, high - a) <= 127]
        if not pairs:
            return None
        found.append(pairs[0])
    low, high = torch.tensor(found).T
    return low, high


def _for_lanes(words: list[int]) -> Tensor:
    """int32 `[words, LANES]`, the same for all lanes."""
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)[:, None].expand(-1, LANES).contiguous()


def _copies(kind: trellis_asm.Kind) -> int:
    """As many as fit; a single one is smaller."""
    fit = TABLE_BYTES // (1 if kind.bits <= 2 else 2) // (4 * kind.entries)
    return min(32, 1 << fit.bit_length() - 1) if fit > 1 else 1


# How often, on average, a warp's lookups take their turn at the bank where most of them meet.
TURNS = {1: 3.5, 2: 3.3, 4: 3.1, 8: 2.9, 16: 2.0, 32: 1.0}


def _cost(kind: trellis_asm.Kind) -> float:
    """Cycles of a multiprocessor's quarter for a coordinate of a warp: of its shared memory or of its integer unit."""
    return max(4 * TURNS[kind.copies] / kind.per, 2 * (2 / kind.per + (1.35 if kind.per == 1 else 1.1)))


def integer_step(levels: Tensor, largest: int = 126) -> float | None:
    """The unit of which all `levels` are whole multiples up to `largest`, or None."""
    for top in range(1, largest + 1):
        whole = levels / levels.abs().max() * top
        if (whole - whole.round()).abs().max() < 1e-3 * min(1.0, top / 100):
            return float(levels.abs().max() / top)
    return None


def _words(numbers: Tensor) -> list[int]:
    """Signed bytes, four to a little-endian 32-bit word."""
    data = (numbers & 255).tolist() + [0] * (-len(numbers) % 4)
    return [int.from_bytes(bytes(data[i : i + 4]), "little", signed=True) for i in range(0, len(data), 4)]
