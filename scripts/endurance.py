"""Runs a compressed cache for very long: no memory must grow, and the last step must be as good as the first.

    python scripts/endurance.py [--steps 100000] [--compared 5000] [--device cuda]

A tiny random model of two layers decodes one token after another, in sequences of 1,000 that begin anew in the same
cache, as a server does. After each, the peak of resident memory, the tensors alive and whether the last logits are
those of the first sequence are noted. Then steps compiled by torch are compared with eager ones, in one long sequence
whose tokens are given, with a codec that loses nothing and with a real one. At the end two processes load one artifact
at the same time and generate.
"""

import argparse
import copy
import gc
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch
from tiny import TOLERANCE, lossless, rounding
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaConfig, StaticCache

import tqcompress

if not hasattr(tqcompress, "plugins"):
    tqcompress.__path__.append(str(ROOT))  # plugins and recipes, if nothing is installed

SEQUENCE, PROMPT = 1000, 40
MOST_TURNED = 1e-3  # of stored bytes by rounding; a lost or misplaced token changes nearly all that come after it
KEEP = {"sinks": 4, "window": 32}
RECIPE = {"version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "keep": KEEP}
TWICE = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, tqcompress
tqcompress.__path__ += sys.argv[2:3]
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
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(count: int, device: str) -> torch.Tensor:
    """Random ids `[1, count]`."""
    return torch.randint(1, 64, (1, count), generator=torch.Generator().manual_seed(1)).to(device)


def living() -> int:
    """Tensors alive."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@torch.no_grad()
def run(model, steps: int, device: str, sequence: int = SEQUENCE) -> list[tuple[float, int, bool]]:
    """Of each sequence: the peak of resident memory until then, MiB, tensors alive, whether it ended as the first."""
    ids = tokens(sequence, device)
    cache, first, found = DynamicCache(config=model.config), None, []
    for _ in range(-(-steps // (sequence - PROMPT))):
        logits = model(ids[:, :PROMPT], past_key_values=cache).logits
        for i in range(PROMPT, sequence):
            logits = model(ids[:, i : i + 1], past_key_values=cache).logits
        first = logits if first is None else first
        cache.reset()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found.append((peak, living(), torch.equal(logits, first)))
        if len(found) % 10 == 0:
            print(f"{len(found) * (sequence - PROMPT):,} steps, {found[-1][0]:.1f} MiB", flush=True)
    return found


class Drift(NamedTuple):
    """How far compiled steps are from eager ones, over a sequence.

    Attributes:
        early, late: the largest difference of logits in the first and in the second half.
        limit: how large rounding can make it.
        changed: how many steps have another best token.
        codes: the share of stored bytes that differ at the end.
    """

    early: float
    late: float
    limit: float
    changed: int
    codes: float


@torch.no_grad()
def drift(model, recipe: dict, steps: int, device: str) -> Drift:
    """Eager and compiled steps on the same tokens, each in a cache of fixed size.

    Both compute the same with sums in another order, so logits are apart by `TOLERANCE` times the rounding of the
    model's own arithmetic at most (`tiny.rounding`; kernels round to fp16 as well). A rounding error may also turn a
    code that is next to a threshold, an error of one step; encoding errs by 12**-.5 steps (rms) in every code. A
    share `codes` of turned ones thus adds (12 codes)**.5 times the error that the codec causes, also in the mean.
    """
    count = PROMPT + steps
    ids, short = tokens(count, device), min(count, SEQUENCE)  # float64 has the whole square of scores
    plain = model(ids, use_cache=False).logits
    tqcompress.apply(model, recipe)
    torch._dynamo.reset()
    caches = [StaticCache(config=model.config, max_cache_len=count) for _ in range(2)]
    for cache in caches:
        model(ids[:, :PROMPT], past_key_values=cache)
    # What generate() does where it compiles; elsewhere compressed layers run eagerly between compiled parts.
    kernels = caches[0].is_compileable
    compiled = model.get_compiled_call(CompileConfig(mode="reduce-overhead" if kernels else "default"))
    apart, lost, changed = [], 0.0, 0
    for i in range(PROMPT, count):
        given = {"position_ids": torch.full((1, 1), i, device=device)}
        eager, other = (
            step(ids[:, i : i + 1], past_key_values=cache, **given).logits[0, -1]
            for step, cache in zip((model, compiled), caches, strict=True)
        )
        apart.append((eager - other).abs().max().item())
        lost = max(lost, (eager - plain[0, i]).abs().max().item())
        changed += int(eager.argmax() != other.argmax())
    tqcompress.remove(model)
    codes = differing(*caches) if recipe.get("quantizer") != "exact" else 0.0
    own = rounding(copy.deepcopy(model).half() if kernels else model, ids[:, :short])
    limit, half = TOLERANCE * (own + lost * (12 * codes) ** 0.5), len(apart) // 2
    return Drift(max(apart[:half]), max(apart[half:]), limit, changed, codes)


def differing(*caches) -> float:
    """The share of bytes stored in two caches that differ, codes and scales."""
    stored = []
    for cache in caches:
        cache.crop(-1)  # for the host to learn how many there are
        stores = [store for layer in cache.layers for pair in layer.stores for store in pair]
        stored.append(
            torch.cat([rows.view(torch.uint8).flatten() for store in stores for rows in store.read().values()])
        )
    return (stored[0] != stored[1]).float().mean().item()


def check_drift(model, steps: int, device: str) -> int:
    """Print how far compiled steps are from eager ones; returns what is wrong."""
    wrong = 0
    for name, recipe in (("lossless", lossless(keep=KEEP)), ("4-bit keys, 3-bit values", RECIPE)):
        found = drift(model, recipe, steps, device)
        good = max(found.early, found.late) <= found.limit and found.codes < MOST_TURNED
        good &= name != "lossless" or found.changed == 0
        wrong += not good
        print(
            f"compiled against eager, {name}, {steps:,} steps: logits apart by {found.early:.2g} in the first half, "
            f"{found.late:.2g} in the second (limit {found.limit:.2g}); {found.changed} other tokens; "
            f"{found.codes:.2g} of the stored bytes differ{'' if good else '  WRONG'}",
            flush=True,
        )
    return wrong


def main() -> int:
    """Print what grew, and return how much of it was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--compared", type=int, default=5_000, help="steps of compiled against eager")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny().to(options.device)
    drifted = check_drift(model, options.compared, options.device)
    tqcompress.apply(model, RECIPE)
    found = run(model, options.steps, options.device)
    settled = found[min(len(found) - 1, 4)]  # allocators take what they need in the first sequences
    grown, tensors, same = found[-1][0] - settled[0], found[-1][1] - settled[1], all(good for *_, good in found)
    print(f"{len(found)} sequences; since the fifth: peak memory {grown:+.1f} MiB, tensors alive {tensors:+d}")
    print(f"last logits of all sequences: {'equal to the bit' if same else 'DIFFERENT'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tqcompress.save(model.cpu(), Path(folder) / "out", weights=True)
        command = [sys.executable, "-c", TWICE, f"{folder}/out", str(ROOT), str(ROOT / "kernels")]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in "ab"]
        said = [process.communicate()[0] for process in both]
    agree = said[0] == said[1] != b"" and not any(process.returncode for process in both)
    print(f"two processes with one artifact: {'the same tokens' if agree else 'DIFFERENT'}")
    return drifted + (grown > 8) + (tensors > 0) + (not same) + (not agree)


if __name__ == "__main__":
    sys.exit(main())
