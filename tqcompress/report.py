"""What the command line prints: rich tables of plans, measurements and plugins."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from .codec import TensorSpec
from .compression import Compression
from .estimate import Estimate
from .evaluate import Quality
from .needle import Retrieval
from .plan import SIDES, Plan
from .registry import Source

Q = TypeVar("Q", bound=Quality)

# Cells of the terminal's map at so many bits, in between by their logarithm: light to dark.
COLOURS = {
    1: (253, 231, 37),
    2: (142, 214, 68),
    3: (53, 183, 121),
    4: (33, 145, 140),
    8: (55, 88, 141),
    16: (68, 1, 84),
}
CONTEXTS = {8192: "8K", 131072: "128K", 1048576: "1M"}


def readable_size(nbytes: float) -> str:
    """Bytes in the unit that keeps the number readable."""
    power = min(int(math.log2(max(nbytes, 1)) / 10), 4)
    return f"{nbytes / 1024**power:,.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def costs(plan: Plan) -> list[dict[str, float]]:
    """Bits, bytes and ratio of a plan at each of `CONTEXTS`, exact tokens counted at 16 bits."""
    rows = []
    for tokens in CONTEXTS:
        dense, nbytes = plan.dense_nbytes(tokens), plan.nbytes(tokens, dtype=torch.bfloat16)
        rows.append(
            {
                "tokens": tokens,
                "effective_bits": plan.effective_bits(tokens),
                "bytes_per_token": nbytes / tokens,
                "ratio_to_bf16": dense / nbytes,
                "nbytes": nbytes,
                "nbytes_bf16": dense,
            }
        )
    return rows


def cost_table(plan: Plan) -> Table:
    """The cache's cost at each context length."""
    table = Table(title=f"KV cache of {plan.model.name}; exact tokens at 16 bits", title_justify="left")
    for column in ("context", "bits a value", "bytes a token", "cache", "bf16 cache", "ratio"):
        table.add_column(column, justify="right")
    for row in costs(plan):
        table.add_row(
            CONTEXTS[int(row["tokens"])], f"{row['effective_bits']:.3f}", f"{row['bytes_per_token']:,.0f}",
            readable_size(row["nbytes"]), readable_size(row["nbytes_bf16"]), f"{row['ratio_to_bf16']:.2f}x",
        )  # fmt: skip
    return table


def pareto_front(results: Sequence[Q], bits: str = "format_bits") -> list[Q]:
    """Those that no other beats in KL with as few bits, or in bits with as little KL; `bits` names a field."""

    def cost(result: Quality) -> tuple[float, float]:
        return getattr(result, bits), result.kl_mean

    def beaten(a: Quality) -> bool:
        return any(cost(b) != cost(a) and all(x <= y for x, y in zip(cost(b), cost(a), strict=True)) for b in results)

    return [result for result in results if not beaten(result)]


def quality_table(results: list[Quality], text: str) -> Table:
    """Perplexity, KL and agreement of each recipe; a star marks those on the Pareto front, if there is a choice.

    Results of one budget after the other make a section each; what they all keep exact stands above.
    """
    first = results[0]
    title = f"{text}, {first.tokens:,} tokens; uncompressed perplexity {first.perplexity_uncompressed:.3f}"
    table = Table(title=title, title_justify="left")
    table.add_column("recipe", overflow="fold")
    for column in ("bits", "format", "ppl", "mean KL", "KL p99", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    best = pareto_front(results)
    for budget, section in groupby(results, key=lambda result: result.budget):
        rows = list(section)
        if budget is not None:
            table.add_section()
            table.add_row(Text(section_title(rows), "bold"))
        for r in rows:
            name = f"{r.series} *" if r in best and len(results) > 2 else r.series
            table.add_row(
                name, f"{r.effective_bits:.2f}", f"{r.format_bits:.2f}", f"{r.perplexity:.2f}",
                f"{r.kl_mean:.4f}±{r.kl_stderr:.4f}", f"{r.kl_p99:.2f}", f"{r.top1:.1%}",
            )  # fmt: skip
    if first.window_tokens and len(results) > 2:
        table.caption = (
            f"bits: everything counted, at {first.window_tokens:,} tokens; format: in the long run, which * goes by"
        )
    return table


def needle_table(results: list[Retrieval], text: str) -> Table:
    """How many of the uncompressed model's finds each recipe makes too, by the length of the prompt."""
    lengths = sorted({result.tokens for result in results})
    table = Table(title=f"needles in {text}: found, of those that the uncompressed model finds", title_justify="left")
    table.add_column("recipe", overflow="fold")
    for tokens in lengths:
        table.add_column(f"{tokens:,} tokens", justify="right", no_wrap=True)
    table.add_column("all", justify="right", no_wrap=True)
    for name, group in groupby(sorted(results, key=lambda r: (r.recipe, r.tokens)), key=lambda r: r.recipe):
        rows = list(group)
        found, dense = sum(r.found for r in rows), sum(r.uncompressed for r in rows)
        share = f"{found / dense:.1%}" if dense else "-"
        table.add_row(name, *(f"{r.found} of {r.uncompressed}" for r in rows), share)
    tried = sum(r.tried for r in results if r.recipe == results[0].recipe)
    table.caption = f"{tried} prompts"
    return table


def estimate_table(found: list[Estimate], model: str, device: str, tokens: int, batch: int) -> Table:
    """What fits, and how fast it decodes; "bf16" is the least time that any engine can take with that cache."""
    title = f"{model} on one {device}, {batch} x {tokens:,} tokens: estimated"
    table = Table(title=title, title_justify="left")
    table.caption = "context, batch: the most that fits beside the weights, the other being as given"
    for name in ("recipe", "cache", "fits", "context", "batch", "step", "tokens/s"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for one in found:
        name = "bf16, at best" if one.recipe == "bf16" else one.recipe
        longest, largest = (f"{number:,}" if number else "-" for number in (one.longest, one.largest))
        speed = f"{1e3 * one.seconds:.1f} ms", f"{one.tokens_per_second(batch):,.0f}"
        fits = ("yes", *speed) if one.fits else ("no", "-", "-")
        table.add_row(name, readable_size(one.cache), fits[0], longest, largest, *fits[1:])
    return table


def section_title(results: Sequence[Quality]) -> str:
    """What the results of one budget of the suite have in common."""
    budget, exact = results[0].budget, {(r.sinks, r.window) for r in results}
    if budget is None:
        return "recipes as they are, exact tokens as each has them"
    sinks, window = min(exact)
    same = f"; exact: {sinks} first, {window} last" if len(exact) == 1 else ""
    return f"about {budget:g} bits{same}"


def plan_table(compression: Compression) -> Table:
    """What every layer and head gets; layers that get the same share a row."""
    plan = compression.plan
    table = Table(title=f"{compression.recipe.name} on {plan.model.name}", title_justify="left")
    for column in ("layers", "KV heads", "keys", "values", "bytes a token", "backend"):
        table.add_column(column, overflow="fold", justify="right" if column == "bytes a token" else "left")
    layers_of: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(plan.model.layers)):
        for row in _layer_rows(compression, index):
            layers_of.setdefault(row, []).append(index)
    for row, layers in sorted(layers_of.items(), key=lambda item: (item[1], item[0])):
        table.add_row(_ranges(layers), *row)
    backends = {group.backend for codecs in compression.layers.values() for group in codecs.groups}
    table.caption = "; ".join(sorted(f"backend {backend.name}: {backend.reason}" for backend in backends))
    return table


def _ranges(numbers: list[int]) -> str:
    """0-3, 7 from [0, 1, 2, 3, 7]."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def _layer_rows(compression: Compression, index: int) -> list[tuple[str, ...]]:
    """KV heads, keys, values, bytes of a token and backend of each of a layer's groups."""
    plan = compression.plan
    shape = plan.model.layers[index]
    groups = plan.layer_groups(index)
    if not groups:
        nbytes = shape.values_per_token * plan.model.dtype.itemsize
        return [("all", f"exact: {plan.exact[index]}", "", f"{nbytes:,.1f}", "transformers")]
    rows: list[tuple[str, ...]] = []
    for group, codecs in zip(groups, compression.layers[index].groups, strict=True):
        row = sum(plan.layout(group, side).nbytes_per_token for side in SIDES)
        heads = "all" if len(group.heads) == shape.num_kv_heads else ", ".join(map(str, group.heads))
        size = f"{len(group.heads) * row:,.1f}"
        rows.append((heads, describe(group.key), describe(group.value), size, codecs.backend.name))
    return rows


def describe(spec: TensorSpec) -> str:
    """A spec in a few words."""
    if spec.quantizer == "exact":
        return "exact"
    return f"{spec.bits:g} bit {spec.quantizer} {_named(spec.options)}".rstrip()


def _named(options: dict[str, Any]) -> str:
    """`a=1 b=(c=2 d=3)`."""
    parts = ((key, f"({_named(value)})" if isinstance(value, dict) else value) for key, value in options.items())
    return " ".join(f"{key}={value}" for key, value in sorted(parts))


def bits_map(plan: Plan, width: int) -> Text:
    """Bits of a value as coloured cells, layers across and KV heads down, keys and values apart.

    A cell says the whole bits, the legend below all of them; heads that get the same share a row. `width` is that of
    the terminal: more layers than fit go below.
    """
    maps = {side: plan.head_bits(side) for side in SIDES}
    margin, lines = 16, [Text("Bits a value, scales included, of each layer (across) and KV head (down)", "italic")]
    at_once = max(5, (width - margin) // 2)
    for start in range(0, len(plan.model.layers), at_once):
        part = range(start, min(start + at_once, len(plan.model.layers)))
        ruler = "".join(f"{index:<10}" for index in part if (index - start) % 5 == 0)
        lines.append(Text(f"{'layer':<{margin}}{ruler}".rstrip(), "dim"))
        for side, table in maps.items():
            rows: dict[tuple[float | None, ...], list[int]] = {}
            for head in range(max(map(len, table))):
                row = tuple(table[index][head] if head < len(table[index]) else None for index in part)
                rows.setdefault(row, []).append(head)
            for row, heads in rows.items():
                label = f"{side} {'all' if len(rows) == 1 else _ranges(heads)}"
                lines.append(Text.assemble(f"{label:<{margin - 1}.{margin - 1}} ", *map(_cell, row)))
    values = sorted({bits for table in maps.values() for row in table for bits in row})
    legend = [part for bits in values for part in (_cell(bits), f" {bits:.4g} bits   ")]
    return Text("\n").join([*lines, Text.assemble(" " * margin, *legend)])


def _cell(bits: float | None) -> Text:
    """Two columns of a terminal, the darker the more bits."""
    if bits is None:
        return Text("  ")
    marks = [math.log2(mark) for mark in COLOURS]
    parts = zip(*COLOURS.values(), strict=True)
    red, green, blue = (round(float(np.interp(math.log2(bits), marks, part))) for part in parts)
    ink = "black" if bits < 4 else "white"
    return Text(f" {int(bits)}" if bits < 10 else " ■", f"{ink} on rgb({red},{green},{blue})")


def plugin_table(sources: list[Source]) -> Table:
    """Every plugin, what it adds, and what is wrong with it."""
    table = Table(title="Plugins, in the order of their registration", title_justify="left")
    for column in ("plugin", "from", "quantizers", "status"):
        table.add_column(column)
    for source in sources:
        status = Text(f"broken: {source.error}", "red") if source.error else "ok"
        table.add_row(Text(source.name), Text(source.origin), ", ".join(source.codecs) or "-", status)
    return table
