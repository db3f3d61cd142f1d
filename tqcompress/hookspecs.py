"""Every hook that a plugin can implement. Mark an implementation with `tqcompress.hookimpl`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch
    import typer
    from transformers import PreTrainedModel

    from .codec import Codec
    from .plan import Group, Plan
    from .recipe import Recipe
    from .registry import Registry
    from .view import Backend

hookspec = pluggy.HookspecMarker("tqcompress")
hookimpl = pluggy.HookimplMarker("tqcompress")


@hookspec(historic=True)
def tqcompress_register(registry: "Registry") -> None:
    """Add quantizers, `registry.add_codec(MyCodec)`; called once, when the plugin is loaded."""


@hookspec
def tqcompress_plan(model: "PreTrainedModel", recipe: "Recipe", plan: "Plan") -> "Plan | None":
    """Return a changed plan, or None to leave it; called after the recipe is resolved."""


@hookspec(firstresult=True)
def tqcompress_backend(group: "Group", codecs: "Mapping[str, Codec]", device: "torch.device") -> "Backend | None":
    """Return a `Backend` that reads this group's packed codes on `device`; asked once, at apply."""


@hookspec
def tqcompress_applied(model: "PreTrainedModel", plan: "Plan") -> None:
    """The model now generates with a compressed cache."""


@hookspec(firstresult=True)
def tqcompress_export(model: "PreTrainedModel", plan: "Plan", format: str, path: Path) -> "Path | None":
    """Write the model's compressed cache for another engine; return the path written."""


@hookspec
def tqcompress_cli(app: "typer.Typer") -> None:
    """Add commands to the typer application."""
