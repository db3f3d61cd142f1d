"""What kernels stored that does not hold what came is found without waiting for the device.

Kernels are interpreted on the CPU, compiled on CUDA.
"""

import copy
import math

import pytest
import torch
from test_steps import compressed, fused_everywhere, make_cache  # first: how the kernels run

import tqcompress
from tqcompress import ModelError

__all__ = ["fused_everywhere"]
RECIPE = {"version": 1, "key": {"bits": 3}, "value": {"bits": 3}, "keep": {"sinks": 3, "window": 8}}
FOUND = r"layer 0, KV heads \[0\]"


class Fed:
    """The only layer of a cache, given random tokens."""

    def __init__(self, kind: str):
        self.model = compressed(recipe=RECIPE)
        self.cache = make_cache(kind, self.model, 400)
        self.model.tqcompress.compress_layers(self.cache)
        self.layer = self.cache.layers[0]
        assert self.layer.codecs.groups[0].backend.append is not None

    @torch.no_grad()
    def add(self, tokens: int, bad: float = 0.0) -> None:
        """Update and attend; `bad`, if not 0, is a coordinate of an early key."""
        states = torch.randn(1, 1, tokens, 16, generator=torch.Generator().manual_seed(tokens)).to(self.model.device)
        keys = states.clone()
        keys[0, 0, tokens // 6, 3] += bad
        view = self.layer.update(keys, states)[0]
        if not isinstance(view, torch.Tensor):
            view.attend(states[:, :, -1:].expand(1, 2, -1, -1), None, 0.25, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e7])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_in_a_prompt(kind, bad):
    """1e7 overflows the fp16 scale. A growing cache tells a step later, one of fixed size with the next chunk."""
    fed = Fed(kind)
    fed.add(60)
    tqcompress.verify(fed.cache)
    fed.layer.reset()
    fed.add(120, bad)
    before = int(fed.layer.get_seq_length())
    with pytest.raises(ModelError, match=FOUND):
        tqcompress.verify(copy.deepcopy(fed.cache))
    if fed.model.device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ModelError, match=FOUND):
        fed.add(1 if kind == "growing" else 2)
    assert int(fed.layer.get_seq_length()) == before
    fed.layer.reset()  # and is as good as new
    fed.add(60)
    fed.add(1)
    tqcompress.verify(fed.cache)


def test_in_a_step():
    """The token leaves the ring with its block of 64; the step after next tells."""
    fed = Fed("growing")
    fed.add(60)
    fed.add(1, math.nan)
    late = 0  # steps after the one that encodes it
    with pytest.raises(ModelError, match=FOUND):
        for _ in range(200):
            fed.add(1)
            late += fed.layer.rings[0].packed(fed.layer.tokens) >= 64
    assert late <= 2


def test_what_was_cropped_away_is_forgiven():
    fed = Fed("growing")
    fed.add(60)
    fed.add(100, math.nan)
    fed.layer.crop(-90)  # of 160, the bad one being number 76
    tqcompress.verify(fed.cache)
    fed.add(1)


def test_verify_reads_the_exact_tokens_too():
    fed = Fed("growing")
    fed.add(60)
    fed.add(1, math.nan)
    with pytest.raises(ModelError, match=rf"{FOUND}: keys of 1 tokens are infinite or not a number"):
        tqcompress.verify(fed.cache)
