"""Times a decoding step of attention over packed codes against the best dense attention, on one CUDA device.

Random data, for speed only. Every figure is the median of CUDA-graph replays of the whole step: rotating the query,
reading the codes, merging the splits and rotating the output back. Beside it stands the memory roofline: the bytes
that must be read over the bandwidth that a plain read reaches.

    python scripts/bench_decode.py [--shapes 0,1,2] [--pairs 44,42,2.5/2.5,4x32+2/2] [--sweep] [--json FILE]

A pair is the bits of keys and of values, "u" before uniform ones. With a slash between them they may be fractions, or
say that so many coordinates have other bits than the rest.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]  # runs without installing

import torch
import torch.nn.functional as F
import triton
from dense_decode import dense_decode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqcompress_kernels import decode, fast, lookups, plain, tuning
from tqcompress_kernels.packed import Packed, Wide, plane_widths

# batch, query heads, KV heads, head_dim, context
SHAPES = [
    (1, 32, 8, 128, 32768),
    (1, 32, 8, 128, 131072),
    (8, 32, 8, 128, 32768),
    (32, 32, 8, 128, 8192),
    (64, 64, 8, 128, 4096),
    (1, 9, 3, 64, 8192),
    (4, 4, 1, 256, 32768),
    (8, 32, 32, 128, 8192),
]
# Lloyd-Max levels on an int8 grid (what `levels: int8` makes of head_dim 128); "u" marks uniform ones.
GRID = {
    1: [-1, 1],
    2: [-123, -37, 37, 123],
    3: [-113, -71, -40, -13, 13, 40, 71, 113],
    4: [-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104],
}
PAIRS = ["44", "42", "33", "22", "84", "u4u4", "u2u2", "4u2", "2.5/2.5", "3.5/2.5", "2.25/2.25", "4x32+2/4x32+2"]


def microseconds(function) -> float:
    return triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median") * 1e3


def read_bandwidth() -> float:
    """Bytes a second that summing a large tensor reads."""
    x = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    return x.nbytes / (triton.testing.do_bench(x.sum, return_mode="median") * 1e-3)


def levels_of(kind: str) -> torch.Tensor:
    bits = int(kind[-1])
    uniform = kind[0] == "u" or bits not in GRID
    numbers = torch.arange(2**bits) * 2.0 - 2**bits + 1 if uniform else torch.tensor(GRID[bits])
    return numbers.float().cuda() / numbers.abs().max()


def kinds_of(pair: str) -> list[str]:
    """ "4u2" -> ["4", "u2"]."""
    if "/" in pair:
        return pair.split("/")
    return pair.replace("u", " u").replace("4", "4 ").replace("2", "2 ").replace("3", "3 ").replace("8", "8 ").split()


def parts_of(kind: str, dim: int) -> tuple[str, int, str] | None:
    """ "2.5" -> ("3", dim / 2, "2"), "4x32+2" -> ("4", 32, "2"): what the first coordinates have, and the rest."""
    if "x" in kind:
        first, rest = kind.split("+")
        bits, count = first.split("x")
        return bits, int(count), rest
    if "." not in kind or kind[0] == "T":
        return None
    whole = int(float(kind))
    return str(whole + 1), round((float(kind) - whole) * dim), str(whole)


def joined(first: Packed, count: int, rest: Packed) -> Packed:
    """Vectors whose first `count` coordinates are those of `first`."""
    wide = Wide(count, first.levels, first.bits, first.step, first.uniform)
    return rest._replace(planes=first.planes + rest.planes, wide=wide)


def packed(shape: tuple, kind: str) -> Packed:
    batch, _, kv_heads, dim, tokens = shape
    if parts := parts_of(kind, dim):
        first, count, rest = parts
        sizes = count, dim - count
        one, other = (packed((*shape[:3], n, tokens), k) for n, k in zip(sizes, (first, rest), strict=True))
        return joined(one, count, other)
    levels = levels_of(kind)
    bits = int(kind[-1])
    planes = tuple(
        torch.randint(0, 256, (batch, kv_heads, tokens, dim * width // 8), dtype=torch.uint8, device="cuda")
        for width in plane_widths(bits)
    )
    scale = (torch.rand(batch, kv_heads, tokens, 1, device="cuda") + 0.5).half()
    return Packed(planes, scale, levels, bits)


def best_dense(shape: tuple) -> dict[str, float]:
    """Microseconds of dense attentions: torch's for bf16, and a split-KV kernel for bf16 and fp8."""
    batch, heads, kv_heads, dim, tokens = shape
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(batch, kv_heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        rows = query.view(batch, kv_heads, heads // kv_heads, dim)  # the query heads of a KV head as rows
        for name, q, gqa in (("gqa", query, True), ("rows", rows, False)):
            try:
                with sdpa_kernel([backend]):
                    call = lambda q=q, gqa=gqa: F.scaled_dot_product_attention(q, key, value, enable_gqa=gqa)  # noqa: E731
                    times[f"bf16 {backend.name.split('_')[0].lower()} {name}"] = microseconds(call)
            except RuntimeError:
                continue  # this backend does not take the shape
    columns = torch.randn(batch, kv_heads, 16, dim, device="cuda", dtype=torch.bfloat16)
    for name, dtype in (("bf16 triton", torch.bfloat16), ("fp8 triton", torch.float8_e4m3fn)):
        k, v = key.to(dtype), value.to(dtype)
        found = []
        for per_sm in (2, 4, 8):
            splits = max(1, min(132 * per_sm // (batch * kv_heads), tokens // 128))
            found += [microseconds(dense_decode(columns, k, v, splits, warps)) for warps in (4, 8)]
        times[name] = min(found)
    return times


def one(shape: tuple, pair: str, dense: dict[str, float], bandwidth: float, sweep: bool) -> dict:
    """Time one shape and pair of bits; print and return it."""
    batch, heads, _, dim, tokens = shape
    bf16 = min(time for name, time in dense.items() if "bf16" in name)
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    key, value = (packed(shape, kind) for kind in kinds_of(pair))
    found = [lookups.lookup(side.levels, query.device, side.wide) for side in (key, value)]
    obstacle = fast.obstacle(*found, dim, query.device)
    split = plain.split if obstacle else fast.FastSplit(*found)
    basis = torch.eye(dim, device="cuda")[None]
    none = query.new_empty(batch, shape[2], 0, dim)

    def step(**options):
        return decode.decode_attention(
            query, key, value, basis, basis, None, None, (none, none), (none, none), tokens, dim**-0.5, split=split,
            **options,
        )  # fmt: skip

    nbytes = sum(t.nbytes for side in (key, value) for t in (*side.planes, side.scale))
    limit = nbytes / bandwidth * 1e6
    time = microseconds(step)
    print(
        f"  K{pair:14}{time:8.1f} us  {bf16 / time:5.2f}x bf16  {dense['fp8 triton'] / time:5.2f}x fp8  "
        f"{nbytes / time / 1e3:6.0f} GB/s ({limit / time:4.0%} of the roofline, {bf16 / limit:.2f}x)"
        + (f" plain kernel: {obstacle}" if obstacle else ""),
        flush=True,
    )
    if sweep:
        counts = {}
        for per_sm in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16):
            splits = max(1, 132 * per_sm // (batch * shape[2]))
            counts.setdefault(splits, microseconds(lambda s=splits: step(splits=s)))
        best = sorted(counts.items(), key=lambda item: item[1])[:4]
        print("         splits", ", ".join(f"{s}: {t:.1f}" for s, t in best), "of", tuning.__name__, flush=True)
    return {"shape": shape, "pair": pair, "us": time, "bf16_us": bf16, "dense": dense, "roofline_us": limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(map(str, range(len(SHAPES)))))
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--sweep", action="store_true", help="try other split counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s; random data, speed only")
    results = []
    for index in map(int, options.shapes.split(",")):
        shape = SHAPES[index]
        dense = best_dense(shape)
        print(f"\n{shape}: " + ", ".join(f"{name} {time:.1f}" for name, time in dense.items()), flush=True)
        results += [one(shape, pair, dense, bandwidth, options.sweep) for pair in options.pairs.split(",")]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
