"""Tiny models of many architectures.

Their weights are random: they are good for comparing one run with another, and say nothing about quality.
The weights are larger than at a real initialisation, so that the best token is not decided by near-ties.
"""

import copy

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

torch.set_num_threads(1)  # these models are too small for more

VOCAB = 200
WINDOW = 16  # sliding window of the models that have one
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied, random models repeat their last token
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 512} | {
    key: _SIZES[key]
    for key in (
        "vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    )
}  # fmt: skip
_CONFIGS = {
    "llama": (LlamaConfig, _SIZES | {"head_dim": 16}),
    "qwen2": (Qwen2Config, _SIZES),
    "qwen3": (Qwen3Config, _SIZES | {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, _SIZES | _MIXED | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma2": (Gemma2Config, _SIZES | _MIXED | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "mistral": (MistralConfig, _SIZES | {"head_dim": 16, "sliding_window": None}),
    "gpt2": (GPT2Config, _GPT2),
    "gpt_oss": (
        GptOssConfig,
        _SIZES
        | _MIXED
        | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "phi3": (Phi3Config, _SIZES | {"head_dim": 16}),
    "cohere": (CohereConfig, _SIZES | {"use_qk_norm": True, "logit_scale": 1.0}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        _SIZES | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1},
    ),
}


def tiny_config(name: str, **overrides) -> AutoConfig:
    """The config of the tiny model `name`."""
    config_class, settings = _CONFIGS[name]
    return config_class(**settings | overrides)


def tiny_model(name: str, seed: int = 0, **overrides):
    """A seeded random model in float32 and evaluation mode."""
    torch.manual_seed(seed)
    # Fused experts have no float64.
    extra = {"experts_implementation": "eager"} if name in ("gpt_oss", "qwen3_moe") else {}
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), dtype=torch.float32, **extra)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms, biases and attention sinks start as constants: give them something to say
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        if key.endswith(("wpe.weight", "wte.weight", "embed_tokens.weight")):
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval()


def lossless(**changes) -> dict:
    """A recipe that stores the bytes of the values themselves, nearly all of them packed."""
    side = {"bits": 32}
    return {
        "version": 1, "quantizer": "exact", "key": side, "value": side, "keep": {"sinks": 4, "window": 8}, **changes,
    }  # fmt: skip


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, tokens]` without the padding token."""
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def rounding(model, ids: torch.Tensor, read=lambda out: out.logits, **inputs) -> float:
    """The largest error of the plain float32 model's logits on `ids`, measured against itself in float64.

    Two exact ways to compute the same logits in float32 each err about that much. Tests allow 8 times as much:
    2 for the two computations, 4 because a maximum over other tokens, or with the sums in another order, varies.
    """
    single = read(model(ids, use_cache=False, **inputs))
    double = read(copy.deepcopy(model).double()(ids, use_cache=False, **inputs))
    return (single - double).abs().max().item()


TOLERANCE = 8  # times `rounding`, see there
