"""Export to ONNX: encode and decode graphs of every codec, and a step of the whole model.

Standard operators of opset 18 only, with the sizes of batch and tokens left open. What torch's exporter lacks or
exports badly has translations of its own: `bucketize`, and the shifts of int32 numbers, which are those of uint32 as
codes are never negative. Everything else of a codec is exported as it runs in torch.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import Codec
from ..compression import Compression
from ..constants import kept_for_export
from ..errors import ModelError, TQCompressError
from ..output import replace_file
from ..plan import SIDES, Plan
from ..registry import plugins
from .step import ModelStep, fields

OPSET = 18  # the first with BitwiseAnd and BitwiseOr
MANIFEST = "tqcompress.json"
MODEL = "model.onnx"
SIZE = 3  # of the open axes of the inputs that are traced: not 1, which torch would take for fixed


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


def check_installed() -> None:
    """Raise `TQCompressError` if a package that exporting needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TQCompressError(f"{error.name} is not installed; install the extra tqcompress[onnx]") from None


# ---------------------------------------------------------------------------------------------------- the exporter


def to_onnx(
    module: nn.Module, inputs: tuple[Any, ...], open_axes: tuple[Any, ...], names: list[str], outputs: list[str]
) -> Any:
    """The graph of `module(*inputs)`, a `torch.onnx.ONNXProgram`, not optimized: buffers keep their names.

    Args:
        open_axes: for each input, as `torch.export.export` takes them as `dynamic_shapes`.
        names, outputs: of the graph's inputs and outputs, in their order.
    """
    with kept_for_export(), torch.no_grad(), _quiet():
        module(*inputs)  # so that constants are known
        program = torch.export.export(module, inputs, dynamic_shapes=open_axes, strict=False)
        return torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=open_axes,  # for the names of the axes
            optimize=False,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            custom_translation_table=_translations(),
            verbose=False,
        )


def _translations() -> dict[Any, Any]:
    """Operators of torch that its exporter does not translate, or not well, as functions that build graphs."""
    from onnxscript import opset18 as op

    unsigned, int32, int64 = 12, 6, 7  # numbers of types in the format

    def left(x: Any, count: Any) -> Any:
        shifted = op.BitShift(op.Cast(x, to=unsigned), op.Cast(count, to=unsigned), direction="LEFT")
        return op.Cast(shifted, to=int32)

    def right(x: Any, count: Any) -> Any:
        shifted = op.BitShift(op.Cast(x, to=unsigned), op.Cast(count, to=unsigned), direction="RIGHT")
        return op.Cast(shifted, to=int32)

    # How many borders each number has passed.
    def bucketize(x: Any, borders: Any, out_int32: bool = False, right: bool = False) -> Any:
        compare = op.GreaterOrEqual if right else op.Greater
        last = op.Constant(value_ints=[-1])
        passed = op.Cast(compare(op.Unsqueeze(x, last), borders), to=int32 if out_int32 else int64)
        return op.ReduceSum(passed, last, keepdims=0)

    aten = torch.ops.aten
    return {
        aten.__lshift__.Tensor: left,
        aten.__lshift__.Scalar: left,
        aten.__rshift__.Tensor: right,
        aten.__rshift__.Scalar: right,
        aten.bucketize.Tensor: bucketize,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages and its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(model: Any, path: Path, external: bool = False) -> None:
    """Optimize and check an `onnx_ir.Model`, and write it; `external`: its numbers to a file beside it."""
    import onnx
    import onnx_ir
    from onnxscript import optimizer

    optimizer.optimize(model, num_iterations=1, onnx_shape_inference=False)  # more take time squared, and find nothing
    nodes = list(model.graph.all_nodes())
    for part in (model, model.graph, *nodes, *(value for node in nodes for value in node.outputs)):
        part.metadata_props.clear()  # traces of the code it came from, several times the graph itself
    others = {node.domain for node in nodes} - {"", "ai.onnx"}
    if others or model.functions:
        raise ModelError(f"{path.name}: the graph has operators that are not standard: {sorted(others)}")
    if external:
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
    else:
        onnx_ir.save(model, path)
    onnx.checker.check_model(path, full_check=not external)


# ------------------------------------------------------------------------------------------------------ the codecs


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
        _write(model, self.directory / file)
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
    batch, tokens = torch.export.Dim("batch"), _tokens("tokens", layout.block)
    x = torch.randn(SIZE, shape.num_kv_heads, SIZE * layout.block, shape.head_dim)  # only its shape matters
    names = list(layout.fields)
    if method == "encode":
        return _named(codec, method, Encode(codec), (x,), ({0: batch, 2: tokens},), ["x"], names)
    empty = {
        name: torch.zeros(SIZE, shape.num_kv_heads, SIZE * layout.block // field.tokens, field.size, dtype=field.dtype)
        for name, field in layout.fields.items()
    }
    axes = {name: {0: batch, 2: _tokens("tokens", layout.block, field.tokens)} for name, field in layout.fields.items()}
    return _named(codec, method, Decode(codec), (empty,), (axes,), names, ["x"])


def _named(codec: Codec, method: str, *arguments: Any) -> Any:
    """`to_onnx`, whose errors name the codec."""
    try:
        return to_onnx(*arguments)
    except Exception as error:  # the exporter raises whatever its parts do
        raise ModelError(f"{codec.name}: {method} cannot be exported to ONNX: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom: torch's exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tokens(name: str, block: int, shared: int = 1) -> Any:
    """The open axis of rows that `shared` of the tokens share, where tokens come in blocks; blocks are what is open."""
    blocks, rows = torch.export.Dim(name if block == 1 else f"{name}_{block}"), block // shared
    return blocks if rows == 1 else rows * blocks


# ------------------------------------------------------------------------------------------------------- the model


def model_inputs(step: ModelStep) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace a step with, and their open axes."""
    axis, plan = torch.export.Dim, step.plan
    batch, new = axis("batch"), axis("new")
    cache, axes = {}, {}
    for index, (layer, groups) in enumerate(zip(plan.model.layers, step.groups, strict=True)):
        block = plan.block(index) if groups else 1
        sizes = {"past": axis("exact" if groups else "tokens")} | (
            {"leaving": _tokens("leaving", block)} if groups else {}
        )
        for part, size in sizes.items():
            for side in SIDES:
                name = f"{part}.{index}.{side}"
                cache[name] = torch.randn(SIZE, layer.num_kv_heads, SIZE * block, layer.head_dim)
                axes[name] = {0: batch, 2: size}
        for name, (heads, field) in fields(groups).items():
            rows = SIZE * block // field.tokens
            cache[f"past.{index}.{name}"] = torch.zeros(SIZE, heads, rows, field.size, dtype=field.dtype)
            axes[f"past.{index}.{name}"] = {0: batch, 2: _tokens("packed", block, field.tokens)}
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
            for method, reason in plugins().registry.codec(spec.quantizer).not_in_onnx.items():
                raise ModelError(
                    f"layer {group.layer}: {spec.quantizer}: {method} is not exported to ONNX, and a step needs it: "
                    f"{reason}; export the codecs alone with --codecs"
                )


def write_model(step: ModelStep, directory: Path) -> str:
    """Write `model.onnx`, and its weights beside it. Raises `ModelError` if it cannot be exported."""
    inputs, axes = model_inputs(step)
    names = ["input_ids", "position_ids", *inputs[2]]
    outputs = ["logits", *step.present_names()]
    try:
        program = to_onnx(step, inputs, axes, names, outputs)
    except Exception as error:  # as above
        raise ModelError(f"{step.plan.model.name}: cannot be exported to ONNX: {_reason(error)}") from error
    _write(program.model, directory / MODEL, external=True)
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


def write_manifest(
    directory: Path, compression: Compression, step: str | None, files: dict[tuple[str, str], dict[str, str]]
) -> None:
    """Write `tqcompress.json`: what there is, and all that a caller must know of the cache.

    Args:
        step: the file of the model's step.
        files: those of the codecs' graphs, by the codec's name in `compression.codecs` and its side.
    """
    plan, layers = compression.plan, []
    for index, shape in enumerate(plan.model.layers):
        groups = []
        for j, group in enumerate(plan.layer_groups(index)):
            sides: dict[str, Any] = {}
            for side in SIDES:
                spec, layout = getattr(group, side), plan.layout(group, side)
                sides[side] = {
                    "quantizer": spec.quantizer,
                    "bits": spec.bits,
                    **files.get((f"{index}-{j}", side), {}),
                    "fields": {
                        name: {
                            "dtype": str(field.dtype).removeprefix("torch."),
                            "size": field.size,
                            "tokens": field.tokens,
                        }
                        for name, field in layout.fields.items()
                    },
                }
            groups.append({"heads": list(group.heads), **sides})
        block = plan.block(index) if groups else 1
        layers.append({"kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "block": block, "groups": groups})
    content = {
        "format_version": 1,
        "model": plan.model.name,
        "step": step,
        "sinks": plan.sinks,
        "window": plan.window,
        "layers": layers,
    }
    replace_file(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
