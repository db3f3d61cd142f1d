"""Scalar codebooks for the exact law of a coordinate of a random unit vector: Lloyd-Max levels, and levels on grids.

Source: Lloyd-Max as in TurboQuant (arXiv 2504.19874, equation 4). A coordinate of a uniform random unit
vector in R^d has the density (1 - x^2)^((d-3)/2) on [-1, 1] up to a constant; times sqrt(d) it tends to
the unit Gaussian.
"""

import math
from functools import cache

import numpy as np
from scipy import optimize, special
from scipy.stats import norm

E4M3_MAX = 448.0


class SphereCoordinate:
    """The law of sqrt(dim) times a coordinate of a random unit vector; `dim=None` is its Gaussian limit."""

    def __init__(self, dim: float | None):
        if dim is not None and dim < 2:
            raise ValueError(f"dim: found {dim}; a unit vector needs at least 2 coordinates")
        self.dim = dim
        self.edge = math.inf if dim is None else math.sqrt(dim)

    def cdf(self, x: np.ndarray) -> np.ndarray:
        """P(X <= x)."""
        if self.dim is None:
            return norm.cdf(x)
        half = (self.dim - 1) / 2
        return special.betainc(half, half, np.clip((x / self.edge + 1) / 2, 0, 1))

    def ppf(self, p: np.ndarray) -> np.ndarray:
        """The quantile function."""
        if self.dim is None:
            return norm.ppf(p)
        half = (self.dim - 1) / 2
        return (2 * special.betaincinv(half, half, p) - 1) * self.edge

    def partial_mean(self, x: np.ndarray) -> np.ndarray:
        """E[X; X > x], the integral of t f(t) from x to the edge (closed form)."""
        if self.dim is None:
            return norm.pdf(x)
        # f is (1 - u^2)^((d-3)/2) / B, so the integral of u f is (1 - u^2)^((d-1)/2) / ((d-1) B).
        log_b = special.betaln(0.5, (self.dim - 1) / 2)
        u = np.clip(x / self.edge, -1, 1)
        return self.edge * (1 - u * u) ** ((self.dim - 1) / 2) * math.exp(-log_b) / (self.dim - 1)


def _cells(levels: np.ndarray, law: SphereCoordinate) -> tuple[np.ndarray, np.ndarray]:
    """Probability and partial mean of the nearest-level cells of symmetric levels' positive half."""
    bounds = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [law.edge]])
    return np.diff(law.cdf(bounds)), -np.diff(law.partial_mean(bounds))


def distortion(levels: np.ndarray, dim: int | None) -> float:
    """Mean squared error of symmetric ascending `levels` for a coordinate scaled to unit variance."""
    half = np.asarray(levels, dtype=np.float64)[len(levels) // 2 :]
    probability, mean = _cells(half, SphereCoordinate(dim))
    return float(1 + 2 * np.sum(half * half * probability - 2 * half * mean))


@cache
def lloyd_max(bits: int, dim: int | None) -> np.ndarray:
    """The `2**bits` optimal levels, ascending and symmetric, for a coordinate scaled to unit variance."""
    law = SphereCoordinate(dim)
    count = 2 ** (bits - 1)

    def residual(gaps: np.ndarray) -> np.ndarray:
        half = np.cumsum(np.exp(gaps))  # positive gaps keep the levels ascending whatever the solver tries
        probability, mean = _cells(half, law)
        return half - mean / np.maximum(probability, 1e-300)  # zero where each level is its cell's centroid

    # Panter-Dite start: quantiles of density^(1/3), which is a law of the same family.
    if dim is None:
        wide, stretch = law, math.sqrt(3)
    else:
        wide = SphereCoordinate((dim + 6) / 3)
        stretch = law.edge / wide.edge
    start = stretch * wide.ppf(0.5 + (np.arange(count) + 0.5) / (2 * count))
    solution = optimize.root(residual, np.log(np.diff(start, prepend=0.0)), method="hybr", tol=1e-13)
    half = np.cumsum(np.exp(solution.x))
    if np.abs(residual(solution.x)).max() > 1e-9:
        raise ArithmeticError(f"Lloyd-Max did not converge for {bits} bits, dim {dim}: {solution.message}")
    return _mirrored(half)


@cache
def uniform_levels(bits: int, dim: int | None) -> np.ndarray:
    """Evenly spaced levels: `(2 * code + 1 - 2**bits)` times the number of least distortion."""
    return _stretched(np.arange(1.0, 2**bits, 2), bits, dim)


@cache
def int8_levels(bits: int, dim: int | None) -> np.ndarray:
    """Lloyd-Max levels moved to integers in [-127, 127] times the common step of least distortion.

    At 8 bits, where there are fewer integers than levels, these are the uniform ones.
    """
    if bits == 8:
        return uniform_levels(bits, dim)
    half = lloyd_max(bits, dim)[2 ** (bits - 1) :]
    best = None
    for scale in np.geomspace(63.5, 127.49, 512) / half[-1]:  # a smaller grid is in these too, doubled
        grid = np.round(half * scale)
        if grid[0] > 0 and (np.diff(grid) > 0).all():
            error = distortion(_mirrored(grid / scale), dim)
            best = (error, grid) if best is None or error < best[0] else best
    if best is None:
        raise ValueError(f"{bits} bits: the int8 grid has too few numbers for these {2**bits} levels")
    return _stretched(best[1], bits, dim)


def _stretched(grid: np.ndarray, bits: int, dim: int | None) -> np.ndarray:
    """Symmetric levels whose positive half is `grid` times the step of least distortion."""
    near = lloyd_max(bits, dim)[-1] / grid[-1]
    found = optimize.minimize_scalar(
        lambda step: distortion(_mirrored(grid * step), dim),
        bounds=(near / 2, near * 1.1),
        method="bounded",
        options={"xatol": 1e-10 * near},
    )
    return _mirrored(grid * found.x)


def _mirrored(half: np.ndarray) -> np.ndarray:
    return np.concatenate([-half[::-1], half])


def grid_step(levels: np.ndarray) -> float | None:
    """The widest step of which float32 `levels` are integers in [-127, 127], up to their rounding, or None.

    256 levels, more than there are integers, may be -127.5, -126.5 ... 127.5 times the step instead.
    """
    levels = np.asarray(levels, dtype=np.float64)
    top = np.abs(levels).max()
    for number in (127.5,) if len(levels) == 256 else range(1, 128):
        ratio = levels * (number / top)
        shift = number % 1
        if np.abs(ratio - shift - np.round(ratio - shift)).max() <= number * 2.0**-23:
            return float(top / number)
    return None


@cache
def e4m3_levels(bits: int, dim: int | None) -> np.ndarray:
    """Lloyd-Max levels moved to multiples of the fp8 e4m3 grid: `levels * scale` are e4m3 numbers.

    The common scale is the one of least distortion; fused kernels then look levels up as fp8 operands.
    """
    half = lloyd_max(bits, dim)[2 ** (bits - 1) :]
    best = None
    for scale in np.geomspace(16, 32, 512, endpoint=False) / half[0] * 0.5:
        if half[-1] * scale > E4M3_MAX:
            scale *= 2.0 ** -math.ceil(math.log2(half[-1] * scale / E4M3_MAX))
        grid = _round_e4m3(half * scale)
        levels = _mirrored(grid / scale)
        if len(set(grid)) == len(grid) and (best is None or distortion(levels, dim) < best[0]):
            best = (distortion(levels, dim), levels)
    if best is None:
        raise ValueError(f"{bits} bits: the e4m3 grid has too few numbers for {2**bits} levels")
    return best[1]


def _round_e4m3(x: np.ndarray) -> np.ndarray:
    """Round positive numbers in the normal range to 3 mantissa bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 16) / 16, exponent)
