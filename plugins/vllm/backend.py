"""vLLM's attention backends: layers with codecs write and read packed pages, all others are vLLM's own.

Layers of one model may have pages of different sizes, but vLLM asks a backend's class for its page, not a layer.
So every size gets a class of its own, which its layers name once they are loaded.
"""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from tqcompress import ModelError
from tqcompress.view import LayerCodecs

from . import artifact
from .pages import PageFormat
from .schedule import Step

BLOCK = 64  # tokens of a page that kernels read best


class PackedImpl(AttentionImpl):
    """What is put in front of a backend's implementation; it finds out by itself whether its layer is packed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config = get_current_vllm_config()
        self.codecs: LayerCodecs | None = None  # None: vLLM's own pages
        self.format: PageFormat | None = None  # made when the engine has decided how large a page is

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Choose the layer's pages, before vLLM asks for their size. Raises `ArtifactError` or `ModelError`."""
        super().process_weights_after_loading(act_dtype)
        context = self.config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in context.items() if getattr(layer, "impl", None) is self)
        codecs = artifact.layers(self.config).get(extract_layer_index(name))
        if codecs is None:
            return
        self._check(name, layer, codecs)
        self.codecs, self.dtype = codecs, act_dtype
        layer.attn_backend = with_pages_of(*PageFormat.sizes(codecs, act_dtype))

    def _check(self, name: str, layer: Any, codecs: LayerCodecs) -> None:
        """Raise `ModelError` for attention that packed pages do not have."""
        shape, theirs = (self.num_kv_heads, self.head_size), (codecs.num_kv_heads, codecs.head_dim)
        found = {
            "a sliding window": layer.sliding_window is not None,
            "ALiBi": self.alibi_slopes is not None,
            "learned sinks": self.sinks is not None,
            "a cache shared between layers": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            f"{shape[0]} KV heads of {shape[1]}": shape != theirs,
        }
        for what, there in found.items():
            if there:
                raise ModelError(f"{name}: {what} cannot be combined with packed pages; let the recipe skip this layer")

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new tokens `[tokens, kv_heads, head_dim]`."""
        if self.codecs is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        if self.format is None:
            self.format = page_format(self.codecs, kv_cache.shape[2], self.dtype, kv_cache.device)
        step = cast(dict[str, Step], get_forward_context().attn_metadata)[cast(Any, layer).layer_name]
        count, exact = len(slot_mapping), step.exact(self.format.block_size, self.format.sinks)
        self.format.write(kv_cache, slot_mapping, key[:count], value[:count], exact)

    def forward(
        self, layer: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Attend; query, key, value, output `[tokens, heads, head_dim]`."""
        if self.codecs is None or attn_metadata is None:  # None: vLLM measures how much memory a step takes
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        assert self.format is not None
        for tokens, tables, past, longest in attn_metadata.batches:
            queries, keys, values = (
                states[tokens].unflatten(0, (len(past), -1)).transpose(1, 2) for states in (query, key, value)
            )
            softcap = self.logits_soft_cap or None
            attended = self.format.attend(kv_cache, tables, past, queries, keys, values, self.scale, softcap, longest)
            output[tokens] = attended.transpose(1, 2).flatten(0, 1).to(output.dtype)
        return output


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes a `Step` of what vLLM knows of one. Packed pages are written by steps that graphs do not hold."""

    def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """For all layers with pages of one size."""
        known = common_attn_metadata
        longest = known.seq_lens if known.seq_lens_cpu_upper_bound is None else known.seq_lens_cpu_upper_bound
        count = known.num_reqs
        return Step(
            known.query_start_loc_cpu[: count + 1].tolist(), known.seq_lens[:count], longest[:count].tolist(),
            known.block_table_tensor[:count], known.slot_mapping,
        )  # fmt: skip


def page_format(codecs: LayerCodecs, block_size: int, dtype: torch.dtype, device: torch.device) -> PageFormat:
    """The pages of a layer: by kernels where there are any, else by torch, which is said once."""
    if device.type != "cuda":
        return PageFormat(codecs, block_size, dtype)
    from .fused_pages import FusedPages, obstacle

    if reason := obstacle(codecs, device):
        for group in codecs.groups:
            group.key.to(device), group.value.to(device)
        _say_once(f"attention to pages is by torch, which is slow: {reason}")
        return PageFormat(codecs, block_size, dtype)
    return FusedPages(codecs, block_size, dtype, device)


@cache
def _say_once(what: str) -> None:
    artifact.log.warning("tqcompress: %s", what)


@cache
def packed(name: str) -> type[AttentionBackend]:
    """What the platform gives all layers in place of its backend of that name; its pages are vLLM's own."""
    theirs = resolve_obj_by_qualname(AttentionBackendEnum[name].value)  # the default, whatever was registered since
    impl = type(f"Packed{name}Impl", (PackedImpl, theirs.get_impl_cls()), {})
    return type(f"Packed{name}", (theirs,), {"get_impl_cls": staticmethod(lambda: impl), "__module__": __name__})


@cache
def with_pages_of(packed_bytes: int, sinks: int, exact_bytes: int) -> type[AttentionBackend]:
    """The backend of layers that store so many bytes a token, all heads together, and of the first `sinks` of a page
    so many more."""

    def customize_spec(cls: type[AttentionBackend], spec: AttentionSpec) -> AttentionSpec:
        # Bytes, and one slot for all heads: heads may have different numbers of bits.
        content = PageFormat.content(packed_bytes, sinks, exact_bytes, spec.block_size)
        return replace(spec, num_head_slots=1, dtype=torch.uint8, state_content_bytes=content)

    name = f"PackedPages{packed_bytes}x{sinks}x{exact_bytes}"  # vLLM tells backends apart by name
    return type(name, (PackedPages,), {"customize_spec": classmethod(customize_spec), "__module__": __name__})


class PackedPages(AttentionBackend):
    """Packed pages, whatever the platform."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """In messages."""
        return "TQCOMPRESS"

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        """Not asked for: layers have their implementation before they know their pages."""
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """What vLLM makes a step's metadata with."""
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """Of a page in tokens; vLLM takes the smallest that it and its other backends allow."""
        return [MultipleOf(1 if current_platform.is_cpu() else BLOCK)]


def __getattr__(name: str) -> type[AttentionBackend]:
    """vLLM asks for backends by the name of a class in a module: here for "Packed" and one of its own."""
    if not name.startswith("Packed"):
        raise AttributeError(name)
    return packed(name.removeprefix("Packed"))
