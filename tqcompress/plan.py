"""The plan: what every KV head of a model gets, and what that costs in bytes, exactly."""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from .codec import Codec, HeadShape, Layout, TensorSpec
from .errors import ModelError
from .registry import plugins
from .shape import ModelShape

Side = Literal["key", "value"]
SIDES: tuple[Side, ...] = ("key", "value")


@dataclass(frozen=True)
class Group:
    """The KV heads of one layer that share a pair of specs; one codec a side, one launch a group."""

    layer: int
    heads: tuple[int, ...]
    key: TensorSpec
    value: TensorSpec


def build_codec(spec: TensorSpec, shape: HeadShape) -> Codec:
    """The codec that `spec` names. Raises `RecipeError` if it refuses the spec."""
    return plugins().registry.codec(spec.quantizer)(spec, shape)


@lru_cache(maxsize=4096)
def footprint(spec: TensorSpec, shape: HeadShape) -> tuple[Layout, int]:
    """What a codec stores for a token, and the bytes of its own state."""
    codec = build_codec(spec, shape)
    return codec.layout(), sum(tensor.nbytes for tensor in codec.state().values())


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model.

    Layers without a group stay exactly as transformers makes them; `exact` says why for each.
    """

    model: ModelShape
    groups: tuple[Group, ...]
    sinks: int
    window: int
    exact: dict[int, str]

    def __post_init__(self) -> None:
        if not self.groups:
            reasons = "; ".join(sorted(set(self.exact.values()))) or "the model has no layers"
            raise ModelError(f"{self.model.name}: nothing to compress, every layer stays exact ({reasons})")

    def layer_groups(self, layer: int) -> list[Group]:
        """The groups of one layer, in order."""
        return [group for group in self.groups if group.layer == layer]

    def head_shape(self, group: Group, side: Side, dtype: torch.dtype | None = None) -> HeadShape:
        """What the group's codec of that side is built for, in a model of `dtype` (default: this one's)."""
        return HeadShape(len(group.heads), self.model.layers[group.layer].head_dim, side, dtype or self.model.dtype)

    def layout(self, group: Group, side: Side, dtype: torch.dtype | None = None) -> Layout:
        """What the group's codec of that side stores."""
        return footprint(getattr(group, side), self.head_shape(group, side, dtype))[0]

    def block(self, layer: int) -> int:
        """Tokens of this layer that leave the window together: the least that every codec can encode."""
        return math.lcm(*(self.layout(group, side).block for group in self.layer_groups(layer) for side in SIDES))

    def packed_tokens(self, layer: int, tokens: int) -> int:
        """Tokens held packed when the newest of `tokens` attends: all but sinks, window and itself."""
        return packed_tokens(tokens, self.sinks, self.window, self.block(layer))

    def nbytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of the whole cache after a decoding step that made it `tokens` long, of all processes that share it.

        Counts codes, scales, codec state (codebooks, rotations ...), exact tokens and uncompressed
        layers, the exact ones in `dtype` (default: the model's). Spare room of a growing pool is not counted,
        nor up to 127 tokens more than the window that fused kernels keep exact until 64 are encoded together.
        """
        width = (dtype or self.model.dtype).itemsize
        total = 0
        for index, layer in enumerate(self.model.layers):
            groups = self.layer_groups(index)
            if not groups:
                total += batch * layer.held(tokens) * layer.values_per_token * width
                continue
            packed = self.packed_tokens(index, tokens)
            total += batch * (tokens - packed) * layer.values_per_token * width
            for group in groups:
                for side in SIDES:
                    layout, state = footprint(getattr(group, side), self.head_shape(group, side, dtype))
                    total += state + batch * len(group.heads) * round(packed * layout.nbytes_per_token)
        return total

    def dense_nbytes(self, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the same cache without compression."""
        return batch * dtype.itemsize * self._values(tokens)

    def effective_bits(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Bits a cached value costs at that length, everything counted, exact tokens in `dtype`."""
        return 8 * self.nbytes(tokens, dtype=dtype) / self._values(tokens)

    def format_bits(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """The limit of `effective_bits` for an endless context: sinks, window and state vanish.

        Full-attention layers that stay exact are counted at their full width.
        """
        bits = values = 0.0
        for index, layer in enumerate(self.model.layers):
            if layer.kind != "full":
                continue
            values += layer.values_per_token
            groups = self.layer_groups(index)
            bits += 0 if groups else layer.values_per_token * dtype.itemsize * 8
            for group in groups:
                row = sum(self.layout(group, side, dtype).nbytes_per_token for side in SIDES)
                bits += 8 * len(group.heads) * row
        return bits / values

    def head_bits(self, side: Side, dtype: torch.dtype = torch.bfloat16) -> list[list[float]]:
        """Bits of a stored coordinate of that side for each layer and KV head, scales included; exact ones in `dtype`.

        Layers whose cache holds no keys and values have no heads here.
        """
        table: list[list[float]] = []
        for index, layer in enumerate(self.model.layers):
            row = [8.0 * dtype.itemsize] * (layer.num_kv_heads if layer.values_per_token else 0)
            for group in self.layer_groups(index):
                for head in group.heads:
                    row[head] = 8 * self.layout(group, side, dtype).nbytes_per_token / layer.head_dim
            table.append(row)
        return table

    def _values(self, tokens: int) -> int:
        return sum(layer.held(tokens) * layer.values_per_token for layer in self.model.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the artifact; the model's shape is stored beside it."""
        return {
            "groups": [asdict(group) for group in self.groups],
            "sinks": self.sinks,
            "window": self.window,
            "exact": {str(layer): reason for layer, reason in self.exact.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], model: ModelShape) -> "Plan":
        """The plan that `to_dict` described, for `model`."""
        groups = tuple(
            Group(g["layer"], tuple(g["heads"]), TensorSpec(**g["key"]), TensorSpec(**g["value"]))
            for g in data["groups"]
        )
        exact = {int(layer): reason for layer, reason in data["exact"].items()}
        return cls(model, groups, data["sinks"], data["window"], exact)


def packed_tokens(tokens: int, sinks: int, window: int, block: int) -> int:
    """Of `tokens` cached tokens, how many the newest one reads packed.

    It sees exactly: the first `sinks`, itself and the `window` tokens before it, and what is left over
    of a block of `block` tokens that are only encoded together.
    """
    return max(0, tokens - 1 - window - sinks) // block * block
