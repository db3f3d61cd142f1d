"""tqcompress: the KV cache of transformer language models in 1-4 bits a value.

plan = tqcompress.apply(model, "balanced")   # from now on model.generate() uses a compressed cache
tqcompress.save(model, "out")                # AutoModelForCausalLM.from_pretrained("out") brings it back
tqcompress.remove(model)
"""

from .api import apply, load, remove, save, verify
from .codec import Codec, Field, HeadShape, Layout, Options, ScalarLevels, TensorSpec, TrellisLevels, WideLevels
from .errors import ArtifactError, ModelError, OutputError, PluginError, RecipeError, TQCompressError
from .hf import TQCompressConfig
from .hookspecs import hookimpl
from .recipe import Recipe
from .run_ahead import run_ahead
from .version import __version__
from .view import Backend

__all__ = [
    "ArtifactError",
    "Backend",
    "Codec",
    "Field",
    "HeadShape",
    "Layout",
    "ModelError",
    "Options",
    "OutputError",
    "PluginError",
    "Recipe",
    "RecipeError",
    "ScalarLevels",
    "TQCompressConfig",
    "TQCompressError",
    "TensorSpec",
    "TrellisLevels",
    "WideLevels",
    "__version__",
    "apply",
    "hookimpl",
    "load",
    "remove",
    "run_ahead",
    "save",
    "verify",
]
