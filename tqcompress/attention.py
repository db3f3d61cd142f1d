"""The attention function registered with transformers as "tqcompress", and its mask.

Ordinary tensors (a prefill of an empty cache, layers that stay exact, no cache at all) go to torch's
scaled-dot-product attention; a `KVView` goes to each group's backend.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.attention.bias import causal_lower_right

from .blockwise import attend_exact
from .errors import ModelError
from .masks import causal_mask, dense
from .ring import StepView
from .view import KVView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tqcompress"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]  # with the arguments of `attention_forward`


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: "Tensor | KVView",
    value: "Tensor | KVView",
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with `query` `[batch, heads, queries, head_dim]`; returns `[batch, queries, heads, head_dim]`.

    `softcap` bounds the scores (Gemma 2), `s_aux` `[heads]` are learned sink logits (GPT-OSS). Raises
    `ModelError` for what the compressed cache does not support: position biases, dropout.
    """
    compressed = isinstance(key, KVView)
    plain = not compressed and softcap is None and s_aux is None
    if not compressed and attention_mask is not None:
        if attention_mask.dim() == 2:  # it ends with the last query, the keys of a static cache with its buffer
            width = attention_mask.shape[1]
            key, value = (states[:, :, :width] for states in (key, value))  # type: ignore[index]  # tensors
            attention_mask = dense(attention_mask, query.shape[2]) if plain else attention_mask
        else:  # as wide as a static cache, while the keys of an empty one are only as long as the prompt
            attention_mask = attention_mask[..., : key.shape[2]]
    if plain and attention_mask is None and 1 < query.shape[2] < key.shape[2] and position_bias is None:
        # `causal_mask` makes none: causal, the last query being the last token. Torch aligns the first ones.
        bias = causal_lower_right(query.shape[2], key.shape[2])
        options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, **options  # type: ignore[arg-type]  # tensors
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), None
    if plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs,
        )  # fmt: skip
        return found
    if position_bias is not None:
        raise ModelError(f"{type(module).__name__}: position biases do not work with a compressed cache")
    if dropout:
        raise ModelError(f"{type(module).__name__}: attention dropout is on; call model.eval() first")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, StepView):
        output, lse = _attend_step(query, key, attention_mask, scaling, softcap)
    elif compressed:
        output, lse = _attend_view(query, key, attention_mask, scaling, softcap)
    else:
        output, lse = attend_exact(query, key, value, attention_mask, scaling, softcap)  # type: ignore[arg-type]  # tensors
    if s_aux is not None:  # one more score without a value: it only takes weight away
        output = output * torch.sigmoid(lse - s_aux.float().view(1, -1, 1)).unsqueeze(-1)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend_step(
    query: Tensor, view: StepView, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and query.requires_grad and not torch.compiler.is_compiling():
        return _opaque(query, view, mask, scaling, softcap)
    return view.attend(query, mask, scaling, softcap)


# As CompressedLayer.update: lengths that grow would compile anew at every step.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives no types
def _attend_view(
    query: Tensor, view: KVView, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return _opaque(query, view, mask, scaling, softcap)


class _Opaque(torch.autograd.Function):
    """Attention without a gradient: a backward pass must fail, not stop silently at the cache."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, view: KVView, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return view.attend(query, mask, scaling, softcap)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> NoReturn:
        raise ModelError(
            "no gradient flows through a compressed KV cache; pass use_cache=False to train, "
            "or run generation under torch.no_grad()"
        )


_opaque: Callable[..., tuple[Tensor, Tensor]] = _Opaque.apply


def register(name: str = NAME, function: AttentionFunction = attention_forward) -> None:
    """Make an attention function and its masks known to transformers, by default "tqcompress"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    # Without its own entry the mask would silently be None, wrong for padded batches.
    AttentionMaskInterface.register(name, causal_mask)


@contextmanager
def selected(model: "PreTrainedModel", name: str = NAME) -> Iterator[None]:
    """The model with a registered attention, and its own again afterwards."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
