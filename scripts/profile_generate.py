"""Where a decoding step of `generate()` spends its time, on one CUDA device: kernels by name, and what the host does.

Random weights, keys and values, as in `bench_generate.py`: they tell about speed only.

    python scripts/profile_generate.py [--model llama-3.1-8b] [--cases 8x32K,1x128K] [--setups 4c] [--layers N]
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import torch
from bench_generate import Clock, applied, build, cache_for, free, settings
from torch.profiler import ProfilerActivity, profile

from tqcompress.session import count

STEPS = 4  # profiled, after WARM others
WARM = 10


class Window(Clock):
    """Profiles `STEPS` steps."""

    def __init__(self):
        super().__init__()
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def __call__(self, input_ids, scores):
        if len(self.times) == WARM:
            torch.cuda.synchronize()
            self.profile.start()
        if len(self.times) == WARM + STEPS:
            torch.cuda.synchronize()
            self.profile.stop()
        return super().__call__(input_ids, scores)


def trace(profiled) -> list[dict]:
    """The events of a profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def table(events: list[dict], rows: int) -> None:
    """Microseconds a step by name, most first."""
    total, calls = defaultdict(float), defaultdict(int)
    for event in events:
        total[event["name"][:90]] += event["dur"]
        calls[event["name"][:90]] += 1
    for name, spent in sorted(total.items(), key=lambda item: -item[1])[:rows]:
        print(f"{spent / STEPS:9.1f} us {calls[name] / STEPS:7.1f} x  {name}")


def show(events: list[dict]) -> None:
    """How busy the device is, its kernels, and the host's work."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda event: event["ts"])
    end, idle = kernels[0]["ts"], defaultdict(float)
    for event in kernels:
        gap = event["ts"] - end
        idle["over 20 us" if gap > 20 else "shorter"] += max(gap, 0)
        end = max(end, event["ts"] + event["dur"])
    span = end - kernels[0]["ts"]
    gaps = ", ".join(f"{kind} {total / STEPS:.0f} us" for kind, total in idle.items())
    print(f"device: {span / STEPS:.0f} us a step, idle of it in gaps: {gaps}")
    table(kernels, 24)
    print("host:")
    table([e for e in events if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")], 24)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--cases", default="8x32K,1x128K")
    parser.add_argument("--setups", default="4c")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    model = build(options.model, options.layers)
    for case in options.cases.split(","):
        batch, tokens = map(count, case.split("x"))
        for setup in options.setups.split(","):
            with applied(model, setup):
                cache = cache_for(model, setup, batch, tokens, WARM + STEPS + 8)
                clock = Window()
                ids = torch.ones(batch, tokens + 1, dtype=torch.long, device="cuda")
                model.generate(
                    ids, past_key_values=cache, logits_processor=[clock], max_new_tokens=WARM + STEPS + 2,
                    **settings(setup, ids),
                )  # fmt: skip
            print(f"\n{case} {setup}")
            show(trace(clock.profile))
            del cache
            free()


if __name__ == "__main__":
    main()
