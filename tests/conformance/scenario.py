"""Running a scenario with the reference and with the cache that is tested, and comparing what comes out."""

from collections.abc import Sequence

import torch
from setups import Pair
from tiny import prompt
from transformers import Cache

NEW = 12


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, padded on the left, and their mask."""
    ids = prompt(26, batch=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 15)):  # 15: the first packed tokens of that row are padding
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def generate(model, ids: torch.Tensor, **settings) -> torch.Tensor:
    """Token ids, seeded. With a mask: transformers would take a token that equals the padding token for padding."""
    torch.manual_seed(1)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **defaults | settings)


def assert_same_tokens(pair: Pair, ids: torch.Tensor, given: bool = False, **settings) -> torch.Tensor:
    """Both generate the same, the tested model with a cache that is `given` to it, or one that generate() makes."""
    cache = {"past_key_values": pair.reference(settings.get("attention_mask"))}
    want = generate(pair.plain, ids, **cache, **settings)
    cache = {"past_key_values": pair.cache()} if given else {}
    if pair.setup.fixed:
        settings |= {"disable_compile": True} | ({} if given else {"cache_implementation": "static"})
    got = generate(pair.compressed, ids, **cache, **settings)
    assert torch.equal(got, want)
    new = want[:, ids.shape[1] :]
    # Not one token repeated; random models of one layer do that, and beams that end early are short.
    assert len(set(new.flatten().tolist())) > (1 if pair.setup.lossy or "num_beams" in settings else 3)
    return want


@torch.no_grad()
def feed(model, cache: Cache, ids: torch.Tensor, pieces: Sequence[int], mask: torch.Tensor | None = None):
    """Logits `[batch, tokens, vocabulary]` of tokens given in pieces of these sizes, the rest one by one.

    `mask` `[batch, tokens]` is of all tokens, those that the cache holds already too.
    """
    pieces = [*(n for n in pieces if n), *[1] * (ids.shape[1] - sum(pieces))]
    out, last = [], int(cache.get_seq_length())
    for part in ids.split(pieces, dim=1):
        last += part.shape[1]
        given = {}
        if mask is not None:
            places = (mask[:, :last].cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
            given = {"attention_mask": mask[:, :last], "position_ids": places}
        out.append(model(part, past_key_values=cache, **given).logits)
    return torch.cat(out, dim=1)
