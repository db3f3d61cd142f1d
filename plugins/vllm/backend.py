"""vLLM's attention backend: layers with codecs write and read packed pages, all others are vLLM's own.

Layers of one model may have pages of different sizes, but vLLM asks a backend's class for its page, not a layer.
So every page size gets a class of its own, which its layers name once they are loaded.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from tqcompress import ModelError

from . import artifact
from .pages import PageFormat


class PackedAttention(CPUAttentionBackend):
    """What the platform gives all layers; its pages are vLLM's own."""

    @staticmethod
    def get_impl_cls() -> type["PackedAttentionImpl"]:
        """The implementation, which finds out by itself whether its layer is packed."""
        return PackedAttentionImpl


@cache
def with_pages_of(content_bytes: int) -> type[PackedAttention]:
    """The backend of layers that store so many bytes a token, all heads together."""

    def customize_spec(cls: type[PackedAttention], spec: AttentionSpec) -> AttentionSpec:
        # Bytes, and one slot for all heads: heads may have different numbers of bits.
        return replace(spec, num_head_slots=1, dtype=torch.uint8, state_content_bytes=content_bytes)

    name = f"PackedAttention{content_bytes}"  # vLLM tells backends apart by name
    return type(name, (PackedAttention,), {"customize_spec": classmethod(customize_spec), "__module__": __name__})


class PackedAttentionImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config = get_current_vllm_config()
        self.format: PageFormat | None = None  # None: vLLM's own pages

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Choose the layer's pages, before vLLM asks for their size. Raises `ArtifactError` or `ModelError`."""
        super().process_weights_after_loading(act_dtype)
        context = self.config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in context.items() if getattr(layer, "impl", None) is self)
        codecs = artifact.layers(self.config).get(extract_layer_index(name))
        if codecs is None:
            return
        self._check(name, codecs.num_kv_heads, codecs.head_dim)
        self.format = PageFormat(codecs, self.config.cache_config.block_size, act_dtype)
        layer.attn_backend = with_pages_of(self.format.content_bytes)

    def _check(self, name: str, kv_heads: int, head_dim: int) -> None:
        """Raise `ModelError` for attention that packed pages do not have."""
        found = {
            "a sliding window": self.sliding_window > 0,
            "ALiBi": self.alibi_slopes is not None,
            "learned sinks": self.sinks is not None,
            "a cache shared between layers": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            f"{self.num_kv_heads} KV heads of {self.head_size}": (self.num_kv_heads, self.head_size)
            != (kv_heads, head_dim),
        }
        for what, there in found.items():
            if there:
                raise ModelError(f"{name}: {what} cannot be combined with packed pages; let the recipe skip this layer")

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new tokens `[tokens, kv_heads, head_dim]`."""
        if self.format is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            count = len(slot_mapping)
            self.format.write(kv_cache, slot_mapping, key[:count], value[:count])

    def forward(
        self, layer: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None, output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Attend; shapes as in `CPUAttentionBackendImpl.forward`."""
        if self.format is None or attn_metadata is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens
        steps = [i for i, start in enumerate(starts[:-1]) if starts[i + 1] - start == 1]
        chunks = [i for i, start in enumerate(starts[:-1]) if starts[i + 1] - start > 1]
        batches = [[i] for i in chunks] + ([steps] if steps else [])  # sequences that are attended to together
        for batch in batches:
            first, new = torch.tensor([starts[i] for i in batch]), starts[batch[0] + 1] - starts[batch[0]]
            places = first[:, None] + torch.arange(new)
            queries, keys, values = (states[places].transpose(1, 2) for states in (query, key, value))
            tables, past = attn_metadata.block_table[batch], lengths[batch] - new
            softcap = self.logits_soft_cap or None
            attended = self.format.attend(kv_cache, tables, past, queries, keys, values, self.scale, softcap)
            output[places] = attended.transpose(1, 2).to(output.dtype)
        return output
