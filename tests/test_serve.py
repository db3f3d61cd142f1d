"""`tqcompress serve` on a real model: SmolLM2-135M-Instruct, asked through the openai client."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cli import run
from tiny import lossless, prompt, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import tqcompress
from tqcompress import api
from tqcompress.models import load_model
from tqcompress.texts import load_text

openai = pytest.importorskip("openai", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
manager = pytest.importorskip("transformers.cli.serving.model_manager")

NEW = 16
# Coarse, so that answers differ from those of the uncompressed model.
RECIPE = {"version": 1, "key": {"bits": 2}, "value": {"bits": 2}, "keep": {"sinks": 4, "window": 8}}
TEXT = load_text("constitution")
QUESTIONS = [f"{TEXT[start : start + length]}\n\nSay that again." for start, length in
             ((2000, 200), (4000, 300), (6000, 150), (8000, 250))]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory without weights, and what the uncompressed model answers."""
    torch.set_num_threads(1)
    model, tokenizer = load_model("llama", "cpu")
    plain = [answer(model, tokenizer, question) for question in QUESTIONS]
    tqcompress.apply(model, RECIPE)
    directory = tmp_path_factory.mktemp("served") / "smol"
    tqcompress.save(model, directory, tokenizer=tokenizer, base="llama")
    return directory, plain


def answer(model, tokenizer, question):
    """What generate() makes of a question alone, greedily."""
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=NEW, do_sample=False, pad_token_id=2)
    return tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def client(saved):
    """A client of the command, which runs in a process of its own, with one thread as the references here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tqcompress.cli", "serve", saved[0].name, "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = saved[0].parent / "log"
    with log.open("w") as file:
        server = subprocess.Popen(words, cwd=saved[0].parent, env=environment, stdout=file, stderr=file)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=300)
    until = time.monotonic() + 300
    while server.poll() is None and time.monotonic() < until:
        try:
            client.models.list()
            break
        except openai.APIConnectionError:
            time.sleep(0.5)
    yield client
    server.send_signal(signal.SIGINT)
    assert server.wait(60) in (0, 130), log.read_text()  # by the version of uvicorn
    assert "Traceback" not in log.read_text()


def ask(client, question, stream=True):
    """The pieces of an answer, as they come."""
    settings = {"model": "smol", "max_tokens": NEW, "temperature": 0, "stream": stream}
    reply = client.chat.completions.create(messages=[{"role": "user", "content": question}], **settings)
    if not stream:
        return [reply.choices[0].message.content]
    return [chunk.choices[0].delta.content for chunk in reply if chunk.choices[0].delta.content]


def test_four_requests_at_once_get_what_each_gets_alone(client, saved):
    directory, plain = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    alone = [answer(model, tokenizer, question) for question in QUESTIONS]
    assert alone != plain  # the codes are read
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: ask(client, question), QUESTIONS))
    assert ["".join(pieces) for pieces in together] == alone
    assert all(len(pieces) > 1 for pieces in together)  # streamed
    assert ask(client, QUESTIONS[0], stream=False) == alone[:1]


def test_the_served_model_is_listed_and_no_other_is_given(client):
    assert [model.id for model in client.models.list()] == ["smol"]
    with pytest.raises(openai.BadRequestError, match="400"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Who are you?"}])


def test_a_directory_with_weights_is_loaded_compressed(saved, tmp_path):
    model = tiny_model("llama")
    tqcompress.apply(model, lossless())
    tqcompress.save(model, tmp_path, weights=True, tokenizer=AutoTokenizer.from_pretrained(saved[0]))
    served = manager.ModelManager(device="cpu", force_model=str(tmp_path)).loaded_models
    assert [api.compression_of(entry.model).recipe.quantizer for entry in served.values()] == ["exact"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "name a directory that `tqcompress apply --out`"),
        (["nope"], "nope: no such file; `tqcompress apply --out DIR`"),
        (["smol", "--continuous-batching"], "--continuous-batching: transformers keeps the keys and values"),
        (["smol", "--ports", "1"], "No such option: --ports"),
        (["a@b"], "a@b: the server cannot name a directory with an @"),
    ],
)
def test_mistakes_are_one_line(capsys, words, named):
    status, out, err = run(capsys, "serve", *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"tqcompress: {named}")


def test_help_shows_the_options_of_the_server(capsys):
    status, out, _ = run(capsys, "serve", "--help")
    assert status == 0
    assert "tqcompress serve" in out and "--port" in out


def test_continuous_batching_is_refused_not_silently_uncompressed():
    model = tiny_model("llama")
    tqcompress.apply(model, lossless())
    model.set_attn_implementation("sdpa")  # as continuous batching asks for, or flash attention does by itself
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    found = model.generate_batch([prompt(40)[0].tolist()], settings, pages, progress_bar=False)
    assert [result.generated_tokens for result in found.values()] == [[]]
    assert all("in pages of transformers' own" in result.error for result in found.values())
