"""TurboQuant: random rotation, one scale a vector, Lloyd-Max levels a coordinate.

Source: TurboQuant (arXiv 2504.19874), the MSE variant. Unlike the paper, the stored scale is by default
|x| / |levels[codes]| and not |x| / sqrt(head_dim): the decoded vector keeps its norm, at no cost. And up to 4 bits
the levels are by default moved to an int8 grid, which fused kernels multiply fastest, for less than .1 % of error.
Centring and balancing (`tqcompress.transform`) are not the paper's; outliers and fractional bits (`tqcompress.parts`)
are, but for their one scale.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tqcompress import HeadShape, Layout, RecipeError, ScalarLevels, TensorSpec, WideLevels, hookimpl
from tqcompress.codebook import e4m3_levels, grid_step, int8_levels, lloyd_max, uniform_levels
from tqcompress.packing import look_up, pack, plane_fields
from tqcompress.recipe import Outliers
from tqcompress.registry import Registry
from tqcompress.transform import TransformedCodec, TransformedOptions

INT8_BITS = (1, 2, 3, 4, 8)  # where levels are on an int8 grid unless the recipe says otherwise

LEVELS = {"int8": int8_levels, "lloyd-max": lloyd_max, "uniform": uniform_levels, "e4m3": e4m3_levels}


class TurboQuantOptions(TransformedOptions):
    """Recipe keys of `quantizer: turboquant`."""

    # None is int8 up to 4 bits, and at 8, where the doubled error is still a hundredth of that of 4 bits; lloyd-max
    # at 5 to 7, where int8 costs .6, 3 and 18 %.
    levels: Literal["int8", "lloyd-max", "uniform", "e4m3"] | None = None
    outliers: Outliers | None = None


class TurboQuant(TransformedCodec):
    """Scalar quantization in a turned basis: head_dim * bits / 8 bytes of codes and one scale a vector."""

    name = "turboquant"
    Options = TurboQuantOptions
    options: TurboQuantOptions
    codebook: Tensor
    wide_codebook: Tensor  # if `wide`
    splits = True

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        self.register_state("codebook", self._codebook(self.bits))
        if self.wide:
            self.register_state("wide_codebook", self._codebook(self.wide_bits))

    @classmethod
    def values_a_second(cls, bits: float, options: dict[str, Any]) -> float | None:
        """Integer instructions bound it where memory is as fast as an H200's, on which these were measured."""
        return 1.1e13 if bits <= 2 else 8.1e12 if bits <= 3 else 7.5e12

    def layout(self) -> Layout:
        """Packed codes and one scale for each token."""
        wide = plane_fields(self.wide, self.wide_bits, "wide") if self.wide else {}
        return Layout(wide | plane_fields(self.shape.head_dim - self.wide, self.bits) | self.scale_field())

    def quantize(self, unit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The nearest level of every coordinate."""
        if not self.wide:
            return _nearest(unit, self.codebook, self.bits, "codes")
        packed, decoded = _nearest(unit[..., : self.wide], self.wide_codebook, self.wide_bits, "wide")
        rest, other = _nearest(unit[..., self.wide :], self.codebook, self.bits, "codes")
        return packed | rest, torch.cat([decoded, other], dim=-1)

    def dequantize(self, packed: dict[str, Tensor]) -> Tensor:
        """The levels of the codes."""
        decoded = look_up(packed, self.bits, self.shape.head_dim - self.wide, self.codebook)
        if not self.wide:
            return decoded
        return torch.cat([look_up(packed, self.wide_bits, self.wide, self.wide_codebook, "wide"), decoded], dim=-1)

    def levels(self) -> ScalarLevels | None:
        """The codebooks in the stored basis: every fused kernel can read them."""
        into, back = self.basis()
        wide = None
        if self.wide:
            wide = WideLevels(self.wide, self.wide_codebook, self.wide_bits, _step(self.wide_codebook))
        return ScalarLevels(
            levels=self.codebook,
            bits=self.bits,
            scale_format=self.options.scale,
            step=_step(self.codebook),
            into=into,
            back=back,
            mean=self.mean if self.options.center else None,
            norm_correction=self.options.norm_correction,
            wide=wide,
        )

    def _codebook(self, bits: int) -> Tensor:
        """The levels of codes of `bits` bits, float32."""
        levels = self.options.levels or ("int8" if bits in INT8_BITS else "lloyd-max")
        try:
            return torch.tensor(LEVELS[levels](bits, self.shape.head_dim), dtype=torch.float32)
        except ValueError as error:
            raise RecipeError(f"levels: found {levels!r}; {error}; use lloyd-max or uniform") from None


def _nearest(unit: Tensor, codebook: Tensor, bits: int, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The planes of the nearest levels' codes, and the levels."""
    codes = torch.bucketize(unit.contiguous(), (codebook[1:] + codebook[:-1]) / 2, out_int32=True)
    decoded = codebook.index_select(0, codes.flatten()).view(codes.shape)  # faster than indexing
    return pack(codes, bits, name), decoded


def _step(codebook: Tensor) -> float | None:
    """Not by `options.levels`: a file may have changed the levels."""
    return grid_step(codebook.numpy(force=True))


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `turboquant`."""
    registry.add_codec(TurboQuant)
