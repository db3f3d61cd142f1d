"""Texts to measure on: files, or texts that ship with the package by name."""

from importlib import resources
from pathlib import Path

from .errors import TQCompressError

# The Constitution of the United States with its amendments: a work of the US government, public domain.
SHIPPED = ("constitution",)


def load_text(name: "str | Path") -> str:
    """The text of a UTF-8 file, or a shipped text by name. Raises `TQCompressError` if there is neither."""
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TQCompressError(f"{name}: not a UTF-8 text file ({error})") from None
    if str(name) in SHIPPED:
        return (resources.files("tqcompress") / "data" / f"{name}.txt").read_text(encoding="utf-8")
    raise TQCompressError(f"{name}: no such text file; texts that ship with tqcompress: {', '.join(SHIPPED)}")
