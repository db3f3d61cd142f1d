"""What tests of the encoding kernels need: levels, rotations, vectors, poisoned storage, and the comparison itself."""

import math
from functools import cache

import torch
from kernels_helpers import DEVICE  # first: it decides how the kernels run

from tqcompress_kernels.encode_reference import encode_scale, pack, quantize, unpack

U = 2.0**-24  # unit roundoff of float32
POISON = 0xA5
HEADS = 2


@cache
def gaussian_levels(bits: int) -> torch.Tensor:
    """Symmetric levels, evenly spaced in probability."""
    half = torch.special.ndtri((torch.arange(2 ** (bits - 1)).double() + 0.5) / 2**bits + 0.5)
    return torch.cat([-half.flip(0), half]).float().to(DEVICE)


def even_levels(bits: int) -> torch.Tensor:
    return (torch.arange(2**bits).float() - (2**bits - 1) / 2).to(DEVICE) * 0.3


@cache
def rotation(kind: str, dim: int) -> torch.Tensor:
    """`into`: a Hadamard matrix with random signs, a dense matrix for every head, or none."""
    generator = torch.Generator().manual_seed(dim)
    if kind == "dense":
        return torch.linalg.qr(torch.randn(HEADS, dim, dim, generator=generator))[0].contiguous().to(DEVICE)
    matrix = torch.ones(1, 1)
    while kind == "hadamard" and matrix.shape[0] < dim:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / math.sqrt(2)
    signs = torch.randint(0, 2, (dim, 1), generator=generator) * 2 - 1
    return (signs * matrix if kind == "hadamard" else torch.eye(dim))[None].to(DEVICE)


def vectors(batch: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed vectors of different sizes, a view as attention layers make them: tokens before heads."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, HEADS, dim + 8)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).abs()
    x = x * torch.rand(*shape[:3], 1, generator=generator) * 4
    return x.to(dtype).to(DEVICE)[..., :dim].transpose(1, 2)


class Target:
    """Planes and scales of `tokens` rows inside bigger buffers that are full of poison."""

    def __init__(self, batch: int, tokens: int, dim: int, bits: int, scale_format: str):
        sizes = [plane.shape[-1] for plane in pack(torch.zeros(dim, dtype=torch.int64), bits)]
        self.buffers = [torch.full((batch, HEADS + 1, tokens + 2, size), POISON, dtype=torch.uint8) for size in sizes]
        scale = torch.full((batch, HEADS + 1, tokens + 2, 2), POISON, dtype=torch.uint8)
        self.buffers = [buffer.to(DEVICE) for buffer in (*self.buffers, scale)]
        views = [buffer[:, 1:] for buffer in self.buffers]
        self.planes, self.bits, self.dim = tuple(views[:-1]), bits, dim
        self.scale = views[-1].view(torch.float16) if scale_format == "fp16" else views[-1][..., :1]

    def take(self, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and stored scales of some tokens; everything else must still be poison."""
        planes = tuple(plane[:, :, start : start + tokens].clone() for plane in self.planes)
        scale = self.scale[:, :, start : start + tokens].clone()
        for field in (*self.planes, self.scale):
            field[:, :, start : start + tokens] = torch.full((2,), POISON, dtype=torch.uint8).view(field.dtype)[0]
        assert all((buffer == POISON).all() for buffer in self.buffers), "wrote where it should not"
        return unpack(planes, self.bits, self.dim), scale


def ordinal(stored: torch.Tensor) -> torch.Tensor:
    """Stored scales as integers, neighbours one apart."""
    return (stored if stored.dtype == torch.uint8 else stored.view(torch.int16)).int()


def check(codes, stored, x, into, mean, levels, scale_format, norm_correction) -> None:
    """Codes and scales are the reference's in float64, but for what rounding to float32 explains."""
    x, into, levels = x.double(), into.double(), levels.double()
    mean = mean if mean is None else mean.double()
    expected, unit, _ = quantize(x, into, mean, levels, norm_correction)
    norm = ((x if mean is None else x - mean[:, None]) @ into).norm(dim=-1, keepdim=True)
    dim = x.shape[-1]
    # A coordinate is a sum of dim products: |error| <= dim U |x| |column|; the size of a vector is sqrt(dim) units.
    size = x.norm(dim=-1, keepdim=True) + (0 if mean is None else mean.norm(dim=-1)[:, None, None])
    slack = (dim * U * math.sqrt(dim) * size / norm.clamp_min(1e-30)).expand_as(unit)
    wrong = codes != expected
    boundaries = (levels[1:] + levels[:-1]) / 2
    assert ((codes - expected).abs() <= 1).all()
    if wrong.any():
        distance = (unit[wrong] - boundaries[torch.minimum(codes, expected)[wrong]]).abs()
        assert (distance <= slack[wrong]).all(), distance.max()
    assert wrong.sum() <= 1 + 1e-3 * wrong.numel()
    length = levels[codes].norm(dim=-1, keepdim=True) if norm_correction else math.sqrt(dim)
    apart = (ordinal(stored) - ordinal(encode_scale(norm / length, scale_format))).abs()
    assert apart.max() <= 1
    assert (apart > 0).sum() <= 1 + 0.05 * apart.numel()
