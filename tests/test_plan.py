"""Plans and their byte counts."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_helpers import FULL, resolved

from tqcompress import ModelError, TensorSpec
from tqcompress.plan import Group, Plan, packed_tokens
from tqcompress.shape import LayerShape, ModelShape


def model(*layers: LayerShape, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    return ModelShape("tiny", "llama", dtype, layers, "None")


@pytest.mark.parametrize(
    ("tokens", "sinks", "window", "block", "packed"),
    [
        (0, 0, 0, 1, 0),
        (0, 4, 8, 1, 0),
        (1, 0, 0, 1, 0),  # the newest token is always exact
        (2, 0, 0, 1, 1),
        (4, 4, 8, 1, 0),
        (12, 4, 8, 1, 0),
        (13, 4, 8, 1, 0),  # sinks, window, and the newest one itself
        (14, 4, 8, 1, 1),
        (100, 4, 8, 1, 87),
        (44, 4, 8, 32, 0),  # 31 have left the window: no whole block
        (45, 4, 8, 32, 32),
        (76, 4, 8, 32, 32),
        (77, 4, 8, 32, 64),
    ],
)
def test_packed_tokens_at_the_edges(tokens, sinks, window, block, packed):
    assert packed_tokens(tokens, sinks, window, block) == packed


@settings(deadline=None)
@given(*[st.integers(0, 300)] * 3, st.integers(1, 64))
def test_packed_tokens_keeps_what_it_promises(tokens, sinks, window, block):
    packed = packed_tokens(tokens, sinks, window, block)
    exact = tokens - packed
    assert packed >= 0
    assert packed % block == 0
    assert exact >= min(tokens, sinks + window + 1)  # never less than promised ...
    assert packed == 0 or exact < sinks + window + 1 + block  # ... and less than a block more
    assert packed_tokens(tokens + 1, sinks, window, block) in (packed, packed + block)


def test_nbytes_by_hand():
    """Layer 0 turboquant, layer 1 sliding, layer 2 skipped; 100 tokens, 4 sinks, a window of 8."""
    sliding = LayerShape("sliding", 8, 2, 64, 32)
    full = LayerShape("full", 8, 2, 64)
    plan = resolved(model(full, sliding, full), keep={"sinks": 4, "window": 8}, rules=[{"layers": 2, "skip": True}])
    packed = 100 - 4 - 8 - 1
    row = (64 * 3 // 8 + 2) + (64 * 2 // 8 + 2)  # codes and a float16 scale, key and value
    state = (2**3 * 4 + 64) + (2**2 * 4 + 64)  # float32 codebook and int8 signs, key and value
    token = 2 * 2 * 64 * 2  # an exact token of a layer: two sides, two heads, 64 values of 2 bytes
    sliding_bytes = 31 * token  # transformers keeps sliding_window - 1 tokens
    layers = [2 * packed * row + 13 * token, sliding_bytes, 100 * token]
    assert plan.nbytes(100) == state + sum(layers)
    # State is not repeated for a batch; everything else is. Exact tokens cost twice as much in float32.
    assert plan.nbytes(100, batch=3) == state + 3 * sum(layers)
    assert plan.nbytes(100, dtype=torch.float32) == state + 2 * packed * row + (13 + 31 + 100) * 2 * token
    assert plan.dense_nbytes(100) == (100 + 31 + 100) * token
    assert plan.dense_nbytes(100, batch=2, dtype=torch.float32) == 4 * (100 + 31 + 100) * token
    values = (100 + 31 + 100) * token / 2
    assert plan.effective_bits(100) == pytest.approx(8 * plan.nbytes(100) / values, rel=1e-12)
    # Nothing is packed yet: all tokens exact, state all the same.
    assert plan.nbytes(10) == state + 3 * 10 * token


def test_nbytes_of_groups_and_blocks_by_hand():
    """Per-channel keys in blocks of 32 tokens, and one head of the layer at other bits."""
    plan = resolved(
        model(LayerShape("full", 4, 2, 64)),
        quantizer="affine",
        keep={"sinks": 0, "window": 0},
        rules=[{"heads": 1, "key": {"bits": 4}, "value": {"bits": 4}}],
    )
    assert plan.block(0) == 32
    # 100 tokens: 99 without the newest, 96 in whole blocks, 4 exact; affine has no state.
    codes = 96 * 64 * (3 + 2 + 4 + 4) // 8
    key_steps = 2 * 3 * 64 * (2 + 2)  # heads, blocks, channels, float16 step and low
    value_steps = 2 * 96 * 2 * (2 + 2)  # heads, tokens, groups of 32 channels
    assert plan.nbytes(100) == codes + key_steps + value_steps + 4 * 2 * 2 * 64 * 2


def test_state_is_counted_for_each_group():
    one = resolved(model(FULL, FULL), keep={"sinks": 0, "window": 0})
    two = resolved(model(FULL, FULL), keep={"sinks": 0, "window": 0}, rules=[{"heads": 0, "key": {"bits": 4}}])
    state = (2**3 * 4 + 16) + (2**2 * 4 + 16)
    wide = (2**4 * 4 + 16) + (2**2 * 4 + 16)
    assert one.nbytes(0) == 2 * state
    assert two.nbytes(0) == 2 * (state + wide)


def test_effective_bits_tend_to_format_bits():
    full = LayerShape("full", 8, 2, 128)
    plan = resolved(model(full, full, LayerShape("sliding", 8, 2, 128, 64)), keep={"sinks": 4, "window": 128})
    assert plan.format_bits() == (3 + 2) / 2 + 16 / 128
    distance = [plan.effective_bits(10**n) - plan.format_bits() for n in (3, 4, 5, 6, 7)]
    assert all(0 < later < earlier for earlier, later in pairwise(distance))
    # What does not grow with the context: 133 exact tokens and a sliding window of 63, at most 16 bits each, the
    # state (< 1 KiB a layer), over the 2 * 512 values of a token in the two full layers.
    assert distance[-1] <= (16 * (133 * 1024 + 63 * 512) + 8 * 2048) / (10**7 * 1024)


def test_format_bits_count_skipped_layers_and_heads_in_full():
    full = LayerShape("full", 8, 2, 128)
    layer = resolved(model(full, full), rules=[{"layers": 0, "skip": True}])
    heads = resolved(model(full, full), rules=[{"heads": 0, "skip": True}])
    assert layer.format_bits() == heads.format_bits() == (2.625 + 16) / 2
    assert layer.format_bits(torch.float32) == (2.625 + 32) / 2


def test_heads_with_equal_pairs_share_a_group():
    wide = LayerShape("full", 16, 8, 64)
    plan = resolved(
        model(wide),
        rules=[
            {"heads": [1, 4], "key": {"bits": 4}},
            {"heads": 6, "value": {"bits": 4}},
            {"heads": 7, "key": {"bits": 4}, "value": {"bits": 2}},  # ends up equal to heads 1 and 4
        ],
    )
    groups = {group.heads: (group.key.bits, group.value.bits) for group in plan.groups}
    assert groups == {(0, 2, 3, 5): (3, 2), (1, 4, 7): (4, 2), (6,): (3, 4)}


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [{"layers": 0, "skip": True}],
        [{"heads": 1, "skip": True}, {"layers": 1, "key": {"quantizer": "affine", "group": 16, "bits": 4}}],
    ],
)
def test_a_plan_survives_json(rules):
    plan = resolved(model(FULL, FULL, LayerShape("sliding", 6, 2, 16, 8)), key={"bits": 3, "seed": 5}, rules=rules)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.model)
    assert again == plan
    assert again.nbytes(5000) == plan.nbytes(5000)


def test_specs_that_differ_only_in_the_order_of_options_are_one():
    first = TensorSpec("turboquant", 3, {"seed": 1, "rotation": "dense"})
    second = TensorSpec("turboquant", 3, {"rotation": "dense", "seed": 1})
    assert first == second
    assert hash(first) == hash(second)


def test_a_plan_without_groups_is_refused():
    with pytest.raises(ModelError, match="nothing to compress"):
        Plan(model(), (), 4, 128, {})
    spec = TensorSpec("turboquant", 3)
    assert Plan(model(FULL), (Group(0, (0, 1), spec, spec),), 4, 128, {}).exact == {}
