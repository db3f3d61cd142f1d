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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from . import attention
from .compression import Compression
from .errors import ModelError, TQCompressError
from .plan import SIDES, Plan, packed_tokens
from .view import KVView, LayerCodecs, take_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES_AT_ONCE = 256  # bounds the score matrices of a window
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
                cache = _teacher_cache(model, compression.layers, losses[name])
                logits = model(batch, past_key_values=cache, use_cache=True).logits[0, :-1]
                tallies[name].add(reference, logits, targets)
                progress()
    used, longest = sum(map(len, windows)), len(windows[0])
    return [tallies[name].quality(name, c, losses[name], used, longest) for name, c in compressions.items()]


def passes(tokens: int, window_tokens: int, compressions: int) -> int:
    """Forward passes that `evaluate` makes."""
    return math.ceil(tokens / window_tokens) * (1 + compressions)


@torch.no_grad()
def divergences(
    model: "PreTrainedModel",
    windows: Sequence[Tensor],
    candidates: Sequence[Callable[[], dict[int, LayerCodecs]]],
    progress: Callable[[], None] = lambda: None,
) -> list[float]:
    """The mean KL, as in `evaluate`, of each candidate on windows of token ids `[tokens]`.

    A candidate is a function that builds the codecs of all compressed layers: one is held at a time. `progress` is
    called after every forward pass, one for each window and one more for each of its candidates.
    """
    tallies = [_Tally() for _ in candidates]
    with _attention(model):
        for window in windows:
            batch, targets = window.to(model.device)[None], window[1:].to(model.device)
            reference = model(batch, use_cache=False).logits[0, :-1]
            progress()
            for tally, layers in zip(tallies, candidates, strict=True):
                cache = _teacher_cache(model, layers())
                tally.add(reference, model(batch, past_key_values=cache, use_cache=True).logits[0, :-1], targets)
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

    def quality(self, name: str, compression: Compression, losses: "Losses", tokens: int, longest: int) -> Quality:
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


# Of each compressed layer `[2, 2, kv_heads]`, float64: keys and values; |x - decoded|^2 and |x|^2 of all packed tokens.
Losses = dict[int, Tensor]


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


def _teacher_cache(model: "PreTrainedModel", layers: dict[int, LayerCodecs], losses: Losses | None = None) -> Cache:
    """A cache for one forward pass over a whole window; what its codecs lose is added to `losses`."""
    cache = DynamicCache(config=model.config)
    for index, codecs in layers.items():
        cache.layers[index] = _TeacherLayer(codecs, losses)
    return cache


class _TeacherLayer(DynamicLayer):
    """Takes one window of tokens; its attention decodes, query by query, what the real cache would have packed."""

    def __init__(self, codecs: LayerCodecs, losses: Losses | None):
        super().__init__()
        self.codecs, self.losses = codecs, losses

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[KVView, KVView]:
        """See `_TeacherView`."""
        view = _TeacherView(self.codecs, key_states, value_states)
        if self.losses is not None and (lost := view.losses()) is not None:
            self.losses[self.codecs.layer] = self.losses.get(self.codecs.layer, 0) + lost
        return view, view


class _TeacherView(KVView):
    """Exact and decoded keys and values `[1, kv_heads, tokens, head_dim]` of a window."""

    def __init__(self, codecs: LayerCodecs, keys: Tensor, values: Tensor):
        super().__init__((), codecs.num_kv_heads)
        self.codecs, self.exact = codecs, (keys.float(), values.float())
        count = packed_tokens(keys.shape[2], codecs.sinks, codecs.window, codecs.block)
        self.decoded = tuple(states.clone() for states in self.exact)
        for group in codecs.groups:
            for codec, states, out in zip((group.key, group.value), (keys, values), self.decoded, strict=True):
                if count:
                    old = take_heads(states, group).narrow(2, codecs.sinks, count)
                    decoded = codec.to(states.device).decode(codec.encode(old))
                    out[:, list(group.heads), codecs.sinks : codecs.sinks + count] = decoded

    def losses(self) -> Tensor | None:
        """`[2, 2, kv_heads]`, as in `Losses`; None if nothing is packed."""
        count = packed_tokens(self.exact[0].shape[2], self.codecs.sinks, self.codecs.window, self.codecs.block)
        if not count:
            return None
        rows = []
        for pair in zip(self.exact, self.decoded, strict=True):
            exact, decoded = (states.narrow(2, self.codecs.sinks, count) for states in pair)
            rows += [(exact - decoded).square().sum((0, 2, 3)), exact.square().sum((0, 2, 3))]
        lost: Tensor = torch.stack(rows).cpu().double().unflatten(0, (2, 2))
        return lost

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """As `KVView.attend`, for a whole causal window without padding."""
        if mask is not None:
            raise ModelError("evaluation reads one unpadded window at a time; it takes no attention mask")
        parts = [
            self._attend(query[:, :, start : start + QUERIES_AT_ONCE].float(), start, scaling, softcap)
            for start in range(0, query.shape[2], QUERIES_AT_ONCE)
        ]
        return torch.cat([output for output, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)

    def _attend(self, query: Tensor, first: int, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        queries = query.shape[2]
        stop = first + queries
        query = query.unflatten(1, (self.num_kv_heads, -1)).flatten(2, 3)
        exact, decoded = ([s[:, :, :stop] for s in pair] for pair in (self.exact, self.decoded))
        position = torch.arange(first, stop, device=query.device)[:, None]
        token = torch.arange(stop, device=query.device)
        c = self.codecs
        counts = [packed_tokens(i + 1, c.sinks, c.window, c.block) for i in range(first, stop)]
        packed = torch.tensor(counts, device=query.device)[:, None]
        old = ((token >= c.sinks) & (token < c.sinks + packed)).repeat(query.shape[2] // queries, 1)
        seen = (token <= position).repeat(query.shape[2] // queries, 1)
        scores = torch.where(old, query @ decoded[0].transpose(-1, -2), query @ exact[0].transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        output = weights.masked_fill(~old, 0) @ decoded[1] + weights.masked_fill(old, 0) @ exact[1]
        return output.unflatten(2, (-1, queries)).flatten(1, 2), lse.unflatten(2, (-1, queries)).flatten(1, 2)
