"""Steps of the vLLM plugin, without vLLM: from an engine's metadata to the sequences that are attended to together."""

import pytest
import torch
from test_vllm_pages import BLOCK, as_read, empty_pages, form, slots, states  # noqa: F401  # `form` is a fixture
from tqcompress.plugins.vllm.schedule import Step

from tqcompress.blockwise import attend_exact

TABLES = [[4, 1, 6], [0, 7, 9], [2, 5, 10], [3, 8, 11], [12, 13, 14]]


# For each sequence what it has and what is new: single tokens that follow each other or not, chunks, nothing new.
@pytest.mark.parametrize(
    "batch",
    [
        [(9, 1), (0, 1), (17, 1)],
        [(9, 1), (4, 1), (2, 7), (0, 12)],
        [(5, 3), (9, 1), (11, 2), (0, 1), (20, 1)],
        [(9, 1), (7, 0), (3, 1)],
    ],
    ids=["steps", "steps first", "mixed", "one without"],
)
@pytest.mark.parametrize("more", [0, 3])  # what the engine's bound for single tokens may be too large by
def test_every_sequence_gets_its_own_attention(form, batch, more):  # noqa: F811
    """Whatever a step is made of, each sequence attends to what it has stored and to its new tokens."""
    pages, share, (heads, dim) = empty_pages(form, 15), 2, form.exact_shape[2:]
    kept = [states(form, past + new, seed) for seed, (past, new) in enumerate(batch)]
    for one, table, (past, _) in zip(kept, TABLES, batch, strict=False):
        form.write(pages, slots(table, 0, past), *one[:, :past])
    counts = [new for _, new in batch]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    lengths = [past + new for past, new in batch]
    padding = torch.tensor([-1, -1])
    where = [slots(t, past, past + new) for t, (past, new) in zip(TABLES, batch, strict=False)]
    step = Step(
        starts, torch.tensor(lengths, dtype=torch.int32),
        [length + more * (new == 1) for length, new in zip(lengths, counts, strict=True)],
        torch.tensor(TABLES[: len(batch)], dtype=torch.int32), torch.cat([*where, padding]),
    )  # fmt: skip
    assert sum(new > 1 for new in counts) + any(new == 1 for new in counts) == len(step.batches)
    query = torch.randn(starts[-1], share * heads, dim, generator=torch.Generator().manual_seed(1))
    fresh = torch.cat([one[:, past:] for one, (past, _) in zip(kept, batch, strict=True)], dim=1)
    got = torch.full_like(query, torch.nan)
    for tokens, tables, past, longest in step.batches:
        parts = (x[tokens].unflatten(0, (len(past), -1)).transpose(1, 2) for x in (query, *fresh))
        got[tokens] = form.attend(pages, tables, past, *parts, 0.3, None, longest).transpose(1, 2).flatten(0, 1)
    for i, (past, new) in enumerate(batch):
        if new:
            mine = query[starts[i] : starts[i + 1]].transpose(0, 1)[None]
            want = attend_exact(mine, *as_read(form, kept[i], past), None, 0.3)[0]
            torch.testing.assert_close(got[starts[i] : starts[i + 1]], want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_which_tokens_pages_keep_exact():
    """The first three of every page, of those that are written at all; found once."""
    where = torch.tensor([0, 2, 3, 7, 8, 10, 11, -1, 17])
    step = Step([0, 9], torch.tensor([9], dtype=torch.int32), [9], torch.zeros(1, 3, dtype=torch.int32), where)
    assert step.exact(BLOCK, 3).tolist() == [0, 1, 4, 5, 8]
    assert step.exact(BLOCK, 3) is step.exact(BLOCK, 3)
    assert step.exact(BLOCK, 0).tolist() == []
