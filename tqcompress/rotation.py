"""Rotations that spread a vector's energy evenly over its coordinates.

Source: the random rotation of TurboQuant (arXiv 2504.19874, section 3.1) in the randomized Hadamard form
`x -> H (signs * x)` of QuIP# (arXiv 2402.04396).
"""

import math

import torch
from torch import Tensor

from .constants import cached_constant


@cached_constant
def hadamard(dim: int, device: "torch.device | str" = "cpu") -> Tensor:
    """An orthogonal symmetric `[dim, dim]` float32 matrix with entries of even magnitude.

    For `dim = 2**k * m` with m odd it is the Kronecker product of the Sylvester-Hadamard matrix of order
    2**k and the Hartley matrix `cas(2 pi i j / m) / sqrt(m)` of order m, whose entries are at most
    sqrt(2/m): 64 and 128 get the plain Hadamard matrix, 80 gets 16 x 5, 96 gets 32 x 3.
    """
    odd = dim
    matrix = torch.ones(1, 1, dtype=torch.float64)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while odd % 2 == 0:
        matrix, odd = torch.kron(matrix, block), odd // 2
    index = torch.arange(odd, dtype=torch.float64)
    # The product is reduced modulo m before the trigonometry: exact symmetry for every m.
    angle = 2 * math.pi * (torch.outer(index, index) % odd) / odd
    hartley = (angle.cos() + angle.sin()) / math.sqrt(odd)
    return torch.kron(matrix, hartley).to(device, torch.float32)


def random_signs(dim: int, seed: int) -> Tensor:
    """`dim` random signs as int8, the same on every machine for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (dim,), generator=generator) * 2 - 1).to(torch.int8)


def random_orthogonal(dim: int, seed: int) -> Tensor:
    """A Haar-distributed orthogonal `[dim, dim]` float32 matrix (QR of a Gaussian, signs fixed by R)."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    matrix: Tensor = q * r.diagonal().sign()
    return matrix.to(torch.float32)


class Rotation:
    """An orthogonal map of `[..., dim]`, built from the state a codec registered.

    `hadamard` keeps only `signs`: the matrix itself is a constant shared by all codecs of that size.
    """

    @staticmethod
    def state(kind: str, dim: int, seed: int) -> dict[str, Tensor]:
        """The tensors that define the rotation of that kind."""
        if kind == "hadamard":
            return {"signs": random_signs(dim, seed)}
        return {"rotation": random_orthogonal(dim, seed)} if kind == "dense" else {}

    @staticmethod
    def forward(x: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Rotate float32 `x` `[..., dim]`."""
        if "signs" in state:
            return (x * state["signs"]) @ hadamard(x.shape[-1], x.device)
        return x @ state["rotation"].T if "rotation" in state else x

    @staticmethod
    def inverse(x: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Undo `forward`."""
        if "signs" in state:
            return (x @ hadamard(x.shape[-1], x.device)) * state["signs"]
        return x @ state["rotation"] if "rotation" in state else x

    @staticmethod
    def matrix(state: dict[str, Tensor], dim: int, device: "torch.device | str" = "cpu") -> Tensor:
        """The float32 matrix `[dim, dim]` of `forward`: `forward(x) = x @ matrix`; `inverse` is its transpose."""
        if "signs" in state:
            return state["signs"][:, None] * hadamard(dim, device)
        return state["rotation"].T if "rotation" in state else torch.eye(dim, device=device)
