"""Checks the kernels for trellis codes, then times them beside dense attention and scalar codes, on one CUDA device.

Random data, for speed only. Encoding: vectors a second at head_dim 128, rotation included, and its share of the time
of a prompt of 32K tokens of a model in the shape of Llama-3.1-8B. Decoding: the whole step, as `bench_decode.py`.

    python scripts/bench_trellis.py [--skip-checks] [--quick] [--only TEXT]
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "kernels")]  # runs without installing

import torch
import triton
from bench_decode import best_dense, microseconds, packed, read_bandwidth
from check_kernels import BOUND, run
from check_trellis import AUTO, ENCODERS, LOOKUPS, RINGS, encoder_of, trellis_cases
from trellis_sides import as_packed, lookup_of, parse, random_codes, table_of

from tqcompress_kernels import decode, encode_trellis, fast, tuning
from tqcompress_kernels.dequantize import dequantize

DIM, HEADS, TOKENS = 128, 8, 1 << 17
PREFILL_SECONDS, PREFILL_VECTORS = 1.315, 32 * 2 * 8 * 32768  # 32K tokens: 32 layers, keys and values, 8 KV heads
SHAPES = [(8, 32, 8, 128, 32768), (1, 32, 8, 128, 131072)]
NARROW = (8, 32, 8, 64, 32768)
# Of the encoder, numbers of programs a multiprocessor.
LAUNCHES = [{"programs": 4}, {"programs": 8}, {"programs": 16}, {"programs": 24}]


def check(processes: int) -> int:
    """Run all checks in several processes, which also compiles; the number of those that failed."""
    cases = [(" ".join(map(str, (f.__name__, *a))), f, a) for f, a in trellis_cases(1000)]
    bad = 0
    for name, error in ProcessPoolExecutor(processes, mp_context=get_context("spawn")).map(run, cases):
        wrong = isinstance(error, str) or not error < BOUND
        bad += wrong
        print(
            f"{'FAIL' if wrong else 'ok  '} {error if isinstance(error, str) else f'{error:.1e}'}  {name}", flush=True
        )
    print(f"{len(cases)} checks, {bad} failed", flush=True)
    return bad


def bench_encode(kind: str, programs: int | None = None, **options):
    """Print vectors a second of one encoder."""
    (table, step), (_, bits) = table_of(kind), parse(kind)
    hadamard = torch.ones(1, 1, device="cuda")
    while len(hadamard) < DIM:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cuda")) / 2**0.5
    by = encoder_of(hadamard[None], table, step, bits, "fp16", options)
    x = torch.randn(1, TOKENS, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    codes = torch.zeros(1, HEADS, TOKENS, DIM * bits // 8, dtype=torch.uint8, device="cuda")
    scale = torch.zeros(1, HEADS, TOKENS, 1, dtype=torch.float16, device="cuda")
    chosen = encode_trellis._programs
    if programs:
        encode_trellis._programs = lambda device, _: programs * chosen(device, 1) // encode_trellis.MORE_PROGRAMS
    try:
        ms = triton.testing.do_bench(lambda: by.launch(x, (codes,), scale, 0, None), 5, 60, return_mode="median")
    finally:
        encode_trellis._programs = chosen
    rate = TOKENS * HEADS / ms * 1e3
    share = PREFILL_VECTORS / rate / PREFILL_SECONDS
    what = ({"programs": programs} if programs else {}) | options
    print(f"  {kind:8} {rate / 1e6:8.1f} M vectors/s  {share:6.1%} of the prompt  {what or ''}", flush=True)


def side_of(shape: tuple, kind: str):
    """A side full of random codes."""
    if kind[0] != "T":
        return packed(shape, kind)
    batch, _, kv_heads, dim, tokens = shape
    scale = (torch.rand(batch, kv_heads, tokens, 1, device="cuda") + 0.5).half()
    return as_packed(kind, random_codes(kind, (batch, kv_heads, tokens), dim), scale)


def bench_decode(shape: tuple, kind: str, bf16: float, limit: float, key=AUTO, value=AUTO, how=None, programs=None):
    """Print the microseconds of a step with keys and values of one kind; see `check_trellis.LOOKUPS`.

    `programs`: of a multiprocessor, 8 or as many as its shared memory holds if None.
    """
    batch, heads, kv_heads, dim, tokens = shape
    sides = side_of(shape, kind), side_of(shape, kind)
    read = fast.FastSplit(lookup_of(sides[0], *key), lookup_of(sides[1], *value, of_keys=False))
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    if programs is None and read.key.trellis:
        tile, stages = (how or {}).get("tile"), (how or {}).get("stages", 2)
        tile = tile or read._tile(*sides, heads // kv_heads, 0, dim, stages)
        total = torch.cuda.get_device_properties(query.device).shared_memory_per_multiprocessor
        programs = min(8, total // (sum(read._used(*sides, dim, tile, stages)) + fast.RESERVED))
    programs = programs or 8
    basis, none = torch.eye(dim, device="cuda")[None], query.new_empty(batch, kv_heads, 0, dim)
    before, tuning.PROGRAMS = tuning.PROGRAMS, programs
    fast._room.cache_clear()
    try:
        splits = tuning.splits(query.device, batch * kv_heads, dim, tokens)
        time = microseconds(
            lambda: decode.decode_attention(
                query, *sides, basis, basis, None, None, (none, none), (none, none), tokens, dim**-0.5,
                split=lambda *a: read(*a, **(how or {})), splits=splits,
            )
        )  # fmt: skip
    finally:
        tuning.PROGRAMS = before
        fast._room.cache_clear()
    nbytes = sum(t.nbytes for side in sides for t in (*side.planes, side.scale))
    names = [f"{one.per} a lookup, {one.copies} copies" if one and one.copies else "registers"
             for one in (read.key.trellis, read.value.trellis)]  # fmt: skip
    extra = f"{how or ''}{f', {programs} programs' if programs != 8 else ''}"
    print(f"  {kind:8} {time:8.1f} us  {bf16 / time:5.2f}x bf16  {nbytes / limit * 1e6 / time:4.0%} of the bandwidth  "
          f"{' / '.join(dict.fromkeys(names))} {extra}", flush=True)  # fmt: skip
    return time


def bench_decodes(shape: tuple, limit: float, only: str, variants: list, programs: tuple = ()) -> None:
    """Scalar codes and all variants at one shape; then other numbers of programs for the best of each kind."""
    dense = best_dense(shape)
    bf16 = min(time for name, time in dense.items() if "bf16" in name)
    print(f"\n{shape}: " + ", ".join(f"{name} {time:.1f}" for name, time in dense.items()), flush=True)
    for kind in ("4", "3", "2"):
        bench_decode(shape, kind, bf16, limit)
    best = {}
    for kind, *rest in variants:
        if only not in kind:
            continue
        time = bench_decode(shape, kind, bf16, limit, *rest)
        best[kind] = min(best.get(kind, (time, rest)), (time, rest), key=lambda pair: pair[0])
    for kind, (_, rest) in best.items():
        for count in programs:
            bench_decode(shape, kind, bf16, limit, *rest, count)


def bench_dequantize(kind: str) -> None:
    """Print vectors a second of decoding into a workspace."""
    shape = 1, 32, HEADS, DIM, TOKENS
    out, side = torch.empty(1, HEADS, TOKENS, DIM, device="cuda", dtype=torch.bfloat16), side_of(shape, kind)
    time = microseconds(lambda: dequantize(side, out, 0))
    print(f"  {kind:8} {TOKENS * HEADS / time:8.1f} M vectors/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--quick", action="store_true", help="no other numbers of programs")
    parser.add_argument("--only", default="", help="time the kinds whose name contains this, as T256")
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    only = options.only
    bad = 0 if options.skip_checks else check(options.processes)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    limit = read_bandwidth()
    print(f"read bandwidth {limit / 1e12:.2f} TB/s\n\nencoding {TOKENS * HEADS} vectors")
    for kind, variant in ENCODERS:
        if only in kind:
            bench_encode(kind, **variant)
    for kind in ("T256.2", "T256.3"):
        for launch in LAUNCHES if only in kind else []:
            if kind == "T256.3" or launch.get("programs", 0) <= 12:  # of what registers hold
                bench_encode(kind, **launch)
    for states in (16, 64, 1024):
        for bits in (1, 2, 3, 4):
            kind = f"T{states}.{bits}"
            if states >> bits <= encode_trellis.MOST_OVERLAPS and only in kind:
                bench_encode(kind)
    programs = () if options.quick else (6, 7, 9, 12)
    bench_decodes(SHAPES[0], limit, only, LOOKUPS + RINGS, programs)
    chosen = [(f"T{states}.{bits}", AUTO, AUTO, {}) for states in (16, 64, 256, 1024) for bits in (2, 3)]
    bench_decodes(SHAPES[1], limit, only, chosen)
    bench_decodes(NARROW, limit, only, [(kind, AUTO, AUTO, {}) for kind in ("T16.2", "T64.3", "T256.2", "T256.3")])
    print("\ndecoding into a workspace")
    for kind in ("4", "T16.2", "T256.3", "T1024.2"):
        bench_dequantize(kind)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
