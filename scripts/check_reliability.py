"""On a CUDA device: fused kernels generate the right tokens, bad numbers are found, and what looking for them costs.

Models are tiny and random, for comparing one run with another. Runs without installing anything.

    python scripts/check_reliability.py
"""

import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch
from tiny import prompt, tiny_model
from transformers import DynamicCache, StaticCache

import tqcompress

tqcompress.__path__.append(str(ROOT))  # plugins and recipes, if nothing is installed
from tqcompress.cache import CompressedLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEP = {"sinks": 3, "window": 8}
ARCHITECTURES = ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt2", "gpt_oss", "cohere")


def recipe(bits: int) -> dict:
    """8 bits lose so little that most of these models' tokens stay."""
    return {"version": 1, "key": {"bits": bits}, "value": {"bits": bits}, "keep": KEEP}


def padded(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and their mask."""
    ids = prompt(tokens, batch)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 7 * row], mask[row, : 7 * row] = 0, 0
    return ids.to(DEVICE), mask.to(DEVICE)


def same_tokens(name: str, mode: str) -> float:
    """The share of new tokens that are those of the uncompressed model."""
    model = tiny_model(name).to(DEVICE)
    if name in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("eager")  # soft cap and sinks
    ids, mask = padded(3, 150)
    settings = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False}
    settings |= {"num_beams": 3} if mode == "beams" else {}
    want = model.generate(ids, **settings)
    tqcompress.apply(model, recipe(8))
    if mode in ("fixed", "compiled"):
        settings |= {"cache_implementation": "static", "disable_compile": mode == "fixed"}
    got = model.generate(ids, **settings)
    width = min(got.shape[1], want.shape[1])
    return (got[:, :width] == want[:, :width])[:, ids.shape[1] :].float().mean().item()


def steps_until_found(kind: str) -> int | None:
    """A key that is not a number, in a prompt: after how many single tokens, or chunks if `fixed`, it is told."""
    model = tiny_model("llama").to(DEVICE)
    tqcompress.apply(model, recipe(3))
    fixed = kind == "fixed"
    cache = StaticCache(config=model.config, max_cache_len=600) if fixed else DynamicCache(config=model.config)
    model.tqcompress.compress_layers(cache)
    layer = cache.layers[1]
    states = torch.randn(2, 2, 200, 16, device=DEVICE)
    broken = states.clone()
    broken[1, 1, 20, 3] = math.nan
    layer.update(broken, states)
    for step in range(1, 300):
        try:
            new = states[:, :, : 2 if fixed else 1]
            view = layer.update(new, new)[0]
            view.attend(new.repeat_interleave(3, 1), None, 0.25, None)
        except tqcompress.ModelError as error:
            assert "layer 1, KV heads [1]" in str(error), error
            return step
    return None


def cost(watched: bool, tokens: int = 8192, steps: int = 512) -> tuple[float, float]:
    """Milliseconds of a prompt and of a step of a model with the heads of a large one, 4 layers."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny_model("llama", head_dim=128, max_position_embeddings=1 << 15, **sizes).to(DEVICE, torch.bfloat16)
    tqcompress.apply(model, recipe(4) | {"keep": {"sinks": 4, "window": 128}})
    own = CompressedLayer._watch_new
    if not watched:
        CompressedLayer._watch_new = lambda layer: None
    try:
        ids, found = prompt(tokens).to(DEVICE), []
        with torch.no_grad():
            for _ in range(2):  # the first one compiles
                cache = DynamicCache(config=model.config)
                times = []
                for part in (ids, *[ids[:, :1]] * steps):
                    if len(times) in (0, 1):
                        torch.cuda.synchronize()
                        times.append(time.perf_counter())
                    model(part, past_key_values=cache)
                torch.cuda.synchronize()
                times.append(time.perf_counter())
                found = [1e3 * (times[1] - times[0]), 1e3 * (times[2] - times[1]) / steps]
        return found[0], found[1]
    finally:
        CompressedLayer._watch_new = own


def main() -> None:
    """Run everything and print one line each."""
    failed = 0
    for name in ARCHITECTURES:
        for mode in ("growing", "beams", "fixed", "compiled"):
            share = same_tokens(name, mode)
            failed += share < 0.5  # one near-tie changes all that follow it; a wrong cache leaves a tenth at most
            print(f"{name}, {mode}: {share:.3f} of the tokens are those of the uncompressed model", flush=True)
    for kind in ("growing", "fixed") if DEVICE == "cuda" else ():  # a CPU refuses it when it comes
        found = steps_until_found(kind)
        failed += found is None
        print(f"not a number in a prompt, {kind} cache: told at call {found}", flush=True)
    if DEVICE == "cuda":
        for turn in range(2):
            for watched in (False, True):
                prefill, step = cost(watched)
                what = "watched" if watched else "not watched"
                print(f"cost {turn}, {what}: prompt {prefill:.2f} ms, step {step:.3f} ms", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
