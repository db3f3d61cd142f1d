"""What a recipe's `guard` measures when a model is compressed: the error of every head, which caches are held to later.

The model reads a text once. A codec whose noise drowns what it stores is found here, before it does harm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import attention
from .calibrate import watched
from .codec import Codec
from .errors import ModelError
from .plan import Plan
from .recipe import Guard, Recipe, Rule, Side
from .registry import plugins
from .view import each

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES = 32  # of a head, spread over the text, that keys are judged by
Place = tuple[int, str]  # a layer and a side


@dataclass(frozen=True)
class Measured:
    """What a codec did to the keys or values of a layer, `[kv_heads]` each, float32.

    Attributes:
        error: the mean squared error of a vector.
        noise: the variance that the error adds, over tokens, to scores (of keys) or to coordinates (of values), as a
            share of the variance that is there: what all tokens have in common tells none from another.
    """

    error: Tensor
    noise: Tensor


@torch.no_grad()
def measure(
    model: "PreTrainedModel",
    codecs: dict[int, list[tuple[tuple[int, ...], Mapping[str, Codec]]]],
    ids: Tensor,
    skip: int,
) -> dict[Place, Measured]:
    """`{(layer, side): Measured}` on the token ids `[n]`, the first `skip` tokens left out.

    `codecs` are the groups of each layer: their KV heads, and the codecs of both sides.
    """
    found: dict[Place, Measured] = {}

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer: int = module.layer_idx  # type: ignore[assignment]  # transformers' modules have it
        for heads, pair in codecs.get(layer, ()):
            for side, states in (("key", key), ("value", value)):
                share = query.shape[1] // key.shape[1]
                seen = query[:, :, skip:].unflatten(1, (-1, share))[:, list(heads)]
                got = _measured(pair[side], states[:, list(heads), skip:], seen if side == "key" else None)
                place = layer, side
                whole = found.setdefault(place, Measured(*(got.error.new_zeros(key.shape[1]) for _ in range(2))))
                whole.error[list(heads)], whole.noise[list(heads)] = got.error, got.noise
        return attention.attention_forward(module, query, key, value, *args, **kwargs)

    with watched(model, watch):
        model.get_decoder()(input_ids=ids.to(model.device)[None], use_cache=False)
    return found


def _measured(codec: Codec, x: Tensor, query: Tensor | None) -> Measured:
    """Of vectors `[1, heads, tokens, head_dim]` that queries `[1, heads, share, tokens, head_dim]` meet."""
    tokens = x.shape[2] // codec.layout().block * codec.layout().block
    x = x[:, :, :tokens].float()
    codec.to(x.device)
    error = codec.decode(codec.encode(x)) - x
    judged = error, x
    if query is not None:
        some = query[:, :, :, :: max(1, query.shape[3] // QUERIES)].float().flatten(2, 3)
        judged = each(lambda states: states @ some.mT, judged)
    added, there = (states.var(2, unbiased=False).sum((0, 2)) for states in judged)
    return Measured(error.square().sum(-1).mean((0, 2)), added / there.clamp_min(torch.finfo(torch.float32).tiny))


def weak(measured: dict[Place, Measured], settings: Guard) -> dict[Place, tuple[list[int], float]]:
    """The KV heads whose codecs are too noisy, and the most noise, of every layer and side that has any."""
    found = {}
    for place, one in measured.items():
        heads = (~(one.noise <= settings.limit)).nonzero().flatten().tolist()
        if heads:
            found[place] = heads, one.noise[heads].max().item()
    return found


def told(places: dict[Place, tuple[list[int], float]], settings: Guard) -> str:
    """What is weak, in one line."""
    some = [
        f"layer {layer}, {side}s of KV heads {heads}: {most:.2g}" for (layer, side), (heads, most) in places.items()
    ]
    more = f" and {len(some) - 4} others" if len(some) > 4 else ""
    return (
        f"the noise of the codec is more than {settings.limit:g} times what there is to store (guard.limit): "
        f"{'; '.join(some[:4])}{more}"
    )


def with_more_bits(recipe: Recipe, plan: Plan, places: set[Place], what: str) -> Recipe:
    """The recipe with one rule more for each place: the next bits that the quantizer has, for all heads of the layer.

    Raises `ModelError`, which begins with `what`, if there are none.
    """
    rules = list(recipe.rules)
    for layer, side in sorted(places):
        specs = [getattr(group, side) for group in plan.layer_groups(layer)]
        most = max(specs, key=lambda spec: spec.bits)
        more = [bits for bits in plugins().registry.codec(most.quantizer).supported_bits if bits > most.bits]
        if not more:
            raise ModelError(f"{what}; {most.quantizer} has no more than {most.bits:g} bits: skip layer {layer}")
        rules.append(Rule(layers=[layer], **{side: Side(bits=float(more[0]))}))  # type: ignore[arg-type]  # a side's name
    return recipe.model_copy(update={"rules": rules})
