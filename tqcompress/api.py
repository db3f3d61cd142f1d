"""apply, remove, save, load: the only place that wires the parts to a model."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from . import artifacts, promises
from .allocate import allocate
from .cache import CompressedLayer
from .calibrate import Calibrator, Statistics
from .compression import MODULE, Compression
from .errors import ArtifactError, ModelError, RecipeError
from .models import base_name
from .output import empty_stage, publish, stage_of, writing
from .plan import Plan
from .recipe import Guard, Recipe
from .registry import plugins
from .resolve import Allocated, resolve
from .shape import ModelShape
from .sharding import HeadShard, is_shared, writes_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("tqcompress")


def apply(
    model: "PreTrainedModel",
    recipe: "Recipe | str | Path | dict[str, Any]",
    tokenizer: Any = None,
    statistics: Statistics | None = None,
) -> Plan:
    """Compress the KV cache of a transformers model from now on; returns what every head gets.

    `recipe` is a `Recipe`, a YAML file, the name of a shipped recipe, or plain data. A model that is
    compressed already gets the new recipe instead. A recipe that needs calibration runs the model over its text
    first, with `tokenizer` (default: the one the model was published with), unless `statistics` are given. Raises
    `RecipeError` or `ModelError`; the model is then unchanged.
    """
    compression = plan_compression(model, recipe, Calibrator(model, tokenizer), statistics)
    if compression.allocation is not None:
        log.log(logging.INFO if compression.allocation.kept else logging.WARNING, compression.allocation)
    attach(model, compression)
    return compression.plan


def plan_compression(
    model: "PreTrainedModel",
    recipe: "Recipe | str | Path | dict[str, Any]",
    calibrator: Calibrator | None = None,
    statistics: Statistics | None = None,
) -> Compression:
    """Resolve a recipe against a model, build its codecs and fit them, without touching the model.

    `calibrator` takes the statistics that the recipe asks for, unless they are given, and the text that a budget is
    measured on.
    """
    loaded, shape, devices, shard = Recipe.load(recipe), ModelShape.of(model), _devices(model), HeadShard.of(model)
    source = str(recipe) if isinstance(recipe, (str, Path)) else loaded.name
    calibrator = calibrator or Calibrator(model)

    def plan_of(allocated: Allocated | None = None, recipe: Recipe = loaded) -> Plan:
        plan = resolve(recipe, shape, source, allocated)
        for changed in plugins().hook.tqcompress_plan(model=model, recipe=loaded, plan=plan):
            plan = changed or plan
        return plan

    def build(plan: Plan, recipe: Recipe = loaded) -> Compression:
        compression = Compression(recipe, plan, devices, shard)
        if compression.needs_statistics:
            compression.fit(statistics or calibrator.statistics(loaded))
        elif loaded.calibration is not None and loaded.budget is None:
            raise RecipeError(f"{loaded.name}: calibration: nothing here uses it; add center or balance, or remove it")
        compression.choose_backends()
        return compression

    if loaded.guard is not None and shard.size > 1:
        raise ModelError(
            f"{source}: guard: a model that several processes share is not measured; apply the recipe in one process"
        )
    if loaded.budget is None and loaded.guard is None:
        return build(plan_of())
    if loaded.budget is None:
        return _guarded(model, source, build(plan_of()), calibrator, lambda to: build(plan_of(None, to), to))
    if shard.size > 1:
        raise ModelError(
            f"{source}: budget: a model that several processes share is not measured; apply the recipe in one process, "
            "save, and load that here"
        )
    windows, progress = partial(calibrator.other_windows, loaded), partial(calibrator.progress, "allocating bits")
    plan, allocation = allocate(model, loaded, source, windows, plan_of, build, progress)
    compression = build(plan)
    compression.allocation = allocation
    return compression if loaded.guard is None else _guarded(model, source, compression, calibrator)


def _guarded(
    model: "PreTrainedModel",
    source: str,
    compression: Compression,
    calibrator: Calibrator,
    rebuild: Callable[[Recipe], Compression] | None = None,
) -> Compression:
    """The compression with its errors measured, as the recipe's `guard` says.

    Where the noise is beyond `guard.limit` it is an error, or, with `rebuild`, those layers get the next bits until it
    is not. Raises `ModelError` for an error, or if no more bits can be given.
    """
    settings: Guard = compression.recipe.guard  # type: ignore[assignment]  # or this is not called
    ids = calibrator.guard_ids(settings)
    while weak := promises.weak(compression.measure(model, ids), settings):
        what = f"{source}: {promises.told(weak, settings)}"
        if settings.weak == "refuse" or rebuild is None:
            raise ModelError(f"{what}; center the keys, give those layers more bits, or skip them")
        log.warning("%s; they get more bits", what)
        compression = rebuild(promises.with_more_bits(compression.recipe, compression.plan, set(weak), what))
    compression.choose_backends()
    return compression


def remove(model: "PreTrainedModel") -> None:
    """Restore the model: attention, hook, codecs and quantization config. Does nothing to a plain model."""
    compression = compression_of(model)
    if compression is None:
        return
    compression.detach(model)
    if getattr(model, "quantization_method", None) == MODULE:
        model.hf_quantizer.remove_quantization_config(model)


def compression_of(model: "PreTrainedModel") -> Compression | None:
    """What `apply` attached to the model, or None."""
    found = getattr(model, MODULE, None)
    return found if isinstance(found, Compression) else None


def save(
    model: "PreTrainedModel", path: "str | Path", weights: bool = False, tokenizer: Any = None, base: str | None = None
) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` and `tqcompress.load` read.

    Without `weights` it only points at the base model, `base` or the name the model was loaded from.
    If several processes share the model, all must call this, as they must `save_pretrained`; the first one writes.
    What is at `path` is the old output or the new one at any moment; other files there stay. Raises `ModelError` if
    the model is not compressed, or has neither weights to save nor a base to name, `OutputError` if the disk is full.
    """
    compression = compression_of(model)
    if compression is None:
        raise ModelError("the model is not compressed; call tqcompress.apply(model, recipe) before save")
    from .hf import check_savable, write_config

    base = base_name(base or model.config._name_or_path)
    check_savable(model, weights, base)
    path, writes = Path(path), writes_files(model)
    stage = stage_of(path)
    with writing(path, stage if writes else None):
        if writes:
            empty_stage(path)
        _wait(model)
        if weights:
            model.save_pretrained(stage)  # by all processes: each gives its part
        if writes:
            c = compression
            artifacts.write(stage, c.recipe, c.plan, c.state(), c.calibration, c.allocation)
            write_config(model, stage, weights, base)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
        _wait(model)
        if writes:
            publish(path, weights)
    _wait(model)
    return path


def _wait(model: "PreTrainedModel") -> None:
    """For the other processes that share the model."""
    if is_shared(model):
        torch.distributed.barrier()


def load(model: "PreTrainedModel", path: "str | Path") -> Plan:
    """Compress `model` with the artifact in `path` (a directory or the file itself); returns its plan.

    Raises `ArtifactError` if the artifact is damaged, too new, or made for another model; the model is then
    unchanged.
    """
    artifact = artifacts.read(Path(path))
    compression = restored(artifact, ModelShape.of(model), _devices(model), HeadShard.of(model))
    attach(model, compression)
    return compression.plan


def restored(
    artifact: artifacts.Artifact,
    shape: ModelShape,
    devices: dict[int, torch.device] | None = None,
    shard: HeadShard | None = None,
) -> Compression:
    """What an artifact holds, ready for a model of that shape. Raises `ArtifactError` as `load` does."""
    plan = artifact.plan_for(shape)
    try:
        compression = Compression(artifact.recipe, plan, devices or {}, shard)
    except RecipeError as error:  # a quantizer that is not installed here
        raise ArtifactError(f"{artifact.path}: {error}") from None
    artifact.restore(compression.state())
    compression.calibration = artifact.calibration
    compression.allocation = artifact.allocation
    compression.choose_backends()
    return compression


def verify(cache: Cache) -> None:
    """Raise `ModelError` if a compressed cache holds anything infinite, not a number, or too large for its codes.

    The error names the layer and the KV heads. Waits for the device. On a CPU such keys and values are refused when
    they come; on other devices they are found some steps after they were encoded, and here at once.
    """
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            layer.verify()


def attach(model: "PreTrainedModel", compression: Compression) -> None:
    """Compress `model` with what `plan_compression` prepared, in place of what it had before."""
    previous = compression_of(model)
    if previous is not None:
        previous.detach(model)
    compression.attach(model)
    plugins().hook.tqcompress_applied(model=model, plan=compression.plan)


def _devices(model: "PreTrainedModel") -> dict[int, torch.device]:
    """The device of each layer: that of the first parameter of the module that calls the cache.

    Where accelerate moves the parameters in for each call (offloading), it is the one that they are moved to.
    """
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        parameter = next(module.parameters(), None)
        if not isinstance(index, int) or parameter is None:
            continue
        device = parameter.device
        if device.type == "meta":
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            devices.setdefault(index, torch.device(device))
    return devices
