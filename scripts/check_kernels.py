"""Compares every kernel with its fp64 reference on one CUDA device, in several processes (most time is compilation).

Inputs are random, heavy-tailed, constant, zero and huge; outputs are poisoned with NaN before each launch. The bound on
decoding is on the error relative to the norm of the reference output, 2e-3; encoding must be bit-equal but for ties.

    python scripts/check_kernels.py [--only TEXT] [--processes N] [--small]
"""

import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "scripts")]

import torch

BOUND = 2e-3
DEVICE = "cuda"


def random_side(kind: str, batch: int, kv_heads: int, rows: int, dim: int, inputs: str, log8: bool = False):
    """Packed random codes whose scales are of the kind `inputs`."""
    from bench_decode import joined, levels_of, parts_of
    from trellis_sides import as_packed, random_codes

    from tqcompress_kernels.packed import Packed, plane_widths

    if parts := parts_of(kind, dim):
        first, size, rest = parts
        sides = (
            random_side(one, batch, kv_heads, rows, n, inputs, log8) for one, n in ((first, size), (rest, dim - size))
        )
        return joined(next(sides), size, next(sides))
    trellis, bits = kind[0] == "T", int(kind[-1])
    high = {(3, 1): -(-dim // 16) * 16}
    planes = tuple(
        torch.randint(
            0, 256, (batch, kv_heads, rows, -(-high.get((bits, w), dim) * w // 8)), dtype=torch.uint8, device=DEVICE
        )
        for w in plane_widths(bits)
    )
    if trellis:
        planes = (random_codes(kind, (batch, kv_heads, rows), dim, DEVICE),)
    if inputs == "constant":
        planes = tuple(torch.full_like(plane, 0xFF) for plane in planes)
    spread = {"heavy": 2.0}.get(inputs, 0.5)
    scale = (torch.randn(batch, kv_heads, rows, 1, device=DEVICE) * spread).exp()
    scale = scale * {"zero": 0.0, "huge": 500.0}.get(inputs, 1.0)
    if log8:
        scale = (scale.log2() * 16 + 128).round().clamp(1, 254).to(torch.uint8)
    scale = scale if log8 else scale.half()
    if trellis:
        return as_packed(kind, planes[0], scale)
    uniform = kind[0] == "u" or bits not in (1, 2, 3, 4)
    return Packed(planes, scale, levels_of(kind), bits, None, uniform)


def decode_case(
    kernel: str, key: str, value: str, dim: int, share: int, tokens: int, inputs: str, queries: int = 1,
    options: tuple[str, ...] = (), lookups: tuple = ((None, None), (None, None)), how: dict | None = None,
) -> float:  # fmt: skip
    """The larger of the relative errors of output and weights (exp of the log-sum-exp) of one decode.

    `lookups`: coordinates a lookup and copies of the table, of keys and of values, for trellis codes; `how`: options of
    the int8 kernel.
    """
    from trellis_sides import lookup_of

    from tqcompress_kernels import decode, fast, plain, reference

    torch.manual_seed(0)
    batch, kv_heads, page = 2, 2, 64 if kernel == "int8" else 16
    rows, table = -(-max(tokens, 1) // 64) * 64, None
    count = batch
    if "paged" in options:
        pages = rows // page
        table = torch.randperm(batch * pages, device=DEVICE).int().view(batch, pages)
        count, rows = batch * pages, page
    k, v = (random_side(kind, count, kv_heads, rows, dim, inputs, "log8" in options) for kind in (key, value))
    dtype = torch.float32 if "fp32" in options else torch.bfloat16 if "bf16" in options else torch.float16
    # Scores of a few units whatever the scales: that is where an error shows.
    unit = reference.stored(k, dim, torch.float64).square().mean().sqrt().clamp_min(1e-3)
    query = (torch.randn(batch, kv_heads * share, queries, dim, device=DEVICE) * 3 / unit).to(dtype)
    basis = torch.linalg.qr(torch.randn(dim, dim, device=DEVICE, dtype=torch.float64)).Q.float()[None].contiguous()
    exact = 0 if "bare" in options else 5 + queries
    sinks, recent = (
        tuple(torch.randn(batch, kv_heads, n, dim, device=DEVICE, dtype=dtype) for _ in range(2))
        for n in (min(exact, 4), exact)
    )
    means = [torch.randn(kv_heads, dim, device=DEVICE) / 4 if "means" in options else None for _ in range(2)]
    total = sinks[0].shape[2] + tokens + exact
    mask = torch.rand(batch, total, device=DEVICE) > 0.3 if "mask" in options else None
    lengths = torch.tensor([tokens, tokens // 2], device=DEVICE, dtype=torch.int32) if "lengths" in options else None
    softcap = 20.0 if "softcap" in options else None
    rest = {"lengths": lengths, "mask": mask, "block_table": table, "softcap": softcap}
    split = plain.split
    if kernel == "int8":
        read = fast.FastSplit(lookup_of(k, *lookups[0]), lookup_of(v, *lookups[1], of_keys=False))
        split = lambda *a: read(*a, **(how or {}))  # noqa: E731
    arguments = (k, v, basis, basis.transpose(-1, -2).contiguous(), *means, sinks, recent, tokens, dim**-0.5)
    junk = [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(4)]
    del junk  # what the allocator hands out next is poisoned
    got, got_lse = decode.decode_attention(query, *arguments, split=split, **rest)
    want, want_lse = reference.decode_attention(query.double(), *arguments, **rest)
    torch.cuda.synchronize()
    if not (got.isfinite().all() and torch.equal(got_lse.isfinite(), want_lse.isfinite())):
        return float("inf")
    lse = (got_lse - want_lse).nan_to_num(0.0).abs().max().item()
    return max(((got - want).norm() / want.norm().clamp_min(1e-30)).item(), lse / max(1.0, want_lse.abs().max().item()))


def chunk_case(dim: int, share: int, tokens: int, queries: int, dtype: str, options: tuple[str, ...] = ()) -> float:
    """Relative error of a continuation chunk, in the units of what its number format rounds anyway."""
    from tqcompress_kernels import chunk, reference

    torch.manual_seed(0)
    found = next((option for option in options if option[0].isdigit()), "4")
    k, v = (random_side(found, 2, 2, tokens, dim, "random") for _ in range(2))
    kind = getattr(torch, dtype)
    query = torch.randn(2, queries, 2 * share, dim, device=DEVICE, dtype=kind).transpose(1, 2)
    basis = torch.linalg.qr(torch.randn(dim, dim, device=DEVICE)).Q[None].contiguous()
    sinks, recent = (
        tuple(torch.randn(2, 2, n, dim, device=DEVICE, dtype=kind) for _ in range(2)) for n in (4, queries + 64)
    )
    means = [torch.randn(2, dim, device=DEVICE) / 4 if "means" in options else None for _ in range(2)]
    softcap, mask = 5.0 if "softcap" in options else None, None
    if "mask" in options:  # padding behind the sinks, tokens here and there, and in a row all before the chunk's middle
        mask = torch.rand(2, 4 + tokens + queries + 64, device=DEVICE) > 0.1
        mask[0, 4 : 4 + tokens // 2] = False
        mask[1, : -queries // 2] = False
    arguments = (k, v, basis, basis.transpose(-1, -2).contiguous(), *means, sinks, recent, tokens, dim**-0.5, softcap)
    junk = [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(4)]
    del junk  # what the allocator hands out next is poisoned
    got, lse = chunk.chunk_attention(query, *arguments, mask, workspace_bytes=1 << 20)
    want, want_lse = reference.decode_attention(query.double(), *arguments, None, mask)
    if not (got.isfinite().all() and torch.equal(lse.isfinite(), want_lse.isfinite())):
        return float("inf")
    error = ((got - want).norm() / want.norm()).item()
    # Rounded to half precision: rotated query, decoded keys and values, weights, each by half a unit in the last place.
    return error * BOUND / max(4 * torch.finfo(kind).eps, 2.0**-16)


def encode_case(kind: str, dim: int, dtype: str, inputs: str, scale_format: str, hadamard: bool, tokens: int) -> float:
    """0 if codes are the reference's but for ties and scales within a unit in the last place, else what is off."""
    from bench_decode import parts_of

    from tqcompress_kernels import encode, encode_reference
    from tqcompress_kernels.packed import Wide

    def gaussian_levels(bits: int) -> torch.Tensor:
        half = torch.special.ndtri((torch.arange(2 ** (bits - 1)).double() + 0.5) / 2**bits + 0.5).float()
        return torch.cat([-half.flip(0), half]).to(DEVICE)

    torch.manual_seed(0)
    first, count, rest = parts_of(kind, dim) or (0, 0, kind)
    bits, wide = int(rest), Wide(count, gaussian_levels(int(first)), int(first)) if count else None
    x = torch.randn(2, 2, tokens, dim, device=DEVICE)
    x = {"heavy": x**5, "constant": x * 0 + 3, "zero": x * 0, "huge": x * 1e3}.get(inputs, x).to(getattr(torch, dtype))
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim and hadamard and dim & (dim - 1) == 0:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / 2**0.5
    if matrix.shape[0] < dim:
        matrix = torch.linalg.qr(torch.randn(dim, dim)).Q
    into = (torch.randn(dim, 1).sign() * matrix)[None].contiguous().to(DEVICE)
    levels = gaussian_levels(bits)
    sizes = [plane.shape[-1] for plane in encode_reference.pack(torch.zeros(dim, dtype=torch.int64), bits, wide)]
    planes = tuple(torch.full((2, 2, tokens + 8, size), 0xA5, dtype=torch.uint8, device=DEVICE) for size in sizes)
    scale = torch.zeros(
        2, 2, tokens + 8, 1, dtype=torch.float16 if scale_format == "fp16" else torch.uint8, device=DEVICE
    )
    encode.encode(x, planes, scale, 3, encode.encoder(into, None, levels, scale_format, wide=wide))
    if any((plane[:, :, :3] != 0xA5).any() or (plane[:, :, tokens + 3 :] != 0xA5).any() for plane in planes):
        return float("inf")
    codes = encode_reference.unpack(tuple(plane[:, :, 3 : tokens + 3] for plane in planes), bits, dim, wide)
    want, unit, _ = encode_reference.quantize(x.double(), into, None, levels, wide=wide)
    lower, distance = torch.minimum(codes, want), torch.empty_like(unit)
    for part, book in encode_reference.books(levels.double(), wide):
        boundaries = (book[1:] + book[:-1]) / 2
        distance[..., part] = (unit[..., part] - boundaries[lower[..., part].clamp(max=len(boundaries) - 1)]).abs()
    slack = dim**1.5 * 2.0**-24  # of a sum of dim float32 products, in units of a vector's root mean square
    wrong = ((codes != want) & ((distance > slack) | ((codes - want).abs() > 1))).double().mean().item()
    norm = (x.double() @ into.double()).norm(dim=-1, keepdim=True)
    length = encode_reference.decoded(codes, levels.double(), wide).norm(dim=-1, keepdim=True)
    exact = encode_reference.encode_scale(norm / length, scale_format)
    stored = scale[:, :, 3 : tokens + 3]
    apart = encode_reference.decode_scale(stored) / encode_reference.decode_scale(exact).clamp_min(1e-30)
    apart = torch.where(encode_reference.decode_scale(exact) == 0, encode_reference.decode_scale(stored) + 1, apart)
    unit_in_the_last_place = 2.0**-10 if scale_format == "fp16" else 2.0 ** (1 / 16) - 1
    return wrong + ((apart - 1).abs() > 1.01 * unit_in_the_last_place).double().mean().item()


def cases(small: bool):
    """(name, function, arguments) of every check."""
    tokens = 130 if small else 1000
    found = []

    def add(function, *arguments):
        name = " ".join([function.__name__.removesuffix("_case"), *(str(a) for a in arguments)])
        found.append((name, function, arguments))

    kinds = ["4", "3", "2", "u4", "u2", "1"]
    for key, value in itertools.product([*kinds, "8"], kinds):
        if key == value or "4" in (key, value) or key == "8":
            add(decode_case, "int8", key, value, 128, 4, tokens, "random")
    for dim, share in (
        (64, 3),
        (80, 1),
        (96, 2),
        (192, 4),
        (256, 4),
        (256, 8),
        (128, 1),
        (128, 5),
        (128, 8),
        (128, 16),
    ):
        for pair in ("44", "42") if dim == 80 else ("44", "33", "22"):
            add(decode_case, "int8", *pair, dim, share, tokens, "random")
    for options in (("mask",), ("lengths",), ("softcap",), ("means", "bf16"), ("log8",), ("paged",), ("bare",)):
        for pair in ("44", "33"):
            add(decode_case, "int8", *pair, 128, 4, tokens, "random", 1, options)
    for inputs in ("heavy", "constant", "zero", "huge"):
        for pair in ("44", "33", "22", "84"):
            add(decode_case, "int8", *pair, 128, 4, tokens, inputs, 1, ("fp32",))
    for length in (0, 1, 63, 64, 65):
        add(decode_case, "int8", "4", "4", 128, 4, length, "random")
    for queries in (2, 8):
        add(decode_case, "int8", "4", "4", 128, 4, tokens, "random", queries)
    for pair, dim, share in (
        ("44", 128, 4),
        ("33", 128, 4),
        ("22", 64, 3),
        ("11", 128, 4),
        ("16", 64, 4),
        ("55", 128, 4),
        ("66", 128, 4),
        ("53", 80, 2),
        ("84", 256, 4),
    ):
        add(decode_case, "plain", *pair, dim, share, tokens, "random", 1, ("mask", "means"))
    for inputs in ("heavy", "constant", "zero", "huge"):
        add(decode_case, "plain", "4", "3", 128, 4, tokens, inputs)
    for options in (("paged",), ("lengths", "softcap"), ("log8",)):
        add(decode_case, "plain", "4", "4", 128, 4, tokens, "random", 1, options)
    add(decode_case, "plain", "4", "4", 128, 16, tokens, "random", 2)
    if not small:
        for dim, dtype in ((128, "bfloat16"), (64, "float16"), (256, "bfloat16")):
            add(chunk_case, dim, 4, 1500, 300, dtype)
            for options in (("mask",), ("softcap", "means"), ("mask", "softcap", "means")):
                add(chunk_case, dim, 4, 1500, 300, dtype, options)
        for dim, options in ((128, ()), (128, ("mask",)), (64, ("mask", "softcap", "means")), (256, ("mask",))):
            add(chunk_case, dim, 2, 1500, 300, "float32", options)
        for share, queries in ((1, 33), (1, 64), (3, 129)):  # tiles that are not full
            add(chunk_case, 80, share, 1500, queries, "bfloat16", ("mask",))
    for bits in range(1, 9):
        add(encode_case, str(bits), 128, "bfloat16", "random", "fp16", True, tokens)
    for dim in (64, 80, 96, 192, 256):
        add(encode_case, "4", dim, "float16", "random", "fp16", True, tokens)
    for inputs in ("heavy", "constant", "zero", "huge"):
        add(encode_case, "3", 128, "float32", inputs, "log8", False, tokens)
    from check_parts import parts_cases
    from check_trellis import trellis_cases

    for function, arguments in (*trellis_cases(tokens), *parts_cases(tokens, decode_case, encode_case, chunk_case)):
        add(function, *arguments)
    return found


def run(case) -> tuple[str, float | str]:
    """One check; an error instead of a number if it cannot be run."""
    name, function, arguments = case
    try:
        return name, function(*arguments)
    except Exception as error:  # reported with its name, and fails the run
        lines = [line for line in str(error).splitlines() if line.strip()]
        return name, f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--small", action="store_true", help="few tokens, as compute-sanitizer needs")
    options = parser.parse_args()
    chosen = [case for case in cases(options.small) if options.only in case[0]]
    if options.processes == 1:
        results = map(run, chosen)
    else:
        results = ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")).map(run, chosen)
    bad = 0
    for name, error in results:
        wrong = isinstance(error, str) or not error < BOUND
        bad += wrong
        print(
            f"{'FAIL' if wrong else 'ok  '} {error if isinstance(error, str) else f'{error:.1e}'}  {name}", flush=True
        )
    print(f"{len(chosen)} checks, {bad} failed, on {torch.cuda.get_device_name()}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
