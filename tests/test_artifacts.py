"""Saving and loading: what comes back, from where, and what is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

import tqcompress
from tqcompress import ArtifactError, ModelError, TQCompressConfig, artifacts
from tqcompress.api import compression_of

RECIPE = {
    "version": 1, "name": "small", "key": {"bits": 3, "rotation": "dense", "seed": 3}, "value": {"bits": 2},
    "keep": {"sinks": 2, "window": 4}, "rules": [{"layers": 1, "skip": True}],
}  # fmt: skip


@torch.no_grad()
def logits(model):
    """Logits of a prefill, then of tokens that read the cache."""
    cache = DynamicCache(config=model.config)
    ids = prompt(30)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([24, 1, 5], dim=1)], dim=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with an ordinary model."""
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def saved(base, tmp_path):
    """A directory with an artifact that points at the base."""
    model = load_base(base)
    tqcompress.apply(model, RECIPE)
    return tqcompress.save(model, tmp_path / "saved")


# Models to compare are always loaded: .to(bfloat16) would also round the rotary frequencies, which loading keeps.
def load_base(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def edit(path: Path, change=None, metadata=None, rehash=False):
    """Write the artifact anew with changed tensors and metadata; `rehash` makes its checksum right."""
    path = path / artifacts.FILE_NAME
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata() | (metadata or {})
    if change:
        change(tensors)
    if rehash:
        meta.pop("sha256")
        meta["sha256"] = artifacts._digest(tensors, meta)
    save_file(tensors, path, meta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [True, False])
def test_from_pretrained_brings_the_model_back(base, tmp_path, dtype, weights):
    model = load_base(base, dtype)
    plain = logits(model)
    plan = tqcompress.apply(model, RECIPE)
    want = logits(model)
    tqcompress.save(model, tmp_path, weights=weights)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == dtype and not again.training
    assert compression_of(again).plan.to_dict() == plan.to_dict()
    assert torch.equal(logits(again), want) and not torch.equal(want, plain)
    assert all(codec.codebook.dtype == torch.float32 for codec in compression_of(again).codecs["0-0"].values())
    unnamed = AutoModelForCausalLM.from_pretrained(tmp_path)  # the dtype is saved too
    assert unnamed.dtype == dtype and torch.equal(logits(unnamed), want)
    tqcompress.remove(again)
    assert torch.equal(logits(again), plain)


@pytest.mark.parametrize("weights", [True, False])
def test_a_loaded_model_can_be_saved_again(base, tmp_path, weights):
    model = load_base(base)
    tqcompress.apply(model, RECIPE)
    tqcompress.save(model, tmp_path / "one", weights=weights)
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tqcompress.save(second, tmp_path / "two", weights=not weights)
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(third), logits(model))
    old, new = (artifacts.read(tmp_path / name) for name in ("one", "two"))
    assert (new.recipe, new.plan, new.fingerprint) == (old.recipe, old.plan, old.fingerprint)
    assert new.tensors.keys() == old.tensors.keys()
    assert all(torch.equal(new.tensors[name], old.tensors[name]) for name in old.tensors)


def test_load_onto_a_plain_model(base, saved):
    want = logits(AutoModelForCausalLM.from_pretrained(saved))
    for path in (saved, saved / artifacts.FILE_NAME, str(saved)):
        model = load_base(base)
        plan = tqcompress.load(model, path)
        assert torch.equal(logits(model), want) and plan.exact == {1: "skipped by rules[0]"}
        tqcompress.load(model, path)  # and onto one that is compressed already
        assert torch.equal(logits(model), want)


def test_compress_while_loading(base):
    applied = load_base(base)
    tqcompress.apply(applied, RECIPE)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=TQCompressConfig(RECIPE))
    assert torch.equal(logits(model), logits(applied))


def test_tensors_are_read_from_the_file(base, saved, tmp_path):
    """Not rebuilt from seeds: a newer default, or another random generator, must not change a saved model."""
    want = logits(AutoModelForCausalLM.from_pretrained(saved))
    name = "layers.0.g0.key.rotation"

    def turn(tensors):
        tensors[name] = tensors[name].flip(0).contiguous()

    edit(saved, turn, rehash=True)
    model = load_base(base)
    tqcompress.load(model, saved)
    assert torch.equal(compression_of(model).state()[name], artifacts.read(saved).tensors[name])
    assert not torch.equal(logits(model), want)


def test_without_weights_only_small_files_are_written(saved):
    assert {file.name for file in saved.iterdir()} == {"config.json", "recipe.yaml", artifacts.FILE_NAME}
    assert sum(file.stat().st_size for file in saved.iterdir()) < 20_000
    assert tqcompress.Recipe.load(saved / "recipe.yaml") == tqcompress.Recipe.load(RECIPE)
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "tqcompress"


def test_saved_weights_are_the_model_and_nothing_else(base, tmp_path):
    model = load_base(base)
    tqcompress.apply(model, RECIPE)
    tqcompress.save(model, tmp_path, weights=True)
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path))
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "tqcompress"
    assert config["model_type"] == "llama" and "tqcompress" not in json.dumps(config | {"quantization_config": 0})


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def edit_metadata(path):
    edit(path.parent, metadata={"recipe": '{"version": 1, "key": {"bits": 1}, "value": {"bits": 1}}'})


def edit_header(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    path.write_bytes(content[:8] + content[8 : 8 + size].replace(b"dense", b"DENSE") + content[8 + size :])


def drop_tensor(path):
    edit(path.parent, lambda tensors: tensors.pop("layers.0.g0.key.codebook"), rehash=True)


def add_tensor(path):
    edit(path.parent, lambda tensors: tensors.update(more=torch.ones(1)), rehash=True)


def reshape_tensor(path):
    edit(path.parent, lambda tensors: tensors.update({"layers.0.g0.key.codebook": torch.ones(4)}), rehash=True)


def retype_tensor(path):
    name = "layers.0.g0.key.codebook"
    edit(path.parent, lambda tensors: tensors.update({name: tensors[name].double()}), rehash=True)


def damage_plan(path):
    edit(path.parent, metadata={"plan": '{"groups": [{}], "sinks": 0}'}, rehash=True)


def unknown_quantizer(path):
    with safe_open(path, framework="pt") as file:
        plan = file.metadata()["plan"].replace('"turboquant"', '"nobody_has_it"')
    edit(path.parent, metadata={"plan": plan}, rehash=True)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "damaged"),
        (flip_a_byte, "checksum"),
        (edit_metadata, "checksum"),
        (edit_header, "checksum"),
        (lambda path: edit(path.parent, metadata={"format_version": "2"}, rehash=True), "upgrade tqcompress"),
        (lambda path: edit(path.parent, metadata={"format": "gguf"}), "not a tqcompress artifact"),
        (drop_tensor, "layers.0.g0.key.codebook"),
        (add_tensor, "more"),
        (reshape_tensor, r"layers.0.g0.key.codebook.*\[4\].*\[8\]"),
        (retype_tensor, "layers.0.g0.key.codebook.*float64.*float32"),
        (damage_plan, "malformed: plan: groups"),
        (lambda path: edit(path.parent, metadata={"allocation": '{"x": 1}'}, rehash=True), "metadata is malformed"),
        (unknown_quantizer, "nobody_has_it"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "not a tqcompress artifact"),
        (lambda path: path.write_text("hello"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (Path.unlink, "no such file"),
    ],
)
def test_damaged_artifacts_are_refused(base, saved, damage, reason):
    damage(saved / artifacts.FILE_NAME)
    model = load_base(base)
    want = logits(model)
    with pytest.raises(ArtifactError, match=reason) as error:
        tqcompress.load(model, saved)
    assert "\n" not in str(error.value)
    assert compression_of(model) is None and torch.equal(logits(model), want)
    with pytest.raises(ArtifactError):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"num_hidden_layers": 4}, "layers"),
        ("llama", {"num_key_value_heads": 3}, "layers"),
        ("llama", {"head_dim": 32}, "layers"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope"),
        ("mistral", {}, "model_type"),
    ],
)
def test_artifacts_of_other_models_are_refused(saved, name, changes, reason):
    model = tiny_model(name, **changes)
    want = logits(model)
    with pytest.raises(ArtifactError, match=f"made for .*{reason}"):
        tqcompress.load(model, saved)
    assert compression_of(model) is None and torch.equal(logits(model), want)


def test_an_uncompressed_model_is_not_saved(tmp_path):
    with pytest.raises(ModelError, match="not compressed"):
        tqcompress.save(tiny_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pointer_to_a_missing_base_says_so(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gone"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("named", [None, 3, ["a"]])
def test_a_pointer_to_nothing_says_so(saved, named):
    config = json.loads((saved / "config.json").read_text()) | {"base_model_name_or_path": named}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="names no base_model_name_or_path"):
        AutoModelForCausalLM.from_pretrained(saved)
