"""vLLM's engine with packed pages: equal tokens where storage is lossless, those of transformers at 4 bits."""

import copy

import pytest
import torch
from conftest import LOSSLESS, generated, metric, prompts_of
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import tqcompress

LENGTHS = [5, 400, 64, 130, 1, 257, 33, 3]


def test_lossless_tokens_are_vllms_own(engine, artifacts, token_ids):
    """Prefill, chunks of a prompt, decoding in a batch that changes, with pages of one size and of several."""
    prompts = prompts_of(LENGTHS, token_ids)
    want = generated(engine(), prompts)
    assert generated(engine(artifacts["lossless"]), prompts) == want
    chunked = engine(artifacts["mixed"], max_num_batched_tokens=96, max_num_seqs=5)
    assert generated(chunked, prompts) == want


def test_shared_prefixes(engine, artifacts, token_ids):
    """A page that several sequences point to serves all of them."""
    head = token_ids[:300]
    prompts = [{"prompt_token_ids": head + token_ids[500 + i : 520 + 3 * i]} for i in range(8)]
    want = generated(engine(enable_prefix_caching=False), prompts)
    llm = engine(artifacts["lossless"])
    assert generated(llm, prompts[:1]) == want[:1]
    assert generated(llm, prompts) == want
    assert metric(llm, "vllm:prefix_cache_hits") >= 8 * 256


@pytest.mark.parametrize("name", ["lossless", "mixed"])
def test_preemption(engine, artifacts, token_ids, name):
    """A sequence whose pages were taken away goes on as if they had not been."""
    prompts = prompts_of([30, 60, 90, 120] * 3, token_ids)
    want = generated(engine(), prompts, 40)
    page = 32 * (2 * 3 * 64 * 4) * 30 * 9 // 8
    llm = engine(artifacts[name], block_size=32, max_model_len=192, kv_cache_memory_bytes=16 * page)
    assert generated(llm, prompts, 40) == want
    assert metric(llm, "vllm:num_preemptions") > 0


def test_four_bits_hold_more_tokens(engine, artifacts):
    """In the same memory, beside 16-bit values: 4 bits, a scale a vector and the exact first tokens of pages."""
    sizes = []
    for artifact in (None, artifacts["four"]):
        config = engine(artifact, dtype="bfloat16").llm_engine.vllm_config.cache_config
        sizes.append(config.num_gpu_blocks * config.block_size)
    assert sizes[1] >= 3.3 * sizes[0]


@pytest.mark.parametrize("name", ["four", "heads"])
def test_logprobs_are_those_of_transformers(engine, artifacts, token_ids, hf_model, name):
    """What two engines may differ by is rounding, which decoding at 4 bits amplifies: a code that falls on the other
    side changes all later keys a little. How much, transformers tells by itself, with weights changed by some units
    in the last place."""
    prompts = prompts_of([14, 311, 64, 188, 100, 140], token_ids, 700)
    llm = engine(artifacts[name], enable_prefix_caching=False)
    ids, got = _logprobs(llm, prompts)

    def expected(model) -> torch.Tensor:
        return torch.stack([_taught(model, p["prompt_token_ids"], new) for p, new in zip(prompts, ids, strict=True)])

    plain = expected(hf_model)
    tqcompress.load(hf_model, artifacts[name])
    four = expected(hf_model)
    tqcompress.remove(hf_model)
    noisy_model = copy.deepcopy(hf_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in noisy_model.parameters():
            weights.mul_(1 + 2**-20 * torch.randn(weights.shape, generator=generator))  # 16 units of float32's rounding
    tqcompress.load(noisy_model, artifacts[name])
    noise, change, quantization = (_rms(x - four) for x in (expected(noisy_model), got, plain))
    print("rms by step of vLLM, noise and quantization:", change, noise, quantization, sep="\n")
    assert change.mean() <= 4 * noise.mean()  # one draw of each, of few prompts
    # Before anything was read packed, and when all of a prompt is for the first time, nothing has been amplified yet.
    assert change[0] <= 1e-4
    assert change[1] <= quantization[1] / 50


def test_sliding_layers_stay_exact(engine, tmp_path):
    """A small Gemma 3 with random weights: vLLM's own pages for its sliding layers, lossless ones for the others."""
    config = Gemma3TextConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=40, max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    model = Gemma3ForCausalLM.from_pretrained(tmp_path)
    plan = tqcompress.apply(model, LOSSLESS)
    assert sorted(plan.exact) == [0, 2, 4]
    tqcompress.save(model, tmp_path / "artifact", base=str(tmp_path))
    prompts = [{"prompt_token_ids": torch.randint(1, 1000, (n,)).tolist()} for n in (3, 30, 100, 250)]
    options = {"model": tmp_path, "skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 128}
    want = generated(engine(**options), prompts)
    assert generated(engine(tmp_path / "artifact", **options), prompts) == want


def _logprobs(llm, prompts: list[dict], tokens: int = 8) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens and their log-probabilities `[prompts, tokens]`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    outputs = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
    ids = [list(output.token_ids) for output in outputs]
    rows = [[at[i].logprob for i, at in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
    return ids, torch.tensor(rows)


@torch.no_grad()
def _taught(model, prompt: list[int], new: list[int]) -> torch.Tensor:
    """Log-probabilities that transformers gives those tokens, one decoding step each."""
    inputs, cache, found = torch.tensor([prompt]), None, []
    for token in new:
        output = model(inputs, past_key_values=cache, use_cache=True)
        cache, inputs = output.past_key_values, torch.tensor([[token]])
        found.append(output.logits[0, -1].log_softmax(-1)[token])
    return torch.stack(found)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(0).sqrt()
