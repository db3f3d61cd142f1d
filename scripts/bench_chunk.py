"""Speed of chunks of a prompt over packed tokens on a CUDA device: by torch's flash attention, and by our own.

A chunk of 2,048 queries over 4-bit tokens, with random data: plain, padded (half of every other row), with a soft cap
and in float32, beside the plain torch that such chunks would fall back to. Then the flash kernel alone with several
tiles. TFLOP/s count what is not hidden.

    python scripts/bench_chunk.py
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import torch
from bench_decode import packed
from triton.testing import do_bench

from tqcompress_kernels import chunk, flash

QUERIES = 2048
SHAPES = [(1, 32, 8, 128, 32768), (4, 32, 8, 128, 16384), (2, 8, 4, 256, 16384), (4, 9, 3, 64, 8192)]
# Queries and keys of a tile, warps, stages.
TILES = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)]
TILES += [(128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 1), (64, 32, 8, 1)]
TILES += [(32, 32, 4, 1), (64, 16, 4, 1)]


def report(name: str, call, flops: float) -> None:
    """Time `call`, or say why it cannot run."""
    try:
        ms = do_bench(call, rep=200, return_mode="median")
    except Exception as error:  # too much shared memory, of a tile that is only tried
        print(f"  {name:44s} {type(error).__name__}", flush=True)
        return
    print(f"  {name:44s} {ms:8.2f} ms  {flops / ms / 1e9:6.1f} TFLOP/s", flush=True)


def fallback(query, states, mask, softcap) -> None:
    """Plain torch over as many tokens, already decoded: what `blockwise.attend` at least costs."""
    from tqcompress.blockwise import attend_exact

    attend_exact(query, *states, mask, query.shape[-1] ** -0.5, softcap)


def bench(shape: tuple) -> None:
    """All kinds of chunks of one shape."""
    batch, heads, kv_heads, dim, tokens = shape
    sides = [packed((batch, heads, kv_heads, dim, tokens), kind) for kind in ("4", "4")]
    basis = torch.linalg.qr(torch.randn(dim, dim, device="cuda")).Q[None].contiguous()
    print(f"batch {batch}, heads {heads}:{kv_heads}, head_dim {dim}, {tokens} tokens", flush=True)
    for name, dtype, half, softcap in (
        ("bf16", torch.bfloat16, False, None),
        ("bf16, padded", torch.bfloat16, True, None),
        ("bf16, soft cap", torch.bfloat16, False, 30.0),
        ("bf16, padded, soft cap", torch.bfloat16, True, 30.0),
        ("fp32", torch.float32, False, None),
        ("fp32, padded", torch.float32, True, None),
    ):
        query, own, sink = (
            torch.randn(batch, h, n, dim, device="cuda", dtype=dtype)
            for h, n in ((heads, QUERIES), (kv_heads, QUERIES + 128), (kv_heads, 4))
        )
        mask = torch.ones(batch, 4 + tokens + QUERIES + 128, dtype=torch.bool, device="cuda") if half else None
        if half:
            mask[::2, 4 : 4 + tokens // 2] = False
        rows = (batch * tokens - (tokens // 2 * (-(-batch // 2)) if half else 0)) + batch * QUERIES / 2
        flops = 4.0 * heads * QUERIES * dim * rows
        arguments = (*sides, basis, basis.mT.contiguous(), None, None, (sink, sink), (own, own), tokens, dim**-0.5)
        report(name, functools.partial(chunk.chunk_attention, query, *arguments, softcap, mask), flops)
        if softcap or half or dtype == torch.float32:
            states = [torch.randn(batch, kv_heads, tokens + QUERIES, dim, device="cuda", dtype=dtype)] * 2
            seen = None if mask is None else mask[:, : tokens + QUERIES]
            report(f"{name}: plain torch", functools.partial(fallback, query, states, seen, softcap), flops)


def tiles(dim: int, dtype: torch.dtype) -> None:
    """The flash kernel alone, with a mask."""
    query, key, value = (torch.randn(2, 16, n, dim, device="cuda", dtype=dtype) for n in (QUERIES, 8192, 8192))
    mask = torch.ones(2, 8192, dtype=torch.bool, device="cuda")
    flops = 4.0 * 2 * 16 * QUERIES * 8192 * dim
    print(f"flash alone, head_dim {dim}, {dtype}", flush=True)
    if dtype != torch.float32:
        run = torch.ops.aten._scaled_dot_product_flash_attention
        report("torch, no mask", functools.partial(run, query, key, value, 0.0, False, False), flops)
    chosen = flash._tiling
    for tile in TILES:
        flash._tiling = lambda *_, tile=tile: tile
        call = functools.partial(flash.attention, query, key, value, dim**-0.5, None, mask)
        report(f"tile {tile}{' (chosen)' if tile == chosen(dim, dtype == torch.float32, QUERIES) else ''}", call, flops)
    flash._tiling = chosen


if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for dim, dtype in ((128, torch.bfloat16), (64, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
        tiles(dim, dtype)
    for shape in SHAPES:
        bench(shape)
