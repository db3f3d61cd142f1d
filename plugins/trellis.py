"""Trellis coded quantization: every value depends on the bits of its neighbours too, at no storage of its own.

Sources: trellis coded quantization of Marcellin and Fischer (IEEE Transactions on Communications 38(1), 1990); the
bitshift trellis and its tail-biting form are those of QTIP (arXiv 2406.11235). Here one trellis runs along the
coordinates of a vector, after the turn and the scaling of `tqcompress.transform`, and its values are a trained table.

The string. A vector is a circular string of `head_dim * bits` bits, bit `j` of it in bit `j % 8` of byte `j // 8` of
the field `codes`. With `2**L` states, the state at coordinate `i` is the number of the L bits from `i * bits` on
(with wrap around), the first of them the lowest:

    state[i] = sum of string[(i * bits + j) % (head_dim * bits)] << j over j < L,    value[i] = table[state[i]].

So a window begins at its coordinate. A step to the right drops its lowest `bits` bits, the coordinate's symbol, and
takes as many in at the top: `state[i + 1] % 2**(L - bits) == state[i] >> bits`. The string is the symbols in their
order. Any token and any coordinate decode alone.

The tables are trained for Gaussian vectors (`scripts/train_trellis.py`); their entries are integers in [-127, 127]
times one step, and none is zero, so that no decoded vector has the norm 0.
"""

from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from safetensors.torch import load
from torch import Tensor

from tqcompress import Field, HeadShape, Layout, RecipeError, TensorSpec, TrellisLevels, hookimpl
from tqcompress.constants import cached_constant
from tqcompress.registry import Registry
from tqcompress.transform import TransformedCodec, TransformedOptions

# Values that attention decodes a second, by states, with up to 2 bits and with more.
RATES = {16: (7.0e12, 5.4e12), 64: (5.4e12, 3.8e12), 256: (4.2e12, 3.2e12), 1024: (3.3e12, 3.0e12)}
CHUNK_BYTES = 64 * 2**20  # of path costs, which bounds the memory that encoding takes


class TrellisOptions(TransformedOptions):
    """Recipe keys of `quantizer: trellis`. Encoding time is proportional to the states, decoding does not mind."""

    states: Literal[16, 64, 256, 1024] = 256


class Trellis(TransformedCodec):
    """A tail-biting trellis a vector: head_dim * bits / 8 bytes of codes and one scale."""

    name = "trellis"
    supported_bits = (1, 2, 3, 4)
    not_in_onnx = {"encode": "its search is a loop over all coordinates, in memory that it writes to"}
    Options = TrellisOptions
    options: TrellisOptions
    codebook: Tensor

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        states, total = self.options.states, shape.head_dim * self.bits
        if total % 8:
            raise RecipeError(f"bits: found {self.bits}; head_dim {shape.head_dim} times bits must be a multiple of 8")
        if 2**total < states:
            raise RecipeError(
                f"states: found {states}; head_dim {shape.head_dim} has {total} bits, enough for {2**total}"
            )
        self.register_state("codebook", shipped_table(states, self.bits))

    @classmethod
    def values_a_second(cls, bits: float, options: dict[str, Any]) -> float | None:
        """Lookups in shared memory bound it: as `scripts/bench_trellis.py` measured on an H200, at 2 and 3 bits."""
        return RATES[options.get("states", TrellisOptions().states)][bits > 2]

    def layout(self) -> Layout:
        """The bit string and one scale for each token."""
        return Layout({"codes": Field(torch.uint8, self.shape.head_dim * self.bits // 8)} | self.scale_field())

    def quantize(self, unit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The path of least squared error through each vector's trellis, by Viterbi's algorithm in two passes.

        Args:
            unit: vectors of variance 1 a coordinate, `[batch, kv_heads, tokens, head_dim]`.
        """
        symbols = search(unit.reshape(-1, self.shape.head_dim), self.codebook, self.bits)
        codes = pack_string(symbols, self.bits)
        packed = {"codes": codes.view(*unit.shape[:-1], codes.shape[-1])}
        return packed, self.dequantize(packed)

    def dequantize(self, packed: dict[str, Tensor]) -> Tensor:
        """The table's values of all windows, `[batch, kv_heads, tokens, head_dim]`."""
        states = windows(packed["codes"], self.bits, self.shape.head_dim, len(self.codebook))
        return self.codebook.index_select(0, states.flatten()).view(states.shape)

    def levels(self) -> TrellisLevels | None:
        """The table in the stored basis, for fused kernels; None for one that is not on the grid of those shipped."""
        step = float(self.codebook.abs().max() / 127)
        whole = self.codebook / step
        if (whole - whole.round()).abs().max() > 1e-4:
            return None
        into, back = self.basis()
        return TrellisLevels(
            levels=self.codebook,
            bits=self.bits,
            scale_format=self.options.scale,
            step=step,
            into=into,
            back=back,
            mean=self.mean if self.options.center else None,
            norm_correction=self.options.norm_correction,
        )


# -------------------------------------------------------------------------------------------------- the string


def pack_string(symbols: Tensor, bits: int) -> Tensor:
    """uint8 `[..., head_dim * bits / 8]`: the strings of the symbols `[..., head_dim]`."""
    string: Tensor = (symbols.to(torch.int32).unsqueeze(-1) >> _places(bits, symbols.device)) & 1
    octets: Tensor = string.flatten(-2).unflatten(-1, (-1, 8)) << _places(8, symbols.device)
    return octets.sum(-1, dtype=torch.int32).to(torch.uint8)


def windows(codes: Tensor, bits: int, dim: int, states: int) -> Tensor:
    """int32 `[..., dim]`: the state at every coordinate of strings uint8 `[..., dim * bits / 8]`."""
    octets = codes.to(torch.int32)
    # A window of 10 bits from any bit of a byte on lies in that byte and the two behind it.
    words = octets | (octets.roll(-1, -1) << 8) | (octets.roll(-2, -1) << 16)
    first, shift = _offsets(bits, dim, codes.device)
    return (words.index_select(-1, first) >> shift) & (states - 1)


@cached_constant
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@cached_constant
def _offsets(bits: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The byte in which each coordinate's window begins, and the bit of it."""
    start = torch.arange(0, dim * bits, bits, dtype=torch.int32, device=device)
    return start // 8, start % 8


# -------------------------------------------------------------------------------------------------- the search


def reach_of(states: int, bits: int, dim: int) -> int:
    """Coordinates on either side of the seam from which the overlap there is found.

    Paths merge slowly: the squared error of a Gaussian vector is .01 to .4 % above that of looking at all coordinates
    with 128 of them, 1 % with 64, 256 states and 2 bits; a third more coordinates would halve that.
    """
    window = states.bit_length() - 1
    return min(dim // 2, max(24, 3 * window, 6 * -(-window // bits)))


@torch.no_grad()
def search(x: Tensor, table: Tensor, bits: int, reach: int | None = None) -> Tensor:
    """uint8 `[vectors, dim]`: the symbols of the best closed path for each vector, or of one nearly as good.

    Closed paths begin and end in the same `L - bits` bits, the overlap at the seam between the last coordinate and
    the first. The first pass finds the overlap from the coordinates about the seam, the second the best path that
    has it.

    Args:
        x: float32 `[vectors, dim]`.
        table: float32 `[2**L]`, the values of the states.
        reach: coordinates on either side of the seam that the first pass looks at; `reach_of` if None.
    """
    states, dim = len(table), x.shape[-1]
    overlaps = states >> bits
    reach = reach or reach_of(states, bits, dim)
    size = max(1, CHUNK_BYTES // (4 * (overlaps * (dim + 1) + states)))
    symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    room = x.new_empty(dim + 1, overlaps, min(size, len(x)))
    for part, out in zip(x.split(size), symbols.split(size), strict=True):
        part, costs = part.T.contiguous(), room[:, :, : len(part)]
        middle = torch.cat([part[dim - reach :], part[:reach]])
        costs[0] = 0
        last = forward(middle, table, bits, costs).argmin(0)
        overlap = backward(middle, table, bits, costs, last, reach)[1]
        costs[0].fill_(torch.inf).scatter_(0, overlap[None], 0.0)
        forward(part, table, bits, costs)
        out.copy_(backward(part, table, bits, costs, overlap)[0].T)
    return symbols


def forward(x: Tensor, table: Tensor, bits: int, costs: Tensor) -> Tensor:
    """Fill `costs` with the least costs of paths to the overlaps in front of each coordinate; returns the last.

    States meet in the upper `L - bits` bits that they hand on, their overlap with the next state; so costs are kept
    by overlap, `2**bits` fewer than states. The cost of a value v for a coordinate x is v^2 - 2 v x.

    Args:
        x: float32 `[dim, vectors]`.
        costs: float32 `[dim + 1 or more, overlaps, vectors]`; `costs[0]` holds those of the first overlaps.
    """
    fan, overlaps = 2**bits, len(table) >> bits
    value = table.view(fan, overlaps, 1)
    square = value * value
    step = costs.new_empty(fan, *costs.shape[1:])
    for i in range(len(x)):
        torch.add(square, costs[i], out=step).addcmul_(value, x[i], value=-2)
        # The states that hand on the same overlap are neighbours: they differ in the bits that are dropped.
        torch.amin(step.view(overlaps, fan, -1), 1, out=costs[i + 1])
    return costs[len(x)]


def backward(
    x: Tensor, table: Tensor, bits: int, costs: Tensor, overlap: Tensor, down_to: int = 0
) -> tuple[Tensor, Tensor]:
    """The best paths that end in `overlap` `[vectors]`: symbols uint8 `[dim, vectors]`, and overlaps at `down_to`.

    Each step compares the `2**bits` states behind an overlap anew: storing which was the best would cost the
    forward pass several times what this does. Symbols below `down_to` are not filled in.
    """
    fan, mask = 2**bits, (len(table) >> bits) - 1
    value = table.view(mask + 1, fan).T.contiguous()  # [symbol, overlap]
    symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    digits = torch.arange(fan, device=x.device)[:, None]
    for i in range(len(x) - 1, down_to - 1, -1):
        behind = overlap << bits
        v = value.index_select(1, overlap)
        found = costs[i].gather(0, (behind | digits) & mask) + v * (v - 2 * x[i])
        best, half = digits, fan // 2
        while half:  # a knockout: argmin along so few rows takes ten times as long
            upper = found[half:] < found[:half]
            best = torch.where(upper, best[half:], best[:half])
            found = torch.minimum(found[half:], found[:half])
            half //= 2
        best = best[0]
        symbols[i] = best
        overlap = (behind | best) & mask
    return symbols, overlap


# -------------------------------------------------------------------------------------------------- the tables


@cache
def shipped_tables() -> dict[str, Tensor]:
    """All that `tqcompress/data/trellis.safetensors` holds, by name."""
    return load((resources.files("tqcompress") / "data" / "trellis.safetensors").read_bytes())


def shipped_table(states: int, bits: int) -> Tensor:
    """float32 `[states]`: the trained values of the states; integers in [-127, 127] times one step."""
    tables, name = shipped_tables(), f"states{states}.bits{bits}"
    return tables[name].float() * tables[f"{name}.step"]


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `trellis`."""
    registry.add_codec(Trellis)
