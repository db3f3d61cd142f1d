"""Codecs and vectors to try them on, and how far float32 rotations may be off."""

import math
from functools import cache

import torch

from tqcompress import Codec, HeadShape, TensorSpec
from tqcompress.plan import build_codec

U = 2.0**-24  # unit roundoff of float32

BATCH, HEADS, BLOCKS = 2, 2, 3


@cache
def build(name: str, bits: int, side: str, dim: int, options: tuple = ()) -> Codec:
    return build_codec(TensorSpec(name, bits, dict(options)), HeadShape(HEADS, dim, side, torch.bfloat16))


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
