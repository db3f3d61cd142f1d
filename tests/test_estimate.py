"""Estimates: what fits is what is counted, and times are those that were measured on GPUs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tqcompress import TQCompressError
from tqcompress.cli import app
from tqcompress.estimate import GPUS, WORKSPACE, Gpu, estimate, gpu, uncompressed, weights_of
from tqcompress.recipe import Recipe
from tqcompress.resolve import resolve
from tqcompress.shape import ModelShape

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from model_shapes import MODELS

K = 1024
# Milliseconds of a step, compiled and running ahead: docs/performance.md, "Generation".
MEASURED = [
    ("H100", "llama-3.1-8b", 4, 1, 8 * K, 7.2),
    ("H100", "llama-3.1-8b", 4, 1, 32 * K, 7.5),
    ("H100", "llama-3.1-8b", 4, 1, 128 * K, 8.8),
    ("H100", "llama-3.1-8b", 4, 8, 32 * K, 10.1),
    ("H100", "llama-3.1-8b", 4, 32, 8 * K, 11.1),
    ("H100", "llama-3.1-8b", 3, 1, 128 * K, 8.4),
    ("H100", "llama-3.1-8b", 3, 8, 32 * K, 9.7),
    ("H100", "llama-3.1-8b", 3, 32, 8 * K, 10.7),
    ("H100", "llama-3.1-8b", 3, 1, 1024 * K, 16.0),
    ("H100", "llama-3.1-8b", 2, 1, 8 * K, 7.3),
    ("H100", "llama-3.1-8b", 2, 8, 32 * K, 8.9),
    ("H100", "llama-3.1-8b", 2, 32, 8 * K, 9.9),
    ("H100", "qwen3-8b", 4, 1, 8 * K, 7.7),
    ("H100", "qwen3-8b", 4, 1, 128 * K, 9.3),
    ("H100", "qwen3-8b", 4, 8, 32 * K, 11.0),
    ("H100", "qwen3-8b", 4, 32, 8 * K, 12.3),
    ("H100", "qwen2.5-0.5b", 4, 1, 8 * K, 1.6),
    ("H100", "qwen2.5-0.5b", 4, 1, 32 * K, 1.5),
    ("H100", "qwen2.5-0.5b", 4, 1, 128 * K, 1.9),
    ("H100", "qwen2.5-0.5b", 4, 8, 32 * K, 1.9),
    ("H100", "qwen2.5-0.5b", 4, 32, 8 * K, 2.5),
    ("H200", "llama-3.1-8b", 4, 1, 8 * K, 5.8),
    ("H200", "llama-3.1-8b", 4, 1, 128 * K, 6.9),
    ("H200", "llama-3.1-8b", 4, 8, 32 * K, 7.8),
    ("H200", "llama-3.1-8b", 3, 1, 1024 * K, 14.1),
]


def plan_of(model: str, bits: float, **more):
    side = {"bits": bits, "rotation": "hadamard"}
    recipe = {"version": 1, "key": side, "value": side, "keep": {"sinks": 4, "window": 128}, **more}
    config = MODELS[model]
    config.dtype = torch.bfloat16
    return resolve(Recipe.parse(recipe), ModelShape.of(config))


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(map(str, row[:5])))
def test_steps_take_what_was_measured(row):
    """Within 15 %, or what tokens a second are told would mislead."""
    device, model, bits, batch, context, measured = row
    weights = weights_of(MODELS[model], torch.bfloat16)
    found = estimate(plan_of(model, bits), weights, GPUS[device], context, batch)
    assert found.fits
    assert 1e3 * found.seconds == pytest.approx(measured, rel=0.15)


def test_what_fits_is_counted_to_the_token():
    """Weights, cache and workspace fill the memory, and one token or sequence more would not fit."""
    plan, weights = plan_of("llama-3.1-8b", 4), weights_of(MODELS["llama-3.1-8b"], torch.bfloat16)
    found = estimate(plan, weights, GPUS["H100"], 32 * K, 8)
    room = GPUS["H100"].memory - weights.held - WORKSPACE
    assert plan.nbytes(found.longest, 8) <= room < plan.nbytes(found.longest + 1, 8)
    assert plan.nbytes(32 * K, found.largest) <= room < plan.nbytes(32 * K, found.largest + 1)
    dense = uncompressed(plan, weights, GPUS["H100"], 32 * K, 8)
    assert 3.5 < found.longest / dense.longest < 4
    assert estimate(plan, weights, GPUS["H100"], 32 * K, 8, limit=5000).longest == 5000
    none = estimate(plan, weights, Gpu(10e9, 1e12), 32 * K, 8)
    assert (none.fits, none.longest, none.largest) == (False, 0, 0)


def test_weights_are_counted_once():
    """Of Llama-3.1-8B 16.06 GB, of which a step reads no embedding; a tied one is read as the last layer."""
    own = weights_of(MODELS["llama-3.1-8b"], torch.bfloat16)
    assert own.held == 2 * 8_030_261_248
    assert own.held - own.read == 2 * 128256 * 4096
    tied = weights_of(MODELS["qwen2.5-0.5b"], torch.bfloat16)
    assert tied.held == tied.read == 2 * 494_032_768


def test_trellis_codes_take_their_arithmetic():
    """256 states at 3 bits decode 3.2e12 values a second: more time than their bytes take."""
    weights = weights_of(MODELS["llama-3.1-8b"], torch.bfloat16)
    scalar, trellis = (
        estimate(plan_of("llama-3.1-8b", 3, quantizer=name), weights, GPUS["H200"], 32 * K, 8).seconds
        for name in ("turboquant", "trellis")
    )
    values = 2 * 8 * 32 * K * 32 * 8 * 128
    assert trellis - scalar == pytest.approx(values / 3.2e12 - values / 8.1e12, rel=0.02)


def test_the_command(tmp_path):
    MODELS["llama-3.1-8b"].save_pretrained(tmp_path)
    words = ["estimate", "balanced", "--model", str(tmp_path), "--gpu", "h200", "--context", "128K", "--batch", "8"]
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "out.json")], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    bf16, balanced = json.loads((tmp_path / "out.json").read_text())
    assert not bf16["fits"] and balanced["fits"]
    assert balanced["recipe"] == "balanced" and "balanced" in done.output and "bf16, at best" in done.output


def test_an_unknown_gpu_is_named():
    with pytest.raises(TQCompressError, match="gpu: found 'V100'; known are H200, H100"):
        gpu("V100")
