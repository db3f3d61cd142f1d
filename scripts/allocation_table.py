"""Measures bits allocated over layers, heads and sides beside uniform ones of the same size, on text of neither.

    python scripts/allocation_table.py --model llama --text wikitext2-test.txt [--max-tokens 16384] [--json FILE]
        [--bits 2.25,3.25] [--window 128] [--quantizer trellis] [--choices 1,2,3,4] [--tokens 1024] [--scale fp16]

The pipeline is that of docs/quality.md. Statistics are taken from 65,536 tokens of `wikitext-validation` (or read from
`--statistics`, made with the same number), sensitivities from the first `--tokens` of a window that these leave; one
measurement for each kind of unit serves all budgets. A budget is in bits of a stored coordinate in the long run, scales
included. A model in bf16 rounds more than most units disturb: give `--dtype float32`. Runs without installing
anything.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import tqcompress

tqcompress.__path__.append(str(ROOT))  # plugins and recipes, if nothing is installed
from tqcompress.allocate import Bits, Sizes, sensitivities, solve, units
from tqcompress.calibrate import Calibrator, Statistics
from tqcompress.compression import Compression
from tqcompress.evaluate import evaluate
from tqcompress.models import load_model
from tqcompress.plan import Plan
from tqcompress.recipe import Recipe
from tqcompress.resolve import resolve
from tqcompress.session import text_for, token_ids
from tqcompress.shape import ModelShape

OVER = (["layers", "sides"], ["layers", "heads", "sides"])


def recipe(options: argparse.Namespace, bits: float, over: list[str]) -> Recipe:
    """The shipped pipeline with a budget."""
    sides = {side: {"seed": seed, "scale": options.scale} for seed, side in enumerate(("key", "value"))}
    calibration = {"text": "wikitext-validation", "tokens": options.calibration_tokens, "length": 2048, "context": 2048}
    budget = {"bits": bits, "over": over, "choices": options.choices, "tokens": options.tokens}
    return Recipe.parse(
        {"version": 1, "quantizer": options.quantizer, **sides, "keep": {"sinks": 4, "window": options.window}}
        | {"center": {"key": True}, "balance": "key", "calibration": calibration, "budget": budget}
    )


class Bench:
    """A model, its statistics and the text for sensitivities; what is chosen for each budget, as compressions."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model, self.tokenizer = load_model(options.model, options.device, options.dtype)
        self.shape, device = ModelShape.of(self.model), self.model.device
        self.devices = dict.fromkeys(range(len(self.shape.layers)), device)
        calibrator, first = Calibrator(self.model, self.tokenizer), recipe(options, options.bits[0], OVER[0])
        given = options.statistics
        self.statistics = Statistics.load(given) if given else calibrator.statistics(first)
        self.window = calibrator.other_windows(first)[0][: options.tokens]

    def plan(self, recipe: Recipe, bits: Bits) -> Plan:
        """What the recipe means with these bits."""
        return resolve(recipe, self.shape, None, lambda *slot: bits[slot])

    def build(self, recipe: Recipe, plan: Plan) -> Compression:
        """A plan's codecs, fitted."""
        compression = Compression(recipe, plan, self.devices)
        compression.fit(self.statistics)
        compression.choose_backends()
        return compression

    def rows(self) -> dict[str, tuple[float, Compression, Bits]]:
        """By name: the budget, the compression and its bits."""
        losses, found = {}, {}
        for budget in self.options.bits:
            for over in OVER:
                given = recipe(self.options, budget, over)
                sizes = Sizes(given.budget, lambda bits, r=given: resolve(r, self.shape, None, bits), "budget")
                groups, name = units(sizes.of, over), " x ".join(over)
                if name not in losses:
                    losses[name] = self.measure(given, groups, sizes)
                cost = np.array([[sum(sizes.of[slot][c] for slot in unit) for c in sizes.choices] for unit in groups])
                chosen = solve(losses[name], cost, sizes.room)
                bits = {slot: sizes.choices[i] for unit, i in zip(groups, chosen, strict=True) for slot in unit}
                if over is OVER[0]:
                    for (key, value), uniform in sizes.uniform().items():
                        if key >= value:  # the other way round is never better
                            filled = sizes.filled(uniform)
                            row = budget, self.build(given, self.plan(given, filled)), filled
                            found[f"{budget:g}: {key:g}-bit keys, {value:g}-bit values"] = row
                found[f"{budget:g}: {name}"] = budget, self.build(given, self.plan(given, bits)), bits
        return found

    def measure(self, given: Recipe, groups: list, sizes: Sizes) -> np.ndarray:
        """Sensitivities, and how long they took."""
        started = time.perf_counter()
        losses = sensitivities(
            self.model, [self.window], groups, sizes.choices,
            lambda bits: resolve(given, self.shape, None, bits), lambda plan: self.build(given, plan),
        )  # fmt: skip
        what = f"{losses.size} passes of {len(self.window)} tokens"
        print(f"{' x '.join(given.budget.over)}: {what}, {time.perf_counter() - started:.0f} s", flush=True)
        return losses


def mean(bits: Bits, side: str) -> float:
    """Bits of the codes of one side."""
    return float(np.mean([b for slot, b in bits.items() if slot[2] == side]))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--bits", type=numbers, default=[2.25, 3.25])
    parser.add_argument("--choices", type=numbers, default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--quantizer", default="trellis")
    parser.add_argument("--scale", default="fp16")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    text = text_for([recipe(options, options.bits[0], OVER[0])], options.text)
    bench = Bench(options)
    print(f"loaded and calibrated, {time.perf_counter() - started:.0f} s", flush=True)
    rows = bench.rows()
    ids = token_ids(bench.tokenizer, text, options.max_tokens)
    found = evaluate(bench.model, ids, {name: compression for name, (_, compression, _) in rows.items()})
    table = Table(title=f"{options.quantizer}, {options.scale} scales, 4 sinks, window {options.window}")
    for column in ("budget: setting", "bits", "keys", "values", "KL", "perplexity"):
        table.add_column(column, justify="left" if column.startswith("budget") else "right")
    for quality in found:
        bits = rows[quality.recipe][2]
        table.add_row(
            quality.recipe, f"{quality.format_bits:.3f}", f"{mean(bits, 'key'):.2f}", f"{mean(bits, 'value'):.2f}",
            f"{quality.kl_mean:.4f} ± {quality.kl_stderr:.4f}", f"{quality.perplexity:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)
    print(f"{ids.numel()} tokens, uncompressed perplexity {found[0].perplexity_uncompressed:.3f}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if options.json:
        plain = [replace(quality, budget=rows[quality.recipe][0]).to_dict() for quality in found]
        options.json.write_text(json.dumps(plain, indent=2))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
