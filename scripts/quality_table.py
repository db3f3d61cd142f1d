"""Measures the pipeline of docs/quality.md beside plain TurboQuant: perplexity and KL on a text it was not fitted to.

    python scripts/quality_table.py --model llama --text wikitext2-test.txt [--max-tokens 16384] [--json FILE]

Statistics of 65,536 tokens of `wikitext-validation` are taken first, at the positions that the windows measured have,
and serve all rows. Every other argument is one of
`tqcompress eval`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

PIPELINE = {"center": {"key": True}, "balance": "key", "calibration": {"text": "wikitext-validation", "tokens": 65536}}
SHORT = ["--length", "2048", "--context", "2048"]
PLAIN = {"rotation": "dense", "levels": "lloyd-max", "norm_correction": False}


def row(key: int, value: int, window: int, quantizer: str = "trellis", scale: str = "fp16") -> dict:
    """The pipeline with the first 4 tokens exact."""
    sides = {
        side: {"bits": bits, "rotation": "hadamard", "seed": seed, "scale": scale}
        for seed, (side, bits) in enumerate({"key": key, "value": value}.items())
    }
    return {"quantizer": quantizer, **sides, "keep": {"sinks": 4, "window": window}} | PIPELINE


def plain(bits: int, sinks: int = 0, window: int = 0) -> dict:
    """TurboQuant as published, the variant of least squared error."""
    sides = {side: {"bits": bits, "seed": seed} | PLAIN for seed, side in enumerate(("key", "value"))}
    return {"quantizer": "turboquant", **sides, "keep": {"sinks": sinks, "window": window}}


ROWS = {
    "trellis-4bit": row(4, 4, 0),
    "trellis-3bit": row(3, 3, 0),
    "trellis-2bit": row(2, 2, 0),
    "trellis-3bit-w128": row(3, 3, 128, scale="log8"),
    "trellis-2bit-w128": row(2, 2, 128, scale="log8"),
    "scalar-4-3bit-w128": row(4, 3, 128, "turboquant"),
    "plain-4bit": plain(4),
    "plain-3bit": plain(3),
    "plain-2bit": plain(2),
    "plain-2bit-w128": plain(2, 4, 128),
}


def main() -> None:
    """Write the recipes and hand them to the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, recipe in ROWS.items():
            files.append(Path(folder) / f"{name}.yaml")
            files[-1].write_text(yaml.safe_dump({"version": 1, "name": name} | recipe))
        statistics = Path(folder) / "statistics.safetensors"
        command, model = [sys.executable, "-m", "tqcompress.cli"], ["--model", options.model]
        subprocess.run([*command, "calibrate", *model, *SHORT, "--out", statistics], check=True)
        subprocess.run([*command, "eval", *files, *model, "--statistics", statistics, *others], check=True)


if __name__ == "__main__":
    main()
