"""The plots of the report, as plotly figures: loss against bits, and maps of layers and heads."""

from html import escape
from typing import Any

from .errors import TQCompressError
from .plan import SIDES
from .records import Record
from .report import pareto_front

AXES = {
    "effective_bits": "bits a value, everything counted, at {tokens:,} tokens",
    "format_bits": "bits a value in the long run, scales counted",
}
KL = "mean KL divergence (nats a token)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
INK, GREY, GRID = "#1d232b", "#9aa4ae", "#e3e6ea"
# Of series, in their order: apart for the colour-blind, dark enough on white.
COLOURS = ("#0b5fa5", "#d1495b", "#2e8b57", "#e08e0b", "#7b4ea3", "#17879b", "#8c6239", "#5a5a5a")
MARKERS = ("circle", "square", "triangle-up", "star", "triangle-down", "pentagon", "x", "hexagon")
HOVER = "%{text}<br>%{x:.2f} bits, KL %{y:.4f}<br>perplexity %{customdata[0]:.2f}, same top token %{customdata[1]:.1%}"
LAYOUT = {
    "template": "none",
    "paper_bgcolor": "#fff",
    "plot_bgcolor": "#fff",
    "font": {"family": FONT, "size": 13, "color": INK},
    "margin": {"l": 70, "r": 20, "t": 50, "b": 60},
    "hovermode": "closest",
}


def plotly() -> Any:
    """The package. Raises `TQCompressError` if it is not installed."""
    try:
        import plotly
        import plotly.io
        import plotly.offline
        import plotly.subplots
    except ImportError:
        raise TQCompressError("report needs plotly, the extra `report`: pip install 'tqcompress[report]'") from None
    return plotly


def pareto_figure(records: list[Record], axes: tuple[str, ...] = tuple(AXES)) -> Any:
    """KL, on a logarithmic axis with standard errors, against each of `axes`: fields of `Quality` that count bits.

    A line joins what the suite measured of one quantizer, shipped recipes are labelled points.
    """
    drawn = [record for record in records if record.kl_mean > 0]
    series: dict[str, list[Record]] = {}
    for record in drawn:
        series.setdefault(record.series if record.budget is not None else "", []).append(record)
    labelled = series.pop("", [])
    figure = plotly().subplots.make_subplots(rows=len(axes), cols=1, vertical_spacing=0.12)
    for row, axis in enumerate(axes, 1):
        place = {"row": row, "col": 1}
        front = sorted(pareto_front(drawn, axis), key=lambda record: getattr(record, axis))
        line = {"color": GREY, "dash": "dot", "width": 2, "shape": "hv"}
        traces = [_points(front, axis) | {"mode": "lines", "line": line, "name": "Pareto front", "hoverinfo": "skip"}]
        traces += [_line(members, axis, i) for i, members in enumerate(series.values())]
        traces += [_labelled(labelled, axis)] if labelled else []
        for trace in traces:
            figure.add_scatter(**trace, legendgroup=trace["name"], showlegend=row == 1, **place)
        low, high = (pick(getattr(record, axis) for record in records) for pick in (min, max))
        step = (high - low or 1) / 20
        figure.update_xaxes(range=[low - step, high + step * (2 if labelled else 1)], **place)  # room for labels
        figure.update_xaxes(title_text=AXES[axis].format(tokens=records[0].window_tokens), **place)
    frame = {"gridcolor": GRID, "linecolor": GREY, "ticks": "outside"}
    figure.update_xaxes(frame, zeroline=False)
    figure.update_yaxes(frame, type="log", dtick="D2", tickformat=".4~g", title_text=KL)
    title = f"uncompressed perplexity {records[0].perplexity_uncompressed:.2f}"
    return figure.update_layout(LAYOUT, height=100 + 440 * len(axes), title={"text": title, "font_size": 13, "x": 0.06})


def _points(records: list[Record], axis: str) -> dict[str, Any]:
    return {"x": [getattr(record, axis) for record in records], "y": [record.kl_mean for record in records]}


def _measured(records: list[Record], axis: str) -> dict[str, Any]:
    """Points with standard errors and what stands in the box of one that is pointed at."""
    return _points(records, axis) | {
        "error_y": {"array": [record.kl_stderr for record in records], "thickness": 1.2, "width": 3},
        "text": [escape(record.recipe) for record in records],
        "customdata": [[record.perplexity, record.top1] for record in records],
        "hovertemplate": f"{HOVER}<extra></extra>",
    }


def _line(records: list[Record], axis: str, number: int) -> dict[str, Any]:
    records = sorted(records, key=lambda record: getattr(record, axis))
    colour = COLOURS[number % len(COLOURS)]
    return _measured(records, axis) | {
        "name": escape(records[0].series),
        "mode": "lines+markers",
        "line": {"color": colour, "width": 1.5},
        "marker": {"size": 9, "symbol": MARKERS[number % len(MARKERS)], "color": colour},
    }


def _labelled(records: list[Record], axis: str) -> dict[str, Any]:
    records = sorted(records, key=lambda record: record.kl_mean)  # so that labels of neighbours are on different sides
    return _measured(records, axis) | {
        "name": "recipes as they are",
        "mode": "markers+text",
        "textposition": [("middle left", "bottom right", "top right")[i % 3] for i in range(len(records))],
        "textfont": {"size": 11, "color": INK},
        "cliponaxis": False,
        "marker": {"size": 9, "symbol": "diamond", "color": "#39424c"},
    }


def heads_figure(records: list[Record]) -> Any:
    """Heat maps of bits and error, keys and values apart, layers across and KV heads down; a menu picks the recipe."""
    titles = [f"{side}s: {what}" for what in ("bits a value", "relative squared error (%)") for side in SIDES]
    figure = plotly().subplots.make_subplots(
        rows=2, cols=2, shared_xaxes=True, subplot_titles=titles, horizontal_spacing=0.05, vertical_spacing=0.16
    )
    maps = [_maps(record) for record in records]
    for i, (z, unit) in enumerate(zip(maps[0], (" bits", " bits", " %", " %"), strict=True)):
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        hover = f"layer %{{x}}, KV head %{{y}}: %{{z:.3g}}{unit}<extra></extra>"
        figure.add_heatmap(z=z, coloraxis=f"coloraxis{i // 2 + 1}", xgap=1, ygap=1, hovertemplate=hover, **place)
    whole = {"tickmode": "linear", "tick0": 0, "showgrid": False, "zeroline": False}
    figure.update_xaxes(whole, dtick=max(1, len(records[0].key.bits) // 10))
    figure.update_xaxes(title_text="layer", row=2)
    figure.update_yaxes(whole, dtick=max(1, max(map(len, records[0].key.bits)) // 8), autorange="reversed")
    figure.update_yaxes(title_text="KV head", col=1)
    buttons = [
        {"label": escape(record.recipe), "method": "restyle", "args": [{"z": z}, [0, 1, 2, 3]]}
        for record, z in zip(records, maps, strict=True)
    ]
    menu = {"buttons": buttons, "bgcolor": "#fff", "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "bottom"}
    bar = {"thickness": 14, "len": 0.42, "x": 1.01}
    return figure.update_layout(
        LAYOUT,
        height=460,
        updatemenus=[menu],
        coloraxis={"colorscale": "Blues", "colorbar": bar | {"y": 0.79, "title": {"text": "bits"}}},
        coloraxis2={"colorscale": "OrRd", "colorbar": bar | {"y": 0.21, "title": {"text": "%"}}},
    )


def _maps(record: Record) -> list[list[list[float | None]]]:
    """Bits of keys and of values, errors of keys and of values in percent: `[head][layer]` each, None where no head."""
    sides = [getattr(record, side) for side in SIDES]
    percent = [[[None if e is None else 100 * e for e in row] for row in side.error] for side in sides]
    tables = [*(side.bits for side in sides), *percent]
    heads = range(max(map(len, record.key.bits)))
    return [[[row[head] if head < len(row) else None for row in table] for head in heads] for table in tables]
