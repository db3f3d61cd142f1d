"""Compiles the kernels for GPUs that are not there: `python tests/compile_kernels.py TARGET...`.

A stand-in for Triton's driver names the target, and launches only compile; so the host functions run as they are, on
CPU tensors. Prints a line for each kernel. Must run in a process without TRITON_INTERPRET.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
sys.path.insert(0, str(ROOT))

from tqcompress_kernels import encode as encoding  # noqa: E402
from tqcompress_kernels import encode_trellis, fast, flash, lookups, overlap, plain  # noqa: E402
from tqcompress_kernels.combine import combine  # noqa: E402
from tqcompress_kernels.dequantize import dequantize  # noqa: E402
from tqcompress_kernels.encode import encode, encoder  # noqa: E402
from tqcompress_kernels.encode_reference import pack  # noqa: E402
from tqcompress_kernels.encode_trellis import trellis_encoder  # noqa: E402
from tqcompress_kernels.packed import Packed, Wide  # noqa: E402
from tqcompress_kernels.prepare import prepare  # noqa: E402
from tqcompress_kernels.ring import empty_ring  # noqa: E402
from tqcompress_kernels.step import Constants, Side, ring_step  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Driver:
    """What `JITFunction.run` asks a driver before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> str:
        """Kernels are cached by it."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        """None, really."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target


def only_compile(target: GPUTarget) -> None:
    """From now on launches compile for `target`, do not launch, and print what came of it."""
    driver.set_active(Driver(target))
    torch.version.hip = "offline" if target.backend == "hip" else None
    binary = "hsaco" if target.backend == "hip" else "cubin"

    major = target.arch // 10 if target.backend == "cuda" else 9
    device = SimpleNamespace(
        name="offline", major=major, multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10
    )
    torch.cuda.get_device_properties = lambda _: device
    encoding._tiling.cache_clear()
    encode_trellis._programs.cache_clear()
    overlap.overlaps = lambda _: target.backend == "cuda" and target.arch >= 90

    def launch(function, grid):
        def compiled(*args, **options):
            kernel = function.warmup(*args, grid=grid, **options)
            print(f"{target.arch} {function.__name__}: {binary} of {len(kernel.asm[binary])} bytes", flush=True)

        return compiled

    triton.JITFunction.__getitem__ = launch


def packed(bits: int, rows: int, dim: int, uniform: bool, log8: bool, pages: int = 1, heads: int = 2) -> Packed:
    """A side full of zeros."""
    planes = tuple(
        torch.zeros(pages, heads, rows, plane.shape[-1], dtype=torch.uint8)
        for plane in pack(torch.zeros(dim).int(), bits)
    )
    scale = torch.zeros(pages, heads, rows, 1, dtype=torch.uint8 if log8 else torch.float16)
    return Packed(planes, scale, torch.zeros(2**bits), bits, None, uniform)


def split(
    bits: tuple[int, int], dim: int, columns: int, uniform: bool, log8: bool = True, page: int = 0,
    limits: bool = False, softcap: float | None = None,
) -> None:  # fmt: skip
    """Compile `plain.split`; `limits`: with lengths and a mask."""
    key, value = (packed(b, page or 512, dim, uniform, log8, pages=4 if page else 1) for b in bits)
    table = torch.zeros(1, 4, dtype=torch.int32) if page else None
    lengths = torch.zeros(1, dtype=torch.int32) if limits else None
    mask = torch.zeros(1, 512, dtype=torch.bool) if limits else None
    plain.split(
        torch.zeros(1, 2, columns, dim), torch.zeros(1, 2, columns), key, value, torch.zeros(1, 2, 3, columns, dim),
        torch.zeros(1, 2, 3, columns), 512, lengths, mask, table, 0.1, softcap,
    )  # fmt: skip


def ends(dtype: torch.dtype, batch: int) -> None:
    """Compile `prepare` and `combine`."""
    back, mean = torch.zeros(2, 64, 64), torch.zeros(2, 64)
    query = torch.zeros(batch, 8, 2, 64, dtype=dtype)
    rotated, bias = torch.zeros(batch, 2, 8, 64), torch.zeros(batch, 2, 8)
    prepare(query, back, mean, rotated, bias, 0.1)
    exact = torch.zeros(batch, 2, 4, 64, dtype=dtype), torch.zeros(batch, 2, 4, 64, dtype=dtype)
    mask = torch.zeros(batch, 520, dtype=torch.bool)
    partial, lse = torch.zeros(batch, 2, 3, 8, 64), torch.zeros(batch, 2, 3, 8)
    out, out_lse = torch.zeros(batch, 8, 2, 64), torch.zeros(batch, 8, 2)
    combine(partial, lse, back, mean, query, exact, exact, mask, 512, 0.1, 30.0, out, out_lse)


def int8(key_levels: list[int], value_levels: list[int], dim: int, columns: int, page: int = 0) -> None:
    """Compile the int8 kernel; levels are the positive ones."""
    levels = [torch.tensor([-x for x in half[::-1]] + half).float() for half in (key_levels, value_levels)]
    key, value = (
        packed(len(x).bit_length() - 1, page or 512, dim, False, False, pages=4 if page else 1) for x in levels
    )
    read = fast.FastSplit(*(lookups.lookup(x, torch.device("cpu")) for x in levels))
    table = torch.zeros(1, 4, dtype=torch.int32) if page else None
    read(
        torch.zeros(1, 2, columns, dim), torch.zeros(1, 2, columns), key, value, torch.zeros(1, 2, 3, columns, dim),
        torch.zeros(1, 2, 3, columns), 256, None, None, table, 0.1, None,
    )  # fmt: skip


def parts(bits: tuple[int, int], count: int, dim: int, int8: bool, tokens: int = 200) -> None:
    """Compile what vectors need whose first `count` coordinates have `bits[0]` bits and the others `bits[1]`."""
    tables = {1: [1], 2: L2, 3: L3, 4: L4}
    first, levels = (torch.tensor([-x for x in tables[b][::-1]] + tables[b]).float() for b in bits)
    wide, sizes = Wide(count, first, bits[0]), (count, dim - count)
    planes = sum((packed(b, 512, n, False, False).planes for b, n in zip(bits, sizes, strict=True)), ())
    side = packed(bits[1], 512, dim, False, False)._replace(planes=planes, levels=levels, wide=wide)
    read = fast.FastSplit(*[lookups.lookup(levels, torch.device("cpu"), wide)] * 2) if int8 else plain.split
    read(
        torch.zeros(1, 2, 4, dim), torch.zeros(1, 2, 4), side, side, torch.zeros(1, 2, 3, 4, dim),
        torch.zeros(1, 2, 3, 4), 256, None, None, None, 0.1, None,
    )  # fmt: skip
    x = torch.zeros(1, 2, tokens, dim, dtype=torch.bfloat16)
    encode(x, side.planes, side.scale, 0, encoder(torch.eye(dim)[None], None, levels, "fp16", wide=wide))
    dequantize(side, x, 0)


def coding(bits: int, dim: int, tokens: int) -> None:
    """Compile `encode` and `dequantize`."""
    side = packed(bits, 512, dim, False, False)
    levels = torch.cat([-torch.arange(2.0 ** (bits - 1)).flip(0) - 1, torch.arange(2.0 ** (bits - 1)) + 1])
    by = encoder(torch.eye(dim)[None], None, levels, "fp16")
    encode(torch.zeros(1, 2, tokens, dim, dtype=torch.bfloat16), side.planes, side.scale, 0, by)
    dequantize(side._replace(levels=levels), torch.zeros(1, 2, tokens, dim, dtype=torch.bfloat16), 0)


def attention(dtype: torch.dtype, dim: int) -> None:
    """Compile `flash.attention`: what chunks with padding and a soft cap need, and their own causal part."""
    states, bias = torch.zeros(1, 4, 200, dim, dtype=dtype), torch.zeros(1, 4, 200)
    flash.attention(states, states, states, 0.1, 30.0, torch.ones(1, 200, dtype=torch.bool), bias)
    flash.attention(states, states[:, :2], states[:, :2], 0.1, None, torch.ones(1, 200, dtype=torch.bool), causal=True)


def trellis_side(states: int, bits: int, dim: int, page: int = 0) -> Packed:
    """A side of trellis codes full of zeros; the table is one that its encoder takes."""
    half = torch.arange(states // 2).float() % 126 + 1
    rows = 4 if page else 1, 2, page or 512
    codes, scale = torch.zeros(*rows, dim * bits // 8, dtype=torch.uint8), torch.zeros(*rows, 1, dtype=torch.float16)
    return Packed((codes,), scale, torch.cat([half, -half.flip(0)]), bits, 1.0, False, states.bit_length() - 1)


def trellis(states: int, bits: int, other: int, dim: int, page: int = 0, only_int8: bool = False) -> None:
    """Compile what trellis codes need; values have `other` bits. `only_int8`: not what reads them in plain Triton."""
    key, value = trellis_side(states, bits, dim, page), trellis_side(states, other, dim, page)
    by = trellis_encoder(torch.eye(dim)[None], None, key.levels, 1.0, bits, "fp16")
    encode(torch.zeros(1, 2, 70, dim, dtype=torch.bfloat16), key.planes, key.scale, 0, by)
    rest = torch.zeros(1, 2, 3, 4, dim), torch.zeros(1, 2, 3, 4), 256, None, None
    query, table = (torch.zeros(1, 2, 4, dim), torch.zeros(1, 2, 4)), torch.zeros(1, 4, dtype=torch.int32)
    table = table if page else None
    found = (lookups.trellis_lookup(x.levels, 1.0, x.bits, dim) for x in (key, value))
    for read in (fast.FastSplit(*found),) if only_int8 else (plain.split, fast.FastSplit(*found)):
        read(*query, key, value, *rest, table, 0.1, None)
    mixed = packed(4, 512, dim, False, False)._replace(levels=torch.tensor([-x for x in L4[::-1]] + L4).float())
    if not page and not only_int8:
        found = lookups.trellis_lookup(key.levels, 1.0, bits, dim), lookups.lookup(mixed.levels, torch.device("cpu"))
        fast.FastSplit(*found)(*query, key, mixed, *rest, None, 0.1, None)
        dequantize(key, torch.zeros(1, 2, 70, dim, dtype=torch.bfloat16), 0)


def step(dtype: torch.dtype, int8_levels: bool) -> None:
    """Compile a step with a ring."""
    states = torch.zeros(1, 2, 1, 64, dtype=dtype)
    levels = torch.tensor([-x for x in L3[::-1]] + L3).float()
    split = fast.FastSplit(*[lookups.lookup(levels, torch.device("cpu"))] * 2) if int8_levels else plain.split
    identity = torch.eye(64)[None]
    side = Side(levels, 3, None, False, identity, None, encoder(identity, None, levels, "fp16"))
    store = packed(3, 512, 64, False, False)
    buffers = store.planes, store.scale
    ring, query = empty_ring(states, 4, 100), torch.zeros(1, 8, 1, 64, dtype=dtype)
    ring_step(query, (states, states), ring, buffers, buffers, Constants(side, side, split), None, 0.1)


L2, L3, L4 = [37, 123], [13, 40, 71, 113], [5, 15, 25, 36, 48, 62, 79, 104]
EVERYWHERE = [lambda: ends(torch.bfloat16, 1), lambda: coding(3, 64, 200), lambda: attention(torch.bfloat16, 128)]
PLAIN = [lambda: step(torch.bfloat16, False)]  # one of each instruction set: that of sm_89 is sm_80's
# The ways of turning codes into levels, pages and options, thinly: one target each.
ONCE = {
    "sm_80": [
        lambda: split((8, 5), 80, 4, False),
        lambda: ends(torch.float16, 64),
        lambda: int8(L4, [1, 3], 64, 4),
        lambda: parts((4, 2), 16, 64, True),
        lambda: attention(torch.float32, 128),
        lambda: trellis(64, 2, 3, 128),
    ],
    "sm_89": [
        lambda: attention(torch.bfloat16, 256),
        lambda: split((4, 3), 64, 16, False, log8=False, page=16, limits=True),
        lambda: int8(L3, L3, 128, 4),
        lambda: trellis(16, 2, 3, 128, only_int8=True),
    ],
    "sm_90": [
        lambda: split((4, 4), 128, 4, True),
        lambda: ends(torch.float32, 1),
        lambda: int8(L4, L4, 128, 8, 64),
        lambda: step(torch.float16, True),
        lambda: trellis(64, 3, 3, 128, 64),
        lambda: trellis(64, 2, 4, 256, only_int8=True),
        lambda: parts((3, 2), 64, 128, True),
        lambda: parts((3, 2), 32, 64, False),
        lambda: trellis(64, 3, 2, 64, only_int8=True),
    ],
    "sm_100": [lambda: split((3, 1), 64, 4, True, page=64, softcap=30.0), lambda: int8(L2, L2, 128, 4)],
    "gfx942": [lambda: split((2, 6), 64, 4, False)],
}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        only_compile(TARGETS[name])
        for case in EVERYWHERE + ([] if name in ("sm_89", "sm_90") else PLAIN) + ONCE[name]:
            case()
