"""Perplexity and KL divergence of a compressed cache against the same model without compression.

A text is read in independent windows. Within one, a query at position i sees exactly what it sees when the
text is fed token by token through the real cache: sinks, itself and the `window` tokens before it exact,
every other token decoded. A plain prefill would be exact everywhere and show no loss at all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from transformers.cache_utils import DynamicCache

from . import attention
from .compression import Compression
from .errors import TQCompressError
from .plan import SIDES, Plan, Slot
from .prefix import Prefix
from .teacher import Losses, teacher_cache
from .view import LayerCodecs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS_AT_ONCE = 256  # bounds the log-probabilities compared at once


@dataclass(frozen=True)
class HeadMap:
    """What each KV head of each layer gets of one side, and how well it is kept: `[layer][head]`."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    bits: list[list[NonNegativeFloat]]  # a stored coordinate, scales included
    error: list[list[NonNegativeFloat | None]]  # |x - decoded|^2 / |x|^2 of all tokens packed; None if there were none


@dataclass(frozen=True)
class Quality:
    """How a recipe changes a model's predictions on a text. KL is in nats a token."""

    recipe: str
    effective_bits: NonNegativeFloat  # a value, at the length of a window, exact tokens counted at 16 bits
    format_bits: NonNegativeFloat  # without the exact tokens
    perplexity: NonNegativeFloat
    perplexity_uncompressed: NonNegativeFloat
    kl_mean: float
    kl_stderr: NonNegativeFloat  # of kl_mean, positions taken as independent
    kl_p99: float
    top1: NonNegativeFloat  # share of positions where both models predict the same token
    tokens: PositiveInt
    window_tokens: PositiveInt  # the length of the longest window measured
    sinks: NonNegativeInt  # first tokens that stay exact
    window: NonNegativeInt  # last tokens that stay exact
    key: HeadMap
    value: HeadMap
    budget: NonNegativeFloat | None = None  # bits of the suite's comparison at equal bytes that this is part of

    @property
    def series(self) -> str:
        """The recipe's name without the budget that the suite appends to it."""
        return self.recipe if self.budget is None else self.recipe.removesuffix(f"@{self.budget:g}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the fields."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel",
    ids: Tensor,
    compressions: dict[str, Compression],
    window_tokens: int = 2048,
    progress: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Measure each compression (from `api.plan_compression`) on the token ids `[tokens]`.

    `progress` is called after every forward pass; there are `passes(...)` of them. Raises
    `TQCompressError` if there are fewer than two tokens or a window exceeds the model's context.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and window_tokens > limit:
        raise TQCompressError(f"window-tokens: found {window_tokens}; the model's context is {limit} tokens")
    windows = list(_windows(ids, window_tokens))
    if not windows:
        raise TQCompressError(f"the text has {len(ids)} tokens and window-tokens is {window_tokens}; need 2 of each")
    tallies = {name: _Tally() for name in compressions}
    losses: dict[str, Losses] = {name: {} for name in compressions}
    with _attention(model):
        for window in windows:
            batch, targets = window.to(model.device)[None], window[1:].to(model.device)
            reference = model(batch, use_cache=False).logits[0, :-1]
            progress()
            for name, compression in compressions.items():
                cache = teacher_cache(model, compression.layers, losses[name])
                logits = model(batch, past_key_values=cache, use_cache=True).logits[0, :-1]
                tallies[name].add(reference, logits, targets)
                progress()
    used, longest = sum(map(len, windows)), len(windows[0])
    return [tallies[name].quality(name, c, losses[name], used, longest) for name, c in compressions.items()]


def passes(tokens: int, window_tokens: int, compressions: int) -> int:
    """Forward passes that `evaluate` makes."""
    return math.ceil(tokens / window_tokens) * (1 + compressions)


@dataclass(frozen=True)
class Candidate:
    """Compressed layers that `divergences` measures; with `only`, all but these slots of them is exact."""

    build: Callable[[], dict[int, LayerCodecs]]  # called when its turn comes
    only: frozenset[Slot] | None = None

    def layers(self) -> dict[int, LayerCodecs]:
        """Those that are not exact as a whole."""
        layers = self.build()
        return layers if self.only is None else {index: layers[index] for index in {slot[0] for slot in self.only}}


@torch.no_grad()
def divergences(
    model: "PreTrainedModel",
    windows: Sequence[Tensor],
    candidates: Sequence[Candidate],
    progress: Callable[[], None] = lambda: None,
) -> list[float]:
    """The mean KL, as in `evaluate`, of each candidate on windows of token ids `[tokens]`.

    The pass of a candidate begins at its first compressed layer. `progress` is called after every pass, one for each
    window and one more for each of its candidates.
    """
    tallies = [_Tally() for _ in candidates]
    prefix = Prefix(model, len(DynamicCache(config=model.config).layers))
    with _attention(model):
        for window in windows:
            batch, targets = window.to(model.device)[None], window[1:].to(model.device)
            with prefix.recorded():
                reference = model(batch, use_cache=False).logits[0, :-1]
            progress()
            for tally, candidate in zip(tallies, candidates, strict=True):
                layers = candidate.layers()
                cache = teacher_cache(model, layers, only=candidate.only)
                with prefix.replayed(min(layers)):
                    logits = model(batch, past_key_values=cache, use_cache=True).logits[0, :-1]
                tally.add(reference, logits, targets)
                progress()
    return [torch.cat(tally.kl).mean().item() for tally in tallies]


def _windows(ids: Tensor, window_tokens: int) -> Iterator[Tensor]:
    for start in range(0, len(ids), window_tokens):
        window = ids[start : start + window_tokens]
        if len(window) > 1:  # a single token predicts nothing
            yield window


@contextmanager
def _attention(model: "PreTrainedModel") -> Iterator[None]:
    """The model with tqcompress's attention, which treats ordinary tensors as the model's own does."""
    attention.register()
    with attention.selected(model):
        yield


@dataclass
class _Tally:
    """Sums over positions, and every position's KL."""

    loss: float = 0.0
    loss_uncompressed: float = 0.0
    agreed: int = 0
    kl: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take in logits `[positions, vocabulary]` of both models."""
        for start in range(0, len(targets), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            p, q = (x[part].float().log_softmax(-1) for x in (reference, logits))
            target = targets[part, None]
            self.loss -= q.gather(1, target).double().sum().item()
            self.loss_uncompressed -= p.gather(1, target).double().sum().item()
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.kl.append((p.exp() * (p - q)).double().sum(-1).cpu())

    def quality(self, name: str, compression: Compression, losses: Losses, tokens: int, longest: int) -> Quality:
        """The means over all positions."""
        kl, plan = torch.cat(self.kl), compression.plan
        count = len(kl)
        return Quality(
            recipe=name,
            effective_bits=plan.effective_bits(longest),
            format_bits=plan.format_bits(),
            perplexity=math.exp(self.loss / count),
            perplexity_uncompressed=math.exp(self.loss_uncompressed / count),
            kl_mean=kl.mean().item(),
            kl_stderr=(kl.std() / count**0.5).item() if count > 1 else 0.0,
            kl_p99=kl.quantile(0.99).item(),
            top1=self.agreed / count,
            tokens=tokens,
            window_tokens=longest,
            sinks=plan.sinks,
            window=plan.window,
            key=HeadMap(plan.head_bits("key"), _errors(plan, losses, 0)),
            value=HeadMap(plan.head_bits("value"), _errors(plan, losses, 1)),
        )


def _errors(plan: Plan, losses: Losses, side: int) -> list[list[float | None]]:
    """The relative error of each head of each layer: 0 where nothing is compressed."""
    table: list[list[float | None]] = []
    for index, row in enumerate(plan.head_bits(SIDES[side])):
        if not plan.layer_groups(index):
            table.append([0.0] * len(row))
        elif index not in losses:
            table.append([None] * len(row))
        else:
            lost, total = losses[index][side]
            table.append((lost / total.clamp_min(torch.finfo(total.dtype).tiny)).tolist())
    return table
