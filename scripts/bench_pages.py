"""Times packed pages on one CUDA device, beside the same tokens in one piece and the best dense attention in bf16.

Random data, for speed only. A step is the median of CUDA-graph replays of attention of one new token of every sequence,
so it waits for nothing; writing these tokens is timed as it is called.

    python scripts/bench_pages.py
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]  # runs without installing

import torch
import triton
from bench_decode import best_dense, microseconds
from check_pages import DEVICE, RECIPES, FusedPages, layer, pages_of

from tqcompress_kernels import decode

SHAPES = [(1, 32, 8, 128, 131072), (8, 32, 8, 128, 32768), (64, 32, 8, 128, 4096)]
FORMS = [(64, 4), (64, 0), (128, 4), (16, 4)]  # tokens of a page, exact first ones
NAMES = ["4 bits", "4 and 3 bits, small scales", "trellis"]
WRITTEN = 8192  # tokens at once


def filled(form: FusedPages, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages with so many random tokens, and some of these `[2, tokens, kv_heads, head_dim]`."""
    shape = tokens // form.block_size, 1, form.block_size, form.content_bytes
    pages = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
    states = torch.randn(2, WRITTEN, *form.exact_shape[2:], device=DEVICE, dtype=torch.bfloat16)
    for start in range(0, tokens, WRITTEN):
        form.write(pages, torch.arange(start, start + WRITTEN, device=DEVICE), *states)
    return pages, states


def one(name: str, shape: tuple[int, ...], block: int, sinks: int) -> str:
    """The times of one kind of pages."""
    batch, heads, kv_heads, dim, tokens = shape
    form = pages_of(layer(RECIPES[name], heads, kv_heads, dim, sinks), block)
    pages, states = filled(form, batch * tokens)
    tables = torch.randperm(len(pages), device=DEVICE).int().view(batch, -1)
    past = torch.full((batch,), tokens, device=DEVICE, dtype=torch.int32)
    query = torch.randn(batch, heads, 1, dim, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, kv_heads, 1, dim, device=DEVICE, dtype=torch.bfloat16)
    step = microseconds(lambda: form.attend(pages, tables, past, query, key, value, dim**-0.5, longest=tokens))
    slots = torch.randperm(batch * tokens, device=DEVICE)[:batch]
    write = triton.testing.do_bench(lambda: form.write(pages, slots, *states[:, :batch])) * 1e3
    line = f"{name:28} pages of {block:3}, {sinks} sinks: step {step:8.1f} us, write {write:6.1f} us"
    if sinks:
        return line
    fused = form.groups[0][1]
    whole = [
        packed._replace(
            planes=tuple(plane.new_zeros(batch, kv_heads, tokens, plane.shape[-1]) for plane in packed.planes),
            scale=packed.scale.new_ones(batch, kv_heads, tokens, 1),
        )
        for packed in (side.packed(form.fields(pages, side.codec)) for side in (fused.key, fused.value))
    ]
    plainly = microseconds(
        lambda: decode.decode_attention(
            query,
            *whole,
            fused.key.back,
            fused.value.back,
            None,
            None,
            None,
            (key, value),
            tokens,
            dim**-0.5,
            split=fused.split,
        )
    )
    return f"{line}; in one piece {plainly:8.1f} us"


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; random data")
    for shape in SHAPES:
        dense = min(time for name, time in best_dense(shape).items() if "bf16" in name)
        print(f"\n{shape}: bf16 in one piece {dense:.1f} us", flush=True)
        for name in NAMES:
            for block, sinks in FORMS:
                print(f"  {one(name, shape, block, sinks)}", flush=True)


if __name__ == "__main__":
    main()
