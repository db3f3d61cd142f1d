"""Which architectures are supported: each passes, or is refused by name and with the reason. README lists both."""

import re
from pathlib import Path

import pytest
import torch
from setups import SUPPORTED
from tiny import VOCAB, lossless, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config

import tqcompress
from tqcompress import ModelError

_SMALL = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2}
_LAYERS = _SMALL | {"intermediate_size": 32, "num_hidden_layers": 2}
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2,
}  # fmt: skip
# Model type -> its config, and why it is refused.
REFUSED = {
    "falcon": (_LAYERS, "hard-codes its attention"),
    "bloom": ({"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "hard-codes its attention"),
    "mpt": ({"vocab_size": 50, "d_model": 16, "n_heads": 2, "n_layers": 1}, "hard-codes its attention"),
    "codegen": ({"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}, "hard-codes"),
    "deepseek_v3": (_LAYERS | _LATENT, "multi-head latent attention"),
    "mamba": ({"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}, "no attention heads"),
    "rwkv": (
        {"vocab_size": 50, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
        "no attention",
    ),
    "t5": (
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_architecture_is_named_with_the_reason_and_unchanged(model_type):
    sizes, reason = REFUSED[model_type]
    auto = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **sizes))
    before = model.config._attn_implementation, model.config.to_dict(), list(model.state_dict())
    with pytest.raises(ModelError, match=reason) as error:
        tqcompress.apply(model, lossless())
    assert re.search(model_type.replace("_", ""), str(error.value).lower().replace("_", "")), str(error.value)
    assert "\n" not in str(error.value)
    assert before == (model.config._attn_implementation, model.config.to_dict(), list(model.state_dict()))


@pytest.mark.parametrize("change", [{"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}])
def test_variants_of_supported_architectures_are_right_or_refused(change):
    model = tiny_model("gpt2", **change)
    ids = torch.randint(1, VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))
    want = model.generate(ids, max_new_tokens=10, do_sample=False)
    try:
        tqcompress.apply(model, lossless())
    except ModelError as error:
        assert next(iter(change)) in str(error)
        return
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), want)


def test_readme_lists_them():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").lower()
    text = re.sub(r"[^a-z0-9]", "", text)
    for name in (*SUPPORTED, *REFUSED):
        assert re.sub("[^a-z0-9]", "", name) in text, name
    assert GPT2Config.model_type in SUPPORTED
