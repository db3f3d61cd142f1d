"""The queries of a decode in the basis of the stored keys: its first launch.

The naive version is `reference.prepare`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Scratch, launch
from .overlap import launch_options, let_next_start, wait_for_previous

TILE = 32  # coordinates a program


@triton.jit
def load_columns(
    p_query, query_b, query_h, query_q, i_b, i_h, i_c, columns, queries, DIM: tl.constexpr, DIM_PAD: tl.constexpr
):
    """The queries `[len(i_c), DIM_PAD]` of columns `i_c` of a KV head; zeros past the end."""
    head, query = i_h * (columns // queries) + i_c // queries, i_c % queries
    i_d = tl.arange(0, DIM_PAD)
    p_row = p_query + i_b * query_b + head * query_h + query * query_q
    return tl.load(p_row[:, None] + i_d[None, :], mask=(i_c < columns)[:, None] & (i_d < DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["kv_heads", "columns", "queries"])
def _prepare(
    p_query, p_back, p_mean, p_rotated, p_bias, query_b, query_h, query_q, back_h, mean_h,
    kv_heads, columns, queries, scaling, DIM: tl.constexpr, DIM_PAD: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_head // kv_heads, i_head % kv_heads
    i_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i_d, i_n = tl.arange(0, DIM_PAD), tl.program_id(2) * TILE + tl.arange(0, TILE)
    m_back = (i_d < DIM)[:, None] & (i_n < DIM)[None, :]
    back = tl.load(p_back + i_h * back_h + i_n[None, :] * DIM + i_d[:, None], mask=m_back, other=0.0)
    wait_for_previous(OVERLAP)
    if EARLY:
        let_next_start(OVERLAP)
    query = load_columns(p_query, query_b, query_h, query_q, i_b, i_h, i_c, columns, queries, DIM, DIM_PAD)
    query = query.to(tl.float32)
    rotated = tl.dot(query, back, input_precision=PRECISION)
    o_c = i_head * columns + i_c
    m_out = (i_c < columns)[:, None] & (i_n < DIM)[None, :]
    tl.store(p_rotated + o_c[:, None] * DIM + i_n[None, :], rotated, mask=m_out)
    if tl.program_id(2) == 0:
        bias = tl.zeros([COLUMNS], tl.float32)
        if p_mean is not None:
            mean = tl.load(p_mean + i_h * mean_h + i_d, mask=i_d < DIM, other=0.0)
            bias = tl.sum(query * mean[None, :], 1) * scaling
        tl.store(p_bias + o_c, bias, mask=i_c < columns)
    if not EARLY:
        let_next_start(OVERLAP)


def prepare(
    query: Tensor,
    key_back: Tensor,
    key_mean: Tensor | None,
    rotated: Tensor,
    bias: Tensor,
    scaling: float,
    early: bool = True,
) -> None:
    """Write `rotated` and `bias`.

    Args:
        query: float16, bfloat16 or float32 `[batch, kv_heads * share, queries, head_dim]`, last stride 1.
        key_back: float32 `[1 or kv_heads, head_dim, head_dim]`: key = stored key @ key_back + key_mean.
        key_mean: float32 `[kv_heads, head_dim]`.
        rotated: query @ key_back^T, float32 `[batch, kv_heads, share * queries, head_dim]`.
        bias: query . key_mean * scaling, float32 `[batch, kv_heads, share * queries]`.
        early: let the next kernel start at once, not at the end.
    """
    batch, kv_heads, columns, dim = rotated.shape
    queries = query.shape[2]
    if rotated.numel() == 0:
        return
    if key_mean is None and key_back.shape[0] == 1 and query.stride(0) == query.shape[1] * query.stride(1):
        batch, kv_heads, columns = 1, 1, batch * kv_heads * columns  # one rotation for all: as the columns of one head
    pad = max(16, triton.next_power_of_2(dim))
    rows = 4 if batch * kv_heads * columns <= 512 else 64
    launch(
        _prepare, (batch * kv_heads, triton.cdiv(columns, rows), triton.cdiv(dim, TILE)),
        query, key_back, key_mean, rotated, bias, *query.stride()[:3],
        0 if key_back.shape[0] == 1 else key_back.stride(0), 0 if key_mean is None else key_mean.stride(0),
        kv_heads, columns, queries, scaling,
        DIM=dim, DIM_PAD=pad, COLUMNS=rows, TILE=TILE, PRECISION=precision(), EARLY=early, num_warps=4,
        **launch_options(query.device),
    )  # fmt: skip


def precision() -> str:
    """How to multiply float32 matrices to float32 accuracy: on NVIDIA's tensor cores in three steps."""
    return "ieee" if torch.version.hip else "tf32x3"


def empty(query: Tensor, kv_heads: int, memory: Tensor | Scratch) -> tuple[Tensor, Tensor]:
    """Uninitialised `rotated` and `bias` for `prepare`, from `memory.new_empty`."""
    batch, heads, queries, dim = query.shape
    shape = batch, kv_heads, heads // kv_heads * queries
    return memory.new_empty(*shape, dim, dtype=torch.float32), memory.new_empty(*shape, dtype=torch.float32)
