"""Passes that begin behind known layers: the same result to the bit, for less work."""

import logging

import pytest
import torch
from tiny import prompt, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tqcompress import api
from tqcompress.evaluate import Candidate, divergences
from tqcompress.prefix import Prefix

RECIPE = {"version": 1, "key": {"bits": 2}, "value": {"bits": 2}, "keep": {"sinks": 1, "window": 4}}


def candidates(model):
    """One for each layer that is compressed, which compresses the keys of its first head alone."""
    layers = api.plan_compression(model, RECIPE).layers
    return list(layers), [Candidate(lambda: layers, frozenset({(index, 0, "key")})) for index in layers]


def runs(model, windows, given):
    """The KL of each candidate, and how often each layer of the model computed something."""
    blocks, counts = Prefix(model, model.config.num_hidden_layers).blocks, {}
    for index, block in enumerate(blocks):
        inner = next(child for child in block.modules() if isinstance(child, nn.Linear | Conv1D))
        inner.register_forward_hook(lambda *_, index=index: counts.update({index: counts.get(index, 0) + 1}))
    return divergences(model, windows, given), counts


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt2", "gpt_oss", "cohere", "phi3", "qwen3_moe"])
def test_it_changes_nothing_but_the_work(monkeypatch, name):
    model = tiny_model(name)
    layers, given = candidates(model)
    windows = [prompt(24)[0], prompt(20, seed=1)[0]]
    found, counts = runs(model, windows, given)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert counts == {
        index: len(windows) * (1 + sum(first <= index for first in layers))
        for index in range(model.config.num_hidden_layers)
    }
    assert not any("forward" in module.__dict__ for module in model.modules())
    monkeypatch.setattr("tqcompress.prefix._blocks", lambda *_: [])
    assert divergences(model, windows, given) == found
    assert all(kl > 0 for kl in found) and len(set(found)) == len(found)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_forwards_of_others_are_put_back_also_after_an_error():
    model = tiny_model("llama")
    prefix, block = Prefix(model, 3), model.model.layers[1]
    block.forward = own = block.forward  # as accelerate does
    with prefix.recorded():
        want = model(prompt(9), use_cache=False).logits
    with pytest.raises(ZeroDivisionError), prefix.replayed(3):
        assert torch.equal(model(prompt(9, seed=1), use_cache=False).logits, want)
        1 / 0  # noqa: B018
    assert block.forward is own and "forward" not in model.model.layers[0].__dict__
    assert not any(block._forward_hooks for block in model.model.layers)


@pytest.mark.parametrize("layers", [2, 4])
def test_other_layers_than_caches_mean_whole_passes_and_that_is_said(caplog, layers):
    caplog.set_level(logging.INFO, "tqcompress")
    prefix = Prefix(tiny_model("llama"), layers)
    assert prefix.blocks == [] and "every pass goes through all of them" in caplog.text
    with prefix.recorded(), prefix.replayed(2):
        pass


def test_blocks_in_another_order_are_not_taken():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    assert Prefix(model, 3).blocks == []
