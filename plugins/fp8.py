"""fp8: a plain cast to float8 e4m3, one byte a value, no scale. The baseline that serving engines offer.

Source: the format E4M3 of Micikevicius et al. (arXiv 2209.05433); engines use it so, with a scale of 1.
"""

import torch
from torch import Tensor

from tqcompress import Codec, Field, Layout, hookimpl
from tqcompress.registry import Registry

LARGEST = 448.0  # of e4m3
NAN = 127  # its bits but for the sign; one less is the largest number


class Fp8(Codec):
    """The nearest e4m3 number of every value."""

    name = "fp8"
    supported_bits = (8,)

    def layout(self) -> Layout:
        """One byte a value."""
        return Layout({"values": Field(torch.uint8, self.shape.head_dim)})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Cast; what is too large is stored as NaN of its sign, which `fits` tells."""
        x = x.float()
        values = x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"values": torch.where(x.abs() > LARGEST, values | NAN, values)}

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The numbers as float32; what was too large as the largest."""
        values = packed["values"]
        finite = torch.where(values & NAN == NAN, values - 1, values)
        return finite.view(torch.float8_e4m3fn).float()

    def fits(self, packed: dict[str, Tensor]) -> Tensor:
        """False if a value was beyond 448."""
        return (packed["values"] & NAN != NAN).all()


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `fp8`."""
    registry.add_codec(Fp8)
