"""Model shapes from configs, plans and their byte counts, and the store that holds what a plan promises."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from tqcompress import Field, Layout, ModelError, Recipe, TensorSpec
from tqcompress.plan import Group, Plan, packed_tokens
from tqcompress.resolve import resolve
from tqcompress.shape import LayerShape, ModelShape
from tqcompress.store import TokenStore

SIZES = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
FULL = LayerShape("full", 6, 2, 16)


def resolved(model: ModelShape, **changes) -> Plan:
    return resolve(Recipe.parse({"version": 1, "key": {"bits": 3}, "value": {"bits": 2}} | changes), model)


# ------------------------------------------------------------------------------------------- model shapes

MODELS = {
    # hidden_size / num_attention_heads = 16 where the config has no head_dim of its own
    "llama": (LlamaConfig(**SIZES), [FULL] * 4),
    "llama_head_dim": (LlamaConfig(**SIZES, head_dim=80), [LayerShape("full", 6, 2, 80)] * 4),
    "llama_no_gqa": (LlamaConfig(**SIZES | {"num_key_value_heads": None}), [LayerShape("full", 6, 6, 16)] * 4),
    "qwen2": (Qwen2Config(**SIZES), [FULL] * 4),
    "qwen3": (Qwen3Config(**SIZES, head_dim=64), [LayerShape("full", 6, 2, 64)] * 4),
    "mistral": (MistralConfig(**SIZES, sliding_window=None), [FULL] * 4),
    "mistral_sliding": (MistralConfig(**SIZES, sliding_window=32), [LayerShape("sliding", 6, 2, 16, 32)] * 4),
    "gemma3": (
        Gemma3TextConfig(
            **SIZES,
            head_dim=64,
            sliding_window=32,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
        [
            LayerShape(kind, 6, 2, 64, 32 if kind == "sliding" else None)
            for kind in ("sliding", "sliding", "full", "sliding")
        ],
    ),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=96, n_layer=3, n_head=3), [LayerShape("full", 3, 3, 32)] * 3),
}


@pytest.mark.parametrize(("config", "layers"), MODELS.values(), ids=MODELS)
def test_model_shapes(config, layers):
    shape = ModelShape.of(config)
    assert shape.layers == tuple(layers)
    assert shape.model_type == config.model_type
    json.dumps(shape.fingerprint())  # goes into an artifact


def test_the_fingerprint_tells_rope_and_layers_apart_but_not_names():
    one = ModelShape.of(LlamaConfig(**SIZES))
    config = LlamaConfig(**SIZES)
    config._name_or_path = "elsewhere"
    assert ModelShape.of(config).fingerprint() == one.fingerprint()
    assert ModelShape.of(config).name == "elsewhere"
    rope = {"rope_type": "default", "rope_theta": 5e5}
    for other in (LlamaConfig(**SIZES, rope_parameters=rope), LlamaConfig(**SIZES, head_dim=8), Qwen2Config(**SIZES)):
        assert ModelShape.of(other).fingerprint() != one.fingerprint()


REFUSED = {
    "deepseek_v3": (DeepseekV3Config(), ["multi-head latent attention", "kv_lora_rank=512"]),
    "t5": (T5Config(), ["encoder-decoder"]),
    "mamba": (MambaConfig(), ["no attention heads"]),
}


@pytest.mark.parametrize(("config", "reasons"), REFUSED.values(), ids=REFUSED)
def test_models_without_keys_and_values_are_refused_with_the_reason(config, reasons):
    with pytest.raises(ModelError) as error:
        ModelShape.of(config)
    assert config.model_type in str(error.value)
    assert "\n" not in str(error.value)
    assert all(reason in str(error.value) for reason in reasons)


def test_a_model_of_sliding_layers_has_nothing_to_compress():
    with pytest.raises(
        ModelError, match=r"mistral: nothing to compress, every layer stays exact \(sliding attention\)"
    ):
        resolved(ModelShape.of(MODELS["mistral_sliding"][0]))


def test_sliding_layers_stay_exact_beside_full_ones():
    plan = resolved(ModelShape.of(MODELS["gemma3"][0]))
    assert [group.layer for group in plan.groups] == [2]
    assert plan.exact == dict.fromkeys([0, 1, 3], "sliding attention")


# ---------------------------------------------------------------------------------------------- the plan


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


# ---------------------------------------------------------------------------------------------- the store

# Codes of each token beside a step shared by four, as affine's keys have them.
LAYOUT = Layout({"codes": Field(torch.uint8, 3), "step": Field(torch.float16, 2, 4)})
BATCH, HEADS, BLOCK = 2, 3, 4


def packed_rows(tokens: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Rows in which every token, head and sequence has its own numbers."""
    rows = {}
    for name, field in LAYOUT.fields.items():
        count, first = tokens // field.tokens, start // field.tokens
        token = torch.arange(first, first + count)[:, None] * 7 + torch.arange(field.size)
        head = torch.arange(HEADS)[:, None, None] * 31 + torch.arange(BATCH)[:, None, None, None] * 101
        rows[name] = ((token + head) % 251).to(field.dtype)
    return rows


def new_store(capacity: int = 0) -> TokenStore:
    return TokenStore(LAYOUT, BATCH, HEADS, torch.device("cpu"), capacity)


def filled(tokens: int) -> TokenStore:
    store = new_store()
    store.append(packed_rows(tokens), tokens)
    return store


def assert_holds(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("step", [4, 12, 400])
@pytest.mark.parametrize("capacity", [0, 8, 1200])
def test_store_appends_and_reads(step, capacity):
    store = new_store(capacity)
    assert_holds(store.read(), packed_rows(0))
    for start in range(0, 1200, step):
        store.append(packed_rows(step, start), step)
    assert store.length == 1200
    assert_holds(store.read(), packed_rows(1200))
    assert_holds(store.read(8, 20), packed_rows(12, 8))
    assert_holds(store.read(1196), packed_rows(4, 1196))
    assert store.nbytes == BATCH * HEADS * (1200 * 3 + 300 * 2 * 2)


def test_store_appending_nothing():
    store = filled(8)
    store.append(packed_rows(0), 0)
    assert_holds(store.read(), packed_rows(8))


def test_store_views_stay_valid_after_growth():
    store = filled(8)
    view, before = store.read(), store.allocated_nbytes
    store.append(packed_rows(2000, 8), 2000)
    assert store.allocated_nbytes > before  # it did grow
    assert_holds(view, packed_rows(8))
    assert_holds(store.read(0, 8), packed_rows(8))


def test_store_reads_views_not_copies():
    store = filled(400)
    pointers = {buffer.untyped_storage().data_ptr() for buffer in store.buffers.values()}
    assert {view.untyped_storage().data_ptr() for view in store.read(8, 16).values()} == pointers


@pytest.mark.parametrize("step", [4, 36])
def test_store_spare_room_is_bounded_and_growth_is_amortised(step):
    store = new_store()
    token = BATCH * HEADS * LAYOUT.nbytes_per_token
    growths, copied, before = 0, 0, 0
    for start in range(0, 8000, step):
        store.append(packed_rows(step, start), step)
        # At the moment of growth at most an eighth of the tokens held or 256, in whole blocks; then it shrinks.
        spare = store.allocated_nbytes / token - store.length
        assert 0 <= spare <= max(store.length / 8, TokenStore.MIN_GROWTH) + BLOCK
        if store.allocated_nbytes != before:
            growths, copied, before = growths + 1, copied + start, store.allocated_nbytes
    # Below 2048 tokens every 256 at least (8 times), then by an eighth: log(8000/2048) / log(9/8) = 11.6 times.
    assert growths <= 1 + 8 + 12
    assert copied <= 9 * 8000  # a geometric sum with the ratio 9/8


def test_store_of_a_given_capacity_allocates_once():
    store = new_store(400)
    before = {name: buffer.data_ptr() for name, buffer in store.buffers.items()}
    for start in range(0, 400, 4):
        store.append(packed_rows(4, start), 4)
    assert {name: buffer.data_ptr() for name, buffer in store.buffers.items()} == before
    assert store.nbytes == store.allocated_nbytes


def test_store_crops_and_goes_on():
    store = filled(400)
    store.crop(1000)
    assert store.length == 400
    store.crop(12)
    assert_holds(store.read(), packed_rows(12))
    store.append(packed_rows(8, 100), 8)
    assert_holds(store.read(0, 12), packed_rows(12))
    assert_holds(store.read(12), packed_rows(8, 100))
    store.crop(0)
    assert_holds(store.read(), packed_rows(0))


def test_store_maps_every_buffer_and_grows_at_the_new_batch_size():
    store = filled(8)
    order = torch.tensor([1, 0, 0])
    store.map(lambda buffer: buffer.index_select(0, order))
    rows = {name: tensor[order] for name, tensor in packed_rows(8).items()}
    assert_holds(store.read(), rows)
    more = {name: tensor[order] for name, tensor in packed_rows(2000, 8).items()}
    store.append(more, 2000)
    assert_holds(store.read(0, 8), rows)
    assert_holds(store.read(8), more)
