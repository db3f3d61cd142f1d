"""What a plan must know of a model: its layers, KV heads and head sizes, read from the config alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ModelError


@dataclass(frozen=True)
class LayerShape:
    """One layer's cache. Only `kind == "full"` is compressed; other kinds stay as transformers makes them."""

    kind: str  # "full", "sliding", or the name of another transformers cache layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None

    def held(self, tokens: int) -> int:
        """Tokens of an uncompressed cache that has seen `tokens`."""
        return min(tokens, self.sliding_window - 1) if self.sliding_window else tokens

    @property
    def values_per_token(self) -> int:
        """Key and value coordinates of one token."""
        return 2 * self.num_kv_heads * self.head_dim if self.kind in ("full", "sliding") else 0


@dataclass(frozen=True)
class ModelShape:
    """The cache-relevant shape of a model, and the fingerprint that artifacts are matched by."""

    name: str
    model_type: str
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]
    rope: str  # positional embedding parameters: keys are stored after it is applied

    @classmethod
    def of(cls, model_or_config: Any) -> "ModelShape":
        """The shape of a model or of its config.

        Raises `ModelError` for a model whose cache tqcompress cannot hold, with the reason.
        """
        top = getattr(model_or_config, "config", model_or_config)
        dtype = getattr(model_or_config, "dtype", None) or torch.float32
        name = getattr(top, "_name_or_path", "") or top.model_type
        name = Path(name).name if Path(name).is_dir() else name  # a machine's paths mean nothing elsewhere
        if top.is_encoder_decoder:
            raise ModelError(f"{name} ({top.model_type}) is an encoder-decoder; only decoder-only models are supported")
        config = top.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ModelError(
                f"{name} ({config.model_type}) uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): "
                "its cache holds latents, not keys and values, and cannot be compressed by tqcompress"
            )
        if not getattr(config, "num_attention_heads", None):
            raise ModelError(f"{name} ({config.model_type}) has no attention heads, so no KV cache to compress")
        return cls(name, config.model_type, dtype, _layers(config), repr(getattr(config, "rope_parameters", None)))

    def fingerprint(self) -> dict[str, Any]:
        """Plain data that must be equal for an artifact to fit."""
        return {"model_type": self.model_type, "rope": self.rope, "layers": [asdict(layer) for layer in self.layers]}


def _layers(config: Any) -> tuple[LayerShape, ...]:
    """One shape for each layer of the cache that transformers itself would make."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    shapes = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        here = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
        heads = here.num_attention_heads
        kinds = {DynamicLayer: "full", DynamicSlidingWindowLayer: "sliding"}
        shapes.append(
            LayerShape(
                kind=kinds.get(type(layer), type(layer).__name__),
                num_heads=heads,
                num_kv_heads=getattr(here, "num_key_value_heads", None) or heads,
                head_dim=getattr(here, "head_dim", None) or here.hidden_size // heads,
                sliding_window=getattr(layer, "sliding_window", None),
            )
        )
    return tuple(shapes)
