"""Packed pages of the vLLM plugin, without vLLM: what is written is read, for any table, codec and group of heads."""

import pytest
import torch
from tiny import tiny_model
from tqcompress.plugins.vllm.pages import PageFormat

from tqcompress import ModelError
from tqcompress.api import plan_compression
from tqcompress.blockwise import attend_exact

BLOCK = 8
RECIPE = {
    "version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "keep": {"sinks": 3, "window": 0},
    "rules": [{"layers": "all", "heads": [1], "key": {"bits": 8}, "value": {"bits": 2, "seed": 5}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def form() -> PageFormat:
    """Pages of a layer with two groups of heads."""
    model = tiny_model("llama")
    compression = plan_compression(model, RECIPE)
    return PageFormat(compression.layers[0], BLOCK, torch.float32)


def states(form: PageFormat, tokens: int, seed: int) -> torch.Tensor:
    """Random keys and values `[2, tokens, kv_heads, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, *form.exact_shape[2:], generator=generator)


def empty_pages(form: PageFormat, pages: int) -> torch.Tensor:
    """Pages as vLLM gives them, full of bytes that are no numbers in any float format."""
    return torch.full((pages, 1, form.block_size, form.content_bytes), 255, dtype=torch.uint8)


def slots(table: list[int], start: int, stop: int) -> torch.Tensor:
    """Where tokens `start` to `stop` of a sequence go."""
    return torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, stop)], dtype=torch.long)


def as_read(form: PageFormat, kept: torch.Tensor, exact_after: int) -> torch.Tensor:
    """Keys and values as attention sees them, `[2, 1, kv_heads, tokens, head_dim]`: by the codecs' own decode."""
    seen = kept.transpose(1, 2)[:, None].clone()
    for group in form.codecs.groups:
        for which, codec in enumerate((group.key, group.value)):
            mine = seen[which][:, list(group.heads)]
            decoded = codec.decode(codec.encode(mine))
            decoded[:, :, : form.sinks], decoded[:, :, exact_after:] = (
                mine[:, :, : form.sinks],
                mine[:, :, exact_after:],
            )
            seen[which][:, list(group.heads)] = decoded
    return seen


def test_bytes_of_a_page(form):
    """Of a token, exactly the bytes of its codes and scales; the exact part is rounded up to whole bytes a token."""
    heads, dim = form.exact_shape[2:]
    rows = (heads - 1) * (dim * 4 // 8 + dim * 3 // 8 + 4) + (dim * 8 // 8 + dim * 2 // 8 + 4)
    assert form.packed_bytes == rows
    assert form.content_bytes == rows + -(-3 * 2 * heads * dim * 4 // BLOCK)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("past", [0, 2, 3, 8, 21])
def test_reads_what_was_written(form, past, new):
    """One sequence, with its pages in any order, written in two parts; places without a token hold no numbers."""
    table, kept = [4, 1, 6, 2], states(form, past + new, 0)
    pages = empty_pages(form, 7)
    for start, stop in ((0, past // 2), (past // 2, past + new)):
        form.write(pages, slots(table, start, stop), *kept[:, start:stop])
    share, (heads, dim) = 2, form.exact_shape[2:]
    query = torch.randn(1, share * heads, new, dim, generator=torch.Generator().manual_seed(1))
    fresh = (part.transpose(0, 1)[None] for part in kept[:, past:])
    got = form.attend(pages, torch.tensor([table]), torch.tensor([past]), query, *fresh, 0.3)
    want = attend_exact(query, *as_read(form, kept, past), None, 0.3)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # sums of tens of float32 products of order 1


def test_a_batch_is_each_of_its_sequences(form):
    """Decoding steps of different lengths at once, one of them with no past, two that share a page."""
    tables, pasts = [[3, 5, 0], [3, 1, 2], [6, 0, 0]], [19, 10, 0]
    pages, longest = empty_pages(form, 7), states(form, 19, 2)
    form.write(pages, slots(tables[0], 0, 19), *longest)
    other = torch.cat([longest[:, :8], states(form, 2, 3)], dim=1)
    form.write(pages, slots(tables[1], 8, 10), *other[:, 8:])
    share, (heads, dim) = 2, form.exact_shape[2:]
    query = torch.randn(3, share * heads, 1, dim, generator=torch.Generator().manual_seed(4))
    key, value = (part.transpose(1, 2) for part in states(form, 3, 5)[:, :, None])
    got = form.attend(pages, torch.tensor(tables), torch.tensor(pasts), query, key, value, 0.3)
    for i, kept in enumerate((longest, other, longest[:, :0])):
        whole = torch.cat([kept, torch.stack([key[i], value[i]]).transpose(1, 2)], dim=1)
        want = attend_exact(query[i : i + 1], *as_read(form, whole, pasts[i]), None, 0.3)[0]
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-5)


def test_slots_below_zero_are_not_written(form):
    """vLLM pads a batch with them."""
    pages, kept = empty_pages(form, 2), states(form, 2, 6)
    form.write(pages, torch.tensor([-1, -1]), *kept)
    assert (pages == 255).all()


def test_what_no_scale_can_hold_is_an_error(form):
    """Not a page that reads as not-a-number for as long as it is shared."""
    kept = states(form, 1, 7)
    kept[0, 0, 0, 0] = float("inf")
    with pytest.raises(ModelError, match="cannot store"):
        form.write(empty_pages(form, 2), torch.tensor([0]), *kept)
