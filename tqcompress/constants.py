"""Caching of constant tensors that code computes once for each size and device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


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
        return function(*args) if torch.compiler.is_compiling() else build(*args)

    return cast(F, call)
