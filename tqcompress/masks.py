"""The mask function registered with transformers beside the attention.

A mask of several queries has as many elements as the scores: a gigabyte for a chunk of a long prompt. Where a mask is
causal and hides nothing else, there is none (attention is then causal, the last query being the last token); where it
hides tokens besides, it says which: `visible` is set on it, `[batch, tokens]`, so that kernels need not read it.
"""

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_UNREAD: set[int] = set()  # ids of the configs of models whose steps in caches of fixed size read no mask


def unread(config, yes: bool) -> None:
    """Whether steps of one token in a cache of fixed size need no mask: all full-attention layers know theirs."""
    (_UNREAD.add if yes else _UNREAD.discard)(id(config))


def causal_mask(**options) -> Tensor | None:
    """As transformers' `sdpa_mask`, with the same arguments; see above."""
    queries = options["q_length"]
    plain = options.get("mask_function", causal_mask_function) is causal_mask_function
    if not plain or options.get("local_size"):
        return sdpa_mask(**options)
    if queries == 1 and isinstance(options.get("q_offset"), Tensor) and id(options.get("config")) in _UNREAD:
        return None  # generate() would make one from dozens of small operations at every step
    if queries == 1 or not options.get("allow_is_causal_skip", True):
        return sdpa_mask(**options)
    padding = options.get("attention_mask")
    if torch.compiler.is_compiling() or options.get("kv_offset", 0) or (padding is not None and padding.dim() != 2):
        return sdpa_mask(**options)
    first, tokens = int(options.get("q_offset", 0)), options["kv_length"]
    if padding is not None:
        padding = padding[:, : first + queries].bool()
        padding = None if bool(padding.all()) else padding
    if padding is None and (first == 0 or first + queries == tokens):
        return None
    mask = sdpa_mask(**(options | {"allow_is_causal_skip": False})).contiguous()
    mask.visible = padding
    return mask


def in_stored_order(mask: Tensor | None, order: Tensor | None, tokens: int) -> Tensor | None:
    """A mask `[batch or 1, heads or 1, queries, >= tokens]` for tokens in the order stored, `[batch, tokens]`.

    None if it is causal and hides nothing else. `visible` is kept.
    """
    if mask is None:
        return None
    if hasattr(mask, "visible") and mask.visible is None:
        return None
    visible, mask = getattr(mask, "visible", None), mask[..., :tokens]
    if order is not None:
        mask = mask.expand(order.shape[0], *mask.shape[1:])
        mask = mask.gather(-1, order[:, None, None].expand(*mask.shape[:-1], -1))
        visible = None if visible is None else visible.gather(1, order)
    if visible is not None:
        mask.visible = visible[:, :tokens]
    return mask


def shown_by(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The tokens that the last query sees, bool `[batch or 1, tokens]`, or None if that is all."""
    if mask is None or hasattr(mask, "visible"):
        return None if mask is None else mask.visible
    row = mask[:, 0, -1, :tokens]
    return row if row.dtype == torch.bool else row == 0
