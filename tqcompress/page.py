"""The page of `tqcompress report`: measurements as plots and tables in one HTML file that needs nothing else."""

from html import escape
from itertools import groupby
from typing import Any

from .figures import FONT, GRID, INK, heads_figure, pareto_figure, plotly
from .records import Record
from .report import pareto_front, section_title
from .version import __version__

STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; background: #fff; max-width: 1180px; margin: 2em auto; padding: 0 1.5em;
  line-height: 1.45 }}
h1 {{ font-size: 1.6em; margin-bottom: .2em }} h2 {{ font-size: 1.25em; margin: 2em 0 .3em }}
h3 {{ font-size: 1.05em; margin: 1.6em 0 .2em }} p {{ max-width: 52em; margin: .4em 0 }}
.muted {{ color: #5c6670; font-size: .92em }}
table {{ border-collapse: collapse; font-size: .92em; font-variant-numeric: tabular-nums; margin: .6em 0 }}
th, td {{ padding: .25em .9em; text-align: right; border-bottom: 1px solid {GRID} }}
th {{ font-weight: 600; border-bottom: 2px solid #b8c0c8; vertical-align: bottom; white-space: pre-line }}
th:first-child, td:first-child {{ text-align: left }}
td.section {{ font-weight: 600; background: #f4f6f8; padding-top: .5em }} tr.best td:first-child {{ font-weight: 600 }}
"""

# Nothing may be fetched: what the page shows is in it.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

HEADINGS = (
    "recipe", "exact tokens,\nfirst + last", "bits, everything\ncounted", "bits in the\nlong run", "perplexity",
    "mean KL", "KL, 99th\npercentile", "same top\ntoken",
)  # fmt: skip


def render(records: list[Record]) -> str:
    """The page. Raises `TQCompressError` if plotly is not installed."""
    script = plotly().offline.get_plotlyjs()
    places = [list(group) for _, group in groupby(sorted(records, key=_order), key=lambda record: record.place)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>tqcompress: what compression costs and loses</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>
<script>{script}</script></head><body>
<h1>What a compressed KV cache costs and loses</h1>
<p class="muted">KL divergence and perplexity are over the text named, against the same model without compression.
Everything counted: codes, scales, codebooks, matrices and exact tokens, these at 16 bits. In the long run: without what
vanishes as the context grows. Made by tqcompress {__version__}.</p>
{"".join(_section(group, f"place{i}") for i, group in enumerate(places))}
</body></html>
"""


def _order(record: Record) -> tuple[str | float, ...]:
    return (*map(str, record.place), record.budget or 0, record.format_bits, record.kl_mean)


def _section(records: list[Record], name: str) -> str:
    """What was measured in one place, in the order of the table."""
    first = records[0]
    return f"""<h2>{escape(first.model)} on {escape(first.text)}</h2>
<p>{first.tokens:,} tokens in windows of {first.window_tokens:,}. Perplexity of the uncompressed model:
<b>{first.perplexity_uncompressed:.3f}</b>.</p>
<h3>Loss against bits</h3>
{_div(pareto_figure(records), f"{name}-pareto")}
<p class="muted">Bars are one standard error, positions taken as independent. Lines join the settings of one quantizer
in the comparison at equal bytes; diamonds are recipes with exact tokens as each has them; the dotted line is the Pareto
front.{_undrawn(records)}</p>
<h3>All figures</h3>
{_table(records)}
<h3>Bits and errors of every layer and KV head</h3>
{_div(heads_figure(records), f"{name}-heads")}
<p class="muted">Error: the squared distance of decoded from original vectors over the squared length of these, in
percent, over all tokens that were packed; of keys with their mean, which centring keeps.</p>
"""


def _div(figure: Any, name: str) -> str:
    settings = {"displaylogo": False, "responsive": True}
    html: str = plotly().io.to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config=settings)
    return html


def _undrawn(records: list[Record]) -> str:
    names = [record.recipe for record in records if record.kl_mean <= 0]
    return f" No KL to draw on this scale: {escape(', '.join(names))}." if names else ""


def _table(records: list[Record]) -> str:
    best, rows = pareto_front(records), [f"<tr>{''.join(f'<th>{name}</th>' for name in HEADINGS)}</tr>"]
    for _, group in groupby(records, key=lambda record: record.budget):
        part = list(group)
        rows.append(f'<tr><td class="section" colspan="{len(HEADINGS)}">{escape(section_title(part))}</td></tr>')
        rows += [_row(record, record in best) for record in part]
    return f'<table>{"".join(rows)}</table><p class="muted">* on the Pareto front of bits in the long run and KL.</p>'


def _row(r: Record, best: bool) -> str:
    cells = (
        escape(r.series) + (" *" if best else ""), f"{r.sinks} + {r.window}", f"{r.effective_bits:.2f}",
        f"{r.format_bits:.3f}", f"{r.perplexity:.2f}", f"{r.kl_mean:.4f} ± {r.kl_stderr:.4f}", f"{r.kl_p99:.2f}",
        f"{r.top1:.1%}",
    )  # fmt: skip
    return f"<tr{' class=best' if best else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
