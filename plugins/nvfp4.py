"""nvfp4: e2m1 numbers with an e4m3 scale for every 16 of them, 4.5 bits a value. A baseline: no rotation, no mean.

Source: the block format of NVIDIA's Blackwell (OCP MX formats, arXiv 2310.10537, with blocks of 16 and e4m3 scales);
its scale for a whole tensor is left out, keys and values lie within the range of the others.
"""

import torch
from torch import Tensor

from tqcompress import Codec, Field, HeadShape, Layout, RecipeError, TensorSpec, hookimpl
from tqcompress.packing import pack, plane_fields, unpack
from tqcompress.registry import Registry

BLOCK = 16
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1
LARGEST = 448.0  # of a scale


class Nvfp4(Codec):
    """Code = sign * 8 + index of the magnitude; a block's scale is its largest magnitude over 6."""

    name = "nvfp4"
    supported_bits = (4,)
    magnitudes: Tensor

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        if shape.head_dim % BLOCK:
            raise RecipeError(f"quantizer: nvfp4 needs a head_dim that is a multiple of {BLOCK}, not {shape.head_dim}")
        self.register_state("magnitudes", torch.tensor(POSITIVE))

    def layout(self) -> Layout:
        """Codes, and a byte for each block."""
        dim = self.shape.head_dim
        return Layout(plane_fields(dim, 4) | {"scale": Field(torch.uint8, dim // BLOCK)})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Scale every block, take the nearest number."""
        blocks = x.float().unflatten(-1, (-1, BLOCK))
        scale = blocks.abs().amax(-1) / POSITIVE[-1]
        scale = torch.where(scale > LARGEST, torch.nan, scale).to(torch.float8_e4m3fn)
        divisor = scale.float().nan_to_num(LARGEST)
        unit = blocks / torch.where(divisor > 0, divisor, 1.0)[..., None]
        borders = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        codes = torch.bucketize(unit.abs(), borders, out_int32=True) + 8 * (unit < 0)
        return pack(codes.flatten(-2), 4) | {"scale": scale.view(torch.uint8)}

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The numbers as float32; a scale that was too large as the largest."""
        codes = unpack(packed, 4, self.shape.head_dim)
        magnitude = self.magnitudes.index_select(0, (codes & 7).flatten()).view(codes.shape)
        signed: Tensor = torch.where(codes >= 8, -magnitude, magnitude).unflatten(-1, (-1, BLOCK))
        scale = packed["scale"].view(torch.float8_e4m3fn).float().nan_to_num(LARGEST)
        return (signed * scale[..., None]).flatten(-2)

    def fits(self, packed: dict[str, Tensor]) -> Tensor:
        """False if a scale was beyond e4m3."""
        return (packed["scale"] & 127 != 127).all()


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `nvfp4`."""
    registry.add_codec(Nvfp4)
