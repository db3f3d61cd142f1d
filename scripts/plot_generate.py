"""Draw tokens a second and memory against the context, as an SVG, from what `bench_generate.py --json` wrote.

python scripts/plot_generate.py results.json docs/generation.svg [--model llama-3.1-8b] [--batch 1]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from picture import drawn

from tqcompress.figures import COLOURS, GRID, LAYOUT, plotly
from tqcompress.session import count

SERIES = {
    "bf16": "bf16, transformers' default",
    "bf16f": "bf16, flash attention",
    "bf16c": "bf16, static and compiled",
    "hqq4": "transformers' QuantizedCache, 4 bits",
    "4a": "tqcompress, 4 bits",
    "3a": "tqcompress, 3 bits",
}
IDEAL = "bf16, ideal: bytes / bandwidth"
WIDTH, HEIGHT = 900, 440


def series(rows: list[dict], value) -> dict[str, tuple[list[int], list[float]]]:
    """Contexts and values by name of the set-up, those that were measured."""
    found = {}
    for setup, name in SERIES.items():
        some = sorted((count(row["case"].split("x")[1]), row) for row in rows if row["setup"] == setup and row["ms"])
        if some:
            found[name] = [tokens for tokens, _ in some], [value(row) for _, row in some]
    return found


def main() -> None:
    """Read the arguments, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    rows = [row for row in json.loads(options.results.read_text()) if row["model"] == options.model]
    rows = [row for row in rows if row["batch"] == options.batch]
    figure = plotly().subplots.make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    speed, memory = series(rows, lambda row: row["batch"] / row["ms"] * 1e3), series(rows, lambda row: row["peak_GB"])
    ideal = {count(row["case"].split("x")[1]): row["batch"] / row["ideal_bf16_ms"] * 1e3 for row in rows}
    speed[IDEAL] = sorted(ideal), [ideal[tokens] for tokens in sorted(ideal)]
    names = [*SERIES.values(), IDEAL]
    for column, lines in enumerate((speed, memory), 1):
        for name, (tokens, values) in lines.items():
            line = {"color": COLOURS[names.index(name)], "width": 2, "dash": "dot" if name == IDEAL else "solid"}
            mode = "lines" if name == IDEAL else "lines+markers"
            trace = {"type": "scatter", "x": tokens, "y": values, "name": name, "mode": mode, "line": line}
            figure.add_trace(trace | {"legendgroup": name, "showlegend": column == 1}, row=1, col=column)
    contexts = sorted(ideal)
    figure.update_xaxes(
        type="log", title="tokens of context", gridcolor=GRID, tickvals=contexts,
        ticktext=[f"{tokens // 1024}K" if tokens < 1 << 20 else "1M" for tokens in contexts],
    )  # fmt: skip
    figure.update_yaxes(gridcolor=GRID, rangemode="tozero")
    figure.update_yaxes(title="tokens a second", row=1, col=1)
    figure.update_yaxes(title="peak memory with weights, GB", row=1, col=2)
    title = f"{options.model}'s shape, random weights, {options.batch} sequence" + "s" * (options.batch > 1)
    figure.update_layout(**LAYOUT, title={"text": title, "x": 0.07}, legend={"orientation": "h", "y": -0.22})
    options.out.write_text(drawn(figure, WIDTH, HEIGHT), encoding="utf-8")


if __name__ == "__main__":
    main()
