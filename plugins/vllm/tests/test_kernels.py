"""The engine with pages as a CUDA device has them, by interpreted kernels: chunks, steps, several groups of heads."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tqcompress

RECIPE = {
    "version": 1, "key": {"bits": 4}, "value": {"bits": 3, "seed": 1}, "keep": {"sinks": 4, "window": 0},
    "rules": [{"layers": [1], "heads": [1], "key": {"bits": 8}}, {"layers": [2], "skip": True}],
}  # fmt: skip


def test_kernels_do_what_torch_does(tmp_path):
    """Their promise is two thousandths of an output's norm; what quantization does is some hundredths."""
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    tqcompress.apply(model, RECIPE)
    tqcompress.save(model, tmp_path / "artifact", base=str(tmp_path))
    plain, torchs, kernels = (
        _generate(tmp_path, *arguments)
        for arguments in ([""], [tmp_path / "artifact"], [tmp_path / "artifact", "kernels"])
    )
    error, compared = _apart(kernels, torchs)
    change, _ = _apart(torchs, plain)
    print(f"log-probabilities of {compared} tokens: kernels {error:.1e} from torch, which is {change:.1e} from exact")
    assert compared >= 15
    assert 0 < error <= change / 10


def _apart(one: tuple, other: tuple) -> tuple[float, int]:
    """How far log-probabilities are apart on average, up to the first token that differs; and of how many tokens."""
    found = []
    for ids, other_ids, row, other_row in zip(one[0], other[0], one[1], other[1], strict=True):
        same = next((i for i, pair in enumerate(zip(ids, other_ids, strict=True)) if pair[0] != pair[1]), len(ids))
        found += [abs(a - b) for a, b in zip(row[:same], other_row[:same], strict=True)]
    return sum(found) / len(found), len(found)


def _generate(model: Path, *arguments: object) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of every prompt and their log-probabilities."""
    script = Path(__file__).parent / "generate_small.py"
    command = [sys.executable, str(script), str(model), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    return [ids for ids, _ in found], [rows for _, rows in found]
