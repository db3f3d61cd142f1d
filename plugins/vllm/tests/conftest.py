"""A real model, its artifacts, and engines that run it. Started by scripts/test_vllm.sh, not by the quick tests."""

import gc
import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines in this process; a server sets it back

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tqcompress

KEEP = {"sinks": 4, "window": 0}
LOSSLESS = {"version": 1, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}, "keep": KEEP}
FOUR = {
    "version": 1, "quantizer": "turboquant", "key": {"bits": 4}, "value": {"bits": 4, "seed": 1}, "keep": KEEP,
    "center": {"key": True}, "balance": "key", "calibration": {"text": "wikitext-validation", "tokens": 4096},
}  # fmt: skip
RECIPES = {
    "lossless": LOSSLESS,
    "four": FOUR,
    # Pages of two sizes: vLLM's own and packed ones.
    "mixed": LOSSLESS | {"rules": [{"layers": [0, 7, -1], "skip": True}]},
    # And of three, some with heads that differ.
    "heads": FOUR | {
        "rules": [
            {"layers": [0], "skip": True},
            {"layers": [3, 4], "heads": [1], "skip": True},
            {"layers": [3, 5], "heads": [0, 2], "key": {"bits": 3}, "value": {"bits": 8}},
        ]
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def model_path() -> str:
    """SmolLM2's directory."""
    return os.environ["TQCOMPRESS_TEST_MODEL"]


@pytest.fixture(scope="session")
def hf_model(model_path):
    """The same model in transformers, float32; who compresses it must remove that again."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def artifacts(model_path, hf_model, tmp_path_factory) -> dict[str, Path]:
    """A saved directory for each recipe; "four" with the weights."""
    root, tokenizer = tmp_path_factory.mktemp("artifacts"), AutoTokenizer.from_pretrained(model_path)
    for name, recipe in RECIPES.items():
        tqcompress.apply(hf_model, recipe, tokenizer)
        weights = name == "four"
        tqcompress.save(hf_model, root / name, weights, tokenizer if weights else None, base=model_path)
        tqcompress.remove(hf_model)
    return {name: root / name for name in RECIPES}


@pytest.fixture(scope="session")
def token_ids(model_path) -> list[int]:
    """A long text, for prompts to be cut from."""
    text = (Path(tqcompress.__file__).parent / "data" / "constitution.txt").read_text()
    return AutoTokenizer.from_pretrained(model_path)(text).input_ids


@pytest.fixture
def engine(model_path):
    """`engine(artifact or None, **options)`: vLLM's LLM; the one before it is dropped."""
    from vllm import LLM

    made = []

    def make(artifact: Path | None = None, model: "str | Path" = model_path, **options) -> LLM:
        made.clear()
        gc.collect()
        extra = {"tqcompress": str(artifact)} if artifact else {}
        defaults = {
            "enforce_eager": True, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16,
            "kv_cache_memory_bytes": 256 << 20, "disable_log_stats": False,
        }  # fmt: skip
        made.append(LLM(str(model), additional_config=extra, **(defaults | options)))
        return made[0]

    yield make
    made.clear()
    gc.collect()


def prompts_of(lengths: list[int], token_ids: list[int], stride: int = 211) -> list[dict]:
    """Prompts of those lengths, each from another place of the text."""
    return [{"prompt_token_ids": token_ids[i * stride : i * stride + n]} for i, n in enumerate(lengths)]


def generated(llm, prompts: list[dict], tokens: int = 24) -> list[list[int]]:
    """Greedy tokens of every prompt, all at once."""
    from vllm import SamplingParams

    done = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False), use_tqdm=False
    )
    return [list(request.outputs[0].token_ids) for request in done]


def metric(llm, name: str) -> float:
    """A counter of the engine's."""
    return sum(found.value for found in llm.get_metrics() if found.name == name)
