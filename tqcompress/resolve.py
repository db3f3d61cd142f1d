"""Recipe x model shape -> plan. Rules are applied top to bottom, head by head; later rules win."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from .codec import HeadShape, TensorSpec
from .errors import RecipeError
from .plan import SIDES, Group, Plan, footprint
from .plan import Side as SideName
from .recipe import Recipe, Rule, Side
from .registry import plugins
from .shape import ModelShape
from .strict_yaml import shown, yaml_path


@dataclass(frozen=True)
class _Setting:
    """One side of one head while rules are applied: each value with the path it came from."""

    quantizer: tuple[str, str]
    keys: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def overridden(self, quantizer: str | None, side: Side | None, rule: str, name: str) -> "_Setting":
        """This setting after a rule (or the recipe's top level) at path `rule`, for the side `name`."""
        setting, path = self, yaml_path(*filter(None, (rule, name)))
        if side is not None and side.quantizer:
            quantizer, where = side.quantizer, f"{path}.quantizer"
        else:
            where = yaml_path(*filter(None, (rule, "quantizer")))
        if quantizer and quantizer != self.quantizer[0]:
            # The old quantizer's own keys mean nothing to the new one; the bits still do.
            setting = _Setting((quantizer, where), {k: v for k, v in self.keys.items() if k == "bits"})
        if side is None:
            return setting
        given = side.options | ({} if side.bits is None else {"bits": side.bits})
        return replace(setting, keys=setting.keys | {k: (v, f"{path}.{k}") for k, v in given.items()})

    def with_common(self, common: dict[str, tuple[Any, str]]) -> "_Setting":
        """This setting with keys of the recipe's top level that it does not set and its quantizer understands."""
        keys = _keys_of(self.quantizer[0])
        return replace(self, keys={k: v for k, v in common.items() if k in keys} | self.keys)

    def with_bits(self, allocated: Callable[[], float]) -> "_Setting":
        """This setting with allocated bits, if it has none of its own."""
        return (
            self if "bits" in self.keys else replace(self, keys=self.keys | {"bits": (allocated(), "budget.choices")})
        )

    def spec(self, shape: HeadShape, source: str) -> TensorSpec:
        """The checked spec. Raises `RecipeError` naming the path of the offending key."""
        nothing = _defaults_to_none(self.quantizer[0])  # null takes back what was said before
        values = {key: value for key, (value, _) in self.keys.items() if value is not None or key not in nothing}
        paths = {key: path for key, (_, path) in self.keys.items()} | {"quantizer": self.quantizer[1]}
        if "bits" not in values:
            raise RecipeError(f"{source}: {shape.side}.bits: missing; give the bits of a {shape.side}, or a budget")
        spec = TensorSpec(self.quantizer[0], values.pop("bits"), values)
        try:
            footprint(spec, shape)
        except RecipeError as error:
            key, _, message = str(error).partition(": ")
            key, dot, rest = key.partition(".")
            path = paths.get(key, f"{shape.side}.{key}" if message else shape.side) + dot + rest
            raise RecipeError(f"{source}: {path}: {message or key}") from None
        except ValidationError as error:
            first = error.errors()[0]
            allowed = ["bits", "quantizer", *plugins().registry.codec(spec.quantizer).Options.model_fields]
            top, *inner = first["loc"]
            what = f"found {shown(first['input'])}; allowed: {first['msg'].removeprefix('Input should be ')}"
            if first["type"] == "value_error":
                what = first["msg"].removeprefix("Value error, ")
            elif first["type"] == "extra_forbidden":
                what = "unknown key" if inner else f"unknown key; {spec.quantizer} allows {', '.join(allowed)}"
            raise RecipeError(f"{source}: {yaml_path(paths.get(str(top), str(top)), *inner)}: {what}") from None
        return spec


# The bits of a layer's KV head and side that the recipe gives none, because a budget decides.
Allocated = Callable[[int, int, SideName], float]


def resolve(recipe: Recipe, model: ModelShape, source: str | None = None, allocated: Allocated | None = None) -> Plan:
    """The plan that `recipe` means for `model`; `source` names the recipe in errors.

    `allocated` is asked for the bits that a recipe with a budget leaves open. Raises `RecipeError` for layers, heads,
    quantizers, bits or keys that do not exist here.
    """
    source = source or recipe.name
    if recipe.budget is not None and allocated is None:
        raise RecipeError(
            f"{source}: budget: its bits are measured on the model; `tqcompress apply --out DIR` does, then inspect DIR"
        )
    base = {
        side: _Setting((recipe.quantizer, "quantizer")).overridden(None, getattr(recipe, side), "", side)
        for side in SIDES
    }
    common = {side: _common(recipe, side, base[side], source) for side in SIDES}
    rules = [_expand(rule, f"rules[{i}]", model, source) for i, rule in enumerate(recipe.rules)]
    groups, exact = [], {}
    for index, layer in enumerate(model.layers):
        if layer.kind != "full":
            exact[index] = f"{layer.kind} attention" if layer.kind == "sliding" else f"{layer.kind} layer"
            continue
        pairs = defaultdict(list)  # (key spec, value spec), or the path of the rule that skips -> heads
        for head in range(layer.num_kv_heads):
            settings, skipped = dict(base), None
            for rule, path, layers, heads in rules:
                if index not in layers or (heads is not None and head not in heads):
                    continue
                skipped = path if rule.skip else None
                settings = {
                    side: settings[side].overridden(rule.quantizer, getattr(rule, side), path, side)
                    for side in settings
                }
            settings = {side: settings[side].with_common(common[side]) for side in SIDES}
            if recipe.budget is not None and allocated is not None and not skipped:
                for side in SIDES:
                    settings[side] = settings[side].with_bits(partial(allocated, index, head, side))
            pairs[skipped or _specs(settings, model, index, source)].append(head)
        skips = [pair for pair in pairs if isinstance(pair, str)]
        if len(skips) == len(pairs):
            exact[index] = f"skipped by {skips[-1]}"
            continue
        raw = TensorSpec("exact", 32)  # wide enough for any dtype; stored in the model's own
        merged: dict[tuple[TensorSpec, ...], list[int]] = defaultdict(
            list
        )  # two rules that skip heads make one exact group
        for pair, members in pairs.items():
            merged[(raw, raw) if isinstance(pair, str) else pair] += members
        groups += [Group(index, tuple(sorted(members)), *pair) for pair, members in merged.items()]
    return Plan(model, tuple(groups), recipe.keep.sinks, recipe.keep.window, exact)


def _common(recipe: Recipe, side: str, base: _Setting, source: str) -> dict[str, tuple[Any, str]]:
    """What `center`, `balance` and `outliers` mean for one side, as keys of its quantizer."""
    wanted: dict[str, tuple[Any, str]] = {"center": (True, f"center.{side}")} if getattr(recipe.center, side) else {}
    if recipe.balance != "none" and side == "key":
        wanted["balance"] = (recipe.balance, "balance")
    if recipe.outliers is not None:
        wanted["outliers"] = (recipe.outliers.model_dump(exclude_defaults=True), "outliers")
    name = base.quantizer[0]
    for key, (_, path) in wanted.items():
        if name in plugins().registry.names() and key not in _keys_of(name):
            raise RecipeError(f"{source}: {path}: quantizer {name} of {side}s cannot do that; remove it")
    return wanted


def _keys_of(quantizer: str) -> list[str]:
    """The recipe keys that a quantizer understands; none if it is not installed, which `spec` refuses."""
    registry = plugins().registry
    return list(registry.codec(quantizer).Options.model_fields) if quantizer in registry.names() else []


def _defaults_to_none(quantizer: str) -> list[str]:
    """Those of its keys that null leaves out."""
    registry = plugins().registry
    fields = registry.codec(quantizer).Options.model_fields if quantizer in registry.names() else {}
    return [key for key, field in fields.items() if not field.is_required() and field.default is None]


def _specs(settings: dict[SideName, _Setting], model: ModelShape, layer: int, source: str) -> tuple[TensorSpec, ...]:
    dim = model.layers[layer].head_dim
    return tuple(settings[side].spec(HeadShape(1, dim, side, model.dtype), source) for side in SIDES)


def _expand(rule: Rule, path: str, model: ModelShape, source: str) -> tuple[Rule, str, set[int], set[int] | None]:
    """A rule with the layers and heads it covers in this model."""
    many = isinstance(rule.layers, list)
    layers: set[int] = set()
    for i, selector in enumerate(rule.layers if many else [rule.layers]):
        where = f"{source}: {path}.layers" + (f"[{i}]" if many else "")
        layers |= _select(selector, model, where, explicit_must_compress=not rule.skip)
    if rule.heads is None:
        return rule, path, layers, None
    heads = {rule.heads} if isinstance(rule.heads, int) else set(rule.heads)
    limit = min((model.layers[i].num_kv_heads for i in layers), default=0)
    for head in sorted(heads):
        if head >= limit:
            raise RecipeError(
                f"{source}: {path}.heads: found {head}; the layers it covers have KV heads 0 to {limit - 1}"
            )
    return rule, path, layers, heads


def _select(selector: int | str, model: ModelShape, where: str, explicit_must_compress: bool) -> set[int]:
    """The layers that one selector means: an index, a range "a-b", "odd", "even" or "all"."""
    count = len(model.layers)
    if selector in ("all", "odd", "even"):
        return set(range(selector == "odd", count, 1 if selector == "all" else 2))
    if isinstance(selector, str) and "-" in selector[1:]:
        first, last = map(int, selector.split("-"))
        if first > last or last >= count:
            raise RecipeError(f"{where}: found {selector!r}; allowed: a range within 0-{count - 1}, first <= last")
        return set(range(first, last + 1))
    index = int(selector)
    if not -count <= index < count:
        raise RecipeError(f"{where}: found {index}; the model has layers 0 to {count - 1} (or -{count} to -1)")
    index %= count
    if explicit_must_compress and model.layers[index].kind != "full":
        full = [i for i, layer in enumerate(model.layers) if layer.kind == "full"]
        raise RecipeError(
            f"{where}: layer {index} is {model.layers[index].kind} and stays exact; compressed layers: {full}"
        )
    return {index}
