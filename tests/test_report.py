"""Results as files and as a page: bad files are refused by name, and the page draws its plots without a network."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from tiny import tiny_model

from tqcompress import TQCompressError, api, figures
from tqcompress.evaluate import HeadMap, Quality
from tqcompress.page import render
from tqcompress.records import Record, plain, read
from tqcompress.report import bits_map, quality_table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = 2


def record(name: str, bits: float, kl: float, budget: float | None = None, text: str = "a text") -> Record:
    """Made-up figures of a model of 4 layers with 2 KV heads, the last of them with one."""
    heads = [[bits, bits + 1], [16.0, bits], [bits, bits], [bits]]
    errors = [[0.01, 0.02], [0.0, 0.03], [0.04, None], [0.05]]
    sides = [HeadMap([[b + i for b in row] for row in heads], errors) for i in range(2)]
    quality = Quality(name, bits + 1, bits, 20.5, 20.0, kl, kl / 10, 3 * kl, 0.9, 512, 256, 4, 128, *sides, budget)
    return Record.of(quality, "a <b>model</b>", text)


@pytest.fixture
def records() -> list[Record]:
    return [
        *(record(f"ours@{b}", b, 4.0**-b, b) for b in (2.25, 3.25, 4.25)),
        *(record(f"theirs@{b}", b + 0.125, 2 * 4.0**-b, b) for b in (2.25, 3.25)),
        record("shipped", 3.0, 0.1),
        record("lossless", 16.0, 0.0),
        record("elsewhere", 3.0, 0.1, text="another text"),
    ]


def written(tmp_path, data, name="out.json"):
    file = tmp_path / name
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


# ---------------------------------------------------------------------------------------------------- files


def test_records_survive_a_file(tmp_path, records):
    first, second = written(tmp_path, plain(records[:3])), written(tmp_path, plain(records[3:]), "more.json")
    assert read([first, second]) == records


def changed(**changes):
    return [plain([record("r", 3.0, 0.1)])[0] | changes]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ({"recipe": "r"}, "not a file of results; `tqcompress eval --json` writes one"),
        ([], "not a file of results"),
        ([1], "not a file of results"),
        ([{"recipe": "older"}], "[0].version: found None; this tqcompress reads 1"),
        (changed(version=2), "[0].version: found 2; this tqcompress reads 1"),
        (changed(version=True), "[0].version: found True"),
        (changed(kl_mean="low"), "[0].kl_mean: Input should be a valid number, found 'low'"),
        (changed(kl_mean=float("nan")), "[0].kl_mean: Input should be a finite number"),
        (changed(effective_bits=-1.0), "[0].effective_bits: Input should be greater than or equal to 0, found -1.0"),
        (changed(surprise=1), "[0].surprise: unknown key"),
        (changed(key={"bits": [["x"]], "error": [[0.1]]}), "[0].key.bits[0][0]: Input should be a valid number"),
        (changed(key={"bits": [[1.0]], "error": [[0.1]]}), "[0]: the maps of keys and values have different layers"),
        (changed(tokens=0, sinks=-1), "; and 1 more"),
        ([{k: v for k, v in changed()[0].items() if k != "top1"}], "[0].top1: Field required"),
    ],
)
def test_a_bad_file_is_one_error_that_names_the_place(tmp_path, data, named):
    file = written(tmp_path, data)
    with pytest.raises(TQCompressError) as error:
        read([file])
    message = str(error.value)
    assert message.startswith(f"{file}: ")
    assert named in message
    assert "\n" not in message


def test_a_missing_file_and_a_recipe_twice_are_errors(tmp_path, records):
    with pytest.raises(TQCompressError, match=r"nope\.json: cannot be read: No such file"):
        read([tmp_path / "nope.json"])
    file = written(tmp_path, plain(records))
    with pytest.raises(TQCompressError, match=r"ours@2\.25 is there twice, on a <b>model</b> and a text"):
        read([file, file])


# ----------------------------------------------------------------------------------------------------- page


def test_without_plotly_the_error_names_the_extra(monkeypatch, records):
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(TQCompressError, match=r"pip install 'tqcompress\[report\]'"):
        render(records)


def test_figures_hold_the_measurements(records):
    here = records[:7]
    figure = figures.pareto_figure(here)
    first = {trace.name: trace for trace in figure.data if trace.xaxis == "x"}
    second = {trace.name: trace for trace in figure.data if trace.xaxis == "x2"}
    assert set(first) == set(second) == {"ours", "theirs", "recipes as they are", "Pareto front"}
    assert first["ours"].x == (3.25, 4.25, 5.25)
    assert second["ours"].x == (2.25, 3.25, 4.25)
    assert second["ours"].y == tuple(4.0**-b for b in second["ours"].x)
    assert second["ours"].error_y.array == tuple(y / 10 for y in second["ours"].y)
    assert second["Pareto front"].x == (2.25, 3.25, 4.25), "theirs and shipped cost more and lose more"
    assert "lossless" not in second["recipes as they are"].text, "a logarithm of 0 cannot be drawn"
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.title.text == "uncompressed perplexity 20.00"
    assert "256 tokens" in figure.layout.xaxis.title.text

    maps = figures.heads_figure(here)
    key_bits, value_bits, key_error, _ = (trace.z for trace in maps.data)
    assert [list(row) for row in key_bits] == [[2.25, 16.0, 2.25, 2.25], [3.25, 2.25, 2.25, None]]
    assert list(value_bits[0]) == [3.25, 17.0, 3.25, 3.25]
    assert list(key_error[1]) == [2.0, 3.0, None, None]
    assert [button.label for button in maps.layout.updatemenus[0].buttons] == [r.recipe for r in here]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to open the page with")
def test_the_page_is_drawn_in_a_browser_without_a_network(tmp_path, records):
    page = tmp_path / "report.html"
    page.write_text(render(records), encoding="utf-8")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    done = subprocess.run([*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    # Of each place two plots: a front, and a trace for each series; four maps, each a picture in the DOM.
    scatter = dom.count('class="trace scatter')
    assert scatter == 2 * (4 + 2), "front, ours, theirs, shipped; elsewhere only its front and itself"
    assert dom.count('class="scatterlayer') == 2 * SECTIONS
    assert len(re.findall(r'<image [^>]*href="data:image/png', dom)) == 4 * SECTIONS
    assert len(re.findall(r'<path class="point[ "]', dom)) == 2 * (3 + 2 + 1 + 1)
    assert dom.count('class="errorbar"') == 2 * (3 + 2 + 1 + 1)
    assert "CONSOLE" not in done.stderr, "errors, and requests that the page's policy refused, are printed there"
    for words in ("a &lt;b&gt;model&lt;/b&gt; on a text", "on another text", "No KL to draw on this scale: lossless"):
        assert words in dom
    assert not re.search(r'(src|href)="(https?:)?//', dom)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to draw the picture with")
def test_the_picture_of_the_readme_is_one_command(tmp_path, records):
    script = Path(__file__).parents[1] / "scripts" / "picture.py"
    words = [sys.executable, script, written(tmp_path, plain(records[:7])), tmp_path / "pareto.svg"]
    subprocess.run(words, check=True, timeout=120)
    picture = ElementTree.parse(tmp_path / "pareto.svg").getroot()
    said = {text for text in picture.itertext() if text.strip()}
    assert {"bits a value in the long run, scales counted", "ours", "theirs", "Pareto front"} <= said
    assert "a <b>model</b>, a text: uncompressed perplexity 20.00" in said
    assert "shipped" not in said, "only what is compared at equal bytes"


# ------------------------------------------------------------------------------------------------- terminal


def printed(renderable, width: int = 120) -> str:
    console = Console(width=width, record=True, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_bits_map_shows_every_layer_and_head_in_colour():
    rules = [{"layers": 0, "skip": True}, {"layers": 2, "heads": 1, "key": {"bits": 8}}]
    recipe = {"version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "rules": rules}
    plan = api.plan_compression(tiny_model("llama"), recipe).plan
    shown = bits_map(plan, 80)
    lines = shown.plain.splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["key", "0", "■", "5", "5"],  # head_dim is 16, so a scale of 16 bits is one bit a value
        ["key", "1", "■", "5", "9"],
        ["value", "all", "■", "4", "4"],
    ]
    assert [part.strip() for part in lines[-1].split("bits") if part.strip()] == ["4 4", "5 5", "9 9", "■ 16"]
    cells = {str(span.style) for span in shown.spans if "on rgb" in str(span.style)}
    assert len(cells) == 4, "a colour for every number of bits"
    assert "\x1b[" in printed(shown)


def test_many_layers_of_the_bits_map_go_below_each_other():
    model = tiny_model("llama", num_hidden_layers=12)
    plan = api.plan_compression(model, {"version": 1, "key": {"bits": 4}, "value": {"bits": 3}}).plan
    wide, narrow = bits_map(plan, 80).plain, bits_map(plan, 30).plain
    assert wide.count("key all") == 1
    assert narrow.count("key all") == 2
    assert max(map(len, narrow.splitlines()[1:-1])) <= 30
    for shown in (wide, narrow):
        rows = [line for line in shown.splitlines() if line.startswith("key")]
        assert "".join(row.removeprefix("key all") for row in rows).split() == ["5"] * 12


def test_the_table_of_the_suite_has_a_section_for_each_budget(records):
    rows = sorted(records[:7], key=lambda r: (r.budget or 0, r.format_bits))
    text = printed(quality_table(rows, "a text"))
    wanted = ["shipped", "about 2.25 bits; exact: 4 first, 128 last", "ours *", "theirs ", "about 3.25 bits"]
    places = [text.index(words) for words in [*wanted, "about 4.25 bits"]]
    assert places == sorted(places)
    assert text.count("ours *") == 3
    assert "theirs *" not in text
    mixed = [replace(r, sinks=i) for i, r in enumerate(rows[2:4])]
    assert "exact" not in printed(quality_table(mixed, "a text")), "not said where it is not so"
