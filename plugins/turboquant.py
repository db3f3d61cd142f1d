"""TurboQuant: random rotation, one scale a vector, Lloyd-Max levels a coordinate.

Source: TurboQuant (arXiv 2504.19874), the MSE variant. Unlike the paper, the stored scale is by default
|x| / |levels[codes]| and not |x| / sqrt(head_dim): the decoded vector keeps its norm, at no cost. And up to 4 bits
the levels are by default moved to an int8 grid, which fused kernels multiply fastest, for less than .1 % of error.
"""

from typing import Literal

import torch
from torch import Tensor

from tqcompress import Codec, Field, HeadShape, Layout, Options, RecipeError, ScalarLevels, TensorSpec, hookimpl
from tqcompress.codebook import e4m3_levels, grid_step, int8_levels, lloyd_max, uniform_levels
from tqcompress.packing import pack, plane_fields, unpack
from tqcompress.rotation import Rotation

# The 8-bit scale is 2^((code - LOG_ZERO) / 16): code 0 is zero, 1 to 254 span 2^-7.9 to 2^7.9, 255 means too
# large. The scale is the root mean square of a vector's coordinates, so that covers ordinary keys and values.
LOG_STEPS, LOG_ZERO, LOG_OVERFLOW = 16, 128, 255

INT8_BITS = (1, 2, 3, 4, 8)  # where levels are on an int8 grid unless the recipe says otherwise

TINY = 1e-30  # a divisor for vectors of zeros, far below any scale

LEVELS = {"int8": int8_levels, "lloyd-max": lloyd_max, "uniform": uniform_levels, "e4m3": e4m3_levels}


class TurboQuantOptions(Options):
    """Recipe keys of `quantizer: turboquant`."""

    rotation: Literal["hadamard", "dense", "identity"] = "hadamard"
    seed: int = 0
    # None is int8 up to 4 bits, and at 8, where the doubled error is still a hundredth of that of 4 bits; lloyd-max
    # at 5 to 7, where int8 costs .6, 3 and 18 %.
    levels: Literal["int8", "lloyd-max", "uniform", "e4m3"] | None = None
    scale: Literal["fp16", "log8"] = "fp16"
    norm_correction: bool = True


class TurboQuant(Codec):
    """Rotated scalar quantization: head_dim * bits / 8 bytes of codes and one scale a vector."""

    name = "turboquant"
    Options = TurboQuantOptions

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        options, dim = self.options, shape.head_dim
        levels = options.levels or ("int8" if self.bits in INT8_BITS else "lloyd-max")
        try:
            book = LEVELS[levels](self.bits, dim)
        except ValueError as error:
            raise RecipeError(f"levels: found {levels!r}; {error}; use lloyd-max or uniform") from None
        self.register_state("codebook", torch.tensor(book, dtype=torch.float32))
        for name, tensor in Rotation.state(options.rotation, dim, options.seed).items():
            self.register_state(name, tensor)

    def layout(self) -> Layout:
        """Packed codes and one scale for each token."""
        scale = torch.float16 if self.options.scale == "fp16" else torch.uint8
        return Layout(plane_fields(self.shape.head_dim, self.bits) | {"scale": Field(scale, 1)})

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Rotate, scale to unit variance a coordinate, take the nearest level, correct the norm."""
        rotated = Rotation.forward(x.float(), self.state())
        norm = rotated.norm(dim=-1, keepdim=True)
        unit = rotated * (self.shape.head_dim**0.5 / norm.clamp_min(TINY))
        codes = torch.bucketize(unit, (self.codebook[1:] + self.codebook[:-1]) / 2, out_int32=True)
        corrected = self.options.norm_correction
        length = self._levels_of(codes).norm(dim=-1, keepdim=True) if corrected else self.shape.head_dim**0.5
        scale = norm / length
        return pack(codes, self.bits) | {"scale": self._encode_scale(scale)}

    def decode_rotated(self, packed: dict[str, Tensor]) -> Tensor:
        """levels[code] * scale, in the rotated basis."""
        codes = unpack(packed, self.bits, self.shape.head_dim)
        return self._levels_of(codes) * self._decode_scale(packed["scale"])

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The decoded vectors, float32."""
        return self.unrotate(self.decode_rotated(packed))

    def rotate(self, query: Tensor) -> Tensor:
        """The query in the rotated basis (the rotation is orthogonal)."""
        return Rotation.forward(query, self.state())

    def unrotate(self, output: Tensor) -> Tensor:
        """Back to the original basis."""
        return Rotation.inverse(output, self.state())

    def fits(self, packed: dict[str, Tensor]) -> Tensor:
        """False if a scale is beyond its format."""
        log_scale = self.options.scale == "log8"
        return (packed["scale"] != LOG_OVERFLOW).all() if log_scale else super().fits(packed)

    def levels(self) -> ScalarLevels | None:
        """The codebook in the rotated basis: every fused kernel can read it."""
        state, options = self.state(), self.options
        into = Rotation.matrix(state, self.shape.head_dim, self.codebook.device)[None]
        return ScalarLevels(
            levels=self.codebook,
            bits=self.bits,
            scale_format=options.scale,
            step=grid_step(self.codebook.numpy(force=True)),  # not by `options.levels`: a file may have changed it
            into=into.contiguous(),
            back=into.mT.contiguous(),
            hadamard_signs=state.get("signs"),
            norm_correction=options.norm_correction,
        )

    def _levels_of(self, codes: Tensor) -> Tensor:
        return self.codebook.index_select(0, codes.flatten()).view(codes.shape)  # faster than indexing

    def _encode_scale(self, scale: Tensor) -> Tensor:
        if self.options.scale == "fp16":
            return scale.to(torch.float16)
        code = (scale.log2() * LOG_STEPS).round() + LOG_ZERO  # log2(0) = -inf becomes code 0
        return code.nan_to_num(LOG_OVERFLOW).clamp(0, LOG_OVERFLOW).to(torch.uint8)

    def _decode_scale(self, stored: Tensor) -> Tensor:
        if self.options.scale == "fp16":
            return stored.float()
        exponent = (stored.float() - LOG_ZERO) / LOG_STEPS
        return torch.where(stored == 0, 0.0, exponent.exp2())


@hookimpl
def tqcompress_register(registry):
    """Add `turboquant`."""
    registry.add_codec(TurboQuant)
