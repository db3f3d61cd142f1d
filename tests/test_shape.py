"""Model shapes from configs, and the models that are refused."""

import json

import pytest
from plan_helpers import FULL, resolved
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

from tqcompress import ModelError
from tqcompress.shape import LayerShape, ModelShape

SIZES = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}

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
