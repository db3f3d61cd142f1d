"""The mask function registered with transformers beside the attention, and the forms that a mask has.

A mask of several queries has as many elements as the scores: a gigabyte for a chunk of a long prompt. So a causal one
is not made. There is none where nothing else is hidden (attention is then causal, the last query being the last
token); where tokens are hidden besides, the mask says only which: bool `[batch, tokens]`, True = attend, as
transformers' flash attention takes it. Any other mask is bool or additive `[batch, heads, queries, tokens]`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HIDDEN = -1e4  # an added number up to this one leaves a token no weight: exp(-104) is 0 in float32
_sdpa_mask: Callable[..., Tensor | None] = sdpa_mask
_UNREAD: set[int] = set()  # ids of the configs of models for which steps in caches of fixed size need no mask


def unread(config: "PreTrainedConfig", yes: bool) -> None:
    """Whether steps of one token in a cache of fixed size need no mask: all full-attention layers know theirs."""
    (_UNREAD.add if yes else _UNREAD.discard)(id(config))


def causal_mask(**options: Any) -> Tensor | None:
    """As transformers' `sdpa_mask`, with the same arguments, but causal masks of several queries are as above."""
    queries = options["q_length"]
    plain = options.get("mask_function", causal_mask_function) is causal_mask_function
    if not plain or options.get("local_size"):
        return _sdpa_mask(**options)
    if queries == 1 and isinstance(options.get("q_offset"), Tensor) and id(options.get("config")) in _UNREAD:
        return None  # generate() would make one from dozens of small operations at every step
    if queries == 1 or not options.get("allow_is_causal_skip", True):
        return _sdpa_mask(**options)
    padding: Tensor | None = options.get("attention_mask")
    if torch.compiler.is_compiling() or options.get("kv_offset", 0) or (padding is not None and padding.dim() != 2):
        return _sdpa_mask(**options)
    first, tokens = int(options.get("q_offset", 0)), options["kv_length"]
    width = first + queries
    if padding is not None and padding.shape[1] < width:  # the rest is hidden
        return _sdpa_mask(**options)
    if padding is not None and not bool(padding[:, :width].all()):
        return padding[:, :width].bool().contiguous()
    if first == 0 or width == tokens:
        return None
    # Layers that stay exact must know where in their buffer the last query is.
    return torch.ones(1, 1, dtype=torch.bool, device=options.get("device", "cpu")).expand(options["batch_size"], width)


def hides_nothing(mask: Tensor) -> bool:
    """Whether the mask is `causal_mask`'s way to say so: one element, expanded."""
    return mask.dim() == 2 and mask.stride(1) == 0 and mask.shape[1] > 1


def dense(mask: Tensor, queries: int) -> Tensor | None:
    """A mask `[batch, tokens]` as `[batch, 1, queries, tokens]` for torch's attention; None if it hides nothing.

    Made once for all layers that share it.
    """
    if hides_nothing(mask):
        return None
    made: Tensor | None = getattr(mask, "dense", None)
    if made is None or made.shape[2] != queries:
        made = mask[:, None, None] & _causal(queries, mask.shape[1], mask.device)
        mask.dense = made  # type: ignore[attr-defined]  # kept with the mask
    return made


def _causal(queries: int, tokens: int, device: torch.device) -> Tensor:
    places = torch.arange(tokens, device=device)
    return places <= places[tokens - queries :, None]


def same_for_all(mask: Tensor) -> bool:
    """Whether the mask can hide nothing but tokens, judged by its type and shape; `simplest` asks the device."""
    return mask.dim() == 2 or (mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1)


@overload
def simplest(mask: Tensor, queries: int, tokens: int) -> Tensor: ...
@overload
def simplest(mask: Tensor | None, queries: int, tokens: int) -> Tensor | None: ...
def simplest(mask: Tensor | None, queries: int, tokens: int) -> Tensor | None:
    """A mask as `[batch or 1, tokens]` if it is causal and hides nothing else but the same tokens from all.

    Other masks come back as they are. For masks that transformers makes here nothing is asked of the device; for
    others it is, once for all layers that share one.
    """
    if mask is None or mask.dim() == 2:
        return mask
    if queries == 1 and same_for_all(mask):
        return mask[:, 0, 0, :tokens]
    state = queries, tokens, None if mask.is_inference() else mask._version
    made = getattr(mask, "simplest", (None, None))
    if made[0] != state:
        made = state, _visible(mask[..., :tokens], queries, tokens)
        mask.simplest = made  # type: ignore[attr-defined]  # kept with the mask
    visible: Tensor | None = made[1]
    return mask if visible is None else visible


def _visible(mask: Tensor, queries: int, tokens: int) -> Tensor | None:
    """What the mask shows to all, or None if that is not all that there is to it."""
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    visible = seen[:, 0, -1].clone()
    same = (seen == (visible[:, None, None] & _causal(queries, tokens, mask.device))).all()
    if mask.dtype != torch.bool:
        same &= ((mask == 0) | ~seen).all()
    return visible if bool(same) else None


def in_stored_order(mask: Tensor | None, order: Tensor | None, tokens: int) -> Tensor | None:
    """A mask, in either form and with at least so many tokens, for tokens in the order stored, `[batch, tokens]`.

    None if it is causal and hides nothing else.
    """
    if mask is None or hides_nothing(mask):
        return None
    mask = mask[..., :tokens]
    if order is None:
        return mask
    if mask.dim() == 2:
        return mask.expand(order.shape[0], -1).gather(1, order)
    mask = mask.expand(order.shape[0], *mask.shape[1:])
    return mask.gather(-1, order[:, None, None].expand(*mask.shape[:-1], -1))


def shown_by(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The tokens that the last query sees through any head, bool `[batch or 1, tokens]`, or None if that is all."""
    if mask is None or hides_nothing(mask):
        return None
    rows = mask[:, None, :tokens] if mask.dim() == 2 else mask[:, :, -1, :tokens]
    rows = rows if rows.dtype == torch.bool else rows > HIDDEN
    return rows[:, 0] if rows.shape[1] == 1 else rows.any(1)
