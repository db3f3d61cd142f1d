"""Lossless storage: the bytes of the values themselves, through the same path as every quantizer.

For heads that must stay exact beside quantized ones (`skip: true` with `heads:`), and for telling whether a
difference comes from quantization or from somewhere else.
"""

from torch import Tensor

from tqcompress import Codec, Field, HeadShape, Layout, RecipeError, TensorSpec, hookimpl
from tqcompress.registry import Registry


class Exact(Codec):
    """Stores each value in the model's own dtype; `bits`, 16 or 32, must be at least its width."""

    name = "exact"
    supported_bits = (16, 32)

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        if self.bits < shape.dtype.itemsize * 8:
            raise RecipeError(f"bits: found {self.bits}; this model holds {shape.dtype} values, use 32")

    def layout(self) -> Layout:
        """One field of raw values."""
        return Layout({"values": Field(self.shape.dtype, self.shape.head_dim)})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Copy."""
        return {"values": x.to(self.shape.dtype)}

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The values, float32."""
        return packed["values"].float()


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `exact`."""
    registry.add_codec(Exact)
