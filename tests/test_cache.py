"""The compressed cache itself: what is encoded, decoded, held, cropped and refused."""

import pytest
import torch
from tiny import TOLERANCE, lossless, prompt, rounding, tiny_model
from transformers import DynamicCache

import tqcompress
from tqcompress import ModelError, blockwise
from tqcompress.api import compression_of

TURBO = {"version": 1, "key": {"bits": 3}, "value": {"bits": 2}, "keep": {"sinks": 4, "window": 8}}
AFFINE = {
    "version": 1, "quantizer": "affine", "key": {"bits": 2}, "value": {"bits": 2, "group": 16},
    "keep": {"sinks": 4, "window": 8},
}  # fmt: skip


def compressed_model(recipe, name="llama", **overrides):
    model = tiny_model(name, **overrides)
    tqcompress.apply(model, recipe)
    return model


@torch.no_grad()
def feed(model, pieces, cache=None):
    """Logits of the pieces, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1), cache


def codecs_of(model):
    return [codec for pair in compression_of(model).codecs.values() for codec in pair.values()]


def spy(monkeypatch, codec, method):
    """The number of tokens of each call of a codec's method."""
    calls, original = [], getattr(codec, method)

    def counted(argument):
        result = original(argument)
        states = argument if isinstance(argument, torch.Tensor) else result
        calls.append((states[0] if isinstance(states, tuple) else states).shape[2])
        return result

    monkeypatch.setattr(codec, method, counted)
    return calls


@pytest.mark.parametrize("lookup", [None, 5])
def test_a_token_is_encoded_exactly_once(lookup, monkeypatch):
    model = compressed_model(TURBO)
    calls = [spy(monkeypatch, codec, "encode") for codec in codecs_of(model)]
    out = model.generate(
        prompt(10).repeat(1, 3), max_new_tokens=80, do_sample=False, prompt_lookup_num_tokens=lookup,
        return_dict_in_generate=True,
    )  # fmt: skip
    layer = out.past_key_values.layers[0]
    packed = layer.stores[0][0].length
    assert packed >= 30 + 80 - 4 - 8 - 2 - (lookup or 0)
    assert [sum(tokens) for tokens in calls] == [packed] * len(calls)
    if lookup is None:  # a prefill is encoded at once, then one token a step
        assert calls[0][1:] == [1] * (len(calls[0]) - 1)


@pytest.mark.parametrize("recipe", [TURBO, AFFINE], ids=["turboquant", "affine"])
def test_decoding_steps_never_hold_a_dense_history(recipe, monkeypatch):
    model = compressed_model(recipe)
    ids = prompt(150)
    pieces = ids.split([120, 1, 1, 20, 1, 1, 6], dim=1)
    want, _ = feed(model, pieces)
    block = max(layer.block for layer in compression_of(model).layers.values())
    heads, dim = 2, 16
    room = 40 if block == 1 else 64
    workspace = room * heads * dim * 4 * 2  # float32 keys and values of `room` tokens
    monkeypatch.setattr(blockwise, "WORKSPACE_BYTES", workspace)
    spies = [
        (spy(monkeypatch, codec, "decode_rotated"), spy(monkeypatch, codec, "decode_factors"))
        for codec in codecs_of(model)
    ]
    got, _ = feed(model, pieces)
    for (
        rotated,
        factors,
    ) in spies:  # several blocks a step, none too large; many queries want whole vectors, few factors
        assert max(rotated + factors) <= room and len(rotated + factors) > 6 * 100 / room
        assert len(factors) > 4 * 100 / room
    assert (got - want).abs().max() <= TOLERANCE * rounding(tiny_model("llama"), ids)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "recipe",
    [
        TURBO,
        TURBO | {"value": {"bits": 3, "scale": "log8", "rotation": "dense"}, "keep": {"sinks": 0, "window": 0}},
        TURBO | {"rules": [{"layers": 0, "skip": True}]},
        TURBO | {"rules": [{"layers": 1, "heads": 1, "skip": True}, {"layers": -1, "heads": 0, "value": {"bits": 4}}]},
        AFFINE,
        AFFINE | {"rules": [{"layers": -1, "quantizer": "turboquant"}]},
    ],
    ids=["turboquant", "log8", "skip layer", "groups", "affine", "mixed"],
)
def test_plan_knows_every_byte(name, recipe):
    model = tiny_model(name)
    plan = tqcompress.apply(model, recipe)
    cache, fed, ids = None, 0, prompt(120, batch=2)
    state = sum(tensor.nbytes for tensor in compression_of(model).state().values())
    for length in (2, 5, 12, 13, 14, 45, 60, 109):
        pieces = ids[:, fed:length].split([length - fed - 1, 1], dim=1)  # the last token is a decoding step
        _, cache = feed(model, [piece for piece in pieces if piece.numel()], cache)
        fed = length
        held = sum(
            layer.nbytes if index in compression_of(model).layers else layer.keys.nbytes + layer.values.nbytes
            for index, layer in enumerate(cache.layers)
        )
        assert plan.nbytes(length, batch=2) == held + state, length


def test_spare_room_is_bounded():
    _, cache = feed(compressed_model(TURBO), prompt(500).split([480, *[1] * 20], dim=1))
    store = cache.layers[0].stores[0][0]
    assert store.nbytes <= store.allocated_nbytes <= store.nbytes * (1 + 256 / store.length) * 1.13


def test_room_for_a_known_length_is_allocated_once():
    """And beyond that length the cache grows on, with the same logits."""
    pieces = prompt(220).split([40, *[1] * 180], dim=1)
    want, _ = feed(compressed_model(TURBO), pieces)
    model = compressed_model(TURBO | {"max_cache_len": 132})
    cache, moves, logits = None, [], []
    for piece in pieces:
        part, cache = feed(model, [piece], cache)
        logits.append(part)
        moves.append(cache.layers[0].stores[0][0].moves)
    assert moves[0] == 0 and moves[132 - 40] == 0, "allocated with the first tokens"
    assert moves[-1] > 0
    assert torch.equal(torch.cat(logits, 1), want)


@pytest.mark.parametrize("keep", [{"sinks": 4, "window": 8}, {"sinks": 0, "window": 0}])
def test_crop_to_every_length(keep):
    model, plain = compressed_model(lossless(keep=keep)), tiny_model("llama")
    ids, tail = prompt(30), prompt(4, seed=1)
    limit = TOLERANCE * rounding(plain, torch.cat([ids, tail], dim=1))
    for left in range(0, 31):
        _, cache = feed(model, ids.split([20, 1, 9], dim=1))
        cache.crop(left - 30)
        assert cache.get_seq_length() == left
        got, _ = feed(model, tail.split([1, 3], dim=1), cache)
        want, _ = feed(plain, [torch.cat([ids[:, :left], tail], dim=1)])
        assert (got - want[:, left:]).abs().max() <= limit, left
        assert cache.get_seq_length() == left + 4


def test_crop_of_blocks():
    """Cropping into a block decodes what is left of it; the tokens before it stay as they were."""
    model = compressed_model(AFFINE)
    ids, tail = prompt(120), prompt(45, seed=1)
    for left in (0, 3, 4, 5, 36, 37, 60, 68, 99, 100, 119):
        _, cache = feed(model, ids.split([110, *[1] * 10], dim=1))
        layer = cache.layers[0]
        before = layer.stores[0][0].read(0, 32)["codes2"].clone()
        cache.crop(left - 120)
        assert [layer.get_seq_length() for layer in cache.layers] == [left] * 3
        assert layer.stores[0][0].length == min(96, max(0, left - 4) // 32 * 32)
        assert layer.sinks[0].shape[2] == min(left, 4)
        logits, _ = feed(model, tail.split([1, 40, *[1] * 4], dim=1), cache)
        assert logits.isfinite().all()
        assert layer.get_seq_length() == left + 45
        assert layer.stores[0][0].length == max(0, left + 44 - 4 - 8) // 32 * 32
        if left >= 36:
            assert torch.equal(layer.stores[0][0].read(0, 32)["codes2"], before)


def test_crop_past_the_beginning_and_of_nothing():
    _, cache = feed(compressed_model(TURBO), [prompt(20)])
    cache.crop(0)
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="negative"):
        cache.layers[0].crop(5)
    cache.layers[0].crop(-100)
    assert cache.layers[0].get_seq_length() == 0


def test_reset_forgets_everything():
    model = compressed_model(TURBO)
    ids = prompt(40)
    want, cache = feed(model, ids.split([30, 10], dim=1))
    cache.reset()
    assert cache.get_seq_length() == 0 and all(layer.nbytes == 0 for layer in cache.layers)
    got, _ = feed(model, ids.split([30, 10], dim=1), cache)
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_view_is_no_tensor(monkeypatch):
    model = compressed_model(TURBO)
    _, cache = feed(model, [prompt(20)])
    new = torch.zeros(1, 2, 1, 16)
    view, same = cache.layers[0].update(new, new)
    assert view is same and not hasattr(view, "shape") and not hasattr(view, "transpose")
    with pytest.raises(AttributeError, match=r"\.shape.*set_attn_implementation\(\"tqcompress\"\)"):
        _ = view.shape
    with pytest.raises(AttributeError, match=r"tqcompress\.remove\(model\)"):
        view.transpose(1, 2)


@pytest.mark.parametrize(("first", "owner"), [(None, "no compression"), (TURBO, "another compression")])
def test_foreign_tokens_are_refused(first, owner):
    other = tiny_model("llama") if first is None else compressed_model(first)
    _, cache = feed(other, [prompt(20)])
    model = compressed_model(TURBO)
    with pytest.raises(ModelError, match=f"layer 0 .*20 tokens made with {owner}"):
        feed(model, [prompt(1)], cache)
    assert cache.get_seq_length() == 20
    if first:  # an emptied cache of another compression is taken over
        cache.reset()
        feed(model, [prompt(20)], cache)
        assert cache.layers[0].codecs is compression_of(model).layers[0]


def test_gradient_through_the_cache_is_refused():
    model = compressed_model(TURBO)
    ids = prompt(20)
    model(ids, use_cache=False, labels=ids).loss.backward()  # training without a cache works
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    cache = model(ids).past_key_values
    with pytest.raises(ModelError, match="use_cache=False"):
        model(prompt(5), past_key_values=cache).logits.sum().backward()


@pytest.mark.parametrize("shape", [(1, 3, 5, 16), (1, 2, 5, 8)])
def test_wrong_shapes_are_named(shape):
    model = compressed_model(TURBO)
    cache = DynamicCache(config=model.config)
    compression_of(model).compress_layers(cache)
    with pytest.raises(ModelError, match=r"layer 2: keys have shape .*2 KV heads, tokens, head_dim 16"):
        cache.layers[2].update(torch.zeros(shape), torch.zeros(shape))


def test_dropout_is_refused_where_it_would_be_ignored():
    model = compressed_model(TURBO, attention_dropout=0.5)
    _, cache = feed(model, [prompt(20)])
    model.train()
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        feed(model, [prompt(1)], cache)
