"""Encoding in one kernel: rotate, centre, normalise, quantize, correct the norm, pack, and store where the cache is."""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode_kernel import encode_kernel
from .launch import Scratch, launch, on_device
from .overlap import launch_options
from .packed import Wide, plane_widths
from .ring import BLOCK, Ring
from .storage import aligned, units

if TYPE_CHECKING:
    from .encode_trellis import TrellisEncoder

AnyEncoder = Union["Encoder", "TrellisEncoder"]
INTERPRETED = not isinstance(encode_kernel, triton.JITFunction)
CHUNK_BYTES = 24 << 10  # of a matrix that is streamed through shared memory, twice
FEW = 16  # vectors of a head that are encoded one a program, without a matrix product
LINEAR_BITS = 4  # up to here a coordinate is compared with every boundary; above, by binary search in the table


class Encoder(NamedTuple):
    """What `encode` needs to know of one side (keys or values) of a layer; made once by `encoder`.

    Attributes:
        matrix: bfloat16 `[terms, 1 or kv_heads, size, size]`; `factor` times the sum of the terms is the map into
            the stored basis, to float32. Padded with zeros to a power of two, columns in the order of `_columns`.
        mean: float32 `[kv_heads, size]`, the mean in the basis of `matrix`, or None.
        table: float32, the positive boundaries and then the squares of the positive levels, both ascending; with `wide`
            those of the first coordinates and then those of the others.
        uniform: whether the levels are evenly spaced.
        wide: how many of the first coordinates have `wide_bits`, the others having `bits`.
    """

    matrix: Tensor
    mean: Tensor | None
    table: Tensor
    factor: float
    bits: int
    log_scale: bool
    norm_correction: bool
    uniform: bool
    wide: int = 0
    wide_bits: int = 0
    wide_uniform: bool = False

    def launch(
        self, x: Tensor, planes: tuple[Tensor, ...], scale: Tensor, start: int, slots: Tensor | None,
        ring: Ring | None = None, count: bool = False, memory: Scratch | None = None,
    ) -> None:  # fmt: skip
        """Encode `x` as `encode` says, or with a ring as `encode_due` does, if a block leaves it."""
        run(self, x, planes, scale, start, slots, ring, count, planes[0].shape[2])


def encoder(
    into: Tensor, mean: Tensor | None, levels: Tensor, scale_format: str, norm_correction: bool = True,
    wide: Wide | None = None,
) -> Encoder:  # fmt: skip
    """Prepare an `Encoder`; reads values on the host, so not while a CUDA graph is captured.

    Args:
        into: float32 `[1 or kv_heads, head_dim, head_dim]`; stored are the coordinates of `(x - mean) @ into`.
        mean: float32 `[kv_heads, head_dim]` or None.
        levels: float32 `[2**bits]`, ascending and symmetric about zero.
        scale_format: "fp16" or "log8".
        wide: the first coordinates, if they have levels of their own, symmetric as well.
    """
    dim = into.shape[-1]
    if dim % 8 or dim > 256:
        raise ValueError(f"head_dim: found {dim}; multiples of 8 up to 256 are supported")
    if wide and (wide.dim % 16 or not 0 < wide.dim < dim):
        raise ValueError(f"wide.dim: found {wide.dim}; multiples of 16 below {dim} are supported")
    (terms, factor), rest = _bfloat16_terms(into.double()), _size(dim) - dim
    matrix = _columns(torch.nn.functional.pad(terms, (0, rest, 0, rest))).contiguous()
    if mean is not None:
        mean = (mean.double()[:, None] @ into.double())[:, 0] / factor
        mean = _columns(torch.nn.functional.pad(mean, (0, rest))).float().contiguous()
    table, uniform = _table(levels)
    bits, log_scale = levels.shape[0].bit_length() - 1, scale_format == "log8"
    by = Encoder(matrix, mean, table, factor, bits, log_scale, norm_correction, uniform)
    if wide is None:
        return by
    first, even = _table(wide.levels)
    return by._replace(table=torch.cat([first, table]), wide=wide.dim, wide_bits=wide.bits, wide_uniform=even)


def _table(levels: Tensor) -> tuple[Tensor, bool]:
    """`Encoder`'s table of some levels, and whether these are evenly spaced."""
    count = levels.shape[0]
    if (levels + levels.flip(0)).abs().max() > 1e-6 * levels.abs().max():
        raise ValueError(f"levels: found {levels.tolist()}; they must be symmetric about zero")
    positive = levels[count // 2 :].float()
    odd = torch.arange(count // 2, device=levels.device) * 2 + 1
    uniform = count > 2 and bool((positive / positive[0] - odd).abs().max() < 1e-4)
    return torch.cat([(positive[1:] + positive[:-1]) / 2, positive.square()]), uniform


def encode(
    x: Tensor, planes: tuple[Tensor, ...], scale: Tensor, start: int, by: AnyEncoder, slots: Tensor | None = None
) -> None:
    """Encode vectors into rows of a cache's storage; nothing else there is touched.

    Args:
        x: `[batch, kv_heads, tokens, head_dim]` float16, bfloat16 or float32, any strides; copied unless the last is 1.
        planes: the bit planes, widest first, uint8 `[batch, kv_heads, rows, head_dim * width / 8]`; for `slots`
            `[pages, kv_heads, page_tokens, ...]`. All strides but the last are free.
        scale: `[..., rows, 1]`, float16 or uint8 (log8), shaped like the planes but for the last dimension.
        start: token t goes to row `start + t`.
        by: the prepared `encoder`, or `encode_trellis.trellis_encoder`, whose codes are one plane.
        slots: int64 `[batch, tokens]` or None. If given, token (b, t) goes to row `slots[b, t] % page_tokens` of page
            `slots[b, t] // page_tokens` instead, and nowhere if the slot is negative. A contiguous cache whose length
            is only known on the device is such a target: its "pages" are the batch.
    """
    if x.numel() == 0:
        return
    with on_device(x):
        by.launch(x, planes, scale, start, slots)


@torch.library.custom_op("tqcompress::encode", mutates_args={"planes", "scale"})
def encode_op(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    start: int,
    matrix: Tensor,
    mean: Tensor | None,
    table: Tensor,
    factor: float,
    bits: int,
    log_scale: bool,
    norm_correction: bool,
    uniform: bool,
    wide: int,
    wide_bits: int,
    wide_uniform: bool,
    slots: Tensor | None,
) -> None:
    """`encode` for compiled models: `encode_op(x, planes, scale, start, *encoder, slots)`."""
    by = Encoder(
        matrix, mean, table, factor, bits, log_scale, norm_correction, uniform, wide, wide_bits, wide_uniform
    )  # fmt: skip
    encode(x, tuple(planes), scale, start, by, slots)


@encode_op.register_fake
def _(x: Tensor, planes: list[Tensor], scale: Tensor, start: int, *_: Any) -> None:
    return None


def _size(dim: int) -> int:
    return max(64, triton.next_power_of_2(dim))


def _lanes(size: int) -> int:
    """Threads that share a row of the rotated tile when it comes out of a Hopper matrix product."""
    return 8 if size == 256 else 4


def _columns(x: Tensor) -> Tensor:
    """Reorder the last dimension so that each thread of that product gets adjacent coordinates.

    Four threads hold columns 0-1, 2-3, 4-5 and 6-7 of every eight (and half of the eights if eight threads share a
    row). Stored coordinates are read off thread by thread, so the kernel packs codes without exchanging any.
    """
    size, lanes = x.shape[-1], _lanes(x.shape[-1])
    return x.unflatten(-1, (lanes // 4, 4, size // lanes // 2, 2)).transpose(-2, -3).flatten(-4)


def _bfloat16_terms(into: Tensor) -> tuple[Tensor, float]:
    """bfloat16 tensors `[terms, ...]` whose sum times the factor is the float64 `into`, to float32.

    Entries of one magnitude, as in a Hadamard matrix, and of the identity are one term of ones; others are three.
    """
    magnitude = into.abs().max().item()
    factor = magnitude if (into.abs() == magnitude).all() else 1.0
    rest, terms = into / factor, []
    plain = ((rest == 0) | (rest.abs() == 1)).all()
    for _ in range(1 if plain else 3):
        terms.append(rest.to(torch.bfloat16))
        rest = rest - terms[-1].double()
    return torch.stack(terms), factor


class _Part(NamedTuple):
    """Coordinates with the same levels: where they, their planes and their table begin, and how levels are found."""

    first: int
    end: int
    bits: int
    method: str
    planes: int = 0
    table: int = 0


def _parts(by: Encoder, dim: int) -> list[_Part]:
    if by.table.dim() == 0:  # not of levels: a factor of vectors that are left as numbers
        return [_Part(0, dim, by.bits, "unit")]
    rest = by.wide, dim, by.bits, _method(by.bits, by.uniform)
    if not by.wide:
        return [_Part(*rest)]
    first = _Part(0, by.wide, by.wide_bits, _method(by.wide_bits, by.wide_uniform))
    return [first, _Part(*rest, len(plane_widths(by.wide_bits)), (1 << by.wide_bits) - 1)]


def _method(bits: int, uniform: bool) -> str:
    return "uniform" if uniform else "linear" if bits <= LINEAR_BITS else "search"


def _dot_type(dtype: torch.dtype, x_terms: int, block: int) -> tl.dtype:
    """What products are taken in. The interpreter knows no bfloat16 products; what is split is exact in float32."""
    if INTERPRETED or block == 1:
        return tl.float32
    return tl.float16 if dtype == torch.float16 and x_terms == 1 else tl.bfloat16


def _terms_of(dtype: torch.dtype, matrix_terms: int) -> int:
    """bfloat16 terms that a coordinate is split into; 1 leaves it as it is."""
    if dtype == torch.float32:
        return 3
    return 2 if dtype == torch.float16 and matrix_terms > 1 else 1


class _Tiling(NamedTuple):
    """How the work is cut up for a device."""

    block: int  # tokens of a tile; 1 computes without a matrix product
    resident: bool  # whether the matrix stays in shared memory from tile to tile
    programs: int  # at most, all heads together
    options: dict[str, int]  # of the compiler


VECTORS = _Tiling(1, False, 1 << 30, {"num_warps": 4})


@functools.cache
def _tiling(device: int | None, itemsize: int, terms: int, size: int) -> _Tiling:
    """The tiling for coordinates of `itemsize` bytes and a matrix of that size."""
    block, warps = (64, 8) if size == 256 else (128, 8 if size == 128 else 4)
    if INTERPRETED:
        return _Tiling(64, True, 1, {})
    properties = torch.cuda.get_device_properties(device)
    # Hopper and its successors read both operands of a product from shared memory: it pays to keep the matrix there.
    kept = {9: 220 << 10, 10: 150 << 10}.get(properties.major, 0) if torch.version.hip is None else 0
    resident = 2 * size * (size * terms + block * itemsize) <= kept
    options = {"num_warps": warps, "num_stages": 2}
    if resident and terms == 1 and itemsize == 2 and size <= 128:
        options["maxnreg"] = 128  # 16 warps a multiprocessor instead of 8
    return _Tiling(block, resident, 4 * properties.multi_processor_count, options)


def encode_due(
    ring: Ring, side: int, planes: tuple[Tensor, ...], scale: Tensor, by: AnyEncoder, memory: Scratch | None = None
) -> None:
    """Encode the block of tokens that leaves the ring at this step, if one does: for the host always the same call.

    `side` is 0 for keys and 1 for values. Keys come first in a step: their call also counts the packed tokens. See
    `encode` for the rest. `memory`: whose `new_empty` gives room for intermediate results; `x` if None.
    """
    x = ring.exact[side, :, :, ring.sinks :]
    with on_device(x):
        by.launch(x[:, :, : BLOCK.value], planes, scale, 0, None, ring, side == 0, memory)


def run(
    by: Encoder, x: Tensor, planes: tuple[Tensor, ...], scale: Tensor, start: int, slots: Tensor | None,
    ring: Ring | None, count: bool, capacity: int,
) -> None:  # fmt: skip
    """Choose the tiles and run the kernel; `capacity`: rows of the cache's storage."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    terms, matrices, size, _ = by.matrix.shape
    tiling = VECTORS if batch * tokens <= FEW else _tiling(x.device.index, x.element_size(), terms, size)
    if ring is not None:  # most calls find nothing to do and must end at once: no matrix is loaded before that
        tiling = _Tiling(BLOCK.value, False, 1 << 30, {} if INTERPRETED else {"num_warps": 4})
    block, x_terms = tiling.block, _terms_of(x.dtype, terms)
    flat = tokens < block or block == 1
    parts = _parts(by, dim)
    widths = [plane_widths(part.bits) for part in parts]
    tiles = -(-batch * tokens // block) if flat else batch * -(-tokens // block)
    per = -(-tiles // max(1, tiling.programs // heads))
    x_unit, x_strides = units(x.stride()[:3], 8)
    plane_unit, plane_strides = units(tuple(stride for plane in planes for stride in plane.stride()[:3]), 16)
    launch(
        encode_kernel,
        (-(-tiles // per), heads),
        x,
        tuple(planes),
        scale,
        slots,
        None if ring is None else ring.state,
        by.matrix,
        by.mean,
        by.table,
        x_strides,
        plane_strides,
        units(scale.stride()[:3], 1)[1],
        0 if slots is None else slots.stride(0),
        by.matrix.stride(0),
        by.matrix.stride(1) if matrices > 1 else 0,
        0 if ring is None else ring.sinks,
        capacity,
        batch,
        tokens,
        start,
        tiles,
        per,
        by.factor,
        DIM=dim,
        SIZE=size,
        LANES=_lanes(size),
        FIRST=tuple(part.first for part in parts),
        END=tuple(part.end for part in parts),
        BITS=tuple(part.bits for part in parts),
        METHOD=tuple(part.method for part in parts),
        PLANE=tuple(part.planes for part in parts),
        TABLE=tuple(part.table for part in parts),
        LOG_SCALE=by.log_scale,
        CORRECT=by.norm_correction,
        FLAT=flat,
        PAGE_TOKENS=0 if slots is None else planes[0].shape[2],
        X_UNIT=x_unit,
        PLANE_UNIT=plane_unit,
        ALIGNED=all(aligned(planes[part.planes :][: len(of)], of) for part, of in zip(parts, widths, strict=True)),
        X_TERMS=x_terms,
        M_TERMS=terms,
        DOT=_dot_type(x.dtype, x_terms, block),
        RESIDENT=tiling.resident,
        CHUNK=min(64, 1 << ((CHUNK_BYTES // (2 * terms * size)).bit_length() - 1)),
        BLOCK=block,
        ROOM=0 if ring is None else ring.room,
        COUNT=count,
        **({"OVERLAP": False} if ring is None else launch_options(x.device)),
        **tiling.options,
    )
