"""torch's exporter to ONNX: standard operators of opset 18 only, with the sizes of batch and tokens left open.

What it lacks or exports badly has translations of its own: `bucketize`, and the shifts of int32 numbers, which are
those of uint32 as codes are never negative.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..constants import kept_for_export
from ..errors import ModelError, TQCompressError

OPSET = 18  # the first with BitwiseAnd and BitwiseOr
SIZE = 3  # of the open axes of the inputs that are traced: not 1, which torch would take for fixed


def check_installed() -> None:
    """Raise `TQCompressError` if a package that exporting needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TQCompressError(f"{error.name} is not installed; install the extra tqcompress[onnx]") from None


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


def write(model: Any, path: Path, external: bool = False) -> None:
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


def reason(error: BaseException) -> str:
    """The first line of the error at the bottom: torch's exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def open_tokens(name: str, block: int, shared: int = 1) -> Any:
    """The open axis of rows that `shared` of the tokens share, where tokens come in blocks; blocks are what is open."""
    blocks, rows = torch.export.Dim(name if block == 1 else f"{name}_{block}"), block // shared
    return blocks if rows == 1 else rows * blocks
