"""TurboQuant: random rotation, one scale a vector, Lloyd-Max levels a coordinate.

Source: TurboQuant (arXiv 2504.19874), the MSE variant. Unlike the paper, the stored scale is by default
|x| / |levels[codes]| and not |x| / sqrt(head_dim): the decoded vector keeps its norm, at no cost. And up to 4 bits
the levels are by default moved to an int8 grid, which fused kernels multiply fastest, for less than .1 % of error.
Centring and balancing (`tqcompress.transform`) are not the paper's.
"""

from typing import Literal

import torch
from torch import Tensor

from tqcompress import HeadShape, Layout, RecipeError, ScalarLevels, TensorSpec, hookimpl
from tqcompress.codebook import e4m3_levels, grid_step, int8_levels, lloyd_max, uniform_levels
from tqcompress.packing import look_up, pack, plane_fields
from tqcompress.transform import TransformedCodec, TransformedOptions

INT8_BITS = (1, 2, 3, 4, 8)  # where levels are on an int8 grid unless the recipe says otherwise

LEVELS = {"int8": int8_levels, "lloyd-max": lloyd_max, "uniform": uniform_levels, "e4m3": e4m3_levels}


class TurboQuantOptions(TransformedOptions):
    """Recipe keys of `quantizer: turboquant`."""

    # None is int8 up to 4 bits, and at 8, where the doubled error is still a hundredth of that of 4 bits; lloyd-max
    # at 5 to 7, where int8 costs .6, 3 and 18 %.
    levels: Literal["int8", "lloyd-max", "uniform", "e4m3"] | None = None


class TurboQuant(TransformedCodec):
    """Scalar quantization in a turned basis: head_dim * bits / 8 bytes of codes and one scale a vector."""

    name = "turboquant"
    Options = TurboQuantOptions

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        levels = self.options.levels or ("int8" if self.bits in INT8_BITS else "lloyd-max")
        try:
            book = LEVELS[levels](self.bits, shape.head_dim)
        except ValueError as error:
            raise RecipeError(f"levels: found {levels!r}; {error}; use lloyd-max or uniform") from None
        self.register_state("codebook", torch.tensor(book, dtype=torch.float32))

    def layout(self) -> Layout:
        """Packed codes and one scale for each token."""
        return Layout(plane_fields(self.shape.head_dim, self.bits) | self.scale_field())

    def quantize(self, unit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The nearest level of every coordinate."""
        codes = torch.bucketize(unit, (self.codebook[1:] + self.codebook[:-1]) / 2, out_int32=True)
        return pack(codes, self.bits), self._levels_of(codes)

    def dequantize(self, packed: dict[str, Tensor]) -> Tensor:
        """The levels of the codes."""
        return look_up(packed, self.bits, self.shape.head_dim, self.codebook)

    def levels(self) -> ScalarLevels | None:
        """The codebook in the stored basis: every fused kernel can read it."""
        into, back = self.basis()
        return ScalarLevels(
            levels=self.codebook,
            bits=self.bits,
            scale_format=self.options.scale,
            step=grid_step(self.codebook.numpy(force=True)),  # not by `options.levels`: a file may have changed it
            into=into,
            back=back,
            mean=self.mean if self.options.center else None,
            norm_correction=self.options.norm_correction,
        )

    def _levels_of(self, codes: Tensor) -> Tensor:
        return self.codebook.index_select(0, codes.flatten()).view(codes.shape)  # faster than indexing


@hookimpl
def tqcompress_register(registry):
    """Add `turboquant`."""
    registry.add_codec(TurboQuant)
