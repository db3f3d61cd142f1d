"""The `tqcompress` command."""

import json
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging
from typer.exceptions import Abort, TyperException

from . import api, report
from .artifacts import FILE_NAME, read
from .calibrate import Calibrator, Statistics
from .compression import Compression
from .errors import TQCompressError
from .evaluate import evaluate, passes
from .models import ALIASES, default_device, load_model, load_shape
from .recipe import Recipe, shipped_recipes
from .registry import plugins
from .resolve import resolve
from .texts import SHIPPED, load_text
from .version import __version__

app = typer.Typer(pretty_exceptions_enable=False)
console = Console()

RecipeArg = Annotated[str, typer.Argument(help=f"YAML file, or a shipped recipe: {', '.join(shipped_recipes())}")]
ModelOpt = Annotated[str, typer.Option(help=f"hub id, directory, .gguf file, or alias: {', '.join(ALIASES)}")]
TextOpt = Annotated[str, typer.Option(help=f"UTF-8 file to measure on, or a shipped text: {', '.join(SHIPPED)}")]
WindowOpt = Annotated[
    int | None,
    typer.Option(min=2, help="measure in independent windows of this many tokens; default: 2048, or the context"),
]
StatisticsOpt = Annotated[
    Path | None, typer.Option(help="statistics from `tqcompress calibrate`, in place of the recipe's calibration")
]
TokensOpt = Annotated[int, typer.Option(min=2, help="measure on the first tokens of the text only")]
JsonOpt = Annotated[Path | None, typer.Option("--json", help="also write the results to this file")]
DeviceOpt = Annotated[str | None, typer.Option(help="default: cuda if there is one, else cpu")]
DtypeOpt = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: float32 on a CPU")]

PROMPT = "In one short paragraph: what does the text above say about how laws are made?"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tqcompress {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Compress the KV cache of transformer language models to 1-4 bits a value."""


@app.command()
def apply(
    recipe: RecipeArg,
    model: ModelOpt,
    out: Annotated[Path | None, typer.Option(help="save the compressed model's directory here")] = None,
    weights: Annotated[bool, typer.Option(help="save the weights too; without, OUT points at the model")] = False,
    prompt: Annotated[str | None, typer.Option(help="default: a question about a page of the shipped text")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the sample output")] = 48,
    text: TextOpt = "constitution",
    max_tokens: TokensOpt = 2048,
    window_tokens: WindowOpt = None,
    json_file: JsonOpt = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    statistics: StatisticsOpt = None,
) -> None:
    """Compress a model's cache: generate with it, measure what it costs and loses, save it."""
    started = time.perf_counter()
    _check_text([recipe], text)  # a bad recipe must not wait for the model
    content = load_text(text)
    given = Statistics.load(statistics) if statistics else None
    with _progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        inputs = _prompt(tokenizer, prompt).to(loaded.device)
        calibrator = _calibrator(loaded, tokenizer, bar, step)
        compression = api.plan_compression(loaded, recipe, calibrator, given)

        bar.update(step, description="generating, uncompressed", total=None)
        before = _generate(loaded, tokenizer, inputs, max_new_tokens)
        ids = _token_ids(tokenizer, content, max_tokens)
        window = window_tokens or _default_window(loaded)
        bar.update(step, description="measuring", total=passes(len(ids), window, 1), completed=0)
        name = compression.recipe.name
        quality = evaluate(loaded, ids, {name: compression}, window, lambda: bar.advance(step))[0]

        bar.update(step, description="generating, compressed", total=None)
        api.attach(loaded, compression)
        after = _generate(loaded, tokenizer, inputs, max_new_tokens)
        if out is not None:
            bar.update(step, description=f"saving to {out}")
            api.save(loaded, out, weights=weights, tokenizer=tokenizer, base=model)
    seconds = time.perf_counter() - started

    console.print(report.cost_table(compression.plan))
    console.print(report.quality_table([quality], text))
    samples = Table(
        title=f"after a prompt of {inputs.input_ids.shape[1]} tokens", title_justify="left", show_lines=True
    )
    samples.add_column("uncompressed", ratio=1)
    samples.add_column(name, ratio=1)
    samples.add_row(escape(before), escape(after))
    console.print(samples)
    console.print(f"{seconds:.1f} s" + (f", saved to {out}" if out else ""))
    here = report.costs(compression.plan)[0]
    _write_json(json_file, {
        "recipe": name,
        "model": model,
        "context": here["tokens"],
        "effective_bits": here["effective_bits"],
        "format_bits": quality.format_bits,
        "bytes_per_token": here["bytes_per_token"],
        "ratio_to_bf16": here["ratio_to_bf16"],
        "contexts": report.costs(compression.plan),
        "perplexity": quality.perplexity,
        "perplexity_uncompressed": quality.perplexity_uncompressed,
        "kl_mean": quality.kl_mean,
        "quality": quality.to_dict(),
        "generated": after,
        "generated_uncompressed": before,
        "seconds": seconds,
        "out": str(out) if out else None,
    })  # fmt: skip


@app.command(name="eval")
def evaluate_command(
    recipes: Annotated[list[str], typer.Argument(help="recipes, as for apply")],
    model: ModelOpt,
    text: TextOpt = "constitution",
    max_tokens: TokensOpt = 8192,
    window_tokens: WindowOpt = None,
    json_file: JsonOpt = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    statistics: StatisticsOpt = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of recipes against the uncompressed model."""
    _check_text(recipes, text)
    content = load_text(text)
    given = Statistics.load(statistics) if statistics else None
    with _progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        calibrator = _calibrator(loaded, tokenizer, bar, step)
        compressions = {_label(r): api.plan_compression(loaded, r, calibrator, given) for r in recipes}
        if len(compressions) < len(recipes):
            raise TQCompressError(f"two of the recipes have the same name: {', '.join(map(_label, recipes))}")
        ids = _token_ids(tokenizer, content, max_tokens)
        window = window_tokens or _default_window(loaded)
        total = passes(len(ids), window, len(compressions))
        bar.update(step, description="measuring", total=total, completed=0)
        results = evaluate(loaded, ids, compressions, window, lambda: bar.advance(step))
    console.print(report.quality_table(results, text))
    _write_json(json_file, [result.to_dict() for result in results])


@app.command(name="calibrate")
def calibrate_command(
    model: ModelOpt,
    out: Annotated[Path, typer.Option(help="write the statistics here, for `apply --statistics`")],
    text: TextOpt = "wikitext-validation",
    tokens: TokensOpt = 65536,
    length: Annotated[int, typer.Option(min=2, help="tokens of a window; each is read on its own")] = 2048,
    seed: Annotated[int, typer.Option(help="of the choice of windows")] = 0,
    sinks: Annotated[int, typer.Option(min=0, help="tokens at the start of each window to leave out")] = 4,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
) -> None:
    """Take the statistics of a model's queries, keys and values that centring and balancing need."""
    settings = {"text": text, "tokens": tokens, "length": length, "seed": seed}
    recipe = Recipe.parse({"version": 1, "key": {}, "value": {}, "keep": {"sinks": sinks}, "calibration": settings})
    load_text(text)  # a missing text must not wait for the model
    with _progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        taken = _calibrator(loaded, tokenizer, bar, step).statistics(recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    taken.save(out)
    console.print(f"{out}: {len(taken.layers)} layers, {taken.source['tokens']} tokens of {text}")


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="a recipe (with --model), or a directory that apply or save wrote")],
    model: Annotated[str | None, typer.Option(help="as for apply; only its config is read")] = None,
    device: DeviceOpt = None,
) -> None:
    """Show what each layer and KV head gets, what reads it, and what it costs, without loading weights."""
    if (Path(what) / FILE_NAME).is_file() or Path(what).name == FILE_NAME:
        artifact = read(Path(what))
        compression = Compression(artifact.recipe, artifact.plan_for(artifact.model()), {})
        artifact.restore(compression.state())
    elif model is None:
        raise TQCompressError(
            f"{what}: a recipe is inspected against a model, give --model; a saved directory needs none"
        )
    else:
        recipe = Recipe.load(what)
        compression = Compression(recipe, resolve(recipe, load_shape(model), what), {})
    compression.choose_backends(torch.device(device or default_device()))
    console.print(report.plan_table(compression))
    console.print(report.cost_table(compression.plan))


@app.command(name="plugins")
def list_plugins() -> None:
    """List plugins, the quantizers they add, and the ones that failed to load."""
    console.print(report.plugin_table(plugins().sources))


@cache
def _complete_app() -> typer.Typer:
    """The commands here and those that plugins add."""
    plugins().hook.tqcompress_cli(app=app)
    return app


def main(argv: list[str] | None = None) -> None:
    """Run the command line; an error of the user's is one line and exit status 2."""
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if word != "--debug"]  # welcome anywhere on the line
    try:
        sys.exit(_complete_app()(words or ["--help"], standalone_mode=False, prog_name="tqcompress"))
    except (TQCompressError, TyperException) as error:
        if "--debug" in given:
            traceback.print_exc()
        message = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"tqcompress: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (Abort, KeyboardInterrupt):
        sys.exit(130)


def _progress() -> Progress:
    """A progress bar on a terminal's standard error, in place of transformers' own."""
    logging.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True)  # results alone go to standard output
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def _calibrator(model: Any, tokenizer: Any, bar: Progress, step: TaskID) -> Calibrator:
    """One that shows its progress as the task `step`."""

    def show(done: int, total: int) -> None:
        bar.update(step, description="calibrating", completed=done, total=total)

    return Calibrator(model, tokenizer, show)


def _check_text(recipes: list[str], text: str) -> None:
    """Refuse bad recipes, and those that would be measured on the text they are calibrated on."""
    measured = load_text(text).strip()
    for recipe in recipes:
        settings = Recipe.load(recipe).calibration
        if settings is None:
            continue
        seen = load_text(settings.text).strip()
        if measured in seen or seen in measured:
            raise TQCompressError(
                f"{recipe}: calibration.text: {settings.text} is what {text} would measure it on; use another text"
            )


def _default_window(model: Any) -> int:
    return min(2048, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048))


def _label(recipe: str) -> str:
    return Path(recipe).stem if Path(recipe).suffix else recipe


def _token_ids(tokenizer: Any, content: str, max_tokens: int) -> torch.Tensor:
    return torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids[:max_tokens])


def _prompt(tokenizer: Any, prompt: str | None) -> Any:
    """The prompt as a chat message where the tokenizer has a chat template.

    The default one is long enough that most of its cache is compressed: a short prompt fits the window.
    """
    if prompt is None:
        prompt = f"{load_text('constitution')[2000:5500]}\n\n{PROMPT}"
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _generate(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> str:
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


def _write_json(path: Path | None, data: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
