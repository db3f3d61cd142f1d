"""The quantization method "tqcompress" of directories that `tqcompress.save(..., weights=True)` wrote.

It says that the cache is compressed; weights are as they were, so vLLM's own unquantized methods load them.
"""

import re
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

METHOD = "tqcompress"
OF_ARTIFACT = re.compile(r"^layers\.\d+\.g\d+\.(key|value)\.")  # as `Compression.state` names its tensors


class CacheOnly(QuantizationConfig):
    """Quantizes no weights."""

    def get_name(self) -> str:
        """The method's name in `config.json`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of any unquantized model."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing besides `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CacheOnly":
        """There is nothing to read: the artifact has it all."""
        return cls()

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Leave out what the artifact holds: vLLM takes every safetensors file for weights of the model."""
        return WeightsMapper(orig_to_new_regex={OF_ARTIFACT: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Plain linear layers; None, which is vLLM's default, for all else."""
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register_method() -> None:
    """Make the method known to vLLM, once in a process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(CacheOnly)
