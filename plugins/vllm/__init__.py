"""vLLM: a backend for its paged attention that stores pages packed.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in each of its processes.
From then on a model with an artifact (see `artifact.find`) has its cache compressed; any other runs as before.
Nothing here imports vllm before that.
"""

import logging

log = logging.getLogger("vllm.tqcompress")

OF_CPU, OF_CUDA = ("CPU_ATTN",), ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


def register() -> None:
    """Offer vLLM the backend and the quantization method of saved directories; may be called again."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .quantization import register_method

    register_method()
    # Each is vLLM's own backend of that name for every layer without packed pages.
    names = OF_CPU if current_platform.is_cpu() else OF_CUDA if current_platform.is_cuda() else ()
    for name in names:
        register_backend(AttentionBackendEnum[name], f"{__name__}.backend.Packed{name}")
    if not names:
        log.warning("tqcompress packs vLLM's cache on CPUs and CUDA; on %s it stays as it is", current_platform)
