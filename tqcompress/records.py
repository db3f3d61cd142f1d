"""Results of `tqcompress eval --json`: what is written, and its reader, which checks every value.

A file is a JSON list with one object for each recipe: the fields of `Quality`, and those that say where it was
measured. Files can be joined; every object stands alone and carries the version of its schema.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .errors import TQCompressError
from .evaluate import Quality
from .strict_yaml import shown, yaml_path

VERSION: Literal[1] = 1


@dataclass(frozen=True, kw_only=True)
class Record(Quality):
    """One recipe's `Quality` on a model and a text."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    version: Literal[1] = VERSION
    model: str
    text: str

    @classmethod
    def of(cls, quality: Quality, model: str, text: str) -> "Record":
        """The record of what was measured."""
        return cls(**vars(quality), model=model, text=text)

    @property
    def place(self) -> tuple[Any, ...]:
        """What records must share to be compared: model, text, and how much of it in what windows."""
        return self.model, self.text, self.tokens, self.window_tokens, self.perplexity_uncompressed


def plain(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The records as they stand in a file."""
    return [asdict(record) for record in records]


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of one or more files. Raises `TQCompressError` for a file that is not what `eval --json` wrote,
    or if a recipe was measured twice in the same place."""
    records = [record for path in paths for record in _read(path)]
    seen = set()
    for record in records:
        if (record.place, record.recipe) in seen:
            raise TQCompressError(
                f"{record.recipe} is there twice, on {record.model} and {record.text}; give each measurement once"
            )
        seen.add((record.place, record.recipe))
    return records


def _read(path: Path) -> list[Record]:
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except OSError as error:
        raise TQCompressError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # JSON or UTF-8
        raise TQCompressError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, list) or not data or not all(isinstance(item, dict) for item in data):
        raise TQCompressError(f"{path}: not a file of results; `tqcompress eval --json` writes one")
    for i, item in enumerate(data):
        version = item.get("version")
        if version != VERSION or type(version) is not int:
            raise TQCompressError(
                f"{path}: [{i}].version: found {shown(version)}; this tqcompress reads {VERSION}: "
                "run eval again, or upgrade"
            )
    try:
        records = TypeAdapter(list[Record]).validate_json(content)
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        what = "unknown key" if first["type"] == "unexpected_keyword_argument" else first["msg"]
        found = (
            "" if first["type"] in ("missing", "unexpected_keyword_argument") else f", found {shown(first['input'])}"
        )
        others = f"; and {more} more" if more else ""
        raise TQCompressError(f"{path}: {yaml_path(*first['loc'])}: {what}{found}{others}") from None
    for i, record in enumerate(records):
        tables = (record.key.bits, record.key.error, record.value.bits, record.value.error)
        if len({tuple(map(len, table)) for table in tables}) > 1 or not any(record.key.bits):
            raise TQCompressError(
                f"{path}: [{i}]: the maps of keys and values have different layers and heads, or none"
            )
    return records
