"""Packed tokens as ordinary vectors in the stored basis, a bounded number of them at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device
from .packed import Packed, plane_widths, unflat
from .storage import aligned, load_digits, load_shuffled, load_states, offset_of, units

BLOCK = 64  # tokens of a program


@triton.jit(do_not_specialize=["table_stride", "start", "tokens"])
def dequantize_kernel(
    planes,  # tuple, widest first
    scale,
    levels,
    block_table,
    out,
    plane_strides,  # tuples of strides in units, times 16: whatever they are, Triton compiles once
    scale_strides,
    out_strides,
    table_stride,
    start,
    tokens,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WIDTHS: tl.constexpr,
    LOWS: tl.constexpr,  # where the bits of a plane begin in a code
    UNIFORM: tl.constexpr,
    WINDOW: tl.constexpr,
    LOG_SCALE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,  # 0 without a block table
    PLANE_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens `program_id(0) * BLOCK` and on of head `program_id(1)` of batch element `program_id(2)`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    seen = lane < tokens - first
    if PAGE_TOKENS:
        token = start + first + lane
        page = tl.load(block_table + batch * table_stride + token // PAGE_TOKENS, mask=seen, other=0).to(tl.int64)
        row, lane = token % PAGE_TOKENS, lane * 0
    else:
        page, row = batch, start + first
    code = tl.zeros((BLOCK, SIZE // 8, 8), tl.int32)
    for i in tl.static_range(len(planes)):
        strides = (plane_strides[3 * i], plane_strides[3 * i + 1], plane_strides[3 * i + 2])
        rows = planes[i] + offset_of(page, row, head, lane, strides, PLANE_UNIT)
        if WINDOW:
            code = load_states(rows, seen, BITS, WINDOW, SIZE, DIM)
        elif BITS == 3 and WIDTHS[i] == 1:
            code |= load_shuffled(rows, seen, SIZE, DIM, ALIGNED) << LOWS[i]
        else:
            code |= load_digits(rows, seen, WIDTHS[i], SIZE, DIM, ALIGNED) << LOWS[i]
    stored = tl.load(scale + offset_of(page, row, head, lane, scale_strides, 1), mask=seen, other=0).to(tl.float32)
    if LOG_SCALE:
        stored = tl.where(stored == 0, 0.0, tl.exp2(stored * 0.0625 - 8.0))
    y = _levels_of(code, levels, BITS, UNIFORM) * stored[:, None, None]
    column = tl.arange(0, SIZE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    target = out + offset_of(batch, first, head, tl.arange(0, BLOCK), out_strides, OUT_UNIT)
    mask = seen[:, None, None]
    if DIM < SIZE:
        mask = mask & (column < DIM)[None, :, :]
    tl.store(target[:, None, None] + column[None, :, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _levels_of(code, levels, BITS: tl.constexpr, UNIFORM: tl.constexpr):
    """The float32 levels of int32 codes."""
    if UNIFORM:
        # As the low bits of a float32 whose last bit is worth 1/2, codes are numbers without a conversion.
        number = ((code << 1) | 0x4A800000).to(tl.float32, bitcast=True) - (4194304 + (1 << (BITS - 1)) - 0.5)
        level = number * (tl.load(levels + (1 << BITS) - 1) * (2 / ((1 << BITS) - 1)))
    else:
        # A table of a cache line or a few, all of a warp's loads from which are one access: a tree of selections
        # takes twice the instructions.
        level = tl.load(levels + code)
    return level


def dequantize(packed: Packed, out: Tensor, start: int, block_table: Tensor | None = None) -> None:
    """Write `levels[code] * scale` of tokens from `start` on, as many as `out` has room for.

    Args:
        packed: the stored side; scalar levels are symmetric about zero.
        out: `[batch, kv_heads, tokens, head_dim]` float16, bfloat16 or float32; all strides but the last are free.
        start: the first token.
        block_table: int32 `[batch, max_pages]` or None. If given, token t is row `t % page_tokens` of page
            `block_table[b, t // page_tokens]` of the stored tensors.
    """
    if out.numel() == 0:
        return
    with on_device(out):
        for first, count, part in packed.parts(out.shape[3]):
            _launch(part, out[..., first : first + count], start, block_table)


@torch.library.custom_op("tqcompress::dequantize", mutates_args={"out"})
def dequantize_op(
    planes: list[Tensor],
    scale: Tensor,
    levels: Tensor,
    bits: int,
    uniform: bool,
    window: int,
    out: Tensor,
    start: int,
    block_table: Tensor | None,
    wide_levels: Tensor | None = None,
    wide_dim: int = 0,
    wide_bits: int = 0,
    wide_uniform: bool = False,
) -> None:
    """`dequantize` for compiled models."""
    wide = wide_levels, wide_dim, wide_bits, wide_uniform
    dequantize(unflat(planes, scale, levels, bits, None, uniform, window, *wide), out, start, block_table)


@dequantize_op.register_fake
def _(planes, scale, levels, bits, uniform, window, out, start, block_table, *wide) -> None:
    return None


def _launch(packed: Packed, out: Tensor, start: int, block_table: Tensor | None) -> None:
    batch, heads, tokens, dim = out.shape
    widths = (packed.bits,) if packed.window else plane_widths(packed.bits)
    plane_unit, plane_strides = units(tuple(stride for plane in packed.planes for stride in plane.stride()[:3]), 16)
    out_unit, out_strides = units(out.stride()[:3], 8)
    dequantize_kernel[(triton.cdiv(tokens, BLOCK), heads, batch)](
        packed.planes,
        packed.scale,
        packed.levels,
        block_table,
        out,
        plane_strides,
        units(packed.scale.stride()[:3], 1)[1],
        out_strides,
        0 if block_table is None else block_table.stride(0),
        start,
        tokens,
        DIM=dim,
        SIZE=max(16, triton.next_power_of_2(dim)),
        BITS=packed.bits,
        WIDTHS=widths,
        LOWS=tuple(sum(widths[:i]) for i in range(len(widths))),
        UNIFORM=packed.uniform,
        WINDOW=packed.window,
        LOG_SCALE=packed.scale.dtype == torch.uint8,
        PAGE_TOKENS=0 if block_table is None else packed.planes[0].shape[2],
        PLANE_UNIT=plane_unit,
        OUT_UNIT=out_unit,
        ALIGNED=not packed.window and aligned(packed.planes, widths),
        BLOCK=BLOCK,
        num_warps=4,
    )
