"""apply and remove: what they change, what they restore, what they refuse."""

import copy

import pytest
import torch
from tiny import lossless, prompt, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache

import tqcompress
from tqcompress import ModelError
from tqcompress.api import compression_of

LOSSY = {"version": 1, "key": {"bits": 2}, "value": {"bits": 2}, "keep": {"sinks": 2, "window": 4}}


@torch.no_grad()
def logits(model, ids=None):
    """Logits of two steps: a prefill, then tokens that read the cache."""
    ids = prompt(40) if ids is None else ids
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([30, 1, 9], dim=1)], dim=1)


def observable(model):
    """All that apply may change."""
    return {
        "attention": model.config._attn_implementation,
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "modules": [name for name, _ in model.named_modules()],
        "config": model.config.to_dict(),
        "state": list(model.state_dict()),
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_remove_restores_everything(name, attention):
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    before, want = observable(model), logits(model)
    plan = tqcompress.apply(model, LOSSY)
    assert compression_of(model).plan is plan
    assert list(model.state_dict()) == before["state"]
    assert model.config._attn_implementation == "tqcompress"
    assert not torch.equal(logits(model), want)
    tqcompress.remove(model)
    assert observable(model) == before
    assert torch.equal(logits(model), want)
    tqcompress.remove(model)  # does nothing to a plain model
    assert observable(model) == before


def test_models_of_one_process_are_independent():
    plain, first, second = (tiny_model("llama") for _ in range(3))
    want = logits(plain)
    tqcompress.apply(first, LOSSY)
    alone = logits(first)
    tqcompress.apply(second, LOSSY | {"key": {"bits": 4}, "keep": {"sinks": 0, "window": 0}})
    assert torch.equal(logits(first), alone) and torch.equal(logits(plain), want)
    assert not torch.equal(logits(second), alone)
    tqcompress.remove(second)
    assert torch.equal(logits(first), alone) and torch.equal(logits(second), want)


def test_second_recipe_wins():
    model, other = tiny_model("llama"), tiny_model("llama")
    before = observable(model)
    tqcompress.apply(model, LOSSY)
    tqcompress.apply(model, LOSSY | {"value": {"bits": 4}})
    tqcompress.apply(other, LOSSY | {"value": {"bits": 4}})
    assert torch.equal(logits(model), logits(other))
    assert len(model.get_decoder()._forward_pre_hooks) == 1
    tqcompress.remove(model)
    assert observable(model) == before


def test_a_recipe_that_fails_keeps_the_old_one():
    model = tiny_model("llama")
    tqcompress.apply(model, LOSSY)
    want, before = logits(model), observable(model)
    with pytest.raises(tqcompress.RecipeError, match="layers"):
        tqcompress.apply(model, LOSSY | {"rules": [{"layers": 7, "skip": True}]})
    assert observable(model) == before and torch.equal(logits(model), want)


def test_deepcopy_is_independent():
    model = tiny_model("llama")
    plain = logits(model)
    tqcompress.apply(model, LOSSY)
    want = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), want)
    codecs = compression_of(twin)
    for index, layer in codecs.layers.items():  # or moving one model would move the other's codecs
        assert layer.groups[0].key is codecs.codecs[f"{index}-0"]["key"]
        assert layer.groups[0].key is not compression_of(model).layers[index].groups[0].key
    tqcompress.remove(model)
    assert torch.equal(logits(model), plain) and torch.equal(logits(twin), want)
    tqcompress.remove(twin)
    assert torch.equal(logits(twin), plain)
    assert len(twin.get_decoder()._forward_pre_hooks) == 0


def latent_attention():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    latents = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
    config = AutoConfig.for_model("deepseek_v3", vocab_size=50, num_key_value_heads=2, **sizes, **latents, **experts)
    return AutoModelForCausalLM.from_config(config)


def encoder_decoder():
    config = AutoConfig.for_model("t5", vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return AutoModelForSeq2SeqLM.from_config(config)


def hard_coded_attention():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (latent_attention, "multi-head latent attention"),
        (encoder_decoder, "encoder-decoder"),
        (hard_coded_attention, "hard-codes its attention"),
        (lambda: tiny_model("mistral", sliding_window=16), "nothing to compress.*sliding attention"),
    ],
)
def test_refused_models_stay_unchanged(build, reason):
    model = build()
    before = observable(model)
    with pytest.raises(ModelError, match=reason) as error:
        tqcompress.apply(model, LOSSY)
    assert "\n" not in str(error.value)
    assert observable(model) == before


@torch.no_grad()
def test_foreign_attention_is_told_the_fix():
    model = tiny_model("llama")
    tqcompress.apply(model, lossless())
    model.set_attn_implementation("sdpa")
    cache = model(prompt(20)).past_key_values
    with pytest.raises(AttributeError, match=r'set_attn_implementation\("tqcompress"\)'):
        model(prompt(1), past_key_values=cache)


def test_apply_needs_only_the_config_for_its_plan():
    from tqcompress.recipe import Recipe
    from tqcompress.resolve import resolve
    from tqcompress.shape import ModelShape

    plan = tqcompress.apply(tiny_model("gemma3"), LOSSY)
    from_config = resolve(Recipe.load(LOSSY), ModelShape.of(tiny_config("gemma3")))
    assert plan.groups == from_config.groups and plan.exact == from_config.exact
    assert plan.exact == {0: "sliding attention", 2: "sliding attention"}


def test_parameters_move_and_codecs_keep_their_dtype():
    model = tiny_model("llama")
    tqcompress.apply(model, LOSSY)
    state = {name: tensor.clone() for name, tensor in compression_of(model).state().items()}
    model.to(torch.float64).to(torch.float32)
    after = compression_of(model).state()
    assert all(torch.equal(after[name], state[name]) and after[name].dtype == state[name].dtype for name in state)
