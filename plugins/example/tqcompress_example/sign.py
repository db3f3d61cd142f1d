"""Sign quantization: one bit a coordinate and one scale a vector.

`x` is stored as the signs of its coordinates and one fp16 number: `sign(x) * scale`. That is crude, and it
is all that a quantizer needs: the layout of its rows, a way there, a way back, and a hook to announce it.
"""

from typing import Literal

import torch
from torch import Tensor

from tqcompress import Codec, Field, HeadShape, Layout, Options, ScalarLevels, TensorSpec, hookimpl
from tqcompress.packing import pack, plane_fields, unpack
from tqcompress.registry import Registry


class SignOptions(Options):
    """Recipe keys of `quantizer: sign`; pydantic checks them, unknown ones are errors."""

    # The mean of |x| gives the least squared error; the root mean square keeps the vector's length.
    scale: Literal["mean", "rms"] = "mean"


class Sign(Codec):
    """`levels[code] * scale` with the two levels -1 and 1: head_dim / 8 + 2 bytes a vector."""

    name = "sign"
    supported_bits = (1,)
    Options = SignOptions
    options: SignOptions
    codebook: Tensor

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)  # checks the bits and sets self.bits, self.shape and self.options
        # Registered, so that it follows the model to its device, is saved with it and counted as its bytes.
        self.register_state("codebook", torch.tensor([-1.0, 1.0]))

    def layout(self) -> Layout:
        """What is stored for each token of one head."""
        return Layout(plane_fields(self.shape.head_dim, self.bits) | {"scale": Field(torch.float16, 1)})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Pack `x` `[batch, kv_heads, tokens, head_dim]` into the fields of the layout."""
        x = x.float()
        mean = self.options.scale == "mean"
        scale = x.abs().mean(-1, keepdim=True) if mean else x.square().mean(-1, keepdim=True).sqrt()
        return pack(x > 0, self.bits) | {"scale": scale.half()}

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The float32 vectors that the fields stand for."""
        codes = unpack(packed, self.bits, self.shape.head_dim)
        return self.codebook[codes] * packed["scale"].float()

    def levels(self) -> ScalarLevels | None:
        """Optional: a codec of the form `levels[code] * scale` is read and written by the fused kernels as it is."""
        if self.options.scale == "mean":
            return None  # the kernels' scales keep the vector's length
        identity = torch.eye(self.shape.head_dim, device=self.codebook.device)[None]
        return ScalarLevels(self.codebook, self.bits, scale_format="fp16", step=1.0, into=identity, back=identity)


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Make `quantizer: sign` known."""
    registry.add_codec(Sign)
