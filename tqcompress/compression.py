"""`Compression`: a plan at work in a model.

Two official levers of transformers are used and nothing is patched: a forward pre-hook on the decoder, which
puts `CompressedLayer`s into the cache it is given, and the registered attention function "tqcompress".
"""

import inspect
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from . import attention, blockwise, masks, promises
from .cache import CompressedLayer
from .calibrate import Moments, Statistics
from .codec import Codec
from .errors import ModelError
from .guard import LayerGuard
from .plan import SIDES, Group, Plan, build_codec
from .recipe import Recipe
from .registry import plugins
from .ring import ExactLayer, RingLayer
from .sharding import HeadShard
from .view import Backend, GroupCodecs, LayerCodecs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Codecs = MutableMapping[str, Mapping[str, Codec]]  # by group and side
MODULE = "tqcompress"  # the submodule of a model that holds its codecs


class Compression(nn.Module):
    """Everything tqcompress holds for a model: recipe, plan, codecs, and how to undo it.

    Recipe, plan and codecs are of the whole model; `layers` has what this process attends with, the heads of `shard`.
    """

    def __init__(self, recipe: Recipe, plan: Plan, devices: dict[int, torch.device], shard: HeadShard | None = None):
        super().__init__()
        self.recipe, self.plan, self.devices = recipe, plan, devices
        self.shard = shard = shard or HeadShard()
        layers = {group.layer: plan.model.layers[group.layer] for group in plan.groups}
        self.heads = {index: shard.heads(shape.num_kv_heads, index) for index, shape in layers.items()}
        self.codecs: Codecs = nn.ModuleDict()  # type: ignore[assignment]  # torch's does not say of what
        # Of codecs some of whose heads are in other processes: what is used here.
        self.parts: Codecs = nn.ModuleDict()  # type: ignore[assignment]  # likewise
        self.layers: dict[int, LayerCodecs] = {}
        for index in range(len(plan.model.layers)):
            for j, group in enumerate(plan.layer_groups(index)):
                sides: dict[str, Codec] = {
                    side: build_codec(getattr(group, side), plan.head_shape(group, side)) for side in SIDES
                }
                # Only what is used takes a device's memory.
                device = devices.get(index, "cpu") if shard.size == 1 else "cpu"
                self.codecs[f"{index}-{j}"] = nn.ModuleDict(sides).to(device)  # type: ignore[assignment]  # likewise
        self.calibration: dict[str, str | int] | None = None  # what the codecs were fitted on
        # Errors measured when the model was compressed, `[kv_heads]` of each layer and side, if the recipe has a guard.
        self.promised: dict[promises.Place, torch.Tensor] = {}
        if recipe.guard is not None:
            self.promised = {
                (index, side): torch.zeros(shape.num_kv_heads) for index, shape in layers.items() for side in SIDES
            }
        self.allocation: Any = None  # what came of the recipe's budget, an `Allocation`
        self.arguments: list[str] = []  # of the decoder's forward, in order
        self.unread = False  # whether no mask is made for steps in caches of fixed size
        self.hook: RemovableHandle = None  # type: ignore[assignment]  # until it is attached
        self.previous_attention: str | None = None

    @property
    def needs_statistics(self) -> bool:
        """Whether a codec must be fitted before it is used."""
        return any(codec.needs_statistics for pair in self.codecs.values() for codec in pair.values())

    def fit(self, statistics: Statistics) -> None:
        """Fit all codecs. Raises `ModelError` if a layer is missing in the statistics, or has another shape."""
        for index in sorted({group.layer for group in self.plan.groups}):
            shape = self.plan.model.layers[index]
            for j, group in enumerate(self.plan.layer_groups(index)):
                for side, codec in self.codecs[f"{index}-{j}"].items():
                    if not codec.needs_statistics:
                        continue
                    moments = statistics.layers.get(index, {}).get(side)
                    if moments is None or moments.mean.shape != (shape.num_kv_heads, shape.head_dim):
                        found = "none" if moments is None else "x".join(map(str, moments.mean.shape))
                        raise ModelError(
                            f"layer {index}: the statistics have {found} for {side}s; the model has "
                            f"{shape.num_kv_heads}x{shape.head_dim}; calibrate on this model"
                        )
                    _fit(codec, moments.of(group.heads), f"layer {index}, {side}s of KV heads {list(group.heads)}")
        self.calibration = statistics.source

    def choose_backends(self, device: torch.device | None = None) -> None:
        """Ask the plugins what reads each group, on the layer's device or on another one.

        Called once the codecs' state is final: a backend may make constants of it.
        """
        for index in self.heads:
            self.layers[index] = self._layer(index, device or self.devices.get(index, torch.device("cpu")))

    def _layer(self, index: int, device: torch.device) -> LayerCodecs:
        """What attends to the heads of a layer that are here."""
        plan, heads, groups, rings = self.plan, self.heads[index], [], True
        for j, group in enumerate(plan.layer_groups(index)):
            name, places = f"{index}-{j}", [i for i, head in enumerate(group.heads) if head in heads]
            pair = self.codecs[name]
            if places and self.shard.size > 1:
                parts = {side: codec.of_heads(places) for side, codec in pair.items()}
                pair = self.parts[name] = nn.ModuleDict(parts).to(device)  # type: ignore[assignment]  # likewise
            here = replace(group, heads=tuple(group.heads[i] - heads.start for i in places))
            backend = _backend(here if places else group, pair, device)
            if places:
                groups.append(GroupCodecs(here.heads, pair["key"], pair["value"], backend))
            rings = rings and backend.ring is not None  # also elsewhere: all processes do what one alone would
        sizes = (len(heads), plan.model.layers[index].head_dim, plan.sinks, plan.window, plan.block(index))
        # The hooks that carry states from device to device break a compiled graph at every module.
        one_device = len(set(self.devices.values())) <= 1
        watch = None
        if self.recipe.guard is not None:
            promised: dict[str, torch.Tensor] = {
                side: self.promised[index, side][list(heads)].to(device) for side in SIDES
            }
            watch = LayerGuard(self.recipe.guard, index, heads.start, promised)
        return LayerCodecs(
            index, tuple(groups), *sizes, rings and plan.block(index) == 1, heads.start, one_device, watch
        )

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of the artifact: `layers.{i}.g{j}.{key|value}.{name}`."""
        return {
            "layers.{}.g{}.{}.{}".format(*key.split("-"), side, name): tensor
            for key, pair in self.codecs.items()
            for side, codec in pair.items()
            for name, tensor in codec.state().items()
        } | {f"layers.{index}.guard.{side}": error for (index, side), error in self.promised.items()}

    def measure(self, model: "PreTrainedModel", ids: torch.Tensor) -> dict[promises.Place, promises.Measured]:
        """What the codecs do to the keys and values that `model`, uncompressed, makes of the token ids `[n]`.

        Their errors are what the guard of caches compares with from now on; `choose_backends` comes after.
        """
        codecs = {
            index: [(group.heads, self.codecs[f"{index}-{j}"]) for j, group in enumerate(self.plan.layer_groups(index))]
            for index in self.heads
        }
        found = promises.measure(model, codecs, ids, self.plan.sinks)
        for place, one in found.items():
            self.promised[place].copy_(one.error)
        return found

    def attach(self, model: "PreTrainedModel") -> None:
        """Select the attention and hook the decoder. Raises `ModelError` if the model hard-codes its attention."""
        attention.register()
        self.previous_attention = model.config._attn_implementation
        decoder = model.get_decoder()
        arguments = list(inspect.signature(decoder.forward).parameters)
        if "past_key_values" not in arguments:
            raise ModelError(f"{type(decoder).__name__} takes no past_key_values; tqcompress cannot give it a cache")
        if not model._can_set_attn_implementation():
            raise ModelError(
                f"{type(model).__name__} hard-codes its attention instead of asking transformers' AttentionInterface "
                "for it; tqcompress cannot read a compressed cache there"
            )
        model.set_attn_implementation(attention.NAME)
        self.arguments = arguments
        whole = all(shape.kind != "full" or index in self.layers for index, shape in enumerate(self.plan.model.layers))
        self.unread = whole and self.steps
        for config in (model.config, decoder.config):
            masks.unread(config, self.unread)
        self.hook = decoder.register_forward_pre_hook(self.prepare_cache, with_kwargs=True)
        model.add_module(MODULE, self)

    def detach(self, model: "PreTrainedModel") -> None:
        """Undo `attach`."""
        self.hook.remove()
        for config in (model.config, model.get_decoder().config):
            masks.unread(config, False)
        model.set_attn_implementation(self.previous_attention)
        delattr(model, MODULE)
        model.__dict__.pop("_cache", None)  # older transformers keep the last static cache here

    def prepare_cache(
        self, decoder: "PreTrainedModel", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Forward pre-hook: put compressed layers into the cache, making one if the decoder would."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        recomputes = decoder.training and getattr(decoder, "gradient_checkpointing", False)
        if cache is not None and recomputes:  # transformers would drop the cache and go on
            raise ModelError(
                "a cache was given while gradient checkpointing recomputes layers, which uses none; "
                "call model.eval() to generate, or pass no cache and use_cache=False to train"
            )
        if cache is None:
            use_cache = given.get("use_cache")
            if not (decoder.config.use_cache if use_cache is None else use_cache):
                return None
            if recomputes:
                return None  # the decoder will not use a cache
            cache = DynamicCache(config=decoder.config)
            given["past_key_values"] = cache
        self.compress_layers(cache, given.get("attention_mask"))
        self._refuse_packed(cache, given)
        if self.unread and not torch.compiler.is_compiling():
            self._note_step(cache, given)
        return (), given

    def compress_layers(self, cache: Cache, attention_mask: Any = None) -> None:
        """Replace the empty layers of `cache` that the plan compresses. Raises `ModelError` on foreign tokens.

        `attention_mask` (`[batch, tokens]`, or what generate() made of it) tells how far each prompt is padded
        on the left.
        """
        if cache.layer_class_to_replicate is DynamicLayer:  # a DynamicCache() made without a config
            cache.layers += [DynamicLayer() for _ in range(len(cache.layers), len(self.plan.model.layers))]
            cache.layer_class_to_replicate = None
        for index, layer in enumerate(cache.layers):
            codecs = self.layers.get(index)
            if codecs is None:
                # transformers makes one mask for all full-attention layers: the exact ones must be as long as ours.
                if type(layer) is StaticLayer and int(layer.get_seq_length()) == 0:
                    cache.layers[index] = ExactLayer(layer.max_cache_len) if self.steps else DynamicLayer()
                continue
            if isinstance(layer, CompressedLayer) and layer.codecs is codecs:
                continue
            if not isinstance(layer, CompressedLayer) and type(layer) not in (DynamicLayer, StaticLayer):
                if type(layer).__module__ == "transformers.cache_utils":
                    kind = type(layer).__name__
                    warnings.warn(f"the given cache holds a {kind}; it is used as it is, uncompressed", stacklevel=2)
                continue  # a cache layer of somebody else's, chosen on purpose
            if int(layer.get_seq_length()) > 0:
                owner = "another compression" if isinstance(layer, CompressedLayer) else "no compression"
                raise ModelError(
                    f"layer {index} of the given cache already holds {int(layer.get_seq_length())} tokens made with "
                    f"{owner}; start from an empty cache"
                )
            size = getattr(layer, "max_cache_len", None)
            steps = self.steps if size is not None else codecs.steps
            made = RingLayer if steps else CompressedLayer
            cache.layers[index] = made(codecs, size, self.recipe.max_cache_len or 0)
        if attention_mask is not None:
            self._note_padding(cache, attention_mask)

    @property
    def steps(self) -> bool:
        """Whether every layer can take single tokens through rings, as caches of fixed size must."""
        return all(codecs.steps for codecs in self.layers.values())

    def _note_padding(self, cache: Cache, attention_mask: "torch.Tensor | dict[str, torch.Tensor | None]") -> None:
        """Tell the layers of an empty cache where each prompt begins: the sinks are its first real tokens."""
        if self._holds_tokens(cache):
            return
        # One mask for each kind of layer, if generate() made them.
        mask = attention_mask.get("full_attention") if isinstance(attention_mask, dict) else attention_mask
        if mask is None:
            return
        if mask.dim() == 4:  # the last token of a prompt sees all of it but the padding
            mask = mask[:, 0, -1, : mask.shape[2]]
            mask = mask if mask.dtype == torch.bool else mask == 0
        seen = mask.bool()
        shown = None if seen.all() else seen
        padding = None if shown is None else shown.long().argmax(1)
        if padding is not None and not padding.any():
            padding = None
        for index in self.layers:
            cache.layers[index].note_prompt(shown, padding)

    def _refuse_packed(self, cache: Cache, given: dict[str, Any]) -> None:
        """Raise `ModelError` for a prompt of several sequences in one row, told apart by their positions alone.

        Transformers masks them apart without a cache only; with one, each would see those before it.
        """
        places = given.get("position_ids")
        if given.get("attention_mask") is not None or not isinstance(places, torch.Tensor) or places.dim() != 2:
            return
        if places.shape[1] == 1 or torch.compiler.is_compiling() or self._holds_tokens(cache):
            return
        if bool((places.diff(dim=1) <= 0).any()):
            raise ModelError(
                "position_ids begin anew within a row: several sequences are packed into one, which a cache cannot "
                "tell apart; give each its own row, or pass use_cache=False"
            )

    def _holds_tokens(self, cache: Cache) -> bool:
        """Whether any layer here does, or is somebody else's."""
        layers = [cache.layers[index] for index in self.layers]
        return any(not isinstance(layer, CompressedLayer) or layer.holds_tokens for layer in layers)

    def _note_step(self, cache: Cache, given: dict[str, Any]) -> None:
        """Tell caches of fixed size what the caller hides from a step; generate() gives no mask there."""
        mask, new = given.get("attention_mask"), given.get("input_ids")
        new = given.get("inputs_embeds") if new is None else new
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or new is None:
            return
        for layer in (cache.layers[index] for index in self.layers if new.shape[1] == 1):
            if isinstance(layer, RingLayer) and layer.fixed and layer.stepping:
                layer.note_step(mask)


def _fit(codec: Codec, moments: Moments, what: str) -> None:
    """Fit one codec. Raises `ModelError` if the statistics are no moments, or the state does not come out finite."""
    given = [moments.mean, moments.covariance, *([] if moments.query is None else [moments.query])]
    if not all(bool(tensor.isfinite().all()) for tensor in given):
        raise ModelError(f"{what}: the statistics are not finite; calibrate again")
    try:
        codec.fit(moments)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its __all__
        raise ModelError(f"{what}: the statistics are no covariances ({error}); calibrate again") from None
    for name, tensor in codec.state().items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{what}: {name} of {codec.name} is not finite after fitting; calibrate on another text")


def _backend(group: Group, pair: Mapping[str, Codec], device: torch.device) -> Backend:
    """What reads the group's packed tokens, decided here once and for all."""
    found: Backend | None = plugins().hook.tqcompress_backend(group=group, codecs=pair, device=device)
    return found or Backend("torch", blockwise.attend, f"no fused kernel is installed for {device.type}")
