"""What kernels stored that does not hold what came is found without waiting for the device.

Kernels are interpreted on the CPU, compiled on CUDA.
"""

import copy
import math

import pytest
import torch
from test_steps import compressed, fused_everywhere, make_cache  # first: how the kernels run
from tiny import prompt

import tqcompress
from tqcompress import ModelError

__all__ = ["fused_everywhere"]
RECIPE = {"version": 1, "key": {"bits": 3}, "value": {"bits": 3}, "keep": {"sinks": 3, "window": 8}}
NEARLY_FULL = {"sinks": 3, "window": 60}  # rings of 128 tokens, that encode 64 soon after prompts of as many
FOUND = r"layer 0, KV heads \[0\]"


class Fed:
    """The only layer of a cache, given random tokens."""

    def __init__(self, kind: str, **changes):
        self.model = compressed(recipe=RECIPE | changes)
        self.cache = make_cache(kind, self.model, 400)
        self.model.tqcompress.compress_layers(self.cache)
        self.layer = self.cache.layers[0]
        assert self.layer.codecs.groups[0].backend.append is not None

    @torch.no_grad()
    def add(self, tokens: int, bad: float = 0.0, place: int | None = None) -> None:
        """Update and attend; `bad`, if not 0, is added to a coordinate of the key `place`, by default an early one."""
        states = torch.randn(1, 1, tokens, 16, generator=torch.Generator().manual_seed(tokens)).to(self.model.device)
        keys = states.clone()
        keys[0, 0, tokens // 6 if place is None else place, 3] += bad
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
    fed = Fed("growing", keep=NEARLY_FULL)
    fed.add(60)
    fed.add(1, math.nan)
    fed.add(64)
    late = 0  # steps after the one that encodes it
    with pytest.raises(ModelError, match=FOUND):
        for _ in range(20):
            fed.add(1)
            late += fed.layer.rings[0].packed(fed.layer.tokens) >= 64
    assert late <= 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_cropped_away_is_forgiven(mode):
    fed = Fed("growing")
    with mode():
        fed.add(60)
        fed.add(100, math.nan)
        fed.layer.crop(-90)  # of 160, the bad one being number 76
    tqcompress.verify(fed.cache)
    with mode():
        fed.add(1)


def test_verify_reads_the_exact_tokens_too():
    fed = Fed("growing")
    fed.add(60)
    fed.add(1, math.nan)
    with pytest.raises(ModelError, match=rf"{FOUND}: keys of 1 tokens are infinite or not a number"):
        tqcompress.verify(fed.cache)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_in_the_last_tokens_of_a_prompt(kind):
    """They would be encoded many steps later: the device checks a prompt when it comes."""
    fed = Fed(kind)
    fed.add(120, math.nan, place=117)
    with pytest.raises(ModelError, match=rf"{FOUND}: keys of 1 tokens"):
        fed.add(1)


@pytest.mark.parametrize(
    ("side", "bad"),
    [({"bits": 3, "scale": "log8"}, 1e4), ({"bits": 2, "scale": "fp16", "states": 16}, 1e7)],
    ids=["log8", "trellis, fp16"],
)
def test_a_scale_that_overflows(side, bad):
    name = "turboquant" if side["scale"] == "log8" else "trellis"
    fed = Fed("growing", quantizer=name, key=side, value=side)
    fed.add(90, bad, place=5)
    with pytest.raises(ModelError, match=rf"{FOUND}: {name} cannot store these keys"):
        fed.add(1)


def test_steps_in_a_cache_of_fixed_size_are_told_of_when_the_host_next_comes_by():
    """Compiled ones run no code that could: a chunk, a crop and a reset tell, each in its way."""
    fed = Fed("fixed")
    fed.add(60)
    fed.add(1)
    fed.add(1, math.inf)
    fed.add(1)
    for _ in range(2):  # the cache is as it was, and so is the error
        with pytest.raises(ModelError, match=rf"{FOUND}: keys of 1 tokens"):
            fed.add(2)
        assert int(fed.layer.get_seq_length()) == 63
    with pytest.raises(ModelError, match=FOUND):
        copy.deepcopy(fed.cache).crop(-1)
    with pytest.warns(UserWarning, match=rf"a cache that is reset made wrong tokens: {FOUND}"):
        copy.deepcopy(fed.layer).reset()
    fed.layer.crop(-2)
    fed.add(2)
    fed.layer.reset()


def test_steps_in_a_cache_of_fixed_size_that_encoded_what_they_cannot():
    fed = Fed("fixed", keep=NEARLY_FULL)
    fed.add(120, 1e7)
    tqcompress.verify(fed.cache)
    for _ in range(12):
        fed.add(1)
    with pytest.raises(ModelError, match=rf"{FOUND}: turboquant cannot store these keys"):
        fed.add(2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sample", [False, True])
def test_run_ahead_stops_at_what_is_not_a_number(cache, sample):
    """It is in an exact token, and there only for a step of a graph: the scores carry it to the host."""
    model, steps = compressed(recipe=RECIPE), []

    def break_one(module, args, output):
        steps.append(output.shape[1])
        output[0, 0, 3] *= math.nan if len(steps) == 4 else 1.0

    model.model.layers[0].self_attn.k_proj.register_forward_hook(break_one)
    ids = prompt(20).to(model.device)
    settings = {"cache_implementation": cache, "disable_compile": True, "do_sample": sample, "max_new_tokens": 30}
    with pytest.raises(ModelError, match=rf"{FOUND}: keys of 1 tokens"):
        model.generate(ids, custom_generate=tqcompress.run_ahead, **settings)
    assert len(steps) <= 5  # one late


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_run_ahead_looks_at_the_cache_when_it_is_done(cache):
    """Infinite keys may get no weight, and then no score shows them."""
    model, ids = compressed(recipe=RECIPE), prompt(20)

    def break_one(input_ids, scores):
        if input_ids.shape[1] == 24:
            layer.rings[0].ring.exact[0, 0, 0, 5, 3] = math.inf
        return scores

    made = make_cache("fixed" if cache == "static" else "growing", model, 30)
    model.tqcompress.compress_layers(made)
    layer = made.layers[0]
    settings = {"past_key_values": made, "disable_compile": True, "do_sample": False, "max_new_tokens": 5}
    settings |= {"logits_processor": [break_one], "custom_generate": tqcompress.run_ahead}
    with pytest.raises(ModelError, match=rf"{FOUND}: keys of 1 tokens"):
        model.generate(ids.to(model.device), **settings)
