"""The commands `tqcompress export ...`."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .. import api, session
from ..artifacts import read
from ..compression import Compression
from ..errors import ModelError
from ..models import load_model
from ..texts import load_text

if TYPE_CHECKING:
    from .runtime import Agreement

app = typer.Typer(help="Export a compressed model to other runtimes.", no_args_is_help=True)
console = Console()

CHECKED = 96  # tokens of the check's prompt beside sinks and window: they are encoded in its first step


@app.callback()
def options() -> None:
    """Export a compressed model to other runtimes."""


@app.command(name="onnx")
def onnx_command(
    out: Annotated[Path, typer.Argument(help="write the graphs here")],
    directory: Annotated[Path, typer.Option("--dir", help="a directory that `apply --out` or tqcompress.save wrote")],
    codecs: Annotated[bool, typer.Option("--codecs", help="the codecs alone, those that can be; no weights")] = False,
    check: Annotated[int, typer.Option(min=0, help="steps to compare with torch under onnxruntime")] = 16,
) -> None:
    """Write ONNX graphs of every codec, and of a step of the model with its compressed cache."""
    from . import graph, onnx, runtime
    from .step import ModelStep

    graph.check_installed()
    if check and not codecs:
        runtime.sessions()
    artifact = read(directory)  # a bad directory must not wait for the model
    found: list[Agreement] = []
    with session.progress() as bar:
        task = bar.add_task(f"loading {directory}", total=None)
        compression = Compression(artifact.recipe, artifact.plan_for(artifact.model()), {})
        artifact.restore(compression.state())
        if not codecs:
            onnx.check_exportable(compression.plan)
            compression.choose_backends()
            model, tokenizer = load_model(str(directory), "cpu", "float32")
            api.remove(model)
        bar.update(task, description="exporting")
        left_out = onnx.write_directory(out, compression, None if codecs else model)
        for reason in left_out:
            console.print(f"left out: {escape(reason)}")
        if check and not codecs:
            bar.update(task, description="checking", total=check, completed=0)
            plan = compression.plan
            ids = session.token_ids(tokenizer, load_text("constitution"), plan.sinks + plan.window + CHECKED + check)
            prompt, rest = ids[: len(ids) - check], ids[len(ids) - check :]
            steps = chain([prompt], rest.split(1))
            for result in runtime.compare(runtime.OnnxModel(out), ModelStep(model, compression), steps):
                found.append(result)
                bar.advance(task)
    graphs = len(list((out / "codecs").glob("*.onnx")))
    console.print(f"{out}: {graphs} graphs of codecs" + ("" if codecs else f", {onnx.MODEL}"))
    if found:
        report(found)


def report(found: "list[Agreement]") -> None:
    """Print what the check found. Raises `ModelError` if the graph computes something else than torch."""
    from .runtime import LOGITS_ERROR

    rows, ties, wrong = (sum(getattr(f, name) for f in found) for name in ("rows", "ties", "wrong"))
    worst = max(f.logits for f in found)
    equal = "all" if ties + wrong == 0 else f"all but {ties + wrong}"
    console.print(
        f"onnxruntime against torch, a prompt and {len(found) - 1} steps: {equal} of {rows} packed rows are the same "
        f"bits; logits differ by at most {worst:.1e} of their root mean square"
    )
    if wrong or worst > LOGITS_ERROR:
        raise ModelError(
            f"the graph is wrong: {wrong} packed rows and logits up to {worst:.1e} differ from torch's by more than "
            f"rounding (none and {LOGITS_ERROR:.0e})"
        )
