"""Rotations: orthogonal, reproducible, and spreading outliers as documented."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompress.rotation import Rotation, hadamard, random_orthogonal, random_signs

DIMS = [64, 80, 96, 128, 192, 256]
ODD = [1, 3, 7, 45, 63]
U = 2.0**-24  # unit roundoff of float32


def gaussian(dim: int, count: int = 50) -> torch.Tensor:
    # Random data is enough: what is checked here holds for every vector.
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(dim))


def matmul_bound(dim: int) -> float:
    """The relative error of one float32 product with an orthogonal matrix R stored in float32.

    Each coordinate is a sum of dim products: |fl(xR) - xR| <= dim*U * |x| |R| (first order), and the rounding of
    R adds U * |x| |R|; the norm of |R| is at most its Frobenius norm sqrt(dim). 2 % for second-order terms.
    """
    return 1.02 * (dim + 1) * math.sqrt(dim) * U


@pytest.mark.parametrize("dim", DIMS + ODD)
def test_hadamard_is_orthogonal_and_symmetric(dim):
    matrix = hadamard(dim)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    # Entries are rounded to float32 once: each entry of H H' moves by at most 2 U |h_i| |h_k| = 2 U.
    error = matrix.double() @ matrix.double().T - torch.eye(dim, dtype=torch.float64)
    assert error.abs().max() <= 2.01 * U


@pytest.mark.parametrize("dim", DIMS + ODD)
def test_hadamard_entries_are_bounded(dim):
    """Entries are at most sqrt(2/dim); exactly +-1/sqrt(dim) where dim is a power of two."""
    magnitude = hadamard(dim).abs()
    assert magnitude.max() <= math.sqrt(2 / dim) * (1 + U)
    if dim & (dim - 1) == 0:
        assert torch.equal(magnitude, torch.full((dim, dim), dim**-0.5))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200))
def test_hadamard_exists_for_every_size(dim):
    matrix = hadamard(dim).double()
    assert (matrix @ matrix.T - torch.eye(dim, dtype=torch.float64)).abs().max() <= 2.01 * U
    assert matrix.abs().max() <= math.sqrt(2 / dim) * (1 + U)


def test_hadamard_made_in_inference_mode_serves_autograd():
    """The matrix is cached for the process: a first use under inference_mode must not break training later."""
    with torch.inference_mode():
        hadamard(44)  # a size that nothing else here uses
    x = torch.ones(44, requires_grad=True)
    (x @ hadamard(44)).sum().backward()
    assert x.grad.isfinite().all()


def test_exporting_leaves_no_fake_tensor_in_the_cache():
    class Rotate(torch.nn.Module):
        def forward(self, x):
            return x @ hadamard(52)

    torch.export.export(Rotate(), (torch.ones(1, 52),))
    assert type(hadamard(52)) is torch.Tensor
    assert hadamard(52).sum().item() == pytest.approx((hadamard(52) @ torch.ones(52)).sum().item())


def test_signs_are_pinned():
    """Stored codes are only readable with these very signs: they may never change."""
    assert random_signs(16, 0).tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, -1, -1]
    assert random_signs(16, 1).tolist() == [1, 1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, -1, 1, 1, -1]
    assert random_signs(16, 7).tolist() == [1, -1, 1, -1, 1, 1, 1, 1, -1, 1, -1, 1, -1, 1, -1, -1]


def test_signs_are_reproducible_balanced_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = random_signs(4096, 5)
    assert torch.equal(first, random_signs(4096, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.int8
    assert set(first.tolist()) == {-1, 1}
    # A fair coin: the sum has a standard deviation of sqrt(4096) = 64; 5 of them.
    assert abs(first.sum(dtype=torch.int64)) <= 5 * 64
    assert not torch.equal(first, random_signs(4096, 6))


@pytest.mark.parametrize("dim", [3, 64, 80])
def test_dense_is_orthogonal_and_depends_on_the_seed(dim):
    matrix = random_orthogonal(dim, 0)
    assert matrix.dtype == torch.float32
    error = matrix.double() @ matrix.double().T - torch.eye(dim, dtype=torch.float64)
    assert error.abs().max() <= 2.01 * U
    assert torch.equal(matrix, random_orthogonal(dim, 0))
    # Two independent Haar matrices differ by sqrt(2 dim) in the Frobenius norm, give or take about 1.
    assert (matrix - random_orthogonal(dim, 1)).norm() > 0.5


@pytest.mark.parametrize("kind", ("hadamard", "dense", "identity"))
def test_state_is_reproducible(kind):
    state, again, other = (Rotation.state(kind, 64, seed) for seed in (0, 0, 1))
    assert state.keys() == {"hadamard": {"signs"}, "dense": {"rotation"}, "identity": set()}[kind]
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])


@pytest.mark.parametrize("kind", ("hadamard", "dense", "identity"))
@pytest.mark.parametrize("dim", [*DIMS, 45])
def test_inverse_undoes_forward_and_norms_stay(kind, dim):
    state, x = Rotation.state(kind, dim, 3), gaussian(dim)
    rotated = Rotation.forward(x, state)
    norms = x.norm(dim=-1)
    back = Rotation.inverse(rotated, state)
    # One float32 product each way.
    assert ((back - x).norm(dim=-1) <= 2 * matmul_bound(dim) * norms).all()
    change = (rotated.double().norm(dim=-1) - x.double().norm(dim=-1)).abs()
    assert (change <= matmul_bound(dim) * norms).all()


@pytest.mark.parametrize("kind", ("hadamard", "dense", "identity"))
def test_dot_products_stay(kind):
    state, x = Rotation.state(kind, 96, 3), gaussian(96)
    y = x.flip(0)
    before = (x.double() * y.double()).sum(-1)
    after = (Rotation.forward(x, state).double() * Rotation.forward(y, state).double()).sum(-1)
    assert ((before - after).abs() <= 2.1 * matmul_bound(96) * x.norm(dim=-1) * y.norm(dim=-1)).all()


@pytest.mark.parametrize("dim", [*DIMS, 45])
def test_hadamard_spreads_an_outlier(dim):
    """A one-hot vector becomes a row of H: no coordinate above sqrt(2/dim), so all of them carry energy."""
    rotated = Rotation.forward(100 * torch.eye(dim), Rotation.state("hadamard", dim, 0))
    # A product with a one-hot vector rounds once.
    assert rotated.abs().max() <= 100 * math.sqrt(2 / dim) * (1 + 2 * U)


@pytest.mark.parametrize("dim", [64, 80])
def test_seeds_change_the_basis(dim):
    """The signs come before the matrix: another seed must not be a mere sign flip of the coordinates."""
    x = gaussian(dim, 1)
    first, second = (Rotation.forward(x, Rotation.state("hadamard", dim, seed)) for seed in (0, 1))
    # The sorted magnitudes of a sign flip or permutation would agree within rounding.
    assert (first.abs().sort().values - second.abs().sort().values).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ("hadamard", "dense", "identity"))
@pytest.mark.parametrize("dim", [80, 128])
def test_matrix_is_that_of_forward_and_its_transpose_that_of_inverse(kind, dim):
    state, x = Rotation.state(kind, dim, 3), gaussian(dim)
    matrix, bound = Rotation.matrix(state, dim).double(), matmul_bound(dim) * x.norm(dim=-1)
    assert ((x.double() @ matrix - Rotation.forward(x, state)).norm(dim=-1) <= bound).all()
    assert ((x.double() @ matrix.T - Rotation.inverse(x, state)).norm(dim=-1) <= bound).all()


def test_identity_changes_nothing():
    x = gaussian(64)
    assert torch.equal(Rotation.forward(x, {}), x)
    assert torch.equal(Rotation.inverse(x, {}), x)
