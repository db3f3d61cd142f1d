"""Affine quantization with per-channel keys and per-token values: the baseline.

Source: KIVI (arXiv 2402.02750): keys share a minimum and a step along `group` tokens of one channel, values
along `group` channels of one token.
"""

from typing import Annotated

import torch
from pydantic import Field as Bounds
from torch import Tensor

from tqcompress import Codec, Field, HeadShape, Layout, Options, RecipeError, TensorSpec, hookimpl
from tqcompress.packing import pack, plane_fields, unpack
from tqcompress.registry import Registry


class AffineOptions(Options):
    """Recipe keys of `quantizer: affine`."""

    group: Annotated[int, Bounds(ge=1, le=1 << 16)] = 32


class Affine(Codec):
    """`code * step + low`, fp16 step and low for each group of `group` values."""

    name = "affine"
    Options = AffineOptions
    options: AffineOptions

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        self.group = self.options.group
        self.per_channel = shape.side == "key"
        if not self.per_channel and shape.head_dim % self.group:
            divisors = [n for n in range(1, shape.head_dim + 1) if shape.head_dim % n == 0]
            raise RecipeError(
                f"group: found {self.group}; for values of head_dim {shape.head_dim} use one of {divisors}"
            )

    def layout(self) -> Layout:
        """Keys: one row of steps for every `group` tokens; values: head_dim / group steps a token."""
        dim = self.shape.head_dim
        groups = Field(torch.float16, dim, self.group) if self.per_channel else Field(torch.float16, dim // self.group)
        return Layout(plane_fields(dim, self.bits) | {"step": groups, "low": groups})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Quantize each group between its minimum and maximum, with the step and minimum as stored."""
        grouped, axis = self._grouped(x.float())
        low = grouped.amin(axis, keepdim=True).half()
        step = ((grouped.amax(axis, keepdim=True) - low.float()) / (2**self.bits - 1)).half()
        # A constant group has step 0 and needs only its minimum; the divisor is then irrelevant.
        codes = ((grouped - low.float()) / torch.where(step == 0, 1.0, step.float())).round()
        codes = codes.clamp(0, 2**self.bits - 1).reshape(x.shape)
        return pack(codes, self.bits) | {"step": step.squeeze(axis), "low": low.squeeze(axis)}

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The decoded vectors, float32."""
        codes = unpack(packed, self.bits, self.shape.head_dim).float()
        grouped, axis = self._grouped(codes)
        step, low = (packed[name].float().unsqueeze(axis) for name in ("step", "low"))
        return (grouped * step + low).reshape(codes.shape)

    def _grouped(self, x: Tensor) -> tuple[Tensor, int]:
        """`x` with its grouped axis split in (groups, group), and the axis to reduce."""
        axis = -2 if self.per_channel else -1
        return x.unflatten(axis, (-1, self.group)), axis


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `affine`."""
    registry.add_codec(Affine)
