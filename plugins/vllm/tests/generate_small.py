"""Runs a small model in an engine of its own and prints tokens and log-probabilities as JSON.

    python generate_small.py MODEL "" | ARTIFACT [kernels]

With `kernels` pages are those of a CUDA device, and kernels are interpreted.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
MODEL, ARTIFACT, *KERNELS = sys.argv[1:]
if KERNELS:
    sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
    import kernels_helpers  # noqa: F401  # kernels are interpreted from here on

import torch  # noqa: E402
from conftest import prompts_of  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def use_kernels() -> None:
    """Pages by kernels, though the device is a CPU."""
    from tqcompress.plugins.vllm import backend
    from tqcompress.plugins.vllm.fused_pages import FusedPages

    from tqcompress_kernels import plain

    def page_format(*args):
        pages = FusedPages(*args)
        for _, group in pages.groups:
            group.split = plain.split  # the one that can be interpreted
        return pages

    backend.page_format = page_format


if KERNELS:
    use_kernels()
llm = LLM(
    MODEL, enforce_eager=True, dtype="float32", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=48,
    kv_cache_memory_bytes=16 << 20, block_size=32, skip_tokenizer_init=True,
    additional_config={"tqcompress": ARTIFACT} if ARTIFACT else {},
)  # fmt: skip
ids = torch.randint(1, 500, (200,), generator=torch.Generator().manual_seed(0)).tolist()
prompts = prompts_of([3, 70, 33, 50, 1], ids, 17)
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0, detokenize=False)
done = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
found = [(list(one.token_ids), [at[i].logprob for i, at in zip(one.token_ids, one.logprobs)]) for one in done]  # noqa: B905
print("\n" + json.dumps(found))
