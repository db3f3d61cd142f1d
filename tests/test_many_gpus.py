"""Models spread over several devices or processes generate what they do on one.

Tensor parallelism runs here as two processes on a CPU, started once for all tests of it: `SCENARIOS` runs in both and
in this process, and what they return is compared. Logits are those of models in float64, so that the sums of two
processes instead of one do not move codes; what is left is the float32 of codecs and attention.
"""

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import lossless, prompt, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

import tqcompress
from tqcompress import ModelError, TQCompressConfig, artifacts
from tqcompress.api import compression_of
from tqcompress.calibrate import Statistics, calibrate
from tqcompress.sharding import HeadShard

pytest.importorskip("accelerate", reason="device maps need accelerate")

NEW = 14
HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
KEEP = {"sinks": 2, "window": 4}
PER_HEAD = {
    "version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "keep": KEEP,
    "rules": [
        {"layers": "all", "heads": [1], "key": {"bits": 2, "seed": 1}},
        {"layers": 1, "heads": [2, 3], "value": {"bits": 8}},  # both in the second process
        {"layers": 2, "heads": [0, 3], "key": {"bits": 8}, "value": {"bits": 8}},
        # Keys in blocks of 16 tokens: the first process must wait as long before it encodes.
        {"layers": 0, "heads": [3], "quantizer": "affine", "key": {"group": 16}, "value": {"group": 16}},
    ],
}  # fmt: skip
BALANCED = PER_HEAD | {
    "center": {"key": True, "value": True}, "balance": "key", "calibration": {"text": "wikitext-validation"},
    "rules": PER_HEAD["rules"][:3],
}  # fmt: skip


def load(path: Path, **settings):
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float64} | settings).eval()


def padded():
    """Two prompts, one of them padded on the left."""
    ids = prompt(26, batch=2)
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model, **settings) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    inputs = {name: tensor.to(device) for name, tensor in padded().items()}
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False} | settings).cpu()


@torch.no_grad()
def logits(model, count: int = 40) -> torch.Tensor:
    """Of a prompt, of some tokens together, and of single ones that read the cache."""
    ids, cache = prompt(count).to(model.get_input_embeddings().weight.device), DynamicCache(config=model.config)
    parts = ids.split([count // 2, 5, *[1] * (count - count // 2 - 5)], dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1).cpu()


def as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def plain(folder, **where):
    return {"tokens": tokens(load(folder / "llama", dtype=torch.float32, **where))}


def same_tokens(folder, **where):
    """Lossless, in both kinds of cache."""
    model = load(folder / "llama", dtype=torch.float32, **where)
    tqcompress.apply(model, lossless())
    return {"dynamic": tokens(model), "static": tokens(model, cache_implementation="static", disable_compile=True)}


def gathered_heads(folder, **where):
    """A model whose plan gathers queries, keys and values in every process."""
    model = load(folder / "phi3", dtype=torch.float32, **where)
    before = tokens(model)
    tqcompress.apply(model, lossless())
    return {"before": before, "after": tokens(model), "kv_heads": torch.tensor(model.tqcompress.layers[0].num_kv_heads)}


def rules_of_heads(folder, **where):
    """Heads have their numbers in the model whatever process they are in."""
    model = load(folder / "llama", **where)
    tqcompress.apply(model, PER_HEAD)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(40), past_key_values=cache)
    sizes = {"nbytes": sum(layer.nbytes for layer in cache.layers), "kv_heads": model.tqcompress.layers[0].num_kv_heads}
    return {"logits": logits(model)} | {name: torch.tensor(size) for name, size in sizes.items()}


def moments(folder, **where):
    """Statistics are of all heads."""
    found = calibrate(load(folder / "llama", **where), prompt(120)[0], length=40, skip=3)
    return {
        f"{index}.{side}.{name}": getattr(of_side, name)
        for index, sides in found.layers.items()
        for side, of_side in sides.items()
        for name in ("mean", "covariance", "query")
        if getattr(of_side, name) is not None
    }


def balanced(folder, **where):
    """Matrices and means of each head; what is saved is of all heads."""
    model = load(folder / "llama", **where)
    tqcompress.apply(model, BALANCED, statistics=Statistics.load(folder / "statistics"))
    out = folder / ("saved by two" if where else "saved by one")
    tqcompress.save(model, out)
    return {"logits": logits(model), "file": as_tensor((out / artifacts.FILE_NAME).read_bytes())}


def loaded(folder, **where):
    """What one process saved, by each way to load it."""
    saved, found = folder / "artifact", {}
    model = load(folder / "llama", **where)
    tqcompress.load(model, saved)
    found["load"] = logits(model)
    found["pointer"] = logits(load(saved, **where))
    config = TQCompressConfig(PER_HEAD)
    found["config"] = logits(load(folder / "llama", quantization_config=config, **where))
    return found


def with_weights(folder, **where):
    """Weights are gathered as transformers does it."""
    out = folder / ("weights of two" if where else "weights of one")
    model = load(folder / "llama", **where)
    tqcompress.apply(model, PER_HEAD)
    tqcompress.save(model, out, weights=True)
    return {"logits": logits(load(out))}


def uneven(folder, **where):
    """Three KV heads in two processes."""
    try:
        tqcompress.apply(load(folder / "uneven", **where), PER_HEAD | {"rules": []})
    except ModelError as error:
        return {"message": as_tensor(str(error).encode())}
    return {}


SCENARIOS = [plain, same_tokens, gathered_heads, rules_of_heads, moments, balanced, loaded, with_weights, uneven]


def process(rank: int, folder: Path, port: int) -> None:
    """One of two that share a model."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for scenario in SCENARIOS:
        save_file(scenario(folder, tp_plan="auto"), folder / f"{scenario.__name__}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and an artifact, all made by one process."""
    path = tmp_path_factory.mktemp("many")
    tiny_model("llama", **HEADS).double().save_pretrained(path / "llama")
    tiny_model("phi3", **HEADS).double().save_pretrained(path / "phi3")
    tiny_model("llama", num_key_value_heads=3).save_pretrained(path / "uneven")
    model = load(path / "llama")
    calibrate(model, prompt(120)[0]).save(path / "statistics")
    tqcompress.apply(model, BALANCED, statistics=Statistics.load(path / "statistics"))
    tqcompress.save(model, path / "artifact")
    return path


@pytest.fixture(scope="module")
def found(folder):
    """`found(scenario)`: what one process returned, and what each of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # transformers would put a process on each GPU
        torch.multiprocessing.spawn(process, (folder, port), nprocs=2)
    return lambda scenario: (
        scenario(folder), *(load_file(folder / f"{scenario.__name__}.{rank}") for rank in (0, 1))
    )  # fmt: skip


@pytest.fixture(scope="module")
def tolerance(folder):
    """Of logits: float32 sums in another order move a few codes and fp16 scales that lie at a boundary.

    How much that matters is measured, with weights moved by 16 units of float32's rounding, in 5 draws for each recipe;
    4 times the largest change is allowed, for there are more draws than that.
    """
    changes = []
    for recipe in (PER_HEAD, BALANCED):
        found = []
        for seed in range(6):
            model = load(folder / "llama")
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters() if seed else ():
                    parameter.mul_(1 + 2**-20 * torch.randn_like(parameter))
            tqcompress.apply(model, recipe, statistics=Statistics.load(folder / "statistics"))
            found.append(logits(model))
        changes += [(moved - found[0]).abs().max().item() for moved in found[1:]]
    return 4 * max(changes)


def test_steps_over_several_devices_are_not_compiled(folder):
    model = load(folder / "llama", dtype=torch.float32)
    compression = tqcompress.apply(model, PER_HEAD) and compression_of(model)
    assert all(layer.compiles for layer in compression.layers.values())
    compression.devices = {0: torch.device("cpu"), 1: torch.device("meta")}
    compression.choose_backends(torch.device("cpu"))
    assert not any(layer.compiles for layer in compression.layers.values())


def test_two_processes_lossless(found):
    want = found(plain)[0]["tokens"]
    for got in found(same_tokens):
        assert got["dynamic"].equal(want)
        assert got["static"].equal(want)
    assert len(set(want[0, 26:].tolist())) > 3  # not one token repeated


def test_two_processes_that_hold_all_heads(found):
    want = found(gathered_heads)[0]["before"]
    for got in found(gathered_heads):
        assert got["kv_heads"] == 4
        assert got["after"].equal(want)


def test_two_processes_with_rules_of_heads(found, folder, tolerance):
    one, *two = found(rules_of_heads)
    for got in two:
        assert got["kv_heads"] == 2
        assert (got["logits"] - one["logits"]).abs().max() <= tolerance
    assert sum(got["nbytes"] for got in two) == one["nbytes"]
    # The same rules for other heads would be seen.
    model = load(folder / "llama")
    other = [rule | {"heads": [3 - head for head in rule["heads"]]} for rule in PER_HEAD["rules"]]
    tqcompress.apply(model, PER_HEAD | {"rules": other})
    assert (logits(model) - one["logits"]).abs().max() > 100 * tolerance


def test_two_processes_calibrate(found):
    one, *two = found(moments)
    for got in two:
        assert got.keys() == one.keys()
        for name, want in one.items():
            # Sums of 120 float64 products in another order, of hidden states that differ by as little.
            torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_two_processes_with_matrices_of_heads(found, tolerance):
    one, *two = found(balanced)
    for got in two:
        assert (got["logits"] - one["logits"]).abs().max() <= tolerance
        assert got["file"].equal(one["file"]), "an artifact is the same whoever made it"


def test_two_processes_load_what_one_saved(found, tolerance):
    one, *two = found(loaded)
    for name, want in one.items():
        for got in two:
            assert (got[name] - want).abs().max() <= tolerance, name


def test_one_process_loads_weights_that_two_saved(found, tolerance):
    one, *two = found(with_weights)
    for got in two:
        assert (got["logits"] - one["logits"]).abs().max() <= tolerance


def test_two_processes_refuse_uneven_heads(found):
    one, *two = found(uneven)
    assert not one
    for got in two:
        message = bytes(got["message"].tolist()).decode()
        assert message.startswith("layer 0: its 3 KV heads do not divide evenly among the 2 processes"), message


def test_heads_of_each_process():
    assert [list(HeadShard(rank, 4).heads(8, 0)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ModelError, match="layer 5: its 2 KV heads do not divide evenly among the 4 processes"):
        HeadShard(0, 4).heads(2, 5)


def parts(first, second, layers: int) -> dict:
    """A device map: the first half of the layers and the embedding here, the rest there."""
    names = [f"model.layers.{i}" for i in range(layers)]
    where = {name: first if i < layers // 2 else second for i, name in enumerate(names)}
    return where | {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}


def test_layers_whose_weights_are_on_disk(folder, tmp_path):
    """accelerate brings them in for each call: codecs are where the layer computes, not where its weights wait."""
    where = {"device_map": parts("cpu", "disk", 3), "offload_folder": tmp_path}
    want = tokens(load(folder / "llama", dtype=torch.float32))
    model = load(folder / "llama", dtype=torch.float32, **where)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    tqcompress.apply(model, lossless())
    assert compression_of(model).devices == dict.fromkeys(range(3), torch.device("cpu"))
    assert tokens(model).equal(want)
    assert tokens(model, cache_implementation="static").equal(want)


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@needs_two
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_two_devices_lossless(folder, cache, beams):
    settings = {"cache_implementation": cache, "num_beams": beams, "disable_compile": True}
    want = tokens(load(folder / "llama", dtype=torch.float32, device_map="cuda:0"), **settings)
    model = load(folder / "llama", dtype=torch.float32, device_map=parts(0, 1, 3))
    tqcompress.apply(model, lossless())
    assert tokens(model, **settings).equal(want)


@needs_two
@pytest.mark.parametrize("recipe", [PER_HEAD, PER_HEAD | {"rules": []}], ids=["rules", "fused"])
def test_two_devices_compressed(folder, recipe):
    """The same kernels on the same numbers, whichever device they run on."""
    found = []
    for where in ("cuda:0", parts(0, 1, 3)):
        model = load(folder / "llama", dtype=torch.float32, device_map=where)
        tqcompress.apply(model, recipe)
        for index, codecs in model.tqcompress.layers.items():
            states = [*codecs.groups[0].key.buffers(), *codecs.groups[0].value.buffers()]
            assert {state.device for state in states} == {model.model.layers[index].self_attn.k_proj.weight.device}
        found += [(logits(model), tokens(model))]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@needs_two
def test_two_devices_calibrate(folder):
    one, two = (
        calibrate(load(folder / "llama", device_map=where), prompt(120)[0]) for where in ("cuda:0", parts(0, 1, 3))
    )
    for index, sides in one.layers.items():
        for side, want in sides.items():
            assert torch.equal(two.layers[index][side].covariance, want.covariance)
