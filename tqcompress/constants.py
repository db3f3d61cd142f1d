"""Caching of constant tensors that code computes once for each size and device."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch


def cached_constant(function: Callable) -> Callable:
    """Cache what `function` of hashable arguments returns.

    Not while torch traces or exports, where it would keep fake tensors for later real calls; and never as an
    inference-mode tensor, which could not serve autograd later.
    """

    @lru_cache(maxsize=64)
    def build(*args):
        with torch.inference_mode(False):
            return function(*args)

    @wraps(function)
    def call(*args):
        return function(*args) if torch.compiler.is_compiling() else build(*args)

    return call
