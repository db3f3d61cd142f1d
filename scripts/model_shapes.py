"""Configs in the shapes of real models, for random weights: `bench_generate` times them, estimates are held to that."""

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

MODELS = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 21, tie_word_embeddings=False,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 21, tie_word_embeddings=False,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=1 << 21, tie_word_embeddings=True,
    ),
}  # fmt: skip
