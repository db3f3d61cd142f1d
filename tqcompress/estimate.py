"""What fits on a GPU and how fast it decodes, from a model's config alone.

A decoding step reads the weights and the cache once. Its time is taken as what that takes at the bandwidth that a plain
read reaches, and figures fitted to `scripts/bench_generate.py` on an H100 and an H200 (docs/performance.md): weights
are read at `OF_BANDWIDTH` of it, layers and sequences take time of their own, and codes no less than decoding them does
(`Codec.values_a_second`). They hold for compiled steps in a cache of fixed size with `run_ahead`. Of the steps measured
none is farther than 15 % from its estimate (a test compares them).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import TQCompressError
from .plan import Plan
from .registry import plugins

OF_BANDWIDTH = 0.88  # of the plain read's: products of one token with weights
LAYER, SEQUENCE = 52e-6, 25e-6  # seconds a step for each, whatever its size
WORKSPACE = 1 << 30  # bytes beside weights and cache: a chunk of a prompt, and what torch itself takes
FROM_SHEET = 0.9  # of the bandwidth that a vendor names, what a plain read reaches: .91 on an H200, .92 on an H100


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes and bandwidth in bytes a second."""

    memory: float
    bandwidth: float
    measured: bool = False  # else the bandwidth is the vendor's times `FROM_SHEET`


GPUS = {
    "H200": Gpu(139.8 * 2**30, 4.35e12, True),
    "H100": Gpu(79.2 * 2**30, 3.08e12, True),
    "B200": Gpu(178 * 2**30, FROM_SHEET * 8.0e12),
    "A100-80GB": Gpu(79.2 * 2**30, FROM_SHEET * 2.039e12),
    "L40S": Gpu(44.5 * 2**30, FROM_SHEET * 0.864e12),
    "RTX-4090": Gpu(23.6 * 2**30, FROM_SHEET * 1.008e12),
}


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, and of those that every step reads: not the rows of an embedding."""

    held: int
    read: int


@dataclass(frozen=True)
class Estimate:
    """One recipe, or the uncompressed cache, at one context and batch."""

    recipe: str
    cache: int  # bytes
    fits: bool
    longest: int  # tokens of each of the batch's sequences that fit, 0 if none does
    largest: int  # batch of this context that fits
    seconds: float  # a decoding step; of the uncompressed cache, the least that any engine can take

    def tokens_per_second(self, batch: int) -> float:
        """Of all sequences."""
        return batch / self.seconds


def weights_of(config: Any, dtype: torch.dtype) -> Weights:
    """Those of a model of this config, none of which is made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())  # tied ones once
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is table
    return Weights(held, held - (0 if tied else table.numel() * table.element_size()))


def gpu(name: str) -> Gpu:
    """Raises `TQCompressError` for one that is not known."""
    found = {known.lower(): known for known in GPUS}.get(name.lower())
    if found is None:
        raise TQCompressError(f"gpu: found {name!r}; known are {', '.join(GPUS)}")
    return GPUS[found]


def estimate(
    plan: Plan, weights: Weights, device: Gpu, context: int, batch: int = 1, name: str = "", limit: int = 1 << 24
) -> Estimate:
    """Of a recipe's plan; `limit` is the longest context worth asking for."""
    seconds = weights.read / (OF_BANDWIDTH * device.bandwidth) + _attention(plan, device, context, batch)
    seconds += LAYER * len(plan.model.layers) + SEQUENCE * batch
    return _estimate(name, plan.nbytes, weights, device, context, batch, limit, seconds)


def uncompressed(
    plan: Plan, weights: Weights, device: Gpu, context: int, batch: int = 1, limit: int = 1 << 24
) -> Estimate:
    """Of the same model's bf16 cache: bytes of weights and cache over the bandwidth, which no engine can undercut."""
    seconds = (weights.read + plan.dense_nbytes(context, batch)) / device.bandwidth
    return _estimate("bf16", plan.dense_nbytes, weights, device, context, batch, limit, seconds)


def _estimate(
    name: str, nbytes: Callable[[int, int], int], weights: Weights, device: Gpu, context: int, batch: int, limit: int,
    seconds: float,
) -> Estimate:  # fmt: skip
    def fits(tokens: int, sequences: int) -> bool:
        return weights.held + nbytes(tokens, sequences) + WORKSPACE <= device.memory

    longest = _last(lambda tokens: fits(tokens, batch), limit)
    largest = _last(lambda sequences: fits(context, sequences), 1 << 16)
    return Estimate(name, nbytes(context, batch), fits(context, batch), longest, largest, seconds)


def _attention(plan: Plan, device: Gpu, context: int, batch: int) -> float:
    """Seconds in which all layers read their cache."""
    seconds = plan.nbytes(context, batch) / device.bandwidth
    for group in plan.groups:
        for side in (group.key, group.value):
            rate = plugins().registry.codec(side.quantizer).values_a_second(side.bits, side.options)
            if rate is not None:
                values = batch * context * len(group.heads) * plan.model.layers[group.layer].head_dim
                seconds += max(0.0, values / rate - values * side.bits / 8 / device.bandwidth)  # beyond the bytes' own
    return seconds


def _last(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which it holds, 0 if it does for none; it holds for all below that."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
