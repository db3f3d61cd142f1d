"""The caches that the suite tests, each a `Setup`. To test another one, add it to `SETUPS`; nothing else knows them.

A set-up says how a model is made to use the cache, and which cache of plain tensors must give the same: an
uncompressed one for a cache that loses nothing, else one that holds what the codec decodes (`decoded.py`). Lossy ones
are tested on a model of one layer: its keys and values depend on the tokens alone, so both hold the same codes, to
the bit. With more layers, a rounding error in the attention of one could turn a code of the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
from decoded import DecodedCache
from tiny import TOLERANCE, lossless, prompt, rounding, tiny_config, tiny_model
from transformers import Cache, DynamicCache, StaticCache

import tqcompress
from tqcompress.cache import CompressedLayer

SUPPORTED = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "gemma2", "gemma3", "gpt2", "gpt_oss", "cohere",
]  # fmt: skip
EAGER = ("gemma2", "gpt_oss")  # soft cap and sinks of attention: torch's fused attention has neither
KINDS = ["llama", "gemma3", "gpt2"]  # one of each kind of cache and position embedding
LENGTH = 120  # tokens that a cache of fixed size has room for


def tokens_packed(cache: Cache) -> int:
    """Tokens of the first compressed layer that are not held as plain tensors."""
    layer = next(layer for layer in cache.layers if isinstance(layer, CompressedLayer))
    return layer.stores[0][0].length


@dataclass(frozen=True)
class Setup:
    """A way to cache."""

    name: str
    prepare: Callable[[Any], Any]  # makes a model use the cache
    lossy: bool = False
    fixed: bool = False  # whether the cache has a fixed size
    architectures: tuple[str, ...] = ("llama",)
    sizes: dict[str, Any] = field(default_factory=dict)  # of the model's config
    brief: bool = (
        False  # whether some scenarios are enough, because other set-ups have the same cache with other codecs
    )
    packed: Callable[[Cache], int] = tokens_packed

    def pair(self, architecture: str = "llama", **changes) -> "Pair":
        """An uncompressed model and its compressed twin."""
        sizes = self.sizes | changes
        if self.lossy:
            mixed = hasattr(tiny_config(architecture), "layer_types")
            sizes = {"num_hidden_layers": 1} | ({"layer_types": ["full_attention"]} if mixed else {}) | sizes
            if architecture == "gpt2":
                sizes = {"n_layer": 1} | changes
        plain, compressed = (tiny_model(architecture, **sizes) for _ in range(2))
        if architecture in EAGER:
            plain.set_attn_implementation("eager")
        self.prepare(compressed)
        return Pair(self, plain, compressed)


@dataclass(frozen=True)
class Pair:
    """An uncompressed model, its compressed twin, and empty caches for them."""

    setup: Setup
    plain: Any
    compressed: Any

    @cached_property
    def limit(self) -> float:
        """How far logits may be apart: the rounding of the model's own arithmetic, see `tiny.rounding`."""
        return TOLERANCE * rounding(self.plain, prompt(60))

    def reference(self, mask: torch.Tensor | None = None) -> Cache:
        """For the plain model; `mask` `[batch, tokens]` shows where prompts begin."""
        if not self.setup.lossy:
            return DynamicCache(config=self.plain.config)
        padding = None if mask is None or mask.all() else mask.long().argmax(1)
        return DecodedCache(self.compressed.tqcompress.layers, padding)

    def cache(self) -> Cache:
        """For the compressed model."""
        config = self.compressed.config
        return StaticCache(config=config, max_cache_len=LENGTH) if self.setup.fixed else DynamicCache(config=config)


def _recipe(**changes) -> Callable[[Any], Any]:
    recipe = lossless(**changes)
    return lambda model: tqcompress.apply(model, recipe)


def _codec(name: str, bits: int, more: dict | None = None, **changes) -> Callable[[Any], Any]:
    side = {"bits": bits} | (more or {})
    return _recipe(quantizer=name, key=side, value=side, **changes)


_SPLIT = [{"heads": 0, "key": {"bits": 5}}, {"heads": 2, "skip": True}]
SETUPS = [
    Setup("exact, growing", _recipe(), architectures=tuple(SUPPORTED)),
    Setup("exact, fixed size", _recipe(), fixed=True, architectures=("llama", "gemma3", "gpt2", "qwen2")),
    Setup("exact, all packed", _recipe(keep={"sinks": 0, "window": 0}), architectures=("llama", "gemma3")),
    Setup("exact, first layer skipped", _recipe(rules=[{"layers": 0, "skip": True}])),
    Setup(
        "exact, last layer skipped, fixed size", _recipe(rules=[{"layers": -1, "skip": True}]), fixed=True, brief=True
    ),
    Setup("turboquant", _codec("turboquant", 3), lossy=True, architectures=("llama", "gemma2", "gpt2", "gpt_oss")),
    Setup("turboquant, fixed size", _codec("turboquant", 2, {"scale": "log8"}), lossy=True, fixed=True),
    Setup("turboquant, no window", _codec("turboquant", 4, keep={"sinks": 2, "window": 0}), lossy=True, brief=True),
    Setup("turboquant, no sinks", _codec("turboquant", 1, keep={"sinks": 0, "window": 5}), lossy=True),
    Setup(
        "turboquant, each head its own",
        _codec("turboquant", 2, rules=_SPLIT),
        lossy=True,
        sizes={"num_key_value_heads": 3},
    ),
    Setup("affine", _codec("affine", 2, {"group": 16}), lossy=True),
    Setup("polar", _codec("polar", 3), lossy=True, brief=True),
    Setup("qjl", _codec("qjl", 3), lossy=True, brief=True),
    Setup("trellis", _codec("trellis", 2, {"states": 16}), lossy=True, brief=True),
    Setup("nvfp4", _codec("nvfp4", 4), lossy=True, brief=True),
    Setup("fp8", _codec("fp8", 8), lossy=True, brief=True),
]


def setups(
    *keep: Callable[[Setup], bool], architectures: list[str] | None = None, every: bool = False
) -> pytest.MarkDecorator:
    """Parametrize a test over `setup` and `architecture`: set-ups that all of `keep` take, some architectures.

    `every`: also those for which some scenarios are enough.
    """
    return pytest.mark.parametrize(
        ("setup", "architecture"),
        [
            pytest.param(setup, name, id=f"{setup.name}-{name}")
            for setup in SETUPS
            if (every or not setup.brief) and all(wanted(setup) for wanted in keep)
            for name in setup.architectures
            if architectures is None or name in architectures
        ],
    )


def growing(setup: Setup) -> bool:
    """For scenarios that transformers does not offer with a cache of fixed size."""
    return not setup.fixed
