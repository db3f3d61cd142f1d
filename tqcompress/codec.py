"""What a quantizer must offer: `Codec`, and the `Layout` of the rows it stores.

A codec handles one side (keys or values) of the KV heads that share a setting. All of its state is
registered with `register_state`, so it follows `.to(device)`, is saved and is counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .errors import RecipeError

if TYPE_CHECKING:
    from .calibrate import Moments


@dataclass(frozen=True)
class TensorSpec:
    """How one side (keys or values) of a group of heads is quantized."""

    quantizer: str
    bits: float
    options: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.quantizer, self.bits, repr(sorted(self.options.items()))))


@dataclass(frozen=True)
class HeadShape:
    """What a codec is built for: the number of KV heads, their size, and the side."""

    num_kv_heads: int
    head_dim: int
    side: str  # "key" or "value"
    dtype: torch.dtype = torch.float32  # of the model's keys and values


@dataclass(frozen=True)
class Field:
    """One stored tensor: `size` elements a row; `tokens` consecutive tokens of a head share a row."""

    dtype: torch.dtype
    size: int
    tokens: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The fields that a codec stores for a token of one head."""

    fields: dict[str, Field]

    @property
    def block(self) -> int:
        """Tokens that must be encoded together; 1 if every token stands alone."""
        return math.lcm(*(f.tokens for f in self.fields.values()))

    @property
    def nbytes_per_token(self) -> float:
        """Bytes of one token of one head."""
        return sum(f.nbytes / f.tokens for f in self.fields.values())


@dataclass(frozen=True)
class WideLevels:
    """Levels of the first `dim` coordinates of a vector, which have more bits than the rest; see `ScalarLevels`.

    Their planes `wide8` ... `wide1` are packed as those of a vector of `dim` coordinates, a multiple of 16.
    """

    dim: int
    levels: Tensor
    bits: int
    step: float | None


@dataclass(frozen=True)
class ScalarLevels:
    """A codec of the form `levels[code] * scale` in a basis of its own: all that fused kernels know of it.

    Stored are the planes `codes8` ... `codes1` of `packing.plane_fields` and the field `scale`. A vector `x` of
    `dim` coordinates becomes `y = (x - mean) @ into`; its codes are the nearest levels of `y * sqrt(dim) / |y|`
    (the lower one halfway between two), its scale is `|y| / |levels[codes]|` with `norm_correction` and
    `|y| / sqrt(dim)` without. It decodes to `(levels[codes] * scale) @ back + mean`.

    Attributes:
        levels: float32 `[2**bits]`, ascending.
        scale_format: "fp16", or "log8": uint8, `2**((stored - 128) / 16)`, and 0 for 0; 255 means too large.
        step: if not None, `levels / step` are integers in [-127, 127], or at 8 bits -127.5, -126.5 ... 127.5.
        into, back: float32 `[1 or kv_heads, dim, dim]`, inverse to each other.
        mean: float32 `[kv_heads, dim]`, or None for zeros.
        wide: if not None, levels of the first coordinates; `levels`, `bits`, `step` and the planes `codes8` ... are
            then those of the others, packed as a vector of their own. `|levels[codes]|` is over all.
    """

    levels: Tensor
    bits: int
    scale_format: Literal["fp16", "log8"]
    step: float | None
    into: Tensor
    back: Tensor
    mean: Tensor | None = None
    norm_correction: bool = True
    wide: WideLevels | None = None


@dataclass(frozen=True)
class TrellisLevels:
    """A codec of the form `levels[state] * scale`, the states being those of a tail-biting bitshift trellis.

    Stored are the field `codes`, a circular string of `dim * bits` bits for a vector, bit `j` in bit `j % 8` of byte
    `j // 8`, and the field `scale`. With `2**L` levels the state at coordinate `i` is the number of the L bits from
    `i * bits` on, the first of them the lowest. Codes are those of the path of least squared error for
    `y * sqrt(dim) / |y|`, or of one nearly as good; all else is as with `ScalarLevels`.

    Attributes:
        levels: float32 `[2**L]`, the value of each state: integers in [-127, 127] times `step`, and of states with
            all bits inverted each other's negatives.
    """

    levels: Tensor
    bits: int
    scale_format: Literal["fp16", "log8"]
    step: float
    into: Tensor
    back: Tensor
    mean: Tensor | None = None
    norm_correction: bool = True


class Options(BaseModel):
    """Base of a quantizer's own recipe keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Codec(nn.Module):
    """Turns vectors into packed rows and back.

    Subclasses set `name`, `supported_bits` and `Options`, and implement `layout`, `encode` and
    `decode`. Shapes are `[batch, kv_heads, tokens, head_dim]` for vectors and
    `[batch, kv_heads, rows, size]` for every packed field, rows = tokens / `Field.tokens`.
    """

    name: ClassVar[str]
    supported_bits: ClassVar[tuple[int, ...]] = tuple(range(1, 9))
    splits: ClassVar[bool] = False  # whether bits between two supported ones are left to the subclass
    not_in_onnx: ClassVar[dict[str, str]] = {}  # why `encode` or `decode` cannot be exported to ONNX
    Options: ClassVar[type[BaseModel]] = Options
    options: BaseModel  # an instance of `Options`

    def __init__(self, spec: TensorSpec, shape: HeadShape):
        super().__init__()
        if spec.bits not in self.supported_bits and not (self.splits and self._is_between(spec.bits)):
            allowed = ", ".join(map(str, self.supported_bits))
            raise RecipeError(f"bits: found {spec.bits:g}; {self.name} supports {allowed}")
        self.spec, self.shape, self.bits = spec, shape, int(spec.bits)  # rounded down
        self.options = self.Options(**spec.options)

    @classmethod
    def _is_between(cls, bits: float) -> bool:
        return {bits // 1, bits // 1 + 1} <= set(cls.supported_bits)

    def register_state(self, name: str, tensor: Tensor) -> None:
        """Register a tensor that belongs to the artifact (codebook, signs, rotation, mean ...).

        One that holds something for each KV head has the heads as its first axis: see `of_heads`.
        """
        # Not persistent: model.state_dict() must stay what strict weight loaders expect.
        self.register_buffer(name, tensor, persistent=False)

    def of_heads(self, heads: Sequence[int]) -> "Codec":
        """The codec of some of its heads, numbered from 0, on the same device.

        State that is as large whatever the number of heads is shared by all; any other has the heads as its first axis.
        """
        part = type(self)(self.spec, replace(self.shape, num_kv_heads=len(heads)))
        for name, tensor in part.named_buffers():
            whole = self.get_buffer(name)
            tensor.copy_(whole if whole.shape == tensor.shape else whole[list(heads)])
        return part.to(next(self.buffers(), torch.empty(0)).device)

    def state(self) -> dict[str, Tensor]:
        """The tensors that the artifact holds, by name."""
        return dict(self.named_buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.half() must not round codebooks and rotations: move them, keep their dtype.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]  # torch gives no types

    def layout(self) -> Layout:
        """The fields stored for each token."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Pack `x` `[batch, kv_heads, tokens, head_dim]`; tokens is a multiple of `layout().block`."""
        raise NotImplementedError

    def decode(self, packed: dict[str, Tensor]) -> Tensor:
        """The float32 vectors that `packed` stands for: the reference every backend is tested against."""
        raise NotImplementedError

    def fits(self, packed: dict[str, Tensor]) -> Tensor:
        """A boolean scalar: whether `packed` can hold what was encoded (no overflow, no NaN)."""
        floating = [rows.isfinite().all() for rows in packed.values() if rows.is_floating_point()]
        return reduce(torch.logical_and, floating) if floating else torch.tensor(True)

    @classmethod
    def values_a_second(cls, bits: float, options: dict[str, Any]) -> float | None:
        """How many a GPU's attention decodes if memory were no bound, None if they are always; for `estimate` only."""
        return None

    @property
    def needs_statistics(self) -> bool:
        """Whether `fit` must be called before the codec is used."""
        return False

    def fit(self, moments: "Moments") -> None:
        """Set state from calibration statistics of the codec's side and heads; data-free codecs have nothing to do."""

    def levels(self) -> ScalarLevels | TrellisLevels | None:
        """The form that fused kernels read and write, or None if the codec has none; asked at apply."""
        return None

    # Attention may run in the basis in which vectors are stored: one rotation of the query and one of
    # the output a step, instead of one a stored token. Override all three together.

    def rotate(self, query: Tensor) -> Tensor:
        """The query `[batch, kv_heads, n, head_dim]` in the stored basis: its dot products with keys are unchanged."""
        return query

    def unrotate(self, output: Tensor) -> Tensor:
        """Bring an average of stored vectors back to the original basis."""
        return output

    def decode_rotated(self, packed: dict[str, Tensor]) -> Tensor:
        """Like `decode`, but in the stored basis: `decode(p) == unrotate(decode_rotated(p))`."""
        return self.decode(packed)

    def decode_factors(self, packed: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`decode_rotated` as vectors and a factor of each, `[batch, kv_heads, tokens]`, or None for ones.

        Attention of few queries then multiplies scores and weights by the factors: fewer numbers than coordinates.
        """
        return self.decode_rotated(packed), None
