"""vLLM: a backend for its paged attention that stores pages packed.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in each of its processes.
From then on a model with an artifact (see `artifact.find`) has its cache compressed; any other runs as before.
Nothing here imports vllm before that.
"""

import logging

log = logging.getLogger("vllm.tqcompress")


def register() -> None:
    """Offer vLLM the backend and the quantization method of saved directories; may be called again."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .quantization import register_method

    register_method()
    if current_platform.is_cpu():
        # The CPU platform knows one backend by name; ours is that one for every layer without packed pages.
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.backend.PackedAttention")
    else:
        log.warning("tqcompress packs vLLM's cache on CPUs only so far; on %s it stays as it is", current_platform)
