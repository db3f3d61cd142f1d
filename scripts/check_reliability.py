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
import torch.nn.functional as F
from tiny import prompt, tiny_model
from transformers import DynamicCache, StaticCache

import tqcompress

tqcompress.__path__.append(str(ROOT))  # plugins and recipes, if nothing is installed
from tqcompress.cache import CompressedLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MUCH = 3  # times the distance by torch on the CPU: tokens differ, and so do their distances; a wrong cache is nats off
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
    return ids, mask


def generated(name: str, mode: str, device: str, **sizes: int) -> tuple[float, float]:
    """How far log-probabilities of new tokens are from those that the uncompressed model gives to the same tokens, on
    average; and the share of the tokens that it would have generated too. Beams add up what they were given when they
    were elsewhere in the batch; a near-tie changes all tokens behind it, but not the distance."""
    model = tiny_model(name, **sizes).to(device)
    if name in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("eager")  # soft cap and sinks
    ids, mask = (states.to(device) for states in padded(3, 150))
    settings = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False}
    settings |= {"num_beams": 3} if mode == "beams" else {}
    want = model.generate(ids, **settings)
    tqcompress.apply(model, recipe(8))
    if mode in ("fixed", "compiled"):
        settings |= {"cache_implementation": "static", "disable_compile": mode == "fixed"}
    out = model.generate(ids, **settings, output_scores=True, return_dict_in_generate=True)
    got, new = out.sequences, slice(ids.shape[1], None)
    said = model.compute_transition_scores(got, out.scores, out.get("beam_indices"), normalize_logits=mode != "beams")
    tqcompress.remove(model)
    mask = F.pad(mask, (0, got.shape[1] - ids.shape[1] - 1), value=1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(got[:, :-1], attention_mask=mask, position_ids=places).logits
    true = logits.float().log_softmax(-1).gather(2, got[:, 1:, None])[:, ids.shape[1] - 1 :, 0]
    width = min(got.shape[1], want.shape[1])
    same = (got[:, :width] == want[:, :width])[:, new].float().mean().item()
    return (said - true).abs().mean().item(), same


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


def steps_until_run_ahead_tells(kind: str, bad: float, last: bool) -> int | None:
    """A key of an exact token that turns bad while the model generates: how many steps it took until it was told.

    `last`: it does so behind the last step, so that no score can show it.
    """
    model, at, seen, total = tiny_model("llama").to(DEVICE), [], [], 24
    tqcompress.apply(model, recipe(3))
    made = (
        StaticCache(config=model.config, max_cache_len=200) if kind != "growing" else DynamicCache(config=model.config)
    )

    def turn(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids.shape[1])
        if len(seen) == (total if last else 8):
            made.layers[1].rings[0].ring.exact[0, 0, 1, 5, 3] = bad
            at.append(len(seen))
        return scores

    settings = {
        "past_key_values": made,
        "max_new_tokens": total,
        "do_sample": False,
        "disable_compile": kind == "fixed",
    }
    try:
        model.generate(
            prompt(100, 2).to(DEVICE), logits_processor=[turn], custom_generate=tqcompress.run_ahead, **settings
        )
    except tqcompress.ModelError as error:
        assert "layer 1, KV heads [1]" in str(error), error
        return len(seen) - at[0]
    return None


def cost_of_verify(kind: str, tokens: int = 8192) -> float:
    """Milliseconds of `verify` for 4 layers of 8 KV heads; `run_ahead` ends with one."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny_model("llama", head_dim=128, max_position_embeddings=1 << 15, **sizes).to(DEVICE, torch.bfloat16)
    tqcompress.apply(model, recipe(4) | {"keep": {"sinks": 4, "window": 128}})
    fixed = kind == "fixed"
    cache = StaticCache(config=model.config, max_cache_len=9000) if fixed else DynamicCache(config=model.config)
    ids, times = prompt(tokens).to(DEVICE), []
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(10):
            model(ids[:, :1], past_key_values=cache)
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            tqcompress.verify(cache)
            times[-1] = time.perf_counter() - times[-1]
    return 1e3 * sorted(times)[5]


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
    shapes = [("llama", {"head_dim": dim}) for dim in (64, 80, 128, 256)] + [("gemma3", {"head_dim": 256})]
    for name, sizes in [*((name, {}) for name in ARCHITECTURES), *shapes]:
        usual = max(generated(name, mode, "cpu", **sizes)[0] for mode in ("growing", "beams"))
        for mode in ("growing", "beams", "fixed", "compiled") if not sizes else ("growing", "fixed"):
            torch._dynamo.reset()
            distance, share = generated(name, mode, DEVICE, **sizes)
            failed += not distance <= MUCH * usual
            print(
                f"{name}, {mode}{sizes or ''}: log-probabilities {distance:.4f} from the uncompressed model's, "
                f"{usual:.4f} by torch on the CPU; {share:.3f} of the tokens are its own",
                flush=True,
            )
    for kind in ("growing", "fixed") if DEVICE == "cuda" else ():  # a CPU refuses it when it comes
        found = steps_until_found(kind)
        failed += found is None
        print(f"not a number in a prompt, {kind} cache: told at call {found}", flush=True)
    for kind in ("growing", "fixed", "compiled") if DEVICE == "cuda" else ():
        for bad in (math.nan, math.inf):
            for last in (False, True):
                found = steps_until_run_ahead_tells(kind, bad, last)
                failed += found is None or (found > 2 and math.isnan(bad))  # infinite keys may get no weight
                print(f"run_ahead, {kind} cache, {bad}, last {last}: told {found} steps later", flush=True)
    if DEVICE == "cuda":
        for kind in ("growing", "fixed"):
            print(f"cost of verify, 4 layers, {kind} cache: {cost_of_verify(kind):.3f} ms", flush=True)
        for turn in range(2):
            for watched in (False, True):
                prefill, step = cost(watched)
                what = "watched" if watched else "not watched"
                print(f"cost {turn}, {what}: prompt {prefill:.2f} ms, step {step:.3f} ms", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
