"""A real model and its keys and values. Started by scripts/test_lmcache.sh, not by the quick tests."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tqcompress

CHUNK = 256  # tokens, as LMCache cuts sequences by default
KEEP = {"sinks": 4, "window": 0}
PLAIN = {"version": 1, "quantizer": "turboquant", "key": {"bits": 4}, "value": {"bits": 4, "seed": 1}, "keep": KEEP}
RECIPES = {
    "lossless": {"version": 1, "quantizer": "exact", "key": {"bits": 16}, "value": {"bits": 16}, "keep": KEEP},
    "four": PLAIN | {
        "center": {"key": True}, "balance": "key", "calibration": {"text": "wikitext-validation", "tokens": 4096},
    },
    "other": PLAIN,  # its chunks are as long as those of "four"
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's."""
    return AutoTokenizer.from_pretrained(os.environ["TQCOMPRESS_TEST_MODEL"])


@pytest.fixture(scope="session")
def model():
    """SmolLM2 in transformers, bfloat16."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(os.environ["TQCOMPRESS_TEST_MODEL"], dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def artifacts(model, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """A saved directory for each recipe."""
    root = tmp_path_factory.mktemp("artifacts")
    for name, recipe in RECIPES.items():
        tqcompress.apply(model, recipe, tokenizer)
        tqcompress.save(model, root / name, base=os.environ["TQCOMPRESS_TEST_MODEL"])
        tqcompress.remove(model)
    return {name: root / name for name in RECIPES}


@pytest.fixture(scope="session")
def token_ids(tokenizer) -> torch.Tensor:
    """A text of four chunks and a bit, `[1, tokens]`."""
    text = (Path(tqcompress.__file__).parent / "data" / "constitution.txt").read_text()
    return torch.tensor([tokenizer(text).input_ids[: 4 * CHUNK + 64]])


@pytest.fixture(scope="session")
def chunks(model, token_ids) -> list[torch.Tensor]:
    """The model's keys and values of that text as LMCache stores them, `[2, layers, 256, kv_heads * head_dim]` each."""
    with torch.no_grad():
        cache = model(token_ids, use_cache=True).past_key_values
    whole = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers], dim=1)[:, :, 0]
    whole = whole.transpose(2, 3).flatten(3)  # from [2, layers, kv_heads, tokens, head_dim]
    return [whole[:, :, i * CHUNK : (i + 1) * CHUNK].contiguous() for i in range(4)]
