"""Codebooks against known constants, a law with a closed form, and independent numerical quadrature."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate

from tqcompress.codebook import distortion, e4m3_levels, grid_step, int8_levels, lloyd_max, uniform_levels

# Mean squared error of the optimal scalar quantizer of a unit Gaussian (Max 1960), to the digits printed there.
GAUSSIAN = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}


def quad(function, low: float, high: float) -> float:
    return integrate.quad(function, low, high, epsabs=0, epsrel=1e-10, limit=200)[0]


@cache
def density(dim: int):
    """The law of sqrt(dim) * coordinate of a random unit vector, normalised numerically."""
    edge = math.sqrt(dim)

    def shape(x: float) -> float:
        return (1 - x * x / dim) ** ((dim - 3) / 2)

    total = 2 * quad(shape, 0, edge)
    return lambda x: shape(x) / total


def cells(levels: np.ndarray, dim: int) -> list[tuple[float, float, float]]:
    """Each level with the borders of its nearest-neighbour cell."""
    edge = math.sqrt(dim)
    borders = [-edge, *((levels[1:] + levels[:-1]) / 2), edge]
    return list(zip(levels, borders[:-1], borders[1:], strict=True))


def measured_distortion(levels: np.ndarray, dim: int) -> float:
    f = density(dim)
    return sum(quad(lambda x, level=level: (x - level) ** 2 * f(x), a, b) for level, a, b in cells(levels, dim))


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_gaussian_limit_has_the_known_constants(bits):
    # Four printed digits: half a unit of the last one.
    assert abs(distortion(lloyd_max(bits, None), None) - GAUSSIAN[bits]) <= 0.5e-4


def test_gaussian_one_bit_is_exact():
    """The level is E|x| = sqrt(2/pi), the distortion 1 - 2/pi."""
    np.testing.assert_allclose(lloyd_max(1, None), [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], rtol=1e-9)
    assert distortion(lloyd_max(1, None), None) == pytest.approx(1 - 2 / math.pi, rel=1e-9)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", range(1, 5))
def test_levels_are_centroids_by_quadrature(bits, dim):
    """Lloyd's two conditions are those of the optimum: the cells are nearest-neighbour, levels their centroids."""
    f = density(dim)
    for level, low, high in cells(lloyd_max(bits, dim), dim):
        centroid = quad(lambda x: x * f(x), low, high) / quad(f, low, high)
        # The solver stops below 1e-9, the quadrature is good to 1e-10 of each integral; a cell that straddles
        # no zero has integrals of one sign, so the ratio keeps that accuracy.
        assert abs(level - centroid) <= 2e-9 * max(1.0, abs(level))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", range(1, 5))
def test_distortion_by_quadrature(bits, dim):
    levels = lloyd_max(bits, dim)
    # quad: 1e-10 of each positive term; the closed form subtracts numbers near 1: about 1e-15 / distortion.
    assert distortion(levels, dim) == pytest.approx(measured_distortion(levels, dim), rel=1e-9)


def test_distortion_of_levels_that_are_not_optimal_by_quadrature():
    levels = np.array([-2.0, -0.3, 0.3, 2.0])
    assert distortion(levels, 64) == pytest.approx(measured_distortion(levels, 64), rel=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dim_3_is_the_uniform_law(bits):
    """On the sphere in three dimensions a coordinate is uniform: uniform levels, distortion exactly 4**-bits."""
    levels = lloyd_max(bits, 3)
    uniform = math.sqrt(3) * (2 * np.arange(2**bits) + 1 - 2**bits) / 2**bits
    # A residual below 1e-9 in the centroid equations is amplified by the inverse of their Jacobian, for the
    # uniform law a second difference of n = 2**bits levels: at most n**2 / 2 (its smallest eigenvalue is
    # about (pi/n)**2 / 2).
    np.testing.assert_allclose(levels, uniform, rtol=0, atol=1e-9 * max(1, 4**bits / 2))
    assert distortion(uniform, 3) == pytest.approx(4.0**-bits, rel=1e-9)
    # At the optimum the distortion is stationary: the error above enters squared.
    assert distortion(levels, 3) == pytest.approx(4.0**-bits, rel=1e-9)


@pytest.mark.parametrize("dim", [2, 64, 80, 128, None])
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_ascending_symmetric_and_inside(bits, dim):
    levels = lloyd_max(bits, dim)
    assert levels.shape == (2**bits,)
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])
    assert dim is None or levels[-1] < math.sqrt(dim)


@pytest.mark.parametrize("dim", [64, 128, None])
def test_more_bits_are_better_and_above_the_shannon_bound_of_the_gaussian(dim):
    """The Gaussian is the worst source of its variance, so 4**-bits bounds it only: checked for dim=None."""
    errors = [distortion(lloyd_max(bits, dim), dim) for bits in range(1, 9)]
    # A bit divides the error of smooth laws by .3634/.1175 = 3.1 at first and by 4 in the limit; 2.5 leaves room.
    assert all(second < first / 2.5 for first, second in pairwise(errors))
    if dim is None:
        assert all(error > 4.0**-bits for bits, error in enumerate(errors, 1))


def test_no_small_change_improves_the_levels():
    levels = lloyd_max(3, 64)
    best = distortion(levels, 64)
    for i in range(4, 8):
        for step in (-1e-3, 1e-3):
            moved = levels.copy()
            moved[i] += step
            moved[7 - i] -= step
            assert distortion(moved, 64) > best


def test_one_coordinate_is_refused():
    with pytest.raises(ValueError, match="at least 2 coordinates"):
        lloyd_max(2, 1)


def e4m3_scales(smallest: float) -> list[float]:
    """Every scale that could put `smallest` on the grid: a mantissa of 8 to 15 sixteenths, any power of two."""
    return [mantissa / 16 * 2.0**exponent / smallest for mantissa in range(8, 16) for exponent in range(-5, 9)]


def on_grid(values: np.ndarray) -> bool:
    """Whether values are e4m3 numbers, up to the rounding of a float64 product."""
    rounded = torch.from_numpy(values).to(torch.float8_e4m3fn).to(torch.float64).numpy()
    return bool(np.allclose(rounded, values, rtol=1e-12, atol=0))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, None])
@pytest.mark.parametrize("bits", range(1, 5))
def test_e4m3_levels_times_a_common_scale_are_fp8_numbers(bits, dim):
    levels = e4m3_levels(bits, dim)
    assert levels.shape == (2**bits,)
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])
    assert any(on_grid(levels * scale) for scale in e4m3_scales(levels[2 ** (bits - 1)]))


def test_the_grid_check_itself_refuses_other_levels():
    levels = lloyd_max(4, 128)
    assert not any(on_grid(levels * scale) for scale in e4m3_scales(levels[8]))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, None])
@pytest.mark.parametrize(("bits", "loss"), [(1, 1e-9), (2, 0.002), (3, 0.002), (4, 0.015)])
def test_e4m3_levels_cost_little(bits, loss, dim):
    """The limits of the design (quality.md, 2.1: +0.1 % at 3 bits, +0.7 % at 4 bits) with some room."""
    optimum = distortion(lloyd_max(bits, dim), dim)
    assert optimum * (1 - 1e-9) <= distortion(e4m3_levels(bits, dim), dim) <= optimum * (1 + loss)


def test_e4m3_refuses_more_levels_than_the_grid_has():
    with pytest.raises(ValueError, match="too few"):
        e4m3_levels(8, 128)


HEADS = [16, 64, 80, 96, 128, 192, 256, None]


def as_stored(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.float32)


@pytest.mark.parametrize("dim", HEADS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [int8_levels, uniform_levels])
def test_levels_on_a_grid_are_symmetric_ascending_and_on_it(make, bits, dim):
    levels = make(bits, dim)
    assert levels.shape == (2**bits,)
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])
    step = grid_step(as_stored(levels))
    numbers = levels / step - (0.5 if bits == 8 else 0)
    # Rounding of the largest level to float32 moves the step, and so every quotient, by 2^-24 of it.
    np.testing.assert_allclose(numbers, numbers.round(), rtol=0, atol=127.5 * 2.0**-24)
    assert np.abs(numbers).max().round() <= (128 if bits == 8 else 127)
    if make is uniform_levels:
        np.testing.assert_allclose(np.diff(levels), levels[-1] * 2 / (2**bits - 1), rtol=1e-12)


# At most this much more error than Lloyd-Max levels have, whatever the head size: what the default of turboquant's
# `levels` rests on.
INT8_LOSS = {1: 1e-9, 2: 2e-6, 3: 6e-5, 4: 7e-4, 5: 0.007, 6: 0.034, 7: 0.19, 8: 1.13}
UNIFORM_LOSS = {1: 1e-9, 2: 0.0117, 3: 0.084, 4: 0.22, 5: 0.40, 6: 0.62, 7: 0.87, 8: 1.13}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("make", "loss"), [(int8_levels, INT8_LOSS), (uniform_levels, UNIFORM_LOSS)])
def test_what_levels_on_a_grid_cost(make, loss, bits):
    costs = [distortion(make(bits, dim), dim) / distortion(lloyd_max(bits, dim), dim) - 1 for dim in HEADS]
    assert -1e-9 <= min(costs) <= max(costs) <= loss[bits]
    assert bits == 1 or max(costs) >= loss[bits] / 2  # the limits are no wider than they need be


def test_gaussian_uniform_levels_have_the_known_constants():
    """Steps and errors of the optimal uniform quantizer of a unit Gaussian (Max 1960, table II)."""
    for bits, step, error in [(1, 1.596, 0.3634), (2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154)]:
        levels = uniform_levels(bits, None)
        assert levels[1] - levels[0] == pytest.approx(step, abs=0.6e-4 if step < 1 else 0.6e-3)
        assert distortion(levels, None) == pytest.approx(error, abs=0.6e-4 if error > 0.1 else 0.6e-5)


@pytest.mark.parametrize("make", [int8_levels, uniform_levels])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_step_of_the_same_grid_is_better(make, bits):
    levels = make(bits, 128)
    best = distortion(levels, 128)
    assert all(distortion(levels * stretch, 128) > best for stretch in (0.999, 1.001))


def test_grid_step_of_levels_by_hand():
    assert grid_step(np.float32([-1, 1])) == 1
    assert grid_step(np.float32([-2.1, -0.7, 0.7, 2.1])) == pytest.approx(0.7, rel=1e-7)
    assert grid_step(np.float32([-127, -126, 126, 127]) / 7) == pytest.approx(1 / 7, rel=1e-7)
    assert grid_step(np.float32([-128, -127, 127, 128])) is None
    assert grid_step(np.float32([-1.5, -0.5, 0.5, 1.5])) == 0.5  # half-integers are for 256 levels only
    assert grid_step(np.arange(-127.5, 128, dtype=np.float32) * 3) == 3
    assert grid_step(np.arange(256, dtype=np.float32) ** 2) is None
    # A level that is off by more than rounding: the widest grid of the others does not do, nor does any other.
    assert grid_step(np.float32([-3, -1, 1, 3.001])) is None


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_lloyd_max_levels_are_on_no_grid(bits, dim):
    assert grid_step(as_stored(lloyd_max(bits, dim))) is None
