"""TurboQuant's inner-product variant: all bits but one a coordinate for the vector, one for the sign of its sketch.

Source: TurboQuant (arXiv 2504.19874), `Q_prod`: Lloyd-Max codes of `bits - 1` bits, and of their residual `r` QJL
(arXiv 2406.03482): the norm `|r|` and `sign(S r)` for a random `S` `[head_dim, head_dim]`. A score is estimated as

    q . k ~ q . k_mse + |r| c (S q) . sign(S r),    so k decodes to    k_mse + |r| c S^T sign(S r).

Let `d` be head_dim and `u = r / |r|`. The estimate is unbiased over the draw of S if `c E[(S u) . sign(S u)] = 1`:

    Gaussian S, entries of variance 1:    E |S u|_1 = d sqrt(2 / pi)    c = sqrt(pi / 2) / d,
    orthogonal S, rows of norm 1:         E |S u|_1 = d m               c = 1 / (d m),

where `m = Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))` is the mean magnitude of a coordinate of a random unit vector. The
squared error of the residual is then, in units of `|r|^2`, `c^2 E |S^T sign(S u)|^2 - 1`. For the Gaussian S the sum
of d rows is `d sqrt(2/pi)` along u, with variance `d (1 - 2/pi)`, and has variance d in every other direction:
`E |S^T s|^2 = d^2 (1 + 2/pi) - 2 d/pi` and the error is `pi/2 - 1/d`. For the orthogonal S `|S^T s|^2 = d` and it is
`1 / (d m^2) - 1`, close to `pi/2 - 1`: a third of the other.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from tqcompress import Field, HeadShape, Layout, TensorSpec, hookimpl
from tqcompress.codebook import lloyd_max
from tqcompress.packing import pack, plane_fields, unpack
from tqcompress.registry import Registry
from tqcompress.rotation import random_orthogonal
from tqcompress.transform import TransformedCodec, TransformedOptions


class QjlOptions(TransformedOptions):
    """Recipe keys of `quantizer: qjl`."""

    sketch: Literal["gaussian", "orthogonal"] = "gaussian"
    norm_correction: bool = False  # it would make the estimate biased


class Qjl(TransformedCodec):
    """`bits - 1` bits of levels and one of signs a coordinate; a scale and a residual's norm a vector."""

    name = "qjl"
    Options = QjlOptions
    options: QjlOptions
    codebook: Tensor
    sketch: Tensor

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        dim, seed = shape.head_dim, ~self.options.seed  # S must not be the rotation, which has the seed itself
        book = lloyd_max(self.bits - 1, dim) if self.bits > 1 else [0.0]
        self.register_state("codebook", torch.tensor(book, dtype=torch.float32))
        if self.options.sketch == "gaussian":
            sketch = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)) * math.sqrt(math.pi / 2) / dim
        else:
            sketch = random_orthogonal(dim, seed) / (dim * mean_magnitude(dim))
        self.register_state("sketch", sketch)  # c S

    def layout(self) -> Layout:
        """Codes, signs, the residual's norm in units of the scale, and the scale."""
        dim = self.shape.head_dim
        fields = {"signs": plane_fields(dim, 1)["codes1"], "residual": Field(torch.float16, 1)}
        return Layout(plane_fields(dim, self.bits - 1) | fields | self.scale_field())

    def quantize(self, unit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The nearest levels, and the signs of the sketch of what they leave."""
        codes = torch.bucketize(unit, (self.codebook[1:] + self.codebook[:-1]) / 2, out_int32=True)
        rest = unit - self.codebook.index_select(0, codes.flatten()).view(codes.shape)
        signs = pack(rest @ self.sketch.T > 0, 1)["codes1"]
        length = rest.norm(dim=-1, keepdim=True).to(torch.float16)
        packed = pack(codes, self.bits - 1) | {"signs": signs, "residual": length}
        return packed, self.dequantize(packed)

    def dequantize(self, packed: dict[str, Tensor]) -> Tensor:
        """The levels plus the estimate of the residual."""
        dim = self.shape.head_dim
        signs = 2.0 * unpack({"codes1": packed["signs"]}, 1, dim) - 1
        rest = signs @ self.sketch * packed["residual"].float()
        if self.bits == 1:
            return rest
        codes = unpack(packed, self.bits - 1, dim)
        return rest + self.codebook.index_select(0, codes.flatten()).view(codes.shape)


def mean_magnitude(dim: int) -> float:
    """The mean of `|u_1|` for a random unit vector `u` in R^dim."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


@hookimpl
def tqcompress_register(registry: Registry) -> None:
    """Add `qjl`."""
    registry.add_codec(Qjl)
