"""The `tqcompress` command."""

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table
from typer.exceptions import Abort, TyperException

from . import api, page, report, session
from . import suite as suites
from .artifacts import FILE_NAME, read
from .calibrate import Statistics
from .compression import Compression
from .errors import TQCompressError
from .estimate import GPUS, estimate, gpu, uncompressed, weights_of
from .evaluate import evaluate, passes
from .export.commands import app as export_app
from .models import ALIASES, default_device, load_config, load_model, load_shape
from .needle import retrieve
from .output import replace_file
from .recipe import Recipe, shipped_recipes
from .records import Record, plain
from .records import read as read_records
from .registry import plugins
from .resolve import resolve
from .shape import ModelShape
from .texts import SHIPPED, load_text
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(export_app, name="export")
console = Console()

ESTIMATED = ("lossless-4bit", "balanced", "compact-3bit", "extreme-2bit", "trellis-3bit", "trellis-2bit")
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


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tqcompress {__version__}")
        raise typer.Exit


def _say_allocation(compression: Compression) -> None:
    """Print what came of a budget, if the recipe has one."""
    if compression.allocation is not None:
        console.print(f"{escape(compression.recipe.name)}: {compression.allocation}", highlight=False)


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
    content = session.text_for([recipe], text)  # a bad recipe must not wait for the model
    given = Statistics.load(statistics) if statistics else None
    with session.progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        inputs = session.prompt_inputs(tokenizer, prompt).to(loaded.device)
        calibrator = session.calibrator(loaded, tokenizer, bar, step)
        compression = api.plan_compression(loaded, recipe, calibrator, given)

        bar.update(step, description="generating, uncompressed", total=None)
        before = session.generate(loaded, tokenizer, inputs, max_new_tokens)
        ids = session.token_ids(tokenizer, content, max_tokens)
        window = window_tokens or session.default_window(loaded)
        bar.update(step, description="measuring", total=passes(len(ids), window, 1), completed=0)
        name = compression.recipe.name
        quality = evaluate(loaded, ids, {name: compression}, window, lambda: bar.advance(step))[0]

        bar.update(step, description="generating, compressed", total=None)
        api.attach(loaded, compression)
        after = session.generate(loaded, tokenizer, inputs, max_new_tokens)
        if out is not None:
            bar.update(step, description=f"saving to {out}")
            api.save(loaded, out, weights=weights, tokenizer=tokenizer, base=model)
    seconds = time.perf_counter() - started

    _say_allocation(compression)
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
    session.write_json(json_file, {
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


def _planned(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    bar: Progress,
    step: TaskID,
    recipes: Sequence[str | Recipe],
    required: Sequence[str | Recipe],
    statistics: Statistics | None,
) -> tuple[dict[str, Compression], list[str]]:
    """`session.plan_each` for a loaded model, with its calibration shown as the task `step`."""
    calibrator = session.calibrator(model, tokenizer, bar, step)
    return session.plan_each(
        recipes, required, lambda recipe: api.plan_compression(model, recipe, calibrator, statistics)
    )


@app.command(name="eval")
def evaluate_command(
    model: ModelOpt,
    recipes: Annotated[list[str] | None, typer.Argument(help="recipes, as for apply")] = None,
    suite: Annotated[bool, typer.Option("--suite", help="all shipped recipes, and quantizers at equal bytes")] = False,
    text: TextOpt = "constitution",
    max_tokens: TokensOpt = 8192,
    window_tokens: WindowOpt = None,
    json_file: JsonOpt = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    statistics: StatisticsOpt = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of recipes against the uncompressed model."""
    named = recipes or []
    equal = suites.at_equal_bytes() if suite else {}
    wanted: list[str | Recipe] = [*named, *(suites.shipped() if suite else []), *chain.from_iterable(equal.values())]
    if not wanted:
        raise TQCompressError("name recipes to measure, or give --suite")
    content = session.text_for(wanted, text)
    given = Statistics.load(statistics) if statistics else None
    with session.progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        compressions, left_out = _planned(loaded, tokenizer, bar, step, wanted, named, given)
        ids = session.token_ids(tokenizer, content, max_tokens)
        window = window_tokens or session.default_window(loaded)
        total = passes(len(ids), window, len(compressions))
        bar.update(step, description="measuring", total=total, completed=0)
        results = evaluate(loaded, ids, compressions, window, lambda: bar.advance(step))
    if suite:
        budgets = {recipe.name: budget for budget, group in equal.items() for recipe in group}
        results = [replace(result, budget=budgets.get(result.recipe)) for result in results]
        results.sort(key=lambda result: (result.budget or 0, result.format_bits, result.kl_mean))
    for compression in compressions.values():
        _say_allocation(compression)
    console.print(report.quality_table(results, text))
    for reason in left_out:
        console.print(f"left out: {escape(reason)}")
    name = ModelShape.of(loaded).name
    session.write_json(json_file, plain(Record.of(result, name, session.text_name(text)) for result in results))


@app.command(name="needle")
def needle_command(
    model: ModelOpt,
    recipes: Annotated[list[str], typer.Argument(help="recipes, as for apply")],
    text: TextOpt = "constitution",
    lengths: Annotated[str, typer.Option(help="tokens of the prompts, with the answer")] = "1K,2K,4K,8K",
    depths: Annotated[int, typer.Option(min=1, help="places in each prompt")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="prompts for each length and depth")] = 2,
    seed: Annotated[int, typer.Option(help="of numbers and places")] = 0,
    json_file: JsonOpt = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    statistics: StatisticsOpt = None,
) -> None:
    """Hide numbers in long prompts: which recipes still find those that the uncompressed model finds?"""
    sizes = [session.count(part, "lengths") for part in lengths.split(",")]
    content = session.text_for(recipes, text)
    given = Statistics.load(statistics) if statistics else None
    with session.progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        compressions, _ = _planned(loaded, tokenizer, bar, step, recipes, recipes, given)
        bar.update(step, description="hiding and asking", total=len(sizes) * depths * repeats, completed=0)
        asked, results = (compressions, sizes, depths, repeats, seed, lambda: bar.advance(step)), []
        for result in retrieve(loaded, tokenizer, content, *asked):
            results.append(result)
            session.write_json(json_file, [asdict(result) for result in results])
    for compression in compressions.values():
        _say_allocation(compression)
    console.print(report.needle_table(results, text))


@app.command(name="report")
def report_command(
    results: Annotated[list[Path], typer.Argument(help="what `tqcompress eval --json` wrote, one or more files")],
    out: Annotated[Path, typer.Option(help="write the page here, an HTML file that needs nothing else")],
) -> None:
    """Make a page of measurements: KL against bits, bits and errors of every layer and head, tables."""
    records = read_records(results)
    content = page.render(records).encode()
    replace_file(out, content)
    console.print(f"{out}: {len(records)} measurements, {report.readable_size(len(content))}")


@app.command(name="calibrate")
def calibrate_command(
    model: ModelOpt,
    out: Annotated[Path, typer.Option(help="write the statistics here, for `apply --statistics`")],
    text: TextOpt = "wikitext-validation",
    tokens: TokensOpt = 65536,
    length: Annotated[int, typer.Option(min=2, help="tokens of a window; each is read on its own")] = 512,
    seed: Annotated[int, typer.Option(help="of the choice of windows")] = 0,
    context: Annotated[
        int | None, typer.Option(min=2, help="positions that windows are spread over; default: the model's context")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="tokens at the start of each window to leave out")] = 4,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
) -> None:
    """Take the statistics of a model's queries, keys and values that centring and balancing need."""
    settings = {"text": text, "tokens": tokens, "length": length, "seed": seed, "context": context}
    recipe = Recipe.parse({"version": 1, "key": {}, "value": {}, "keep": {"sinks": sinks}, "calibration": settings})
    load_text(text)  # a missing text must not wait for the model
    with session.progress() as bar:
        step = bar.add_task(f"loading {model}", total=None)
        loaded, tokenizer = load_model(model, device, dtype)
        taken = session.calibrator(loaded, tokenizer, bar, step).statistics(recipe)
    taken.save(out)
    console.print(f"{out}: {len(taken.layers)} layers, {taken.source['tokens']} tokens of {text}")


@app.command(name="estimate")
def estimate_command(
    model: ModelOpt,
    recipes: Annotated[
        list[str] | None, typer.Argument(help="recipes, as for apply; default: some shipped ones")
    ] = None,
    device: Annotated[str, typer.Option("--gpu", help=f"one of {', '.join(GPUS)}")] = "H200",
    context: Annotated[str, typer.Option(help="tokens of each sequence")] = "128K",
    batch: Annotated[int, typer.Option(min=1, help="sequences")] = 1,
    json_file: JsonOpt = None,
) -> None:
    """Say what fits on a GPU and how fast it decodes, in bf16, from the model's config alone."""
    tokens, card, config = session.count(context, "context"), gpu(device), load_config(model)
    shape = replace(ModelShape.of(config), dtype=torch.bfloat16)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or tokens
    plans = {name: resolve(Recipe.load(name), shape, name) for name in recipes or ESTIMATED}
    size = (weights_of(config, torch.bfloat16), card, tokens, batch)
    found = [uncompressed(next(iter(plans.values())), *size, limit=limit)]
    found += [estimate(plan, *size, name=name, limit=limit) for name, plan in plans.items()]
    console.print(report.estimate_table(found, shape.name, device, tokens, batch))
    session.write_json(json_file, [asdict(one) for one in found])


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
        compression.allocation = artifact.allocation
    elif model is None:
        raise TQCompressError(
            f"{what}: a recipe is inspected against a model, give --model; a saved directory needs none"
        )
    else:
        recipe = Recipe.load(what)
        compression = Compression(recipe, resolve(recipe, load_shape(model), what), {})
    compression.choose_backends(torch.device(device or default_device()))
    _say_allocation(compression)
    console.print(report.plan_table(compression))
    console.print(report.bits_map(compression.plan, console.width))
    console.print(report.cost_table(compression.plan))


@app.command(
    name="serve",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},  # they are for `transformers serve`
)
def serve_command(context: typer.Context) -> None:
    """Serve a directory that apply or save wrote with an OpenAI-compatible API, through `transformers serve`."""
    from .serve import serve

    serve(context.args)


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


if __name__ == "__main__":
    main()
