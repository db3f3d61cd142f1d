"""Pages of the vLLM plugin by kernels: they hold what torch writes, and attention reads of them what torch reads.

Kernels are interpreted on the CPU, compiled on CUDA.
"""

import pytest
import torch
from kernels_helpers import DEVICE
from test_vllm_pages import RECIPE, empty_pages, states
from tiny import tiny_model
from tqcompress.plugins.vllm.fused_pages import FusedPages
from tqcompress.plugins.vllm.pages import PageFormat

from tqcompress import ModelError
from tqcompress.api import plan_compression
from tqcompress_kernels import plain

HERE = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
BLOCK = 32
BOUND = 2e-3  # of the norm of the output: the kernels' promise


@pytest.fixture(scope="module")
def forms() -> tuple[PageFormat, FusedPages]:
    """Pages of a layer with two groups of heads, by torch and by kernels."""
    codecs = plan_compression(tiny_model("llama"), RECIPE).layers[0]
    for group in codecs.groups:
        group.key.to(HERE), group.value.to(HERE)
    fused = FusedPages(codecs, BLOCK, torch.float32, HERE)
    for _, group in fused.groups:
        if DEVICE == "cpu":
            group.split = plain.split
    return PageFormat(codecs, BLOCK, torch.float32), fused


def filled(form: PageFormat, table: list[int], kept: torch.Tensor, pages: torch.Tensor | None = None) -> torch.Tensor:
    """Pages with the tokens `[2, tokens, kv_heads, head_dim]` of a sequence, written in two parts."""
    pages = empty_pages(form, 9).to(HERE) if pages is None else pages
    count = kept.shape[1]
    for start, stop in ((0, count // 3), (count // 3, count)):
        where = torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, stop)], dtype=torch.long)
        form.write(pages, where.to(HERE), *kept[:, start:stop].to(HERE))
    return pages


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert ((got - want).norm(dim=-1) <= BOUND * want.norm(dim=-1)).all()


def test_kernels_tell_what_they_could_not_store(forms):
    """A key that is not a number: the next write, once the host has heard of it. Places of no token say nothing."""
    codecs, kept = forms[0].codecs, states(forms[0], 4, 0)
    fused = FusedPages(codecs, BLOCK, torch.float32, HERE)
    pages, where = empty_pages(fused, 3).to(HERE), torch.tensor([5, 6, 7, -1], device=HERE)
    bad = kept.clone()
    bad[0, 3] = torch.nan
    fused.write(pages, where, *bad.to(HERE))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    fused.write(pages, where, *kept.to(HERE))
    bad[0, 1, 1, 2] = torch.nan
    fused.write(pages, where, *bad.to(HERE))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ModelError, match="layer 0: keys or values written before cannot be stored"):
        fused.write(pages, where, *kept.to(HERE))


def test_kernels_write_what_torch_writes(forms):
    """The same bytes, but for codes that fall halfway between two levels; and nothing else is touched."""
    kept = states(forms[0], 75, 0)
    want, got = (filled(form, [4, 1, 6], kept) for form in forms)
    assert (want != got).float().mean() < 1e-3
    assert (got[[0, 2, 3, 5, 7, 8]] == 255).all()
    forms[1].write(got, torch.tensor([-1, -1], device=HERE), *kept[:, :2].to(HERE))
    assert (want != got).float().mean() < 1e-3


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("past", [0, 2, 3, 32, 75])
@pytest.mark.parametrize("new", [1, 40])
def test_kernels_read_what_torch_reads(forms, past, new, softcap):
    """A step and a chunk of one sequence; places without a token hold no numbers."""
    torch_form, fused = forms
    pages, table = filled(fused, [4, 1, 6], states(fused, past, 1)), torch.tensor([[4, 1, 6]], device=HERE)
    query, fresh = _new(fused, 1, new)
    want = torch_form.attend(pages, table, torch.tensor([past], device=HERE), query, *fresh, 0.3, softcap)
    counts = torch.tensor([past], device=HERE, dtype=torch.int32)
    close(fused.attend(pages, table.int(), counts, query, *fresh, 0.3, softcap), want)


def test_a_batch_of_steps(forms):
    """Different lengths, one of them none and one shorter than the exact tokens, two that share a page."""
    torch_form, fused = forms
    tables = torch.tensor([[3, 5, 1], [3, 7, 2], [6, 8, 8], [0, 8, 8]], device=HERE)
    past = torch.tensor([75, 40, 0, 2], device=HERE)
    pages = filled(fused, [3, 5, 1], states(fused, 75, 2))
    filled(fused, [3, 7, 2], states(fused, 75, 2)[:, :40], pages)  # the same first page
    filled(fused, [0], states(fused, 2, 3), pages)
    query, fresh = _new(fused, 4, 1)
    want = torch_form.attend(pages, tables, past, query, *fresh, 0.3)
    close(fused.attend(pages, tables.int(), past.int(), query, *fresh, 0.3), want)
    # The host may know a bound only.
    close(fused.attend(pages, tables.int(), past.int(), query, *fresh, 0.3, longest=96), want)


def _new(form: PageFormat, batch: int, new: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Queries of two heads for each KV head, and new keys and values, `[batch, heads, new, head_dim]`."""
    heads, dim = form.exact_shape[2:]
    query = torch.randn(batch, 2 * heads, new, dim, generator=torch.Generator().manual_seed(5)).to(HERE)
    fresh = states(form, batch * new, 6).unflatten(1, (batch, new)).transpose(2, 3)
    return query, [part.to(HERE) for part in fresh]
