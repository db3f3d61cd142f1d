"""Errors a user can act on. Each message is one line: what is wrong, where, and what is allowed."""


class TQCompressError(ValueError):
    """Base of every error that tqcompress raises on bad input. What cannot be printed in it is escaped."""

    def __init__(self, message: str = ""):
        line = " ".join(message.splitlines())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class RecipeError(TQCompressError):
    """A recipe is malformed, or asks a model or quantizer for something it cannot do."""


class ModelError(TQCompressError):
    """A model cannot be compressed, or is used in a way its compressed cache does not support."""


class ArtifactError(TQCompressError):
    """A saved artifact is damaged, too new, or belongs to another model."""


class PluginError(TQCompressError):
    """A plugin is broken, or two plugins claim the same name."""


class OutputError(TQCompressError):
    """An output cannot be written: a full disk, a missing permission. What was there before is unchanged."""
