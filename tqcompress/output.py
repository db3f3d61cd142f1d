"""Outputs that are the old or the new one, whole, at whatever moment the process is killed or the disk is full."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import OutputError

WEIGHTS = ("*.safetensors", "*.index.json", "pytorch_model*")  # what transformers would prefer to newer weights


@contextmanager
def writing(path: Path, stage: Path | None = None) -> Iterator[None]:
    """Turn the ways in which a file can fail to be written into an `OutputError`; the `stage` is then removed."""
    try:
        yield
    except (OSError, SafetensorError, OutputError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        reason = getattr(cause, "strerror", None) or str(cause)
        raise OutputError(f"{path}: cannot be written: {reason}; what was there before is unchanged") from cause
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file that appears whole or not at all. Raises `OutputError`."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    return path


def stage_of(path: Path) -> Path:
    """Where the files of the directory `path` are written first: beside it, so that one rename puts them in place.

    Inside it where it cannot be renamed, being a mount point or in a directory of somebody else's.
    """
    path = path.resolve()
    fixed = path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK))
    return path / ".partial" if fixed else path.with_name(f".{path.name}.partial")


def empty_stage(path: Path) -> None:
    """Make an empty stage, in place of what a killed process left."""
    stage = stage_of(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file; name a directory")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)


def publish(path: Path, weights: bool) -> None:
    """Put the stage in the place of `path`; other files that are there stay, but for old weights beside new ones."""
    stage, path = stage_of(path), path.resolve()
    if stage.parent == path:  # one file at a time: each is whole, and the artifact, which the others serve, the last
        for file in sorted(stage.rglob("*"), key=lambda file: file.name.startswith("tqcompress")):
            if file.is_file():
                target = path / file.relative_to(stage)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        shutil.rmtree(stage, ignore_errors=True)
    elif not path.exists():
        os.rename(stage, path)
    else:
        _keep_others(path, stage, weights)
        shutil.copymode(path, stage)
        if not _exchanged(stage, path):
            old = stage.with_suffix(".old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
            try:
                os.rename(stage, path)
            except OSError:
                os.rename(old, path)
                raise
            stage = old
        shutil.rmtree(stage, ignore_errors=True)


def _keep_others(path: Path, stage: Path, weights: bool) -> None:
    for file in path.rglob("*"):
        target = stage / file.relative_to(path)
        old = weights and file.parent == path and any(file.match(pattern) for pattern in WEIGHTS)
        if old or file.name.endswith(".partial") or target.exists():
            continue
        if file.is_dir() and not file.is_symlink():
            target.mkdir(parents=True)
            continue
        try:
            os.link(file, target, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(file, target, follow_symlinks=False)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories at once, where the system can: Linux, on most file systems."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
