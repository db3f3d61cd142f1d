"""Export to ONNX: encode and decode graphs of every codec, and a step of the whole model.

A codec is exported as it runs in torch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import Codec
from ..compression import Compression
from ..errors import ModelError
from ..plan import SIDES, Plan
from ..registry import plugins
from .graph import SIZE, check_installed, open_tokens, reason, to_onnx, write
from .manifest import write_manifest
from .step import ModelStep, fields

MODEL = "model.onnx"


class Encode(nn.Module):
    """Vectors `[batch, kv_heads, tokens, head_dim]` to packed rows."""

    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The fields of the layout, in its order."""
        rows = self.codec.encode(x)
        return {field: rows[field].clone() for field in self.codec.layout().fields}  # an output must not be an input


class Decode(nn.Module):
    """Packed rows to float32 vectors."""

    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def forward(self, packed: dict[str, Tensor]) -> Tensor:
        """`[batch, kv_heads, tokens, head_dim]`."""
        return self.codec.decode(packed).clone()


class CodecGraphs:
    """Writes the graphs of codecs; those of one kind are traced once, and equal ones are one file."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.traced: dict[Any, bytes] = {}
        self.written: list[tuple[Any, dict[str, Tensor], str]] = []

    def write(self, codec: Codec, method: str, name: str) -> str:
        """The file of the codec's `encode` or `decode` graph, a new one by that name or an equal one.

        Raises `ModelError` if the codec cannot be exported.
        """
        import onnx_ir
        from onnx_ir import serde

        kind, state = (codec.spec, codec.shape, method), codec.state()
        for other, numbers, file in self.written:
            if other == kind and all(torch.equal(numbers[key], tensor) for key, tensor in state.items()):
                return file
        if kind not in self.traced:
            self.traced[kind] = serde.serialize_model(_traced(codec, method).model).SerializeToString()
        proto = _proto(self.traced[kind])
        model = serde.deserialize_model(proto)
        for key, tensor in state.items():
            initializer = model.graph.initializers.get(f"codec.{key}")
            if initializer is not None:  # one side of a matrix may be all that a graph needs
                initializer.const_value = onnx_ir.tensor(tensor.numpy(force=True), name=initializer.name)
        file = f"{name}.{method}.onnx"
        write(model, self.directory / file)
        self.written.append((kind, state, file))
        return file


def _proto(content: bytes) -> Any:
    import onnx

    return onnx.ModelProto.FromString(content)


def _traced(codec: Codec, method: str) -> Any:
    """The graph of one method of a codec. Raises `ModelError`."""
    if method in codec.not_in_onnx:
        raise ModelError(f"{codec.name}: {method} is not exported to ONNX: {codec.not_in_onnx[method]}")
    layout, shape = codec.layout(), codec.shape
    batch, tokens = torch.export.Dim("batch"), open_tokens("tokens", layout.block)
    x = torch.randn(SIZE, shape.num_kv_heads, SIZE * layout.block, shape.head_dim)  # only its shape matters
    names = list(layout.fields)
    if method == "encode":
        return _named(codec, method, Encode(codec), (x,), ({0: batch, 2: tokens},), ["x"], names)
    empty = {
        name: torch.zeros(SIZE, shape.num_kv_heads, SIZE * layout.block // field.tokens, field.size, dtype=field.dtype)
        for name, field in layout.fields.items()
    }
    axes = {
        name: {0: batch, 2: open_tokens("tokens", layout.block, field.tokens)} for name, field in layout.fields.items()
    }
    return _named(codec, method, Decode(codec), (empty,), (axes,), names, ["x"])


def _named(codec: Codec, method: str, *arguments: Any) -> Any:
    """`to_onnx`, whose errors name the codec."""
    try:
        return to_onnx(*arguments)
    except Exception as error:  # the exporter raises whatever its parts do
        raise ModelError(f"{codec.name}: {method} cannot be exported to ONNX: {reason(error)}") from error


# ------------------------------------------------------------------------------------------------------- the model


def model_inputs(step: ModelStep) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace a step with, and their open axes."""
    axis, plan = torch.export.Dim, step.plan
    batch, new = axis("batch"), axis("new")
    cache, axes = {}, {}
    for index, (layer, groups) in enumerate(zip(plan.model.layers, step.groups, strict=True)):
        block = plan.block(index) if groups else 1
        sizes = {"past": axis("exact" if groups else "tokens")} | (
            {"leaving": open_tokens("leaving", block)} if groups else {}
        )
        for part, size in sizes.items():
            for side in SIDES:
                name = f"{part}.{index}.{side}"
                cache[name] = torch.randn(SIZE, layer.num_kv_heads, SIZE * block, layer.head_dim)
                axes[name] = {0: batch, 2: size}
        for name, (heads, field) in fields(groups).items():
            rows = SIZE * block // field.tokens
            cache[f"past.{index}.{name}"] = torch.zeros(SIZE, heads, rows, field.size, dtype=field.dtype)
            axes[f"past.{index}.{name}"] = {0: batch, 2: open_tokens("packed", block, field.tokens)}
    ids = torch.arange(SIZE).expand(SIZE, -1).contiguous()
    return (ids, ids.clone(), cache), ({0: batch, 1: new}, {0: batch, 1: new}, axes)


def check_exportable(plan: Plan) -> None:
    """Raise `ModelError` if a step of the plan's model cannot be exported: known before anything is loaded."""
    for index, layer in enumerate(plan.model.layers):
        if layer.kind != "full":
            raise ModelError(
                f"{plan.model.name}: layer {index} has {layer.kind} attention; a step is exported only of models whose "
                "layers all have full attention; export the codecs alone with --codecs"
            )
    for group in plan.groups:
        for spec in (group.key, group.value):
            for method, why in plugins().registry.codec(spec.quantizer).not_in_onnx.items():
                raise ModelError(
                    f"layer {group.layer}: {spec.quantizer}: {method} is not exported to ONNX, and a step needs it: "
                    f"{why}; export the codecs alone with --codecs"
                )


def write_model(step: ModelStep, directory: Path) -> str:
    """Write `model.onnx`, and its weights beside it. Raises `ModelError` if it cannot be exported."""
    inputs, axes = model_inputs(step)
    names = ["input_ids", "position_ids", *inputs[2]]
    outputs = ["logits", *step.present_names()]
    try:
        program = to_onnx(step, inputs, axes, names, outputs)
    except Exception as error:  # as above
        raise ModelError(f"{step.plan.model.name}: cannot be exported to ONNX: {reason(error)}") from error
    write(program.model, directory / MODEL, external=True)
    return MODEL


# ------------------------------------------------------------------------------------------------------- both


def write_directory(directory: Path, compression: Compression, model: nn.Module | None) -> list[str]:
    """Write the graphs of all codecs, of a step of `model` unless that is None, and `tqcompress.json` about them.

    Without a model codecs that cannot be exported are left out; returned is why, for each of them. With one they are
    errors, and nothing is left out. Raises `ModelError`.
    """
    check_installed()
    if model is not None:
        check_exportable(compression.plan)
    directory.mkdir(parents=True, exist_ok=True)
    step = write_model(ModelStep(model, compression), directory) if model is not None else None
    (directory / "codecs").mkdir(exist_ok=True)
    graphs, left_out = CodecGraphs(directory / "codecs"), list[str]()
    files: dict[tuple[str, str], dict[str, str]] = {}
    for name, pair in compression.codecs.items():
        place = "layer{}.group{}".format(*name.split("-"))
        for side, codec in pair.items():
            files[name, side] = {}
            for method in ("encode", "decode"):
                try:
                    files[name, side][method] = "codecs/" + graphs.write(codec, method, f"{place}.{side}")
                except ModelError as error:
                    left_out.append(str(error))
    if not graphs.written:
        raise ModelError("; ".join(dict.fromkeys(left_out)))
    write_manifest(directory, compression, step, files)
    return list(dict.fromkeys(left_out))
