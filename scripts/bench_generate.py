"""Times generation with a compressed cache against the same model without, on one CUDA device.

Weights, keys and values are random, prompts one token repeated, in the shapes of real models: they tell about speed
and memory only. A cache is filled with random keys and values, then `generate()` continues; a decoding step is the
median time between two of its tokens. Beside it stand the memory limits: the bytes of the weights and of the cache
over the bandwidth of a plain read.

    python scripts/bench_generate.py [--models llama-3.1-8b,...] [--cases 1x8K,...] [--setups bf16,4c,...]
    python scripts/bench_generate.py --prefill 8K,32K,128K [--chunk 8192]      # time to first token, peak memory
    python scripts/bench_generate.py --million                  # 2**20 tokens in one sequence, 3 bits

Setups: `bf16` and `bf16c` (static, compiled) are transformers' own caches, `bf16f` the first without cuDNN's attention,
which plans anew for every length; `hqq4` and `quanto4` its QuantizedCache. `4`, `3`, `2` are ours at that many bits,
`c` behind it compiled, `a` compiled and with `custom_generate=tqcompress.run_ahead`, `m` that with torch's
"max-autotune", which takes a minute more to compile.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import torch
from bench_decode import read_bandwidth
from model_shapes import MODELS
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    QuantizedCache,
    StaticCache,
)
from transformers.generation.logits_process import LogitsProcessor

import tqcompress
from tqcompress.session import count
from tqcompress.shape import ModelShape

CASES = "1x8K,1x32K,1x128K,8x32K,32x8K"
SETUPS = "bf16,bf16f,bf16c,bf16m,hqq4,4,3,2,4c,3c,2c,4a,4m,3m,2m"
_compiled: dict[str, tuple] = {}  # what the compiled model was compiled for: `c` and `a` are the same
COMPILED = "cam"  # how the names of such setups end
KIVI = {"hqq": {"axis_key": 1, "axis_value": 1}, "quanto": {}}  # what each takes
WARM, STEPS = 6, 24


def recipe(bits: int) -> dict:
    side = {"bits": bits, "rotation": "hadamard"}
    return {"version": 1, "key": side, "value": side, "keep": {"sinks": 4, "window": 128}}


def build(name: str, layers: int | None):
    config = MODELS[name]
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    if layers:
        config.num_hidden_layers = layers
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


class Clock(LogitsProcessor):
    """Notes when each step's logits are there to be read; generate() waits for every token."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        self.times.append(time.perf_counter())
        return scores


def fill(model, cache, batch: int, tokens: int) -> None:
    """Random keys and values in every layer."""
    layers = ModelShape.of(model).layers
    keys = torch.randn(batch, layers[0].num_kv_heads, tokens, layers[0].head_dim, dtype=torch.bfloat16, device="cuda")
    for index in range(len(layers)):
        cache.update(keys, keys, index)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@contextmanager
def applied(model, setup: str):
    """The model as the setup has it; yields the plan, if there is one."""
    torch.backends.cuda.enable_cudnn_sdp(setup != "bf16f")
    yield tqcompress.apply(model, recipe(int(setup[0]))) if setup[0].isdigit() else None
    tqcompress.remove(model)


def cache_for(model, setup: str, batch: int, tokens: int, more: int):
    """A cache that holds `tokens` tokens, with room for `more`."""
    config = model.config
    if setup[:-1] in ("hqq", "quanto"):
        cache = QuantizedCache(backend=setup[:-1], config=config, nbits=int(setup[-1]), **KIVI[setup[:-1]])
    elif setup[-1] in COMPILED:
        if _compiled.get("for") != (what := (setup[:-1], setup[-1] == "m", batch, tokens)):
            torch._dynamo.reset()  # or it recompiles, up to a limit, for every size
            _compiled["for"] = what
        cache = StaticCache(config=config, max_cache_len=tokens + more)
    else:
        cache = DynamicCache(config=config)
    compression = getattr(model, "tqcompress", None)
    if compression is not None:
        compression.compress_layers(cache)
    fill(model, cache, batch, tokens)
    return cache


def settings(setup: str, ids: torch.Tensor) -> dict:
    """Arguments of `generate()`."""
    found = {"attention_mask": torch.ones_like(ids), "do_sample": False, "disable_compile": setup[-1] not in COMPILED}
    if setup[-1] in "am":
        found["custom_generate"] = tqcompress.run_ahead
    if setup[-1] == "m":
        found["compile_config"] = CompileConfig(mode="max-autotune")
    return found


@torch.no_grad()
def decode(model, setup: str, batch: int, tokens: int) -> dict:
    """Milliseconds a step and gigabytes."""
    free()
    before = torch.cuda.memory_allocated()
    cache = cache_for(model, setup, batch, tokens, WARM + STEPS + 2)
    free()
    held = torch.cuda.memory_allocated() - before
    ids = torch.ones(batch, tokens + 1, dtype=torch.long, device="cuda")
    clock = Clock()
    start = time.perf_counter()
    model.generate(
        ids, past_key_values=cache, max_new_tokens=WARM + STEPS, logits_processor=[clock], **settings(setup, ids)
    )
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "ms": statistics.median(gaps[WARM:]) * 1e3, "cache_GB": held / 1e9,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9, "first_s": gaps[0] + clock.times[0] - start,
    }  # fmt: skip


def bytes_read(model, tokens: int, batch: int, plan) -> tuple[float, float]:
    """Bytes of weights and of the cache that a step must read."""
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    if plan is not None:
        return weights, plan.nbytes(tokens, batch)
    return weights, 2.0 * batch * tokens * sum(layer.values_per_token for layer in ModelShape.of(model).layers)


def one(model, setup: str, case: str, bandwidth: float) -> dict:
    batch, tokens = (count(part) for part in case.split("x"))
    with applied(model, setup) as plan:
        try:
            result = decode(model, setup, batch, tokens)
        except torch.cuda.OutOfMemoryError:
            result = {"ms": None}
    weights, dense = bytes_read(model, tokens, batch, None)
    _, own = bytes_read(model, tokens, batch, plan)
    ideal, limit = (weights + dense) / bandwidth * 1e3, (weights + own) / bandwidth * 1e3
    return {"case": case, "setup": setup, **result, "ideal_bf16_ms": ideal, "limit_ms": limit, "batch": batch}


def show(result: dict) -> None:
    if result["ms"] is None:
        print(f"{result['case']:>7} {result['setup']:>6}  out of memory", flush=True)
        return
    print(
        f"{result['case']:>7} {result['setup']:>6} {result['ms']:8.2f} ms {result['batch'] / result['ms'] * 1e3:8.0f} "
        f"tokens/s  {result['ms'] / result['ideal_bf16_ms']:5.2f} of the ideal bf16 step, "
        f"{result['ms'] / result['limit_ms']:5.2f} of its limit ({result['limit_ms']:.2f} ms)  "
        f"cache {result['cache_GB']:6.2f} GB, peak {result['peak_GB']:6.2f} GB, first step {result['first_s']:.1f} s",
        flush=True,
    )


@torch.no_grad()
def prefill(model, tokens: int, bits: int | None, fixed: bool, chunk: int | None = None) -> dict:
    """Seconds until the first logits, and gigabytes beyond the weights at most and then."""
    plan = tqcompress.apply(model, recipe(bits)) if bits else None
    ids = torch.ones(1, tokens, dtype=torch.long, device="cuda")
    times = []
    for _ in range(2 if tokens <= 32768 else 1):
        free()
        before = torch.cuda.memory_allocated()
        config = model.config
        cache = StaticCache(config=config, max_cache_len=tokens + 64) if fixed else DynamicCache(config=config)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for part in ids.split(chunk or tokens, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    tqcompress.remove(model)
    planned = plan.nbytes(tokens) / 1e9 if plan else bytes_read(model, tokens, 1, None)[1] / 1e9
    return {"s": min(times), "peak_GB": peak / 1e9, "held_GB": held / 1e9, "planned_GB": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-3.1-8b")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--setups", default=SETUPS)
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script")
    parser.add_argument("--prefill")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk of the prompt")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bandwidth, results = read_bandwidth(), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s")
    print("random weights, keys and values; prompts of one repeated token: speed and memory only")
    for name in options.models.split(","):
        model = build(name, options.layers)
        print(f"\n{name}", flush=True)
        if options.prefill:
            for tokens in options.prefill.split(","):
                for bits, fixed in ((None, False), (4, False), (4, True)):
                    result = prefill(model, count(tokens), bits, fixed, options.chunk)
                    kind = "bf16" if not bits else f"{bits} bits, {'fixed' if fixed else 'growing'}"
                    text = ", ".join(f"{key} {value:.3f}" for key, value in result.items())
                    print(f"prefill {tokens}, {kind}: {text}", flush=True)
        elif options.million:
            for setup in ("3", "3c"):
                show(one(model, setup, "1x1024K", bandwidth))
        else:
            for case in options.cases.split(","):
                for setup in options.setups.split(","):
                    results.append({"model": name} | one(model, setup, case, bandwidth))
                    show(results[-1])
                    if options.json:  # after every row: a run may be cut off
                        options.json.write_text(json.dumps(results, indent=1))
        del model
        free()


if __name__ == "__main__":
    main()
