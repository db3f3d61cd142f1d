"""Caching of constant tensors that code computes once for each size and device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

_known: dict[tuple[Any, ...], Any] | None = None  # while `kept_for_export` is open


@contextmanager
def kept_for_export() -> Iterator[None]:
    """Code that was run in here before it is exported in here finds its constants: a graph then holds their numbers.

    Otherwise it would hold the many operations that compute them.
    """
    global _known
    _known = {}
    try:
        yield
    finally:
        _known = None


def cached_constant(function: F) -> F:
    """Cache what `function` of hashable arguments returns.

    Not while torch traces or exports, where it would keep fake tensors for later real calls; and never as an
    inference-mode tensor, which could not serve autograd later.
    """

    @lru_cache(maxsize=64)
    def build(*args: Any) -> Any:
        with torch.inference_mode(False):
            return function(*args)

    @wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            known = _known if _known is not None and torch.compiler.is_exporting() else {}
            return known[function, args] if (function, args) in known else function(*args)
        result = build(*args)
        if _known is not None:
            _known[function, args] = result
        return result

    return cast(F, call)
