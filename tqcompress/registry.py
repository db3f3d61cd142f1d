"""The plugin manager: finds plugins once, at first use, and knows the quantizers by name.

Built-in plugins (the package `tqcompress.plugins`) register first and installed ones (entry-point group
`tqcompress`) next, so third parties come first in the call order. The environment variable
TQCOMPRESS_PLUGINS, a comma-separated list of entry-point names, limits the installed ones; empty means none.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any

import pluggy

from . import hookspecs
from .codec import Codec
from .errors import PluginError, RecipeError

ALLOW_LIST = "TQCOMPRESS_PLUGINS"


@dataclass
class Source:
    """Where a plugin came from and, if it could not be loaded, why."""

    name: str
    origin: str  # "built-in" or the distribution's name and version
    error: str | None = None
    codecs: list[str] = field(default_factory=list)


class Registry:
    """The quantizers that plugins added."""

    def __init__(self) -> None:
        self._codecs: dict[str, type[Codec]] = {}

    def add_codec(self, codec: type[Codec]) -> None:
        """Make `codec` usable as `quantizer: <codec.name>` in recipes."""
        name = getattr(codec, "name", None)
        if not (isinstance(codec, type) and issubclass(codec, Codec) and isinstance(name, str)):
            raise PluginError(f"{codec!r} is not a subclass of tqcompress.Codec with a `name`")
        if name in self._codecs and self._codecs[name] is not codec:
            raise PluginError(f"quantizer {name!r} is already registered by {self._codecs[name].__module__}")
        self._codecs[name] = codec

    def codec(self, name: str) -> type[Codec]:
        """The codec class of that name."""
        if name not in self._codecs:
            known = ", ".join(sorted(self._codecs))
            raise RecipeError(f"quantizer: found {name!r}; installed: {known} (`tqcompress plugins` lists them)")
        return self._codecs[name]

    def names(self) -> list[str]:
        """The registered quantizers, sorted."""
        return sorted(self._codecs)

    def discard(self, names: list[str]) -> None:
        """Forget quantizers that a plugin added before it failed."""
        for name in names:
            self._codecs.pop(name, None)


class Plugins:
    """All loaded plugins: `hook` calls them, `registry` holds what they added, `sources` lists them."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("tqcompress")
        self.manager.add_hookspecs(hookspecs)
        self.hook = self.manager.hook
        self.registry = Registry()
        self.sources: list[Source] = []
        self.hook.tqcompress_register.call_historic(kwargs={"registry": self.registry})
        self._load_builtin()
        self._load_installed()

    def _load_builtin(self) -> None:
        package = importlib.import_module("tqcompress.plugins")
        names = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
        for name in sorted(names):
            source = Source(name, "built-in")
            self._add(source, partial(importlib.import_module, f"tqcompress.plugins.{name}"))

    def _load_installed(self) -> None:
        allowed = os.environ.get(ALLOW_LIST)
        names = None if allowed is None else {name.strip() for name in allowed.split(",") if name.strip()}
        found = sorted(entry_points(group="tqcompress"), key=lambda point: point.name)
        for point in found:
            if names is None or point.name in names:
                dist = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
                self._add(Source(point.name, dist), point.load)
        for name in sorted((names or set()) - {point.name for point in found}):
            self.sources.append(Source(name, ALLOW_LIST, error="named in the variable but not installed"))

    def _add(self, source: Source, load: Callable[[], Any]) -> None:
        """Load one plugin; a broken one is unregistered, recorded and named, never fatal."""
        self.sources.append(source)
        before, name = self.registry.names(), f"{source.origin}:{source.name}"
        try:
            plugin = load()
            self.manager.register(plugin, name=name)  # calls the historic tqcompress_register at once
            self.manager.check_pending()
            source.codecs = sorted(set(self.registry.names()) - set(before))
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the program must go on without it
            source.error = f"{type(error).__name__}: {error}"
            self.registry.discard(sorted(set(self.registry.names()) - set(before)))
            if self.manager.has_plugin(name):  # by name: the same object may be registered under another one
                self.manager.unregister(name=name)


@cache
def plugins() -> Plugins:
    """The loaded plugins; loads them at the first call. `plugins.cache_clear()` loads them anew."""
    return Plugins()
