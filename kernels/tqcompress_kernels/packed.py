"""What the kernels read of a compressed side: its bit planes, scales and levels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


def plane_widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes of a code of `bits` bits, widest first: 3 -> (2, 1), 6 -> (4, 2)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


class Wide(NamedTuple):
    """What `Packed` has of the first `dim` coordinates, a multiple of 16, where they have more bits than the rest."""

    dim: int
    levels: Tensor
    bits: int
    step: float | None = None
    uniform: bool = False


class Packed(NamedTuple):
    """Keys or values as they are stored: `levels[code] * scale` in the rotated basis.

    N is the batch (contiguous cache, rows are tokens) or the number of pages (paged cache, rows are the
    tokens of a page). The last stride of every tensor is 1, all others are free.

    planes: uint8 `[N, kv_heads, rows, ceil(head_dim * width / 8)]`, one per width of `plane_widths(bits)`;
        the widest holds the low bits of the codes.
    scale: `[N, kv_heads, rows, 1]`, float16, or uint8 for 2 ** ((code - 128) / 16) with 0 for code 0.
    levels: float32 `[2**bits]`, ascending and symmetric (`levels[i] == -levels[-1 - i]`).
    bits: 1-8.
    step: if not None, `levels / step` are integers in [-127, 127].
    uniform: whether the levels are equally spaced (kernels then compute them instead of looking them up).
    window: if not 0, codes are those of a trellis: one plane, a circular string of `head_dim * bits` bits (bit j in bit
        j % 8 of byte j // 8); the value of coordinate i is `levels[w]`, w being the `window` bits from bit `i * bits`
        on, the first of them the lowest. Then `levels` is float32 `[2**window]`, in any order.
    wide: if not None, what is said here is of the other coordinates only, packed like a vector of their own; the planes
        of the first ones come before theirs. The scale is that of all.
    """

    planes: tuple[Tensor, ...]
    scale: Tensor
    levels: Tensor
    bits: int
    step: float | None = None
    uniform: bool = False
    window: int = 0
    wide: Wide | None = None

    @property
    def flat(self) -> tuple[Any, ...]:
        """Of types that custom operators take; `unflat` undoes it."""
        dim, levels, bits, _, uniform = self.wide or (0, None, 0, None, False)
        return (list(self.planes), *self[1:7], levels, dim, bits, uniform)

    def parts(self, dim: int) -> "tuple[tuple[int, int, Packed], ...]":
        """The first coordinate, the number of them and the codes of each part of vectors of `dim` coordinates."""
        if self.wide is None:
            return ((0, dim, self),)
        count, levels, bits, step, uniform = self.wide
        planes = len(plane_widths(bits))
        first = Packed(self.planes[:planes], self.scale, levels, bits, step, uniform)
        return (0, count, first), (count, dim - count, self._replace(planes=self.planes[planes:], wide=None))


def unflat(
    planes: Sequence[Tensor], scale: Tensor, levels: Tensor, bits: int, step: float | None, uniform: bool, window: int,
    wide_levels: Tensor | None, wide_dim: int, wide_bits: int, wide_uniform: bool,
) -> Packed:  # fmt: skip
    """Undo `Packed.flat`, but for the step of the first coordinates."""
    wide = None if wide_levels is None else Wide(wide_dim, wide_levels, wide_bits, None, wide_uniform)
    return Packed(tuple(planes), scale, levels, bits, step, uniform, window, wide)


def is_uniform(levels: Tensor) -> bool:
    """Whether `levels` are equally spaced; reads them on the host, so once a codec and not once a step."""
    gaps = levels.double().diff()
    return bool(((gaps - gaps.mean()).abs() <= 1e-5 * gaps.mean()).all())
