"""Times decoding on this machine's CPU with a compressed cache and without: a real model, a real text.

The text is read once, without compression; its keys and values then go into each cache, which generates on from there.

    python scripts/bench_cpu.py [--contexts 2K,8K] [--bits 4,3,2] [--model llama]
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import tqcompress
from tqcompress.models import find_model
from tqcompress.session import count
from tqcompress.texts import load_text

STEPS = 16


@torch.no_grad()
def read(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer after the text."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(1024, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def decode(model, states, last: torch.Tensor, tokens: int) -> tuple[float, int]:
    """Milliseconds a step, and the bytes that the cache then holds."""
    cache = DynamicCache(config=model.config)
    compression = getattr(model, "tqcompress", None)
    if compression is not None:
        compression.compress_layers(cache)
    for index, (keys, values) in enumerate(states):
        cache.update(keys[:, :, :tokens], values[:, :, :tokens], index)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        last = model(last, past_key_values=cache).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    held = sum(getattr(layer, "nbytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return statistics.median(times) * 1e3, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama")
    parser.add_argument("--contexts", default="2K,8K")
    parser.add_argument("--bits", default="4,3,2")
    options = parser.parse_args()
    base = find_model(options.model)
    model = AutoModelForCausalLM.from_pretrained(base.path, **base.kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(base.path, **base.kwargs)
    contexts = [count(text) for text in options.contexts.split(",")]
    text = load_text("constitution")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : max(contexts)]
    if ids.shape[1] < max(contexts):
        raise SystemExit(f"the text has {ids.shape[1]} tokens; give shorter contexts")
    states = read(model, ids)
    print(f"{options.model}, {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("context  cache    ms a step  times uncompressed      MiB  planned MiB")
    for tokens in contexts:
        last = ids[:, tokens - 1 : tokens]
        dense, held = decode(model, states, last, tokens)
        print(f"{tokens:7,}  {'exact':6} {dense:10.1f} {1:19.2f} {held / 2**20:8.2f}")
        for bits in options.bits.split(","):
            side = {"bits": int(bits), "rotation": "hadamard"}
            recipe = {"version": 1, "key": side, "value": side, "keep": {"sinks": 4, "window": 128}}
            plan = tqcompress.apply(model, recipe)
            ms, held = decode(model, states, last, tokens)
            planned = plan.nbytes(tokens + STEPS)
            tqcompress.remove(model)
            print(
                f"{tokens:7,}  {bits + ' bits':6} {ms:10.1f} {ms / dense:19.2f} {held / 2**20:8.2f} "
                f"{planned / 2**20:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
