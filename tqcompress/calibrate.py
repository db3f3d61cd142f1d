"""Statistics of queries, keys and values on a text: one pass, in memory that does not depend on its length."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from . import attention
from .errors import ArtifactError, ModelError, RecipeError, TQCompressError
from .output import replace_file
from .recipe import Calibration, Guard, Recipe
from .sharding import HeadShard
from .strict_yaml import shown
from .texts import load_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "tqcompress statistics"
NAME = "tqcompress_calibrate"  # the attention function that watches


@dataclass(frozen=True)
class Moments:
    """Moments of one side (keys or values) of some KV heads, float64 on the CPU.

    Keys are taken as they are cached, after rotary embedding. `query` is the sum, over the query heads that share a KV
    head, of E[q q^T]; for values it is None.

    mean `[kv_heads, dim]`, covariance `[kv_heads, dim, dim]`, query `[kv_heads, dim, dim]`.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    query: Tensor | None = None

    def of(self, heads: tuple[int, ...]) -> "Moments":
        """Those of some of the heads."""
        index = list(heads)
        query = None if self.query is None else self.query[index]
        return Moments(self.count, self.mean[index], self.covariance[index], query)


@dataclass(frozen=True)
class Statistics:
    """Moments of every layer, and what they were taken from."""

    layers: dict[int, dict[str, Moments]]
    source: dict[str, str | int] = field(default_factory=dict)  # text, tokens, length, seed, sha256 of the token ids

    def save(self, path: Path) -> None:
        """Write a safetensors file, which appears whole or not at all. Raises `OutputError`."""
        tensors = {
            f"layers.{index}.{side}.{name}": getattr(moments, name).contiguous()
            for index, sides in self.layers.items()
            for side, moments in sides.items()
            for name in ("mean", "covariance", "query")
            if getattr(moments, name) is not None
        }
        count = str(next(iter(self.layers.values()))["key"].count)
        metadata = {"format": FORMAT, "count": count, "source": json.dumps(self.source, sort_keys=True)}
        replace_file(Path(path), to_bytes(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote. Raises `ArtifactError`."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, AttributeError) as error:
            raise ArtifactError(f"{path}: not a file of statistics: {' '.join(str(error).split())}") from None
        if metadata.get("format") != FORMAT:
            raise ArtifactError(f"{path}: not a file of statistics; `tqcompress calibrate --out FILE` writes one")
        layers: dict[int, dict[str, Moments]] = {}
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        try:
            count, source = int(metadata["count"]), json.loads(metadata["source"])
            for name, tensor in tensors.items():
                _, index, side, moment = name.split(".")
                found.setdefault((int(index), side), {})[moment] = tensor
            for (index, side), moments in found.items():
                layers.setdefault(index, {})[side] = _checked(Moments(count, **moments), side)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: the statistics are malformed: {shown(error)}") from None
        return cls(layers, source)


def _checked(moments: Moments, side: str) -> Moments:
    """Raise `ValueError` if the shapes do not fit together, or a number is not finite."""
    heads, dim = moments.mean.shape
    squares = [moments.covariance] if side == "value" else [moments.covariance, moments.query]
    if side not in ("key", "value") or any(x is None or x.shape != (heads, dim, dim) for x in squares):
        raise ValueError(f"{side}: shapes that do not fit together")
    for tensor in (moments.mean, *squares):
        if tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{side}: {tensor.dtype} that should be finite float64")
    return moments


# Rotary embeddings whose angles are proportional to the position, whatever the length of the text.
SHIFTABLE = ("default", "linear", "llama3", "yarn", "proportional")


class Calibrator:
    """Takes the statistics that recipes ask for, each once for a model."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: Any = None, progress: Callable[[str, int, int], None] | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self.progress = progress or (lambda what, done, total: None)  # what goes on, the passes done, their number
        self._taken: dict[tuple[Any, int], Statistics] = {}

    def statistics(self, recipe: Recipe) -> Statistics:
        """Those of the recipe's `calibration`. Raises `RecipeError` if it has none."""
        settings, skip = (
            _settings(recipe, "center, balance and outliers need statistics of the model on a text"),
            recipe.keep.sinks,
        )
        if (settings, skip) not in self._taken:
            show = partial(self.progress, "calibrating")
            ids = self._ids(settings)
            taken = calibrate(
                self.model, ids, settings.tokens, settings.length, settings.seed, skip, show, settings.context
            )
            name = Path(settings.text).name  # a machine's paths mean nothing elsewhere
            self._taken[settings, skip] = replace(taken, source={"text": name, **taken.source})
        return self._taken[settings, skip]

    def other_windows(self, recipe: Recipe) -> list[Tensor]:
        """Token ids of the windows of the calibration text that statistics are not taken from, in a random order."""
        settings = _settings(recipe, "a budget needs a text to measure the model on")
        return choose_windows(self.model, self._ids(settings), settings.tokens, settings.length, settings.seed)[1]

    def guard_ids(self, settings: Guard) -> Tensor:
        """Token ids of the text that a guard measures on: its last ones, calibration beginning where it does."""
        ids = torch.tensor(self._tokenizer()(load_text(settings.text), verbose=False).input_ids)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return ids[-min(settings.tokens, limit or settings.tokens) :]

    def _ids(self, settings: Calibration) -> Tensor:
        return torch.tensor(self._tokenizer()(load_text(settings.text), verbose=False).input_ids)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            from transformers import AutoTokenizer

            name = self.model.config._name_or_path
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ModelError(
                    f"{name or 'the model'}: no tokenizer to calibrate with; give tokenizer= ({reason})"
                ) from None
        return self.tokenizer


class _Sums:
    """Running sums of one side of one layer: of x and x x^T, in float64 on the layer's device."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor = 0.0  # type: ignore[assignment]  # until something is added
        self.second: Tensor = 0.0  # type: ignore[assignment]  # likewise

    def add(self, x: Tensor) -> None:
        """Take in `[batch, heads, tokens, dim]`."""
        x = x.transpose(0, 1).flatten(1, 2)
        self.count += x.shape[1]
        x = x.double()
        self.first = self.first + x.sum(1)
        self.second = self.second + x.mT @ x

    def gather(self, shard: HeadShard) -> None:
        """Take in the heads of the other processes."""
        self.first, self.second = shard.gather(self.first), shard.gather(self.second)

    def moments(self, query: Tensor | None = None) -> Moments:
        """What the sums amount to."""
        mean = self.first / self.count
        covariance = self.second / self.count - mean[:, :, None] * mean[:, None, :]
        return Moments(self.count, mean.cpu(), covariance.cpu(), query)


class _Watcher:
    """The attention function that adds up what it is given, and attends as the model does otherwise."""

    def __init__(self, skip: int):
        self.skip = skip
        self.sums: dict[int, tuple[_Sums, _Sums, _Sums]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer: int = module.layer_idx  # type: ignore[assignment]  # transformers' modules have it
        sums = self.sums.setdefault(layer, (_Sums(), _Sums(), _Sums()))
        for total, x, name in zip(sums, (query, key, value), ("queries", "keys", "values"), strict=True):
            if not bool(x.isfinite().all()):
                raise TQCompressError(f"calibration: layer {layer}: {name} are not finite")
            total.add(x[:, :, self.skip :].detach())
        return attention.attention_forward(module, query, key, value, *args, **kwargs)

    def statistics(self, source: dict[str, str | int], shard: HeadShard) -> Statistics:
        """The moments of every layer that was seen, all heads of it."""
        layers = {}
        for index, (query, key, value) in self.sums.items():
            for sums in (query, key, value):
                sums.gather(shard)
            kv_heads = key.first.shape[0]
            met = (query.second / query.count).unflatten(0, (kv_heads, -1)).sum(1).cpu()
            layers[index] = {"key": key.moments(met), "value": value.moments()}
        return Statistics(layers, source)


@torch.no_grad()
def calibrate(
    model: "PreTrainedModel",
    ids: Tensor,
    tokens: int = 65536,
    length: int = 512,
    seed: int = 0,
    skip: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
    context: int | None = None,
) -> Statistics:
    """Run `model` over windows of the token ids `[n]` of a text, and add up what its attention sees.

    Rotary embedding turns a key by its position, so keys of a long text are not distributed as those of a short one.
    But what a model computes of a window does not depend on where the window begins: windows are read as if they lay
    all over the context.

    Args:
        tokens: how many to use at most; windows are drawn without replacement by `seed` if the text has more.
        length: of a window; each is read on its own.
        skip: tokens at the start of each window that are left out: sinks, which stay exact and are unlike the rest.
        progress: called with the windows done and their number.
        context: positions that windows are spread over, the model's context if None. Models whose embedding is not
            rotary, or changes with the length of the text, read every window at its beginning.

    Raises `TQCompressError` if the text is shorter than two tokens beyond `skip`, or numbers are not finite.
    """
    windows, _ = choose_windows(model, ids, tokens, length, seed)
    used, length = torch.cat(windows), min(length, len(windows[0]))
    if len(windows[0]) < skip + 2:
        raise TQCompressError(f"calibration: the text has {len(ids)} tokens; at least {skip + 2} are needed")
    context = _context(model, context, length)
    # Denser at the beginning, where every text is.
    starts = [round((i / max(1, len(windows) - 1)) ** 2 * (context - length)) for i in range(len(windows))]
    watcher = _Watcher(skip)
    with watched(model, watcher):
        for done, (window, start) in enumerate(zip(windows, starts, strict=True)):
            progress(done, len(windows))
            places = torch.arange(start, start + len(window), device=model.device)[None]
            model.get_decoder()(input_ids=window.to(model.device)[None], position_ids=places, use_cache=False)
        progress(len(windows), len(windows))
    digest = hashlib.sha256(used.to(torch.int64).cpu().numpy().astype("<i8").tobytes()).hexdigest()
    source: dict[str, str | int] = {"tokens": len(used), "length": length, "seed": seed, "skip": skip, "sha256": digest}
    return watcher.statistics(source | {"context": context}, HeadShard.of(model))


def _context(model: "PreTrainedModel", wanted: int | None, length: int) -> int:
    """The positions that windows of `length` tokens are spread over; `length` if they must begin at 0."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or length
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if rope and all(isinstance(one, dict) for one in rope.values()) else [rope]
    if not all(one.get("rope_type") in SHIFTABLE for one in each):
        return length
    return max(length, min(wanted or limit, limit))


def choose_windows(
    model: "PreTrainedModel", ids: Tensor, tokens: int, length: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The windows of a text that `calibrate` uses, in the text's order, and the others, in the order of `seed`."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(length, limit or length, tokens)
    windows = list(ids.split(length))
    if len(windows) > 1 and len(windows[-1]) < length:
        windows.pop()
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, tokens // length)
    return [windows[i] for i in sorted(order[:count])], [windows[i] for i in order[count:]]


def _settings(recipe: Recipe, why: str) -> Calibration:
    """The recipe's `calibration`. Raises `RecipeError`, which says `why` it is needed, if it has none."""
    if recipe.calibration is None:
        raise RecipeError(
            f"{recipe.name}: calibration: missing; {why}, for example calibration: {{text: wikitext-validation}}"
        )
    return recipe.calibration


@contextmanager
def watched(model: "PreTrainedModel", watcher: attention.AttentionFunction) -> Iterator[None]:
    """The model in evaluation mode with the watcher, a function like `attention_forward`, as its attention."""
    attention.register(NAME, watcher)
    training = model.training
    model.eval()
    try:
        with attention.selected(model, NAME):
            yield
    finally:
        model.train(training)
        attention.register(NAME, _refuse)  # keeps no statistics alive


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise TQCompressError("calibration is over; choose another attention implementation")
