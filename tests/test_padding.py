"""In a batch padded on the left, the exact sinks are each row's first real tokens, not its padding."""

import pytest
import torch
from tiny import tiny_model

import tqcompress
from tqcompress import ModelError
from tqcompress.cache import _sinks_first

# One bit for everything but sinks and a short window: rows agree only if the right tokens stay exact.
ROUGH = {"version": 1, "key": {"bits": 1}, "value": {"bits": 1}, "keep": {"sinks": 3, "window": 4}}
PADS = [0, 2, 7]


def padded_batch(prompt):
    rows = [torch.cat([torch.zeros(pads, dtype=torch.long), prompt[: len(prompt) - pads]]) for pads in PADS]
    mask = torch.stack([torch.arange(len(prompt)) >= pads for pads in PADS]).long()
    return torch.stack(rows), mask


def test_order_puts_sinks_first_then_padding_then_the_rest():
    order = _sinks_first(torch.tensor([0, 1, 5, 9]), sinks=3, prompt=10)
    assert order.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [1, 2, 3, 0, 4, 5, 6, 7, 8, 9],
        [5, 6, 7, 0, 1, 2, 3, 4, 8, 9],
        [7, 8, 9, 0, 1, 2, 3, 4, 5, 6],  # a row of one token: what lies before it fills the sinks
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_padded_row_gets_the_logits_it_gets_alone(architecture):
    model = tiny_model(architecture)
    tqcompress.apply(model, ROUGH)
    prompt = torch.randint(1, 200, (30,), generator=torch.Generator().manual_seed(0))
    ids, mask = padded_batch(prompt)
    steps = torch.randint(1, 200, (3, 6), generator=torch.Generator().manual_seed(1))

    def continue_(ids, mask, steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        rows = []
        for i in range(steps.shape[1]):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
            step = steps[:, i : i + 1]
            rows.append(model(step, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
        return torch.cat(rows, 1)

    with torch.no_grad():
        together = continue_(ids, mask, steps)
        for row, pads in enumerate(PADS):
            alone = continue_(ids[row : row + 1, pads:], mask[row : row + 1, pads:], steps[row : row + 1])
            # The same vectors are encoded in both; only the order of float32 sums differs.
            assert (together[row] - alone[0]).abs().max() < 1e-3 * alone.abs().max()


def test_beams_and_crops_keep_the_rows_apart():
    model = tiny_model("llama")
    lossless = {"version": 1, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}, "keep": {"window": 4}}
    ids, mask = padded_batch(torch.randint(1, 200, (30,), generator=torch.Generator().manual_seed(2)))
    for settings in ({"num_beams": 3}, {"do_sample": False, "num_return_sequences": 1}):
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=10, **settings)
        tqcompress.apply(model, lossless)
        assert model.generate(ids, attention_mask=mask, max_new_tokens=10, **settings).equal(plain)
        tqcompress.remove(model)


def test_a_crop_into_a_padded_prompt_is_refused():
    model = tiny_model("llama")
    tqcompress.apply(model, ROUGH)
    ids, mask = padded_batch(torch.arange(1, 31))
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ModelError, match="left-padded prompt"):
        cache.crop(-1)
