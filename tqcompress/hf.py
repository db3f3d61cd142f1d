"""from_pretrained: tqcompress as a quantization method of transformers, and pointers to a base model.

A saved directory with weights is an ordinary model whose config names the quantization method
"tqcompress". One without weights has a config of the model type "tqcompress" that names its base.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .artifacts import FILE_NAME
from .errors import ArtifactError, ModelError
from .output import replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "tqcompress"
_LOCATION = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")


@register_quantization_config(METHOD)
class TQCompressConfig(QuantizationConfigMixin):
    """`from_pretrained(base, quantization_config=TQCompressConfig("balanced"))` compresses while loading.

    `recipe` is the name of a shipped recipe, a YAML file, or plain data; a saved directory needs none,
    its artifact holds everything.
    """

    def __init__(self, recipe: Any = None, **kwargs: Any):
        self.quant_method = METHOD
        self.recipe = recipe


@register_quantizer(METHOD)
class TQCompressQuantizer(HfQuantizer):
    """Attaches the compressed cache once the weights are loaded; the weights themselves stay as they are."""

    def is_serializable(self, **kwargs: Any) -> bool:
        """The model can be saved; `tqcompress.save` adds the artifact."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No gradient flows through the cache."""
        return False

    @property
    def is_compileable(self) -> bool:
        """generate() may compile decoding steps; the cache says whether it can be."""
        return True

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from . import api

        if self.quantization_config.recipe is not None:
            api.apply(model, self.quantization_config.recipe)
        else:
            api.load(model, _find_artifact(model.config._name_or_path, {}))
        return model


class TQCompressPointer(PreTrainedConfig):
    """The config of a saved directory without weights."""

    model_type = METHOD

    def __init__(self, base_model_name_or_path: str | None = None, **kwargs: Any):
        self.base_model_name_or_path = base_model_name_or_path
        super().__init__(**kwargs)


class TQCompressPointerModel:
    """Loads the base model that a `TQCompressPointer` names, and compresses it."""

    config_class = TQCompressPointer

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: TQCompressPointer, **kwargs: Any) -> "PreTrainedModel":
        """The base model with the artifact of `path` attached; `kwargs` go to the base's from_pretrained."""
        from . import api
        from .models import find_model

        where = {key: kwargs.pop(key) for key in _LOCATION if key in kwargs}
        kwargs.pop("adapter_kwargs", None)
        kwargs.pop("_from_auto", None)
        artifact = _find_artifact(path, where)
        if not isinstance(config.base_model_name_or_path, str):
            raise ArtifactError(f"{path}: config.json names no base_model_name_or_path; save it with tqcompress.save")
        base = find_model(config.base_model_name_or_path)
        kwargs.setdefault("dtype", config.dtype)
        model = AutoModelForCausalLM.from_pretrained(base.path, *args, **base.kwargs, **kwargs)
        api.load(model, artifact)
        return model


AutoConfig.register(METHOD, TQCompressPointer)
AutoModelForCausalLM.register(TQCompressPointer, TQCompressPointerModel)


def check_savable(model: "PreTrainedModel", weights: bool, base: str) -> None:
    """Raise `ModelError` for what `write_config` cannot write, before anything is written."""
    other = getattr(model.config, "quantization_config", None)
    if weights and other is not None and not isinstance(other, TQCompressConfig):
        raise ModelError(
            f"the weights are quantized with {getattr(other, 'quant_method', other)}, and a config holds one method; "
            "save without weights"
        )
    if not weights and not base:
        raise ModelError("the model was not loaded from anywhere; save with weights=True or name its base=")


def write_config(model: "PreTrainedModel", path: Path, weights: bool, base: str) -> None:
    """Write `config.json`, or complete that of saved weights, so that from_pretrained finds the artifact beside it."""
    if weights:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": METHOD}
    else:
        dtype = str(model.dtype).removeprefix("torch.")
        config = {"model_type": METHOD, "base_model_name_or_path": base, "dtype": dtype}
    replace_file(path / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _find_artifact(name: str, where: dict[str, Any]) -> Path:
    try:
        return Path(cached_file(name, FILE_NAME, **where))
    except OSError as error:
        raise ArtifactError(f"{name}: no {FILE_NAME} there; save it with tqcompress.save ({error})") from None
