"""Baselines: the noise of QJL and of polar pairs is what their theory, and others' measurements, say."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from tqcompress.plugins.polar import mean_radii
from tqcompress.plugins.qjl import mean_magnitude

from tqcompress import HeadShape, RecipeError, TensorSpec
from tqcompress.codebook import distortion, lloyd_max
from tqcompress.plan import build_codec

U16 = 2.0**-11  # unit roundoff of float16
DRAWS, VECTORS = 100, 40


def codec(name, bits, dim, **options):
    return build_codec(TensorSpec(name, bits, {"rotation": "dense"} | options), HeadShape(1, dim, "key"))


def gaussian(tokens, dim):
    return torch.randn(1, 1, tokens, dim, generator=torch.Generator().manual_seed(5))


def sketch_noise(sketch, dim):
    """The squared error of an estimated residual over its own square, see `plugins/qjl.py`."""
    return math.pi / 2 - 1 / dim if sketch == "gaussian" else 1 / (dim * mean_magnitude(dim) ** 2) - 1


@cache
def draws(bits, dim, sketch):
    """The error and the slope E<x, x'> / |x|^2 of the same vectors under many rotations and sketches: float64 each."""
    x = gaussian(VECTORS, dim)
    size = x.double().square().sum()
    errors, slopes = [], []
    for seed in range(DRAWS):
        one = codec("qjl", bits, dim, sketch=sketch, seed=seed)
        decoded = one.decode(one.encode(x))
        errors.append((decoded - x).double().square().sum() / size)
        slopes.append((decoded.double() * x.double()).sum() / size)
    return torch.stack(errors), torch.stack(slopes)


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (1, 128), (2, 128), (3, 128), (4, 128), (3, 80)])
def test_qjl_is_unbiased_and_as_noisy_as_derived(bits, dim, sketch):
    """Draws of rotation and sketch are independent and the vectors fixed: 5 standard errors of the mean over draws.

    Both stored norms round to float16, which moves x' by at most U16 (|x'| + |x' - levels|) <= 2 U16 (|x| + |error|).
    """
    errors, slopes = draws(bits, dim, sketch)
    levels = distortion(lloyd_max(bits - 1, dim), dim) if bits > 1 else 1.0
    expected = levels * sketch_noise(sketch, dim)
    rounding = 2 * U16 * (1 + expected**0.5)
    assert abs(errors.mean() - expected) <= 5 * errors.std() / DRAWS**0.5 + 2 * rounding * expected**0.5
    assert abs(slopes.mean() - 1) <= 5 * slopes.std() / DRAWS**0.5 + rounding


# Measured independently on Gaussian vectors of 128 coordinates, with one sketch.
MEASURED = {("gaussian", 2): 0.570, ("gaussian", 3): 0.183, ("gaussian", 4): 0.054,
            ("orthogonal", 2): 0.205, ("orthogonal", 3): 0.066, ("orthogonal", 4): 0.019}  # fmt: skip


@pytest.mark.parametrize(("sketch", "bits"), MEASURED)
def test_qjl_agrees_with_others_measurements(sketch, bits):
    """One draw lies within 5 standard deviations of the mean over draws; the figures have three decimals."""
    errors, _ = draws(bits, 128, sketch)
    assert abs(errors.mean() - MEASURED[sketch, bits]) <= 5 * errors.std() + 0.0005


def test_the_orthogonal_factor_tends_to_the_gaussian_one():
    """1 / (d m) over sqrt(pi / 2) / sqrt(d), the factors for rows of norm 1: 1 - 1/(4 d) + O(1/d^2)."""
    for dim in (64, 128, 1024):
        ratio = 1 / (dim * mean_magnitude(dim)) / math.sqrt(math.pi / (2 * dim))
        assert ratio == pytest.approx(1 - 1 / (4 * dim), abs=1 / dim**2)


def test_qjl_estimates_scores_as_published():
    """q . decode(k) is q . k_mse + |r| c (S q) . sign(S r), all in the rotated basis."""
    dim = 64
    one = codec("qjl", 3, dim)
    key, query = gaussian(8, dim), gaussian(16, dim)[:, :, 8:]
    turned, asked = one.rotate(key).double(), one.rotate(query).double()
    norm = turned.norm(dim=-1, keepdim=True)
    unit = turned / norm * dim**0.5
    level = one.codebook.double()[(unit[..., None] - one.codebook.double()).abs().argmin(-1)]
    rest, matrix = unit - level, one.sketch.double() / (math.sqrt(math.pi / 2) / dim)
    assert matrix.std() == pytest.approx(1, abs=5 / math.sqrt(2 * dim * dim))
    sketched = ((asked @ matrix.T) * (rest @ matrix.T).sign()).sum(-1)
    score = (asked * level).sum(-1) + rest.norm(dim=-1) * math.sqrt(math.pi / 2) / dim * sketched
    score = score * norm[..., 0] / dim**0.5
    found = (query.double() * one.decode(one.encode(key)).double()).sum(-1)
    # The scale rounds the whole, the residual's norm its part: U16 of each; float32 is far below.
    assert ((found - score).abs() <= 3 * U16 * query.norm(dim=-1) * key.norm(dim=-1)).all()


def polar_distortion(bits, dim):
    """`1 - s^2 E[m^2] / 2`, see `plugins/polar.py`, with the probabilities of the radii's cells."""
    radii, angles = mean_radii(bits - 1, dim), 2 ** (bits + 1)
    borders = np.concatenate([[0.0], (radii[1:] + radii[:-1]) / 2, [dim**0.5]])
    probability = -np.diff((1 - borders**2 / dim).clip(0) ** ((dim - 2) / 2))
    shrink = math.sin(math.pi / angles) * angles / math.pi
    return 1 - shrink**2 * (probability * radii**2).sum() / 2


@pytest.mark.parametrize(("bits", "known"), [(1, 0.3634), (2, 0.1198), (3, 0.03486), (4, 0.00949)])
def test_polar_distortion_of_a_gaussian(bits, known):
    """Known from a simulation of radius and angle on Gaussian pairs, whose sampling error is about .1 %."""
    assert polar_distortion(bits, 10**6) == pytest.approx(known, rel=3e-3)
    assert polar_distortion(bits, 10**6) > distortion(lloyd_max(bits, None), None) * 0.999, "no better than Lloyd-Max"


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_polar_has_the_distortion_of_its_points(bits, dim):
    one, count = codec("polar", bits, dim, norm_correction=False), 2000
    x = gaussian(count, dim)
    error = (one.decode(one.encode(x)) - x).double().square().sum(-1) / x.double().square().sum(-1)
    expected = polar_distortion(bits, dim)
    # Independent directions: 5 standard errors; the scale rounds to float16, by U16 of the decoded vector.
    assert abs(error.mean() - expected) <= 5 * error.std() / count**0.5 + 2 * U16 * expected**0.5 + U16**2


def test_polar_refuses_what_has_no_pairs():
    with pytest.raises(RecipeError, match="even head_dim of 4 or more, not 45"):
        codec("polar", 2, 45)
