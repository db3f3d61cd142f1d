"""A small recipe, a model for it, and what the plan gives to a head."""

import torch

from tqcompress import Recipe, TensorSpec
from tqcompress.plan import Plan
from tqcompress.resolve import resolve
from tqcompress.shape import LayerShape, ModelShape

BASE = {"version": 1, "key": {"bits": 3}, "value": {"bits": 2}}
SOURCE = "my.yaml"


def shape(kinds: str = "ffffff", heads: int = 4, head_dim: int = 64) -> ModelShape:
    """A model of full (f) and sliding (s) attention layers."""
    layers = {
        "f": LayerShape("full", 2 * heads, heads, head_dim),
        "s": LayerShape("sliding", 2 * heads, heads, head_dim, 32),
    }
    return ModelShape("tiny", "llama", torch.bfloat16, tuple(layers[kind] for kind in kinds), "None")


def plan_of(model: ModelShape | None = None, **changes) -> Plan:
    """What BASE with some keys changed means for a model."""
    return resolve(Recipe.parse(BASE | changes, SOURCE), model or shape(), SOURCE)


def spec(plan: Plan, layer: int, head: int, side: str) -> TensorSpec | None:
    """What one side of a head gets; None if its layer stays exact."""
    for group in plan.layer_groups(layer):
        if head in group.heads:
            return getattr(group, side)
    return None


def bits(plan: Plan, side: str, head: int = 0) -> list:
    """The bits of one head in every layer."""
    specs = [spec(plan, layer, head, side) for layer in range(len(plan.model.layers))]
    return [s and s.bits for s in specs]
