"""Every hook that a plugin can implement. Mark an implementation with `tqcompress.hookimpl`."""

import pluggy

hookspec = pluggy.HookspecMarker("tqcompress")
hookimpl = pluggy.HookimplMarker("tqcompress")


@hookspec(historic=True)
def tqcompress_register(registry):
    """Add quantizers, `registry.add_codec(MyCodec)`; called once, when the plugin is loaded."""


@hookspec
def tqcompress_plan(model, recipe, plan):
    """Return a changed plan, or None to leave it; called after the recipe is resolved."""


@hookspec(firstresult=True)
def tqcompress_backend(group, codecs, device):
    """Return a `Backend` that reads this group's packed codes on `device`; asked once, at apply."""


@hookspec
def tqcompress_applied(model, plan):
    """The model now generates with a compressed cache."""


@hookspec(firstresult=True)
def tqcompress_export(model, plan, format, path):
    """Write the model's compressed cache for another engine; return the path written."""


@hookspec
def tqcompress_cli(app):
    """Add commands to the typer application."""
