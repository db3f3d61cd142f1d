"""What is exported of a model: a step of it, with the compressed cache as plain tensors in and out.

A step takes new tokens, one or a whole prompt, and everything of the cache as inputs; it encodes the tokens that leave
the window, appends the new ones, attends and hands the cache back. Which tokens leave is the caller's to say (see
`runtime`): so no length is computed in the graph, and each may be zero. For every layer there are

    past.{layer}.key, .value                    exact tokens `[batch, kv_heads, exact, head_dim]`: sinks and window
    leaving.{layer}.key, .value                 those to encode now `[batch, kv_heads, leaving, head_dim]`
    past.{layer}.{group}.{key|value}.{field}    packed rows `[batch, heads of the group, rows, size]`

and outputs `present.` with the same names as `past.`. A layer that stays exact has only the first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention import selected
from ..codec import Field
from ..compression import Compression
from ..errors import ModelError
from ..plan import SIDES
from ..view import GroupCodecs, Pair, query_heads, take_heads

NAME = "tqcompress-export"

Rows = dict[str, Tensor]  # by the field of the layout
Packed = tuple[GroupCodecs, Rows, Rows]  # of keys and of values


@dataclass(frozen=True)
class StepTokens:
    """What `update` returns in place of key and value tensors: exact tokens, and each group's packed rows."""

    exact: Pair
    packed: tuple[Packed, ...]


class StepLayer(CacheLayerMixin):
    """One layer's cache during one step: `past` and `leaving` as in the module's text, without the layer's number."""

    supports_early_init = False

    def __init__(self, groups: tuple[GroupCodecs, ...], past: dict[str, Tensor], leaving: dict[str, Tensor]):
        super().__init__()
        self.groups, self.past, self.leaving = groups, past, leaving
        self.present: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: all there is was given."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StepTokens, StepTokens]:
        """Encode what leaves, append what is new; return what attention reads, twice."""
        new = {"key": key_states, "value": value_states}
        self.present = {side: torch.cat([self.past[side], new[side]], dim=2) for side in SIDES}
        packed = []
        for j, group in enumerate(self.groups):
            sides: list[Rows] = []
            for side, codec in zip(SIDES, (group.key, group.value), strict=True):
                rows = codec.encode(take_heads(self.leaving[side], group))
                names = {field: f"{j}.{side}.{field}" for field in codec.layout().fields}
                sides.append({field: torch.cat([self.past[n], rows[field]], dim=2) for field, n in names.items()})
                self.present |= {name: sides[-1][field] for field, name in names.items()}
            packed.append((group, sides[0], sides[1]))
        tokens = StepTokens((self.present["key"], self.present["value"]), tuple(packed))
        return tokens, tokens

    def get_seq_length(self) -> int:
        """Exact tokens only; positions are an input of the step."""
        return self.past["key"].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask that is not made."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers


def attend(query: Tensor, tokens: StepTokens, scaling: float, softcap: float | None = None) -> Tensor:
    """Attention of the last tokens to themselves, causally, and to all before them.

    Args:
        query: `[batch, heads, new, head_dim]`; the last `new` exact tokens are the queries' own.

    Returns:
        float32 of the query's shape. Packed tokens of one layer are decoded as a whole.
    """
    keys, values = tokens.exact
    if not tokens.packed:
        return _attend(query, keys, values, None, scaling, softcap)
    outputs: list[Tensor] = []
    order: list[int] = []
    for packed in tokens.packed:
        group, heads = packed[0], query_heads(packed[0], query.shape[1] // keys.shape[1])
        mine = query if len(tokens.packed) == 1 else query[:, heads]
        outputs.append(_attend(mine, take_heads(keys, group), take_heads(values, group), packed, scaling, softcap))
        order += heads
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs, dim=1)[:, [order.index(head) for head in range(len(order))]]


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, packed: Packed | None, scaling: float, softcap: float | None
) -> Tensor:
    """`attend` of one group's heads, or without packed tokens."""
    new, exact = query.shape[2], keys.shape[2]
    query = (query.float() * scaling).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    scores = query @ keys.float().mT
    if packed is not None:
        group, key_rows, value_rows = packed
        scores = torch.cat([scores, group.key.rotate(query) @ group.key.decode_rotated(key_rows).mT], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(scores.shape[-1], device=query.device)
    last = torch.arange(new, device=query.device)[:, None] + (exact - new)  # the last exact token that a query sees
    seen = (place <= last) | (place >= exact)
    scores = scores.unflatten(2, (-1, new)).masked_fill(~seen, -torch.inf).flatten(2, 3)
    weights = torch.softmax(scores, dim=-1)
    output: Tensor = weights[..., :exact] @ values.float()
    if packed is not None:
        output = output + group.value.unrotate(weights[..., exact:] @ group.value.decode_rotated(value_rows))
    output = output.unflatten(2, (-1, new)).flatten(1, 2)
    return output


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: StepTokens,
    value: StepTokens,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of an exported model, as transformers calls it. Raises `ModelError`."""
    if s_aux is not None or position_bias is not None:
        what = "learned sink logits" if s_aux is not None else "position biases"
        raise ModelError(f"{type(module).__name__}: {what} are not exported")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, scaling, softcap).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # `attend` knows what is causal


class ModelStep(nn.Module):
    """A causal language model's step: `forward(input_ids, position_ids, cache)`."""

    def __init__(self, model: nn.Module, compression: Compression):
        super().__init__()
        self.model, self.plan = model, compression.plan
        self.groups = [
            compression.layers[i].groups if i in compression.layers else () for i in range(len(self.plan.model.layers))
        ]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits `[batch, vocabulary]` behind the last token, and the `present.` tensors.

        Args:
            input_ids, position_ids: int64 `[batch, new]`.
            cache: the `past.` and `leaving.` tensors.
        """
        layers = [
            StepLayer(groups, _under(f"past.{index}.", cache), _under(f"leaving.{index}.", cache))
            for index, groups in enumerate(self.groups)
        ]
        with selected(self.model, NAME):
            output = self.model(
                input_ids=input_ids, position_ids=position_ids, past_key_values=Cache(layers=layers), use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        present = {f"present.{i}.{name}": x for i, layer in enumerate(layers) for name, x in layer.present.items()}
        return output.logits[:, -1].float(), present

    def present_names(self) -> list[str]:
        """The names of the `present.` tensors, in the order of the outputs."""
        names = []
        for index, groups in enumerate(self.groups):
            names += [f"present.{index}.{name}" for name in (*SIDES, *fields(groups))]
        return names


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fields(groups: tuple[GroupCodecs, ...]) -> dict[str, tuple[int, Field]]:
    """The packed tensors of a layer by name, `{group}.{side}.{field}`: how many heads, and the field."""
    return {
        f"{j}.{side}.{name}": (len(group.heads), field)
        for j, group in enumerate(groups)
        for side, codec in zip(SIDES, (group.key, group.value), strict=True)
        for name, field in codec.layout().fields.items()
    }
