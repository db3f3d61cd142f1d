"""Lossless storage: the bytes of the values themselves, through the same path as every quantizer.

For heads that must stay exact beside quantized ones (`skip: true` with `heads:`), and for telling whether a
difference comes from quantization or from somewhere else.
"""

import torch
from torch import Tensor

from tqcompress import Codec, Field, HeadShape, Layout, RecipeError, TensorSpec, hookimpl


class Exact(Codec):
    """Stores each value in `bits` bits: the width of the model's dtype, or 32."""

    name = "exact"
    supported_bits = (16, 32)

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        if self.bits < shape.dtype.itemsize * 8:
            raise RecipeError(f"bits: found {self.bits}; this model holds {shape.dtype} values, use 32")

    def layout(self) -> Layout:
        """One field of raw values."""
        return Layout({"values": Field(self._dtype, self.shape.head_dim)})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Copy."""
        return {"values": x.to(self._dtype)}

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The values, float32."""
        return packed["values"].float()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.bits == 32 else self.shape.dtype


@hookimpl
def tqcompress_register(registry):
    """Add `exact`."""
    registry.add_codec(Exact)
