"""Draw the picture of the README: KL against bits in the long run, as an SVG, from what `eval --suite --json` wrote.

    python scripts/picture.py suite.json docs/pareto.svg

The recipes of the comparison at equal bytes are drawn; plotly makes the SVG in a headless Chromium.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from urllib.parse import unquote

from tqcompress.figures import pareto_figure, plotly
from tqcompress.records import read

WIDTH, HEIGHT = 860, 520

PAGE = """<!doctype html><meta charset="utf-8"><script>{script}</script><body><script>
const figure = {figure};
Plotly.toImage(figure, {{format: "svg", width: {width}, height: {height}}}).then(url => document.body.title = url);
</script></body>"""


def main() -> None:
    """Read the arguments, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    records = [record for record in read([options.results]) if record.budget is not None]
    options.out.write_text(svg(records), encoding="utf-8")


def svg(records: list) -> str:
    """The figure of `records`, all measured in one place, as SVG."""
    first = records[0]
    title = (
        f"{escape(first.model)}, {escape(first.text)}: uncompressed perplexity {first.perplexity_uncompressed:.2f}<br>"
        f"exact tokens of all: {first.sinks} first, {first.window} last"
    )
    figure = pareto_figure(records, ("format_bits",)).update_layout(title={"text": title, "x": 0.09}, margin={"t": 60})
    return drawn(figure, WIDTH, HEIGHT)


def drawn(figure, width: int, height: int) -> str:
    """A plotly figure as SVG."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no chromium is installed; apt-get install chromium")
    content = PAGE.format(script=plotly().offline.get_plotlyjs(), figure=figure.to_json(), width=width, height=height)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "picture.html"
        page.write_text(content, encoding="utf-8")
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
        words += [f"--user-data-dir={folder}/profile", "--dump-dom", page.as_uri()]
        dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<body title="data:image/svg\+xml,([^"]*)"', dom)
    if found is None:
        sys.exit("the browser drew nothing")
    return unquote(found[1]) + "\n"


if __name__ == "__main__":
    main()
