"""`TransformedCodec`: what quantizers of whole vectors share. Centre, turn, scale to unit variance; a scale a vector.

A vector `x` becomes `y = (x - mean) @ into`, is quantized as `y * sqrt(head_dim) / |y|`, and its scale is stored
beside the codes: by default such that the decoded vector keeps the norm of `y`. Subclasses quantize unit vectors.

Balanced keys. An isotropic quantizer adds noise of variance `D |y|^2 / d` to every coordinate of `y = T k`; the
score `q . k = (T^-T q) . (T k)` gets noise of variance `D tr(T S T^T) tr(T^-T W T^-1) / d`, where S is the covariance
of keys and W the second moment of the queries that meet them. With `S = L L^T` and `L^T W L = U diag(l^2) U^T`,

    T = diag(l^(1/2)) U^T L^-1    gives    T S T^T = T^-T W T^-1 = diag(l):

the noise is then `D tr(diag(l))^2 / d`, by the inequality of Cauchy and Schwarz the least of all invertible T. Any
rotation behind T leaves that as it is and evens out the coordinates, so it is the rotation of the recipe that follows.
`diagonal` is the best diagonal T: `T_ii = (W_ii / S_ii)^(1/4)`.

Subclasses may give the first coordinates of the stored basis more bits (`wide`), and those to outlier channels: these
are chosen in the basis before the rotation, which is then one of each part. See `parts`.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field as Bounds
from torch import Tensor

from .calibrate import Moments
from .codec import Codec, Field, HeadShape, Options, TensorSpec
from .errors import RecipeError
from .parts import bring_forward, outlier_count, wide_coordinates
from .recipe import Outliers
from .rotation import Rotation

# The 8-bit scale is 2^((code - LOG_ZERO) / 16): code 0 is zero, 1 to 254 span 2^-7.9 to 2^7.9, 255 means too
# large. The scale is the root mean square of a vector's coordinates, so that covers ordinary keys and values.
LOG_STEPS, LOG_ZERO, LOG_OVERFLOW = 16, 128, 255

TINY = 1e-30  # a divisor for vectors of zeros, far below any scale
RIDGE = 0.001  # of the mean variance of a coordinate, added to each: directions that calibration never saw


class TransformedOptions(Options):
    """Recipe keys of every quantizer of this kind."""

    rotation: Literal["hadamard", "dense", "identity"] = "hadamard"
    seed: Annotated[int, Bounds(ge=-(1 << 63), lt=1 << 63)] = 0
    center: bool = False
    balance: Literal["none", "diagonal", "key"] = "none"
    scale: Literal["fp16", "log8"] = "fp16"
    norm_correction: bool = True


class TransformedCodec(Codec):
    """Subclasses store one `Field` named `scale` and implement `quantize` and `dequantize`.

    Attributes:
        wide: how many of the first coordinates have `wide_bits`, the others having `bits`; 0 in most.
        outlying: the recipe key `outliers`, of subclasses whose options have it.
    """

    Options = TransformedOptions
    options: TransformedOptions
    mean: Tensor  # with `options.center`
    into: Tensor  # and `back`, if `measured`
    back: Tensor

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__(spec, shape)
        options, dim = self.options, shape.head_dim
        if options.balance != "none" and shape.side == "value":
            raise RecipeError(f"balance: found {options.balance!r}; only keys can be balanced")
        self.wide, self.wide_bits = 0, self.bits + 1
        self.outlying: Outliers | None = getattr(options, "outliers", None)
        if self.outlying:
            self._set_outliers(self.outlying)
        elif spec.bits != self.bits:
            self.wide = wide_coordinates(spec.bits, dim)
        self.measured = options.balance != "none" or self.outlying is not None  # matrices, from calibration
        turn = {} if self.measured else Rotation.state(options.rotation, dim, options.seed)
        if self.measured:
            turn = dict.fromkeys(("into", "back"), self._rotation().expand(shape.num_kv_heads, dim, dim))
            turn["back"] = turn["back"].mT
        if self.outlying:
            turn["outliers"] = torch.arange(self.wide, dtype=torch.int16).expand(shape.num_kv_heads, -1)
        if options.center:
            turn["mean"] = torch.zeros(shape.num_kv_heads, dim)
        for name, tensor in turn.items():
            self.register_state(name, tensor.contiguous())

    # What subclasses implement.

    def quantize(self, unit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The packed codes of vectors of variance 1 a coordinate, and what they decode to."""
        raise NotImplementedError

    def dequantize(self, packed: dict[str, Tensor]) -> Tensor:
        """What `quantize` said the codes decode to."""
        raise NotImplementedError

    # The codec.

    @property
    def needs_statistics(self) -> bool:
        """Centring, balancing and outliers come from calibration."""
        return self.options.center or self.measured

    def scale_field(self) -> dict[str, Field]:
        """The field of the scale, for `layout`."""
        return {"scale": Field(torch.float16 if self.options.scale == "fp16" else torch.uint8, 1)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Centre, turn, scale to unit variance a coordinate, quantize, correct the norm."""
        x = x.float()
        y = self._turn(x - self.mean[:, None] if self.options.center else x)
        norm, root = y.norm(dim=-1, keepdim=True), self.shape.head_dim**0.5
        packed, decoded = self.quantize(y * (root / norm.clamp_min(TINY)))
        length = decoded.norm(dim=-1, keepdim=True) if self.options.norm_correction else root
        return packed | {"scale": self._encode_scale(norm / length)}

    def decode_rotated(self, packed: dict[str, Tensor]) -> Tensor:
        """The decoded vectors in the stored basis, with the mean."""
        y = self.dequantize(packed).mul_(self._decode_scale(packed["scale"]))
        return y.add_(self._turn(self.mean[:, None])) if self.options.center else y

    def decode_factors(self, packed: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the codes decode to, and the scales; together if there is a mean to add."""
        if self.options.center:
            return super().decode_factors(packed)
        return self.dequantize(packed), self._decode_scale(packed["scale"]).squeeze(-1)

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The decoded vectors, float32."""
        return self.unrotate(self.decode_rotated(packed))

    def rotate(self, query: Tensor) -> Tensor:
        """The query in the stored basis: by the inverse transpose of what turns keys."""
        return query @ self.back.mT if self.measured else Rotation.forward(query, self.state())

    def unrotate(self, output: Tensor) -> Tensor:
        """Back to the original basis."""
        return output @ self.back if self.measured else Rotation.inverse(output, self.state())

    def fits(self, packed: dict[str, Tensor]) -> Tensor:
        """False if a scale is beyond its format."""
        log_scale = self.options.scale == "log8"
        return (packed["scale"] != LOG_OVERFLOW).all() if log_scale else super().fits(packed)

    def fit(self, moments: Moments) -> None:
        """Set the mean, the matrices and the channels that are outliers."""
        if self.options.center:
            self.mean.copy_(moments.mean)
        if not self.measured:
            return
        spread = moments.covariance
        if not self.options.center:
            spread = spread + moments.mean[:, :, None] * moments.mean[:, None, :]
        if self.options.balance != "none":
            matrix = balancing(spread, moments.query, self.options.balance)  # type: ignore[arg-type]  # keys have one
        else:
            matrix = torch.eye(self.shape.head_dim).to(spread).expand_as(spread)
        if self.outlying:
            listed = self.outlying.channels if isinstance(self.outlying.channels, list) else []
            matrix, chosen = bring_forward(matrix, spread, self.wide, listed)
            self.get_buffer("outliers").copy_(chosen)
        self.into.copy_(matrix.mT @ self._rotation().to(matrix))
        self.back.copy_(torch.linalg.inv(self.into.to(matrix)))  # of the matrix as it is stored

    def basis(self) -> tuple[Tensor, Tensor]:
        """float32 `[1 or kv_heads, head_dim, head_dim]`: the maps into the stored basis and back."""
        if self.measured:
            return self.into, self.back
        dim, device = self.shape.head_dim, next(self.buffers()).device
        into = Rotation.matrix(self.state(), dim, device)[None].contiguous()
        return into, into.mT.contiguous()

    def _turn(self, x: Tensor) -> Tensor:
        return x @ self.into if self.measured else Rotation.forward(x, self.state())

    def _set_outliers(self, outliers: Outliers) -> None:
        """How many coordinates they are. Raises `RecipeError`."""
        if self.spec.bits != self.bits:
            raise RecipeError(f"bits: found {self.spec.bits:g}; beside outliers only whole numbers are possible")
        if outliers.bits not in self.supported_bits:
            allowed = ", ".join(map(str, self.supported_bits))
            raise RecipeError(f"outliers.bits: found {outliers.bits}; {self.name} supports {allowed}")
        if isinstance(outliers.channels, list) and self.options.balance == "key":
            raise RecipeError(
                "outliers.channels: found a list; balance: key leaves the channels of the model, give how many"
            )
        self.wide_bits, self.wide = outliers.bits, outlier_count(outliers, self.bits, self.shape.head_dim)

    def _rotation(self) -> Tensor:
        """float32 `[head_dim, head_dim]`: the rotation, or one of the outliers and one of the other channels."""
        sizes = (self.wide, self.shape.head_dim - self.wide) if self.outlying else (self.shape.head_dim,)
        kind, seed = self.options.rotation, self.options.seed
        parts = (Rotation.matrix(Rotation.state(kind, size, seed), size) for size in sizes)
        matrix: Tensor = torch.block_diag(*parts)
        return matrix

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


def balancing(spread: Tensor, query: Tensor, kind: str) -> Tensor:
    """The matrices T of the module's text, `[kv_heads, dim, dim]` float64, scaled to keep the mean square of keys.

    Args:
        spread: second moments of keys about the centre, float64 `[kv_heads, dim, dim]`.
        query: second moments of the queries that meet them, about zero, the same shape.
        kind: "key" or "diagonal".
    """
    dim = spread.shape[-1]
    eye = torch.eye(dim, dtype=spread.dtype, device=spread.device)

    def power(x: Tensor) -> Tensor:
        return x.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]

    # Heads that saw nothing, or only zeros, keep the basis they have.
    spread, query = (torch.where(power(x) > 0, x + RIDGE * power(x) * eye, eye) for x in (spread, query))
    if kind == "diagonal":
        ratio = query.diagonal(dim1=-2, dim2=-1) / spread.diagonal(dim1=-2, dim2=-1)
        matrix = torch.diag_embed(ratio**0.25)
    else:
        lower = torch.linalg.cholesky(spread)
        squares, vectors = torch.linalg.eigh(lower.mT @ query @ lower)
        matrix = (
            squares.clamp_min(0)[..., None] ** 0.25 * torch.linalg.solve_triangular(lower.mT, vectors, upper=True).mT
        )
    return matrix * (power(spread) / power(matrix @ spread @ matrix.mT)).sqrt()
