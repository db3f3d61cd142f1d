"""Speed of the encoding kernels on a CUDA device: medians of CUDA graphs, beside a copy of the same vectors.

PYTHONPATH=kernels python scripts/bench_encode.py
"""

import functools

import torch
from triton.testing import do_bench_cudagraph

from tqcompress_kernels import encode as encoding
from tqcompress_kernels.dequantize import dequantize
from tqcompress_kernels.encode import encode, encoder
from tqcompress_kernels.packed import Packed, Wide, plane_widths

HEADS, DIM = 8, 128
# Tiles of how many tokens, warps, registers a thread (None: as many as the compiler likes).
TILINGS = [(128, 8, 128), (128, 8, None), (64, 4, 168), (64, 4, 128), (64, 4, None)]


def rotation(kind: str) -> torch.Tensor:
    """`into` `[1, DIM, DIM]`, or one for every head if dense."""
    if kind == "dense":
        return torch.linalg.qr(torch.randn(HEADS, DIM, DIM, device="cuda"))[0].contiguous()
    matrix = torch.ones(1, 1, device="cuda")
    while matrix.shape[0] < DIM:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cuda")) / 2**0.5
    return matrix[None]


def levels_of(bits: int) -> torch.Tensor:
    """Symmetric levels, not evenly spaced."""
    half = torch.special.ndtri((torch.arange(2 ** (bits - 1)).double() + 0.5) / 2**bits + 0.5)
    return torch.cat([-half.flip(0), half]).float().cuda()


def wide_of(bits: float) -> Wide | None:
    """Of fractional bits: the coordinates that have one more."""
    whole, count = int(bits), round(bits % 1 * DIM)
    return Wide(count, levels_of(whole + 1), whole + 1) if count else None


def report(name: str, call, vectors: int, nbytes: int) -> None:
    """Time `call` and print what it does to `vectors` vectors, `nbytes` bytes in all."""
    ms = do_bench_cudagraph(call, rep=200, return_mode="median")
    print(f"{name:44s} {ms * 1e3:9.1f} us  {vectors / ms / 1e6:6.2f} G vectors/s  {nbytes / ms / 1e9:5.2f} TB/s")


def states(batch: int, tokens: int) -> torch.Tensor:
    """Vectors in the layout of a model's key states: `[batch, HEADS, tokens, DIM]`, tokens before heads."""
    return torch.randn(batch, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def storage(x: torch.Tensor, bits: float) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, int]:
    """Planes and float16 scales for `x`, and their bytes."""
    rows = x.shape[:3]
    wide = wide_of(bits)
    sizes = [(DIM - (wide.dim if wide else 0), int(bits))]
    sizes = [(wide.dim, wide.bits), *sizes] if wide else sizes
    planes = [
        torch.zeros(*rows, n * w // 8, device="cuda", dtype=torch.uint8) for n, b in sizes for w in plane_widths(b)
    ]
    scale = torch.zeros(*rows, 1, device="cuda", dtype=torch.float16)
    return tuple(planes), scale, sum(plane.nbytes for plane in planes) + scale.nbytes


def bench_encode(x: torch.Tensor, bits: float, kind: str) -> None:
    """Encode all of `x`."""
    planes, scale, nbytes = storage(x, bits)
    by = encoder(rotation(kind), None, levels_of(int(bits)), "fp16", wide=wide_of(bits))
    call = functools.partial(encode, x, planes, scale, 0, by)
    report(f"encode {bits} bits {kind}", call, x.numel() // DIM, x.nbytes + nbytes)


def bench_dequantize(x: torch.Tensor, bits: float, uniform: bool) -> None:
    """Write as many vectors as `x` has, bfloat16."""
    planes, scale, nbytes = storage(x, bits)
    packed = Packed(planes, scale, levels_of(int(bits)), int(bits), uniform=uniform, wide=wide_of(bits))
    call = functools.partial(dequantize, packed, x, 0)
    name = f"dequantize {bits} bits, {'evenly spaced' if uniform else 'any'} levels"
    report(name, call, x.numel() // DIM, x.nbytes + nbytes)


def bench(batch: int, tokens: int) -> None:
    """All kernels on `batch * HEADS * tokens` vectors."""
    x = states(batch, tokens)
    print(f"{x.numel() // DIM} vectors")
    report("clone", x.clone, x.numel() // DIM, 2 * x.nbytes)
    for bits in (2, 3, 4):
        for kind in ("hadamard", "dense"):
            bench_encode(x, bits, kind)
        for uniform in (False, True):
            bench_dequantize(x, bits, uniform)
    for bits in (2.5, 3.5):
        bench_encode(x, bits, "hadamard")
        bench_dequantize(x, bits, False)


def compare_tilings(batch: int, tokens: int) -> None:
    """The same work cut up in other ways than the default."""
    x, default = states(batch, tokens), encoding._tiling
    for block, warps, registers in TILINGS:
        options = {"num_warps": warps, "num_stages": 2} | ({"maxnreg": registers} if registers else {})
        encoding._tiling = lambda *a, block=block, options=options: default(*a)._replace(block=block, options=options)
        print(f"tiles of {block} tokens, {warps} warps, {registers or 'any number of'} registers")
        for bits in (3, 4):
            for kind in ("hadamard", "dense"):
                bench_encode(x, bits, kind)
    encoding._tiling = default


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    bench(1, 2**17)
    bench(8, 1)
    compare_tilings(1, 2**17)
