"""`vllm serve` with packed pages: 32 requests at once, of mixed lengths, with shared prefixes and preemption."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from conftest import generated

STARTED_WITHIN = 240  # seconds
LENGTHS = [7, 40, 90, 120, 200, 300, 63, 450]
NEW = 16


@pytest.fixture(scope="module")
def prompts(token_ids) -> list[dict]:
    """32 prompts, half of which begin alike."""
    alike = [token_ids[:n] + token_ids[3000 + i : 3010 + i] for i, n in enumerate(LENGTHS * 2)]
    apart = [token_ids[500 + 97 * i :][:n] for i, n in enumerate(LENGTHS * 2)]
    return [{"prompt_token_ids": ids} for ids in alike + apart]


@pytest.fixture(scope="module")
def own_tokens(model_path, prompts) -> list[list[int]]:
    """What vLLM itself generates, float32."""
    from vllm import LLM

    llm = LLM(model_path, enforce_eager=True, dtype="float32", max_model_len=1024, kv_cache_memory_bytes=512 << 20)
    return generated(llm, prompts, NEW)


@contextlib.contextmanager
def served(model, log, *options: str):
    """The address of a server, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-num-seqs", "32", "--max-num-batched-tokens", "512"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, env=environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(STARTED_WITHIN):
            if process.poll() is not None:
                break
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{address}/health", timeout=5).ok:
                    yield address
                    return
            time.sleep(1)
        pytest.fail("the server did not start:\n" + log.read_text()[-3000:])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with contextlib.suppress(ProcessLookupError):  # of its workers, if it left any
            os.killpg(process.pid, signal.SIGKILL)


def complete(address: str, prompts: list[dict]) -> list[dict]:
    """The completions of all prompts, asked for at the same time."""

    def ask(prompt: dict) -> dict:
        body = {
            "model": "m", "prompt": prompt["prompt_token_ids"], "max_tokens": NEW, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        answer = requests.post(f"{address}/v1/completions", json=body, timeout=300)
        answer.raise_for_status()
        return answer.json()["choices"][0]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def counters(address: str) -> dict[str, float]:
    """The server's counters by name."""
    text = requests.get(f"{address}/metrics", timeout=30).text
    return {name: float(value) for name, value in re.findall(r"^vllm:(\w+_total)\{.*\} (\S+)$", text, re.M)}


def test_lossless_server(model_path, artifacts, prompts, own_tokens, tmp_path):
    """Answers are vLLM's own, with pages that are shared and too few of them."""
    page = 32 * (2 * 3 * 64 * 4) * 30 * 9 // 8  # of 32 tokens: 4 of them twice
    options = ["--block-size", "32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(24 * page)]
    extra = ["--additional-config", f'{{"tqcompress": "{artifacts["lossless"]}"}}']
    with served(model_path, tmp_path / "log", *options, *extra) as address:
        choices = complete(address, prompts)
        counted = counters(address)
    assert [choice["token_ids"] for choice in choices] == own_tokens
    assert counted["num_preemptions_total"] > 0
    assert counted["prefix_cache_hits_total"] > 0


def test_saved_directory(artifacts, prompts, own_tokens, hf_model, tmp_path):
    """A directory with weights needs no option. What it generates at 4 bits is about as likely as vLLM's own."""
    options = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20)]
    with served(artifacts["four"], tmp_path / "log", *options) as address:
        choices = complete(address, prompts)
    assert all(choice["finish_reason"] == "length" and len(choice["token_ids"]) == NEW for choice in choices)
    own, packed = (
        _mean_log_probability(hf_model, prompts, tokens)
        for tokens in (own_tokens, [choice["token_ids"] for choice in choices])
    )
    print(f"mean log-probability of generated tokens: vLLM's own {own:.3f}, at 4 bits {packed:.3f}")
    # Greedy tokens of a model that sees nothing right are as unlikely as any: -10.8 (a vocabulary of 49,152).
    assert packed > own - 0.25


@torch.no_grad()
def _mean_log_probability(model, prompts: list[dict], new: list[list[int]]) -> float:
    """Of generated tokens, by the uncompressed model."""
    found = []
    for prompt, tokens in zip(prompts, new, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"] + tokens])
        logits = model(ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0, :-1]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, -len(tokens) :, None]).mean())
    return float(torch.stack(found).mean())
