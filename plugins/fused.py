"""Fused attention on CUDA: which groups get it, and how a cache's view becomes kernel arguments.

The kernels themselves (`tqcompress_kernels`) know tensors only. They read any codec that tells its levels, scalar ones
or those of a trellis.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tqcompress import Backend, Codec, ModelError, ScalarLevels, TrellisLevels, blockwise, hookimpl
from tqcompress.packing import plane_fields
from tqcompress.plan import Group
from tqcompress.store import TokenStore
from tqcompress.view import GroupView

if TYPE_CHECKING:
    from tqcompress_kernels.encode import AnyEncoder
    from tqcompress_kernels.lookups import Lookup
    from tqcompress_kernels.packed import Packed, Wide
    from tqcompress_kernels.step import Constants
    from tqcompress_kernels.step import Side as SideConstants

    from ._fused_ring import FusedRing

FEW_QUERIES = 32  # columns (queries times query heads of a KV head) up to which codes are read directly


@hookimpl(trylast=True)
def tqcompress_backend(group: Group, codecs: Mapping[str, Codec], device: torch.device) -> Backend | None:
    """Fused kernels for groups on CUDA whose codecs tell their levels."""
    if device.type != "cuda":
        return None
    found = FusedGroup(codecs["key"], codecs["value"], device)
    reason = obstacle_of(found)
    return found.backend() if reason is None else Backend("torch", blockwise.attend, reason)


def obstacle_of(group: "FusedGroup") -> str | None:
    """Why there is no kernel for the codecs of a group, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which fused kernels need"
    for side in (group.key, group.value):
        form, codec = side.form, side.codec
        if form is None:
            return f"{codec.name} {codec.shape.side}s have no levels for fused kernels to read"
        if not all(torch.allclose(levels, -levels.flip(0)) for levels in side.tables):
            return f"the levels of {codec.name} {codec.shape.side}s are not symmetric about zero"
        if codec.shape.head_dim % 8 or codec.shape.head_dim > 256:
            return f"head_dim {codec.shape.head_dim} is not a multiple of 8 up to 256"
        if side.window:
            from tqcompress_kernels.encode_trellis import obstacle

            if reason := obstacle(len(form.levels), form.bits):
                return f"{codec.name} {codec.shape.side}s: {reason}"
    return None


class Side:
    """Constants of one codec on its device, made at their first use."""

    def __init__(self, codec: Codec, device: torch.device):
        self.codec, self.device = codec, device
        self.form: ScalarLevels | TrellisLevels = codec.levels()  # type: ignore[assignment]  # `obstacle_of` refuses None

    @cached_property
    def planes(self) -> tuple[str, ...]:
        """Names of the fields that hold the codes, widest plane first; those of the first coordinates before others."""
        if isinstance(self.form, TrellisLevels):
            return ("codes",)
        dim, wide = self.codec.shape.head_dim, self.form.wide
        first = tuple(plane_fields(wide.dim, wide.bits, "wide")) if wide else ()
        return first + tuple(plane_fields(dim, self.form.bits))

    @property
    def tables(self) -> list[Tensor]:
        """The levels of all codes."""
        wide = None if isinstance(self.form, TrellisLevels) else self.form.wide
        return [self.form.levels, *([wide.levels] if wide else [])]

    @property
    def window(self) -> int:
        """Bits of a trellis's states, 0 for scalar codes."""
        return len(self.form.levels).bit_length() - 1 if isinstance(self.form, TrellisLevels) else 0

    @cached_property
    def levels(self) -> Tensor:
        """float32, of every code or state."""
        return self.form.levels.to(self.device).float()

    @cached_property
    def wide(self) -> "Wide | None":
        """What kernels need to know of the first coordinates, if these have levels of their own."""
        from tqcompress_kernels.packed import Wide, is_uniform

        form = None if isinstance(self.form, TrellisLevels) else self.form.wide
        if form is None:
            return None
        return Wide(form.dim, form.levels.to(self.device).float(), form.bits, form.step, is_uniform(form.levels))

    @cached_property
    def back(self) -> Tensor:
        """float32 `[1 or kv_heads, head_dim, head_dim]`, from the stored basis to the original one."""
        return self.form.back.to(self.device).float().contiguous()

    @cached_property
    def mean(self) -> Tensor | None:
        """float32 `[kv_heads, head_dim]` or None."""
        return None if self.form.mean is None else self.form.mean.to(self.device).float().contiguous()

    @cached_property
    def encoder(self) -> "AnyEncoder":
        """What `tqcompress_kernels.encode` needs to know."""
        from tqcompress_kernels.encode import encoder
        from tqcompress_kernels.encode_trellis import trellis_encoder

        form = self.form
        mean = None if form.mean is None else form.mean.to(self.device)
        into, rest = form.into.to(self.device), (form.scale_format, form.norm_correction)
        if isinstance(form, TrellisLevels):
            return trellis_encoder(into, mean, self.levels, form.step, form.bits, *rest)
        return encoder(into, mean, self.levels, *rest, self.wide)

    @cached_property
    def uniform(self) -> bool:
        """Whether levels are equally spaced."""
        from tqcompress_kernels.packed import is_uniform

        return not self.window and is_uniform(self.form.levels)

    @cached_property
    def lookup(self) -> "Lookup | str":
        """How the int8 kernel reads the codes, on the CPU, or why it cannot."""
        from tqcompress_kernels import lookups

        form, shape = self.form, self.codec.shape
        if isinstance(form, TrellisLevels):
            of_keys = shape.side == "key"
            return lookups.trellis_lookup(form.levels, form.step, form.bits, shape.head_dim, registers=of_keys)
        return lookups.lookup(form.levels, torch.device("cpu"), form.wide)  # type: ignore[arg-type]  # has all that is read

    @property
    def constants(self) -> "SideConstants":
        """What steps of one token need to know."""
        from tqcompress_kernels.step import Side as Constants

        own = self.levels, self.form.bits, self.form.step, self.uniform
        return Constants(*own, self.back, self.mean, self.encoder, self.window, self.wide)

    def packed(self, fields: Mapping[str, Tensor]) -> "Packed":
        """Stored tokens as kernels read them, `[batch or pages, heads, rows, size]` each."""
        from tqcompress_kernels.packed import Packed

        planes = tuple(fields[name] for name in self.planes)
        own = self.levels, self.form.bits, self.form.step, self.uniform, self.window, self.wide
        return Packed(planes, fields["scale"], *own)


class FusedGroup:
    """Attention and encoding of a group by kernels."""

    def __init__(self, key: Codec, value: Codec, device: torch.device):
        self.sides = {id(codec): Side(codec, device) for codec in (key, value)}
        self.key, self.value = self.sides[id(key)], self.sides[id(value)]
        self.device = device

    def backend(self) -> Backend:
        """The backend, with the kernel that decodes and why it is that one."""
        name = "triton plain" if self.obstacle else "triton int8"
        reason = self.obstacle or "levels are on an int8 grid: codes go straight into int8 tensor cores"
        return Backend(name, self.attend, reason, self.append, self.ring)

    @cached_property
    def obstacle(self) -> str | None:
        """Why the int8 kernel cannot read the group, or None if it can."""
        from tqcompress_kernels import fast

        return fast.obstacle(self.key.lookup, self.value.lookup, self.key.codec.shape.head_dim, self.device)

    @cached_property
    def split(self) -> Callable[..., None]:
        """The kernel that reads packed tokens."""
        from tqcompress_kernels import fast, plain

        if self.obstacle is not None:
            return plain.split
        key, value = (side.lookup.to(self.device) for side in (self.key, self.value))  # type: ignore[union-attr]  # no obstacle
        return fast.FastSplit(key, value)

    @cached_property
    def constants(self) -> "Constants":
        """What steps of one token need to know."""
        from tqcompress_kernels.step import Constants

        return Constants(self.key.constants, self.value.constants, self.split)

    def ring(self, states: Tensor, sinks: int, window: int) -> "FusedRing":
        """The exact tokens of a new cache."""
        from ._fused_ring import FusedRing

        self._check(states)
        return FusedRing(self.constants, (self.key.planes, self.value.planes), states, sinks, window)

    def append(self, codec: Codec, vectors: Tensor, store: TokenStore) -> None:
        """Encode behind the last stored token."""
        from tqcompress_kernels.encode import encode

        self._check(vectors)
        side = self.sides[id(codec)]
        packed = side.packed(store.buffers)
        encode(vectors, packed.planes, packed.scale, store.length, side.encoder)

    def attend(
        self, query: Tensor, view: GroupView, mask: Tensor | None, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `blockwise.attend`: few queries by decoding, chunks through a workspace, the rest in torch."""
        from tqcompress_kernels import chunk, decode

        self._check(query)
        if mask is not None and mask.dim() != 2:
            _tell("masks that differ between heads, add to scores, or hide more than padding from several queries")
            return blockwise.attend(query, view, mask, scaling, softcap)
        columns = query.shape[2] * query.shape[1] // view.sinks[0].shape[1]
        mask = None if mask is None else mask.expand(query.shape[0], -1)
        key, value = self.key.packed(view.key.buffers), self.value.packed(view.value.buffers)
        arguments = (
            query, key, value, self.key.back, self.value.back, self.key.mean, self.value.mean, view.sinks, view.recent,
            view.packed, scaling, softcap,
        )  # fmt: skip
        if query.shape[2] == 1 or columns <= FEW_QUERIES:
            return decode.decode_attention(*arguments, mask=mask, split=self.split)
        return chunk.chunk_attention(*arguments, mask, blockwise.WORKSPACE_BYTES)

    def _check(self, states: Tensor) -> None:
        if states.device != self.device:
            raise ModelError(
                f"a layer that was on {self.device} when the cache was compressed now runs on {states.device}; "
                "call tqcompress.apply again after moving the model"
            )


@cache
def _tell(what: str) -> None:
    warnings.warn(f"fused kernels do not take {what}; such calls attend in plain torch, slowly", stacklevel=2)
