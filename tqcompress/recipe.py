"""The recipe: what a user wants, as strict pydantic models (schema version 1), and its YAML reader.

Every problem is a `RecipeError` that names the file, the path inside it, what was found and what is
allowed. Keys whose implementation is not there yet are part of the schema and refused, never ignored.
"""

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import RecipeError
from .strict_yaml import MAX_BYTES, parse_yaml, shown, yaml_path

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_ERRORS = 8  # of one recipe that are told


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]  # of tokens
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class Side(BaseModel):
    """Keys or values: `bits`, and the quantizer's own keys (checked against it when a plan is made)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    bits: Annotated[float, Field(gt=0, le=32)] | None = None
    quantizer: Name | None = None

    @property
    def says_something(self) -> bool:
        """Whether any key is given."""
        return bool(self.bits or self.quantizer or self.model_extra)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the quantizer."""
        return dict(self.model_extra or {})


class Keep(_Model):
    """Tokens that stay exact: the first `sinks` and the last `window`."""

    sinks: Count = 4
    window: Count = 128


def _check_version(given: Any) -> Any:
    if type(given) is not int or given != 1:  # True and 1.0 equal 1
        raise ValueError(f"found {shown(given)}; allowed: 1")
    return given


_LAYERS = re.compile(r"all|odd|even|-?[0-9]{1,9}|[0-9]{1,9}-[0-9]{1,9}")


def _check_layers(given: Any) -> Any:
    for selector in given if isinstance(given, list) else [given]:
        is_index = isinstance(selector, int) and not isinstance(selector, bool)
        if not is_index and not (isinstance(selector, str) and _LAYERS.fullmatch(selector)):
            raise ValueError(
                f'found {shown(selector)}; allowed: an index, a range "a-b", odd, even, all, or a list of these'
            )
    if given == []:
        raise ValueError("found an empty list; allowed: leave the key out to mean all layers")
    return given


def _check_heads(given: Any) -> Any:
    for head in given if isinstance(given, list) else [given]:
        if not isinstance(head, int) or isinstance(head, bool) or head < 0:
            raise ValueError(f"found {shown(head)}; allowed: a KV head's index, 0 or more, or a list of these")
    if given == []:
        raise ValueError("found an empty list; allowed: leave the key out to mean all KV heads")
    return given


class Rule(_Model):
    """Overrides for some layers and KV heads; later rules win."""

    layers: Annotated[Any, AfterValidator(_check_layers)] = "all"  # int | str | list[int | str]
    heads: Annotated[Any, AfterValidator(_check_heads)] = None  # int | list[int]
    skip: bool = False
    quantizer: Name | None = None
    key: Side | None = None
    value: Side | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        changes = self.quantizer or any(side and side.says_something for side in (self.key, self.value))
        if self.skip and changes:
            raise ValueError("skip: true contradicts quantizer, key and value in the same rule; use one of them")
        if not self.skip and not changes:
            raise ValueError("the rule changes nothing; give skip: true, quantizer, key or value")
        return self


class Center(_Model):
    """Subtract the calibrated mean, where the quantizer can."""

    key: bool = False
    value: bool = False


def _check_channels(given: Any) -> Any:
    many = isinstance(given, list)
    for channel in given if many else [given]:
        if not isinstance(channel, int) or isinstance(channel, bool) or channel < (not many):
            raise ValueError(f"found {channel!r}; allowed: how many, 1 or more, or a list of channels, 0 or more")
    if many and len(set(given)) < max(len(given), 1):
        raise ValueError(f"found {given}; allowed: one channel or more, each once")
    return given


class Outliers(_Model):
    """Channels with more bits: so many, those that vary most, or listed ones, with those that vary most up to 16 n."""

    channels: Annotated[Any, AfterValidator(_check_channels)]  # int | list[int]
    bits: PositiveInt
    select: Literal["calibration", "listed"] | None = None  # what `channels` says anyway

    @model_validator(mode="after")
    def _selects_as_channels_say(self) -> Self:
        says = "listed" if isinstance(self.channels, list) else "calibration"
        if self.select not in (None, says):
            raise ValueError(f"select: found {self.select!r}; these channels are of select: {says}")
        return self


class Budget(_Model):
    """Bits that are spread where they count: what the recipe gives no `bits` gets them from measurements.

    `bits` is what a stored coordinate costs, scales included, on average over the keys and values of the layers that
    are compressed. Sensitivities are measured on `tokens` tokens of the calibration text.
    """

    bits: Annotated[float, Field(gt=0)]
    over: list[Literal["layers", "heads", "sides"]] = ["layers", "sides"]
    choices: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)] = [1, 2, 3, 4]
    tokens: PositiveInt = 512

    @field_validator("over", "choices")
    @classmethod
    def _each_once(cls, given: list[Any]) -> list[Any]:
        if len(set(given)) < len(given):
            raise ValueError(f"found {given}; allowed: each of them once")
        return given

    @field_validator("over")
    @classmethod
    def _heads_are_of_layers(cls, given: list[str]) -> list[str]:
        if not given or given == ["heads"] or set(given) == {"heads", "sides"}:
            raise ValueError(f"found {given}; allowed: layers, sides, or both; heads only together with layers")
        return given


class Calibration(_Model):
    """The text that statistics are taken from: a file, a shipped text, or `datasets:NAME`."""

    text: Name
    tokens: PositiveInt = 65536
    length: PositiveInt = 512
    seed: Seed = 0
    context: PositiveInt | None = None  # positions that windows are spread over; the model's context if not given


class Guard(_Model):
    """What watches over the codecs' errors, when a model is compressed and while it runs: see `guard.py`."""

    text: Name = "wikitext-validation"  # measured on when the model is compressed, as `calibration.text`
    tokens: Annotated[int, Field(ge=64, le=1 << 20)] = 512
    limit: Annotated[float, Field(gt=0)] = 1.0  # of noise, as a share of what there is to store
    weak: Literal["refuse", "more-bits"] = "refuse"  # what becomes of layers beyond it
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.0625  # of encodings that are looked at while the model runs
    factor: Annotated[float, Field(gt=1)] = 4.0  # the error may be so many times what was measured
    action: Literal["warn", "exact", "raise"] = "warn"


class Tier(_Model):
    """Bits for tokens older than `after`."""

    after: PositiveInt
    key: Side
    value: Side


class Recipe(_Model):
    """A whole recipe. Load one with `Recipe.load`, or build it from keyword arguments."""

    version: Annotated[Any, AfterValidator(_check_version)]  # 1
    name: str = "unnamed"
    quantizer: Name = "turboquant"
    key: Side
    value: Side
    keep: Keep = Keep()
    max_cache_len: PositiveInt | None = None
    rules: list[Rule] = []
    center: Center = Center()
    balance: Literal["none", "diagonal", "key"] = "none"
    outliers: Outliers | None = None
    budget: Budget | None = None
    calibration: Calibration | None = None
    guard: Guard | None = None
    tiers: list[Tier] = []

    @field_validator("tiers")
    @classmethod
    def _only_what_is_implemented(cls, value: Any, info: ValidationInfo) -> Any:
        if value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("part of the schema but not implemented in this version; remove it")
        return value

    @classmethod
    def parse(cls, data: Any, source: str = "recipe") -> "Recipe":
        """Build a recipe from plain data; `source` names it in errors. Raises `RecipeError`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)
            more = f"; and {len(found) - MAX_ERRORS} more" if len(found) > MAX_ERRORS else ""
            raise RecipeError(f"{source}: " + "; ".join(map(_explain, found[:MAX_ERRORS])) + more) from None

    @classmethod
    def load(cls, recipe: "Recipe | str | Path | dict[str, Any]") -> "Recipe":
        """A recipe from a YAML file, the name of a shipped one, plain data, or a `Recipe` itself.

        Raises `RecipeError` if the file is missing, is not YAML, or breaks the schema.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, dict):
            return cls.parse(recipe)
        return cls.parse(parse_yaml(_read(str(recipe)), str(recipe)), str(recipe))

    def dump(self) -> str:
        """The recipe as YAML that loads to an equal recipe."""
        text: str = yaml.safe_dump(self.model_dump(exclude_defaults=True) | {"version": 1}, sort_keys=False)
        return text


def _read(recipe: str) -> bytes:
    """The file, or the shipped recipe of that name."""
    path = Path(recipe)
    shipped = resources.files("tqcompress.recipes") / f"{recipe}.yaml"
    try:
        if path.is_file():
            if path.stat().st_size > MAX_BYTES:
                raise RecipeError(f"{recipe}: found {path.stat().st_size} bytes; a recipe has at most {MAX_BYTES}")
            return path.read_bytes()
        if path.name == recipe and shipped.is_file():
            return shipped.read_bytes()
    except OSError as error:
        raise RecipeError(f"{shown(recipe)}: cannot be read: {error.strerror}") from None
    raise RecipeError(f"{shown(recipe, quotes=False)}: no such file; shipped recipes: {', '.join(shipped_recipes())}")


def shipped_recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    return sorted(p.name[:-5] for p in resources.files("tqcompress.recipes").iterdir() if p.name.endswith(".yaml"))


def _explain(error: "ErrorDetails") -> str:
    """One pydantic error as `path: what was found, what is allowed`."""
    model, parts = Recipe, []
    for part in error["loc"]:
        if isinstance(part, int) or part in getattr(model, "model_fields", {}):
            parts.append(part)
            model = _child(model, part)
        elif error["type"] == "extra_forbidden":
            parts.append(part)  # anything else in loc is pydantic's name for a member of a union
    where = yaml_path(*parts) or "the recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; allowed: {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: missing; it is required"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: found {shown(error['input'])}; allowed: {message}"


def _child(model: Any, part: str | int) -> Any:
    """The model behind a field, looking through lists and unions; None if there is none."""
    pending = [model.model_fields[part].annotation] if isinstance(part, str) else [model]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        pending.extend(getattr(annotation, "__args__", ()))
    return None
