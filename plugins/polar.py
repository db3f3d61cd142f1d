"""Polar quantization: pairs of rotated coordinates as a radius and an angle. A baseline.

Source: PolarQuant (arXiv 2502.02617), the first level of its recursion after a random rotation, with uniform angles and
Lloyd-Max radii. Of the `2 bits` of a pair the angle takes `bits + 1`. The radius of two coordinates of a
random vector of norm sqrt(d) has `P(R > t) = (1 - t^2 / d)^((d-2)/2)`, Rayleigh's law as d grows. With M angles a
pair lies off its angle by a uniform error of at most pi/M, so the best point on that ray is nearer the origin than the
mean radius `m` of the cell: `m s` with `s = sin(pi/M) / (pi/M)`, and the error of a coordinate `1 - s^2 E[m^2] / 2`.
"""

import math
from functools import cache

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

from tqcompress import HeadShape, Layout, RecipeError, TensorSpec, hookimpl
from tqcompress.packing import pack, plane_fields, unpack
from tqcompress.registry import Registry
from tqcompress.transform import TransformedCodec


class Polar(TransformedCodec):
    """One code a pair, `radius * angles + angle`, and one scale a vector."""

    name = "polar"
    supported_bits = (1, 2, 3, 4)
    borders: Tensor
    points: Tensor

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        dim = shape.head_dim
        if dim % 2 or dim < 4:
            raise RecipeError(f"quantizer: polar pairs coordinates, it needs an even head_dim of 4 or more, not {dim}")
        self.angles = 2 ** (self.bits + 1)
        radii = mean_radii(self.bits - 1, dim)
        borders = (radii[1:] + radii[:-1]) / 2
        angle = np.arange(self.angles) * 2 * math.pi / self.angles
        rays = np.stack([np.cos(angle), np.sin(angle)], -1) * math.sin(math.pi / self.angles) * self.angles / math.pi
        points = (radii[:, None, None] * rays).reshape(-1, 2)
        self.register_state("borders", torch.tensor(borders, dtype=torch.float32))  # between the radii
        self.register_state("points", torch.tensor(points, dtype=torch.float32))  # `[4**bits, 2]`

    def layout(self) -> Layout:
        """The codes of head_dim / 2 pairs, and the scale."""
        return Layout(plane_fields(self.shape.head_dim // 2, 2 * self.bits) | self.scale_field())

    def quantize(self, unit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The nearest angle and the nearest radius of every pair."""
        x, y = unit.unflatten(-1, (-1, 2)).unbind(-1)
        angle = (torch.atan2(y, x) * (self.angles / (2 * math.pi))).round().to(torch.int32) % self.angles
        codes = torch.bucketize(torch.hypot(x, y), self.borders, out_int32=True) * self.angles + angle
        packed = pack(codes, 2 * self.bits)
        return packed, self.dequantize(packed)

    def dequantize(self, packed: dict[str, Tensor]) -> Tensor:
        """The points of the codes."""
        codes = unpack(packed, 2 * self.bits, self.shape.head_dim // 2)
        return self.points.index_select(0, codes.flatten()).view(*codes.shape[:-1], self.shape.head_dim)


@cache
def mean_radii(bits: int, dim: int) -> np.ndarray:
    """The `2**bits` Lloyd-Max levels of the radius, ascending: each is the mean of what is nearest to it."""
    count, edge = 2**bits, math.sqrt(dim)

    def beyond(t: np.ndarray) -> np.ndarray:  # P(R > t)
        return (1 - np.clip(t / edge, 0, 1) ** 2) ** ((dim - 2) / 2)

    def integral(t: np.ndarray) -> np.ndarray:  # of `beyond` from 0 to t: an incomplete beta function
        return edge * special.beta(0.5, dim / 2) / 2 * special.betainc(0.5, dim / 2, np.clip(t / edge, 0, 1) ** 2)

    def centroids(levels: np.ndarray) -> np.ndarray:
        borders = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [edge]])
        p = beyond(borders)
        partial = np.diff(integral(borders)) - np.diff(borders * p)  # by parts: the integral of t f(t) over a cell
        return partial / np.maximum(-np.diff(p), 1e-300)

    def residual(gaps: np.ndarray) -> np.ndarray:  # positive gaps keep the levels ascending
        levels = np.cumsum(np.exp(gaps))
        return levels - centroids(levels)

    middle = (np.arange(count) + 0.5) / count
    start = np.sqrt(dim * (1 - (1 - middle) ** (2 / (dim - 2))))  # quantiles of R
    solution = optimize.root(residual, np.log(np.diff(start, prepend=0.0)), method="hybr", tol=1e-13)
    if np.abs(solution.fun).max() > 1e-9:
        raise ArithmeticError(f"the radii did not converge for {bits} bits, dim {dim}: {solution.message}")
    return np.cumsum(np.exp(solution.x))


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `polar`."""
    registry.add_codec(Polar)
