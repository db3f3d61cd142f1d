"""Runs a compressed cache for very long: no memory must grow, and the last sequence must be as good as the first.

    python scripts/endurance.py [--steps 100000] [--device cuda]

A tiny random model decodes one token after another, in sequences of 1,000 that begin anew in the same cache, as a
server does. After each, the peak of resident memory, the tensors alive and whether the last logits are those of the
first sequence are noted. At the end two processes load one artifact at the same time and generate.
"""

import argparse
import gc
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import tqcompress

SEQUENCE, PROMPT = 1000, 40
RECIPE = {"version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "keep": {"sinks": 4, "window": 32}}
TWICE = """
import sys, torch, tqcompress
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.generate(torch.arange(1, 41)[None], max_new_tokens=60, do_sample=False).tolist())
"""


def tiny():
    """A random model of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, head_dim=64, num_key_value_heads=1, initializer_range=0.2, **sizes)
    config.eos_token_id = config.pad_token_id = config.bos_token_id = None
    return AutoModelForCausalLM.from_config(config).eval()


def living() -> int:
    """Tensors alive."""
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@torch.no_grad()
def run(model, steps: int, device: str) -> list[tuple[float, int, bool]]:
    """Of each sequence: the peak of resident memory until then, MiB, tensors alive, whether it ended as the first."""
    ids = torch.randint(1, 64, (1, SEQUENCE), generator=torch.Generator().manual_seed(1)).to(device)
    cache, first, found = DynamicCache(config=model.config), None, []
    for _ in range(-(-steps // (SEQUENCE - PROMPT))):
        logits = model(ids[:, :PROMPT], past_key_values=cache).logits
        for i in range(PROMPT, SEQUENCE):
            logits = model(ids[:, i : i + 1], past_key_values=cache).logits
        first = logits if first is None else first
        cache.reset()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found.append((peak, living(), torch.equal(logits, first)))
        if len(found) % 10 == 0:
            print(f"{len(found) * (SEQUENCE - PROMPT):,} steps, {found[-1][0]:.1f} MiB", flush=True)
    return found


def main() -> int:
    """Print what grew, and return how much of it was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny().to(options.device)
    tqcompress.apply(model, RECIPE)
    found = run(model, options.steps, options.device)
    settled = found[min(len(found) - 1, 4)]  # allocators take what they need in the first sequences
    grown, tensors, same = found[-1][0] - settled[0], found[-1][1] - settled[1], all(good for *_, good in found)
    print(f"{len(found)} sequences; since the fifth: peak memory {grown:+.1f} MiB, tensors alive {tensors:+d}")
    print(f"last logits of all sequences: {'equal to the bit' if same else 'DIFFERENT'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tqcompress.save(model.cpu(), Path(folder) / "out", weights=True)
        both = [subprocess.Popen([sys.executable, "-c", TWICE, f"{folder}/out"], stdout=subprocess.PIPE) for _ in "ab"]
        said = [process.communicate()[0] for process in both]
    agree = said[0] == said[1] != b"" and not any(process.returncode for process in both)
    print(f"two processes with one artifact: {'the same tokens' if agree else 'DIFFERENT'}")
    return (grown > 8) + (tensors > 0) + (not same) + (not agree)


if __name__ == "__main__":
    sys.exit(main())
