"""Codecs and vectors to try them on, how far float32 rotations may be off, and the cases of the codec contract."""

import math
from functools import cache

import pytest
import torch

from tqcompress import Codec, HeadShape, RecipeError, TensorSpec
from tqcompress.calibrate import Moments
from tqcompress.plan import build_codec
from tqcompress.registry import plugins

U = 2.0**-24  # unit roundoff of float32

BATCH, HEADS, BLOCKS = 2, 2, 3


@cache
def build(name: str, bits: float, side: str, dim: int, options: tuple = ()) -> Codec:
    codec = build_codec(TensorSpec(name, bits, dict(options)), HeadShape(HEADS, dim, side, torch.bfloat16))
    if codec.needs_statistics:
        codec.fit(moments(dim))
    return codec


def moments(dim: int) -> Moments:
    """Means, and covariances of keys and queries whose axes differ threefold in size, in a basis of their own each."""
    generator = torch.Generator().manual_seed(1)

    def second() -> torch.Tensor:
        basis = torch.linalg.qr(torch.randn(HEADS, dim, dim, generator=generator, dtype=torch.float64))[0]
        sizes = torch.rand(HEADS, dim, generator=generator, dtype=torch.float64) * 2 + 1
        return (basis * sizes[:, None]) @ basis.mT

    mean = torch.randn(HEADS, dim, generator=generator, dtype=torch.float64)
    return Moments(1000, mean, second(), second())


# The vectors are random: the contract is about shapes, independence and arithmetic, which do not depend on where
# the vectors come from. Nothing here says how well a codec does on a real model.
def vectors(codec: Codec, blocks: int = BLOCKS, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors of different sizes, `blocks` blocks of tokens, as a bfloat16 model would have them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, blocks * codec.layout().block, codec.shape.head_dim)
    size = torch.rand(*shape[:3], 1, generator=generator) * 4 + 0.1
    return (torch.randn(shape, generator=generator) * size).to(torch.bfloat16).float()


def rotation_bound(dim: int) -> float:
    """The relative error of one float32 product with an orthogonal matrix stored in float32.

    A coordinate is a sum of dim products, |fl(xR) - xR| <= dim U |x| |R|; rounding R adds U |x| |R|; the norm of
    |R| is at most its Frobenius norm sqrt(dim). 2 % for second-order terms.
    """
    return 1.02 * (dim + 1) * math.sqrt(dim) * U


DIMS = (64, 80, 96, 128, 192, 256)
ODD_DIM = 45  # codecs may refuse it

# Tried in order: the first options that a codec accepts for a head size make the case ...
FALLBACKS = [{"group": 16}, {"group": 15}, {}]
# ... and these must keep the contract as well, at 3 bits and two head sizes.
VARIANTS = {
    "turboquant": [
        {"rotation": "dense"},
        {"rotation": "identity"},
        {"levels": "e4m3"},
        {"levels": "lloyd-max"},
        {"levels": "uniform"},
        {"scale": "log8"},
        {"norm_correction": False},
        {"seed": 7, "rotation": "dense", "levels": "e4m3", "scale": "log8"},
    ],
    "affine": [{}, {"group": 1}],
    "trellis": [
        {"states": 16},
        {"states": 64, "rotation": "dense"},
        {"states": 1024, "scale": "log8"},
        {"norm_correction": False},
    ],
    "qjl": [{"sketch": "orthogonal"}, {"rotation": "dense"}, {"sketch": "orthogonal", "rotation": "dense", "seed": 3}],
    "polar": [{"rotation": "dense"}, {"scale": "log8", "norm_correction": False}],
}
# Fractional bits, head sizes and options.
FRACTIONS = {
    "turboquant": [
        (2.5, 64, {}),
        (3.25, 64, {"scale": "log8", "rotation": "dense"}),
        (1.2, 80, {}),
        (5.75, 128, {"norm_correction": False}),
        (7.5, 256, {"levels": "uniform"}),
    ]
}

REGISTRY = plugins().registry


def accepted(name: str, side: str, dim: int) -> tuple | None:
    """The first options with which the codec takes that head size, or None."""
    bits = REGISTRY.codec(name).supported_bits[-1]
    for options in FALLBACKS:
        try:
            build(name, bits, side, dim, tuple(options.items()))
            return tuple(options.items())
        except (RecipeError, ValueError):  # a refused key is a ValidationError, which is a ValueError
            continue
    return None


def contract_cases() -> list:
    """Arguments of `build` for every registered codec: bits, sides, head sizes and options."""
    cases = []
    for name in REGISTRY.names():
        supported = REGISTRY.codec(name).supported_bits
        for side in ("key", "value"):
            for dim in (*DIMS, ODD_DIM):
                options = accepted(name, side, dim)
                if options is None and dim == ODD_DIM:
                    continue
                # All bits at one size, elsewhere the fewest, the most and 3 bits
                # (test_more_bits_are_never_worse goes through all of them).
                some = {supported[0], 3, supported[-1]} & set(supported)
                cases += [
                    pytest.param((name, bits, side, dim, options or ()), id=f"{name}-{bits}-{side}-{dim}")
                    for bits in (supported if dim == 64 else sorted(some))
                ]
            for i, options in enumerate(VARIANTS.get(name, [])):
                cases += [
                    pytest.param((name, 3, side, dim, tuple(options.items())), id=f"{name}-variant{i}-{side}-{dim}")
                    for dim in (64, 80)
                    if not (name == "affine" and not options and dim % 32)  # its default group is 32
                ]
            cases += [
                pytest.param((name, bits, side, dim, tuple(options.items())), id=f"{name}-{bits}-{side}-{dim}")
                for bits, dim, options in FRACTIONS.get(name, [])
            ]
    return cases
