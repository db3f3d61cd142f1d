"""A layer and the plan of a small recipe."""

from tqcompress import Recipe
from tqcompress.plan import Plan
from tqcompress.resolve import resolve
from tqcompress.shape import LayerShape, ModelShape

FULL = LayerShape("full", 6, 2, 16)


def resolved(model: ModelShape, **changes) -> Plan:
    return resolve(Recipe.parse({"version": 1, "key": {"bits": 3}, "value": {"bits": 2}} | changes), model)
