"""Texts to calibrate and measure on: files, texts that ship with the package, data sets."""

from importlib import resources
from pathlib import Path

from .errors import TQCompressError

# The Constitution of the United States with its amendments: a work of the US government, public domain.
# The first part of the validation split of WikiText-2 (Merity et al. 2016), without its unknown-word marks: CC BY-SA.
SHIPPED = ("constitution", "wikitext-validation")
DATASETS = "datasets:"
ENOUGH = 1 << 24  # characters that are read of a data set


def load_text(name: "str | Path") -> str:
    """The text of a UTF-8 file, a shipped text by name, or a data set `datasets:NAME[:CONFIG[:SPLIT]]`.

    Of a data set the column `text` is read, of the split `train` if none is named. Raises `TQCompressError` if there
    is no such text.
    """
    if str(name).startswith(DATASETS):
        return _load_dataset(*str(name).removeprefix(DATASETS).split(":"))
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TQCompressError(f"{name}: not a UTF-8 text file ({error})") from None
    if str(name) in SHIPPED:
        return (resources.files("tqcompress") / "data" / f"{name}.txt").read_text(encoding="utf-8")
    raise TQCompressError(f"{name}: no such text file; texts that ship with tqcompress: {', '.join(SHIPPED)}")


def _load_dataset(name: str, config: str = "", split: str = "train") -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TQCompressError(f"{DATASETS}{name}: needs the package datasets; pip install datasets") from None
    parts, size = [], 0
    try:
        for row in load_dataset(name, config or None, split=split, streaming=True):
            parts.append(row["text"])
            size += len(parts[-1])
            if size > ENOUGH:
                break
    except KeyError:
        raise TQCompressError(f"{DATASETS}{name}: has no column text") from None
    except (OSError, ValueError) as error:
        raise TQCompressError(f"{DATASETS}{name}: {str(error).splitlines()[0]}") from None
    return "\n".join(parts)
