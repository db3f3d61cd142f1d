"""Compares a model on two CUDA devices, spread by layers and by heads, with the same model on one.

The model is a small Llama with random weights: good for comparing one run with another, and for nothing else. Spread
by layers (`device_map`) it does the same arithmetic, so everything must be equal. Spread by heads (`tp_plan`, two
processes, NCCL) it adds in another order: lossless generation must give the same tokens, and logits of real codecs
may differ by what noise of 16 units of float32's rounding in the weights does on one device, times 4.

    python scripts/check_many_gpus.py [--no-compile]        # prints PASS or FAIL a line; exits 1 if anything failed
    python scripts/check_many_gpus.py --cpu                 # tries the script itself: a disk is the second device
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs without installing

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import tqcompress

tqcompress.__path__.append(str(ROOT))  # plugins and recipes, if nothing is installed

from tqcompress.calibrate import Statistics, calibrate

LAYERS, VOCABULARY, PROMPT = 4, 1000, 200
NEW = 16 if "--cpu" in sys.argv else 100  # on CUDA enough for a block of 64 tokens to leave the ring
KEEP = {"sinks": 4, "window": 16}
FOUR = {"version": 1, "key": {"bits": 4}, "value": {"bits": 4}, "keep": KEEP}
RECIPES = {
    "lossless": {"version": 1, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}, "keep": KEEP},
    "4 bits": FOUR,
    "4 and 3 bits": FOUR | {"value": {"bits": 3}},
    "rules of heads": FOUR | {
        "rules": [
            {"layers": "all", "heads": [1], "key": {"bits": 3, "seed": 1}, "value": {"bits": 2}},
            {"layers": 1, "heads": [2, 3], "value": {"bits": 8}},
            {"layers": 2, "heads": [0, 3], "skip": True},
        ]
    },
    "balanced keys": FOUR | {
        "center": {"key": True, "value": True}, "balance": "key", "calibration": {"text": "wikitext-validation"},
        "rules": [{"layers": "odd", "heads": [3], "key": {"bits": 3}}],
    },
}  # fmt: skip


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def make_model(path: Path) -> None:
    """A Llama with random weights, large enough that near-ties do not decide the best token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS, head_dim=64,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.06, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(path)


def load(path: Path, where: dict, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where).eval()


def tokens(model, **settings) -> torch.Tensor:
    """Greedy continuations of two prompts, one of them padded on the left."""
    ids = random_ids(2, PROMPT)
    mask = torch.ones_like(ids)
    ids[1, :70], mask[1, :70] = 0, 0
    given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return model.generate(**given, max_new_tokens=NEW, do_sample=False, **settings)[:, PROMPT:].cpu().contiguous()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of a prompt, of some tokens together, and of single ones that read the cache."""
    ids, cache = random_ids(2, PROMPT + NEW, seed=1).to(model.device), DynamicCache(config=model.config)
    parts = ids.split([PROMPT - 40, 40, *[1] * NEW], dim=1)
    return torch.cat([model(part, past_key_values=cache).logits.float().cpu() for part in parts], dim=1)


def compress(model, name: str, folder: Path) -> None:
    statistics = Statistics.load(folder / "statistics") if name == "balanced keys" else None
    tqcompress.apply(model, RECIPES[name], statistics=statistics)


def outcomes(folder: Path, where: dict, compiled: bool) -> dict[str, torch.Tensor]:
    """Everything that is compared, by name."""
    model, found = load(folder / "model", where), {}
    static = {"cache_implementation": "static"}
    found["uncompressed: tokens"] = tokens(model)
    found["uncompressed: tokens, static"] = tokens(model, **static, disable_compile=True)
    moments = calibrate(model, random_ids(600, seed=2), length=200).layers
    found["calibration: moments"] = torch.stack([moments[i]["key"].query for i in range(LAYERS)])
    for name in RECIPES:
        compress(model, name, folder)
        found[f"{name}: tokens"] = tokens(model)
        found[f"{name}: tokens, static"] = tokens(model, **static, disable_compile=True)
        found[f"{name}: logits"] = logits(model)
    out = folder / f"saved with {next(iter(where))}"
    tqcompress.save(model, out, base=str(folder / "model"))
    content = bytearray((out / "tqcompress.safetensors").read_bytes())
    found["artifact: bytes"] = torch.frombuffer(content, dtype=torch.uint8)
    tqcompress.load(model, folder / "artifact")
    found["loaded artifact: logits"] = logits(model)
    found["loaded by from_pretrained: logits"] = logits(load(folder / "artifact", where))
    if compiled:
        for name in ("uncompressed", "4 bits"):
            model = load(folder / "model", where)
            if name in RECIPES:
                compress(model, name, folder)
            found[f"{name}: tokens, compiled"] = attempted(lambda model=model: tokens(model, **static))
            torch.compiler.reset()
    return found


def attempted(function) -> torch.Tensor:
    """What it returns, or nothing: where transformers itself cannot compile, we need not."""
    try:
        return function()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return torch.empty(0)


class Checks:
    """Counts and prints."""

    def __init__(self):
        self.failed, self.start = 0, time.time()

    def __call__(self, name: str, good: bool, found: str) -> None:
        self.failed += not good
        print(f"{'PASS' if good else 'FAIL'} {time.time() - self.start:5.0f} s  {name}: {found}", flush=True)

    def compare(self, title: str, got: dict, want: dict, tolerances: dict[str, float]) -> None:
        """All of `got` with `want`; what `tolerances` names may differ, relative to the largest number."""
        for name, expected in want.items():
            found, label = got[name], f"{title}, {name}"
            if "compiled" in name and not got["uncompressed: tokens, compiled"].numel():
                print(f"SKIP  {label}: transformers itself fails here", flush=True)
            elif found.shape != expected.shape:
                self(label, False, f"shape {list(found.shape)}, not {list(expected.shape)}")
            elif "tokens" in name or name not in tolerances:
                same = (found == expected).double().mean().item()
                # Of a real codec in another order of sums, one token may differ, and then all that follow.
                real = "tokens" in name and not name.startswith(("uncompressed", "lossless"))
                told = bool(tolerances) and real
                self(label, same == 1 or told, f"{same:.1%} equal" + (" (for information)" if told else ""))
            else:
                error, allowed = ((found - expected).abs().max() / expected.abs().max()).item(), tolerances[name]
                self(label, error <= allowed, f"largest difference {error:.1e}, allowed {allowed:.1e}")


def measured_tolerances(folder: Path, where: dict, want: dict) -> dict[str, float]:
    """For each of `want` that is a number: what noise in the weights does, times 4."""
    found: dict[str, float] = {}
    for seed in range(3):
        model = load(folder / "model", where)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2**-20 * torch.randn_like(parameter))
        for name in RECIPES:
            compress(model, name, folder)
            key = f"{name}: logits"
            change = (logits(model) - want[key]).abs().max() / want[key].abs().max()
            found[key] = max(found.get(key, 0.0), 4 * change.item())
    both = found["balanced keys: logits"]
    # Second moments: sums of products of numbers that differ by a few units of float32's rounding.
    extra = {"loaded artifact: logits": both, "loaded by from_pretrained: logits": both, "calibration: moments": 1e-4}
    return found | extra


def by_layers(cpu: bool, folder: Path) -> dict:
    """The first half of the layers here, the second half there."""
    first, second = ("cpu", "disk") if cpu else (0, 1)
    where = {f"model.layers.{i}": first if i < LAYERS // 2 else second for i in range(LAYERS)}
    where |= {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    return {"device_map": where} | ({"offload_folder": str(folder / "offload")} if cpu else {})


def half_precision(folder: Path, where: dict) -> dict[str, torch.Tensor]:
    """bfloat16, in which chunks go through flash attention."""
    model = load(folder / "model", where, torch.bfloat16)
    compress(model, "4 bits", folder)
    return {"bfloat16: tokens": tokens(model), "bfloat16: logits": logits(model)}


def in_two_processes(folder: Path, options: list[str]) -> list[dict]:
    """What each process of `tp_plan` finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = [sys.executable, *launcher, "--master-port", str(port), __file__, "--process", str(folder), *options]
    subprocess.run(command, check=True, timeout=240)
    return [load_file(folder / f"process {rank}") for rank in (0, 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled steps")
    parser.add_argument("--cpu", action="store_true", help="without any GPU")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="fused kernels do not take")
    compiled = not (args.no_compile or args.cpu)
    if args.process:
        found = outcomes(args.process, {"tp_plan": "auto"}, compiled)
        save_file(found, args.process / f"process {os.environ['RANK']}")
        torch.distributed.destroy_process_group()
        return 0
    if not args.cpu and torch.cuda.device_count() < 2:
        parser.error(f"found {torch.cuda.device_count()} CUDA devices; two are needed, or --cpu")
    check = Checks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        alone = {"device_map": "cpu" if args.cpu else "cuda:0"}
        model = load(folder / "model", alone)
        calibrate(model, random_ids(2000, seed=3), length=500).save(folder / "statistics")
        compress(model, "balanced keys", folder)
        tqcompress.save(model, folder / "artifact", base=str(folder / "model"))
        one = outcomes(folder, alone, compiled)
        different = len(set(one["uncompressed: tokens"].flatten().tolist()))
        check("the model's tokens differ", different > NEW // 2, f"{different} of them")
        for cache in ("", ", static"):
            plain, lossless = (one[f"{name}: tokens{cache}"] for name in ("uncompressed", "lossless"))
            same = (plain == lossless).double().mean().item()
            check(f"one device, lossless{cache}", same == 1, f"{same:.1%} equal")
        one |= half_precision(folder, alone)
        two = by_layers(args.cpu, folder)
        # Not compiled: the hooks between devices break graphs, and our caches say so.
        eager = {name: found for name, found in one.items() if "compiled" not in name}
        check.compare("by layers", outcomes(folder, two, False) | half_precision(folder, two), eager, {})
        one = {name: found for name, found in one.items() if "bfloat16" not in name}
        tolerances = measured_tolerances(folder, alone, one)
        options = ["--cpu"] * args.cpu + ["--no-compile"] * args.no_compile
        for rank, found in enumerate(in_two_processes(folder, options)):
            check.compare(f"by heads, process {rank}", found, one, tolerances)
    print(f"{check.failed} FAILED" if check.failed else "ALL PASS", f"in {time.time() - check.start:.0f} s")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
