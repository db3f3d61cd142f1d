"""Which artifact a vLLM model's cache is compressed with, and the codecs it gives every layer."""

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from vllm.utils.torch_utils import set_default_torch_dtype

from tqcompress import ArtifactError, Backend, ModelError, artifacts, blockwise
from tqcompress.api import restored
from tqcompress.shape import ModelShape
from tqcompress.view import LayerCodecs

log = logging.getLogger("vllm.tqcompress")

KEY = "tqcompress"  # of vLLM's --additional-config
TORCH = Backend("torch", blockwise.attend, "pages of vLLM on a CPU")


def find(config: Any) -> Path | None:
    """The artifact of a `VllmConfig`, or None if its cache is to stay as it is.

    It is the directory or file that `--additional-config '{"tqcompress": "DIR"}'` names or, without that, the one
    beside the model's weights, as `tqcompress apply --out DIR --weights` leaves it. `false` in place of a name: none.
    Raises `ArtifactError` for anything else.
    """
    given = config.additional_config.get(KEY) if isinstance(config.additional_config, dict) else None
    if given is False:
        return None
    if given is not None and not isinstance(given, str):
        raise ArtifactError(f"additional-config: {KEY}: found {given!r}; give a directory or false")
    if given is not None:
        return Path(given)
    beside = Path(config.model_config.model) / artifacts.FILE_NAME
    return beside if beside.is_file() else None


def layers(config: Any) -> dict[int, LayerCodecs]:
    """The codecs of every layer whose pages are packed; empty without an artifact.

    Raises `ArtifactError` if the artifact is damaged or made for another model, `ModelError` if vLLM runs the model
    in a way that packed pages do not allow for.
    """
    path = find(config)
    if path is None:
        return {}
    parallel = config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        raise ModelError(f"{path}: packed pages are not shared among processes yet; use --tensor-parallel-size 1")
    if config.cache_config.cache_dtype != "auto":
        raise ModelError(
            f"{path}: found --kv-cache-dtype {config.cache_config.cache_dtype}; pages are packed with 'auto' only"
        )
    shape = replace(ModelShape.of(config.model_config.hf_config), dtype=config.model_config.dtype)
    return _load(path, shape)


@lru_cache(maxsize=4)
def _load(path: Path, shape: ModelShape) -> dict[int, LayerCodecs]:
    artifact = artifacts.read(path)
    with set_default_torch_dtype(torch.float32):  # while a model is loaded it is the model's
        compression = restored(artifact, shape)
    plan = compression.plan
    for index in compression.layers:
        if plan.block(index) > 1:
            raise ModelError(
                f"{artifact.path}: layer {index}: its quantizer encodes {plan.block(index)} tokens together; vLLM "
                "writes pages token by token, so only quantizers whose tokens stand alone can be used there"
            )
    if plan.window:
        log.warning(
            "tqcompress: the recipe's window of %d exact tokens does not exist in vLLM's pages; exact are the first %d "
            "tokens and those of the step that computes them", plan.window, plan.sinks,
        )  # fmt: skip
    return {
        index: replace(layer, groups=tuple(replace(group, backend=TORCH) for group in layer.groups))
        for index, layer in compression.layers.items()
    }
