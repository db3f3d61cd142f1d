"""Exported graphs under onnxruntime against torch."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from codec_helpers import build, moments
from test_cli import run
from tiny import tiny_model

import tqcompress
from tqcompress import HeadShape, TensorSpec, api
from tqcompress.calibrate import calibrate
from tqcompress.errors import ModelError
from tqcompress.export import onnx as exporter
from tqcompress.export.commands import CHECKED
from tqcompress.export.graph import OPSET
from tqcompress.export.manifest import MANIFEST, write_manifest
from tqcompress.export.runtime import LOGITS_ERROR, OnnxModel, as_tensor, compare, differing
from tqcompress.export.step import ModelStep, StepTokens, attend
from tqcompress.models import load_model
from tqcompress.plan import build_codec
from tqcompress.registry import plugins
from tqcompress.texts import load_text

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

# pytest keeps all records of loggers that pass them on; torch's tracer writes a million.
logging.getLogger("torch.__trace").propagate = False

# Layer 0 exact, layer 1 of two groups, one of which shares rows among eight tokens.
RECIPE = {
    "version": 1,
    "key": {"bits": 4},
    "value": {"bits": 3},
    "keep": {"sinks": 4, "window": 8},
    "rules": [
        {"layers": [0], "skip": True},
        {
            "layers": [1],
            "heads": [1],
            "quantizer": "affine",
            "key": {"bits": 4, "group": 8},
            "value": {"bits": 4, "group": 8},
        },
    ],
}


def compressed(model, recipe, statistics=None):
    """The compression that a recipe makes of a model, which is then as before."""
    tqcompress.apply(model, recipe, statistics=statistics)
    compression = api.compression_of(model)
    api.remove(model)
    return compression


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with an exact layer and one of two groups, as graphs."""
    model = tiny_model("llama", num_hidden_layers=2)
    compression = compressed(model, RECIPE)
    directory = tmp_path_factory.mktemp("exported")
    write_manifest(directory, compression, exporter.write_model(ModelStep(model, compression), directory), {})
    return directory, model, compression


def tokens(count, seed=0):
    return torch.randint(0, 200, (count,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ the codecs

CODECS = [
    ("turboquant", 3, "key", (("balance", "key"), ("center", True), ("scale", "log8"))),
    ("turboquant", 2.5, "value", (("center", True),)),
    ("trellis", 2, "value", ()),
    ("exact", 32, "value", ()),
]


@pytest.mark.parametrize(("name", "bits", "side", "options"), CODECS)
def test_graphs_of_codecs_compute_what_torch_does(tmp_path, name, bits, side, options):
    # As in a model that computes in float32: onnxruntime takes no bfloat16 from numpy.
    codec = build_codec(TensorSpec(name, bits, dict(options)), HeadShape(2, 64, side))
    if codec.needs_statistics:
        codec.fit(moments(64))
    graphs, block = exporter.CodecGraphs(tmp_path), codec.layout().block
    sessions = {
        method: onnxruntime.InferenceSession(tmp_path / graphs.write(codec, method, "codec"))
        for method in ("encode", "decode")
        if method not in codec.not_in_onnx
    }
    for batch, blocks in ((1, 0), (1, 1), (2, 9)):  # none of them as it was traced
        x = torch.randn(batch, codec.shape.num_kv_heads, blocks * block, 64, generator=torch.Generator().manual_seed(0))
        packed = {name: as_tensor(rows.numpy()) for name, rows in codec.encode(x).items()}
        if "encode" in sessions:
            names = [output.name for output in sessions["encode"].get_outputs()]
            assert names == list(packed) == list(codec.layout().fields)
            found = dict(zip(names, map(as_tensor, sessions["encode"].run(None, {"x": x.numpy()})), strict=True))
            ties, wrong = differing(codec, x, dict(found), dict(packed))
            assert wrong == 0 and ties <= 1 + x[..., 0].numel() // 500
        decoded = sessions["decode"].run(None, {key: rows.numpy() for key, rows in packed.items()})[0]
        want = codec.decode(packed)
        assert decoded.shape == want.shape
        # A product with a matrix: 64 terms, each rounded, of vectors whose coordinates are about 1.
        assert want.numel() == 0 or np.abs(decoded - want.numpy()).max() < 1e-5


def test_a_row_that_is_wrong_is_told_from_a_tie():
    codec = build("turboquant", 4, "value", 64)
    x = torch.randn(1, codec.shape.num_kv_heads, 5, 64, generator=torch.Generator().manual_seed(0))
    packed = codec.encode(x)
    damaged = {name: rows.clone() for name, rows in packed.items()}
    damaged["codes4"][0, 0, 2, 7] ^= 4
    assert differing(codec, x, dict(damaged), dict(packed)) == (0, 1)
    damaged = packed | {"scale": torch.nextafter(packed["scale"].float(), torch.tensor(9.0)).half()}
    assert differing(codec, x, dict(damaged), dict(packed)) == (0, 0)  # the same, rounded to fp16
    damaged["scale"] = (packed["scale"].view(torch.int16) + 1).view(torch.float16)
    assert differing(codec, x, dict(damaged), dict(packed)) == (x[..., 0].numel(), 0)


def test_equal_codecs_are_one_file_and_others_have_their_own_numbers(tmp_path):
    one, other = (build("turboquant", 4, "key", 64, (("center", True), ("seed", seed))) for seed in (0, 0))
    graphs = exporter.CodecGraphs(tmp_path)
    assert graphs.write(one, "decode", "a") == graphs.write(other, "decode", "b") == "a.decode.onnx"
    moved = type(one)(one.spec, one.shape)
    moved.mean.copy_(one.mean + 1)
    assert graphs.write(moved, "decode", "c") == "c.decode.onnx" and len(graphs.traced) == 1
    packed = {key: rows.numpy() for key, rows in one.encode(torch.zeros(1, 2, 3, 64)).items()}
    decoded = [onnxruntime.InferenceSession(tmp_path / f"{f}.decode.onnx").run(None, packed)[0] for f in "ac"]
    assert np.allclose(decoded[1], decoded[0] + 1, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["fp8", "nvfp4", "polar", "trellis"])
def test_a_codec_that_cannot_be_exported_is_refused_by_name(tmp_path, quantizer):
    bits = min(plugins().registry.codec(quantizer).supported_bits[-1], 8)
    codec = build(quantizer, bits, "key", 64)
    with pytest.raises(ModelError, match=f"{quantizer}: encode is not exported to ONNX: "):
        exporter.CodecGraphs(tmp_path).write(codec, "encode", "codec")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- the model


def test_a_model_runs_as_in_torch_from_nothing_at_all(exported):
    directory, model, compression = exported
    ids = tokens(100)
    steps = [ids[:1], ids[1:3], ids[3:40], *ids[40:80, None], ids[80:]]
    found = list(compare(OnnxModel(directory), ModelStep(model, compression), steps))
    assert {result.rows for result in found} == {0, 24 * 4, 8 * 4}  # 8 tokens at a time: 2 heads, keys and values
    assert sum(result.rows for result in found) == (80 - 12) // 8 * 8 * 4
    assert_equal(found)


def assert_equal(found):
    """Packed rows are the same bits, and logits the same numbers but for rounding; a tie in a thousand is allowed."""
    rows, ties, wrong = (sum(getattr(result, name) for result in found) for name in ("rows", "ties", "wrong"))
    assert wrong == 0 and ties <= 1 + rows // 1000
    assert max(result.logits for result in found) < (LOGITS_ERROR if ties else 2e-5)


def test_a_model_answers_as_its_cache_does(exported):
    """Not `ModelStep` against its own graph, but against generation through transformers."""
    directory, model, _ = exported
    ids = torch.stack([tokens(50, 1), tokens(50, 2)])
    exact = OnnxModel(directory)
    logits, answer = exact(ids.numpy()), []
    for _ in range(30):
        answer.append(logits.argmax(-1))
        logits = exact(answer[-1][:, None])
    tqcompress.apply(model, RECIPE)
    try:
        want = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[:, 50:]
    finally:
        tqcompress.remove(model)
    assert torch.equal(torch.from_numpy(np.stack(answer, 1)), want)


def test_the_graph_is_standard_and_open_in_its_sizes(exported):
    import onnx

    directory, _, _ = exported
    graph = onnx.load(directory / exporter.MODEL, load_external_data=False)
    assert [(o.domain, o.version) for o in graph.opset_import if o.domain == ""] == [("", OPSET)]
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and not graph.functions
    axes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.graph.input}
    assert axes["input_ids"] == ["batch", "new"]
    assert axes["past.0.key"] == ["batch", 2, "tokens", 16] and axes["past.1.key"] == ["batch", 2, "exact", 16]
    assert axes["leaving.1.value"] == ["batch", 2, "8*leaving_8", 16]
    assert axes["past.1.1.key.step"] == ["batch", 1, "packed_8", 16]
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    layers = json.loads((directory / MANIFEST).read_text())["layers"]
    assert [len(layer["groups"]) for layer in layers] == [0, 2] and layers[1]["block"] == 8


def test_attention_of_blocks_of_tokens_and_soft_caps_is_that_of_the_reference():
    """`attend` against `blockwise.attend`, which generation uses, for a codec that shares rows among 32 tokens."""
    from tqcompress import blockwise
    from tqcompress.store import TokenStore
    from tqcompress.view import Backend, GroupCodecs, GroupView

    key, value = build("affine", 4, "key", 64), build("turboquant", 3, "value", 64)
    group = GroupCodecs((0, 1), key, value, Backend("torch", blockwise.attend, ""))
    generator = torch.Generator().manual_seed(0)
    k, v, query = (torch.randn(2, heads, n, 64, generator=generator) for heads, n in ((2, 80), (2, 80), (4, 3)))
    packed = (key.encode(k[:, :, 4:68]), value.encode(v[:, :, 4:68]))
    exact = tuple(torch.cat([x[:, :, :4], x[:, :, 68:]], 2) for x in (k, v))
    stores = []
    for codec, rows in zip((key, value), packed, strict=True):
        store = TokenStore(codec.layout(), 2, 2, torch.device("cpu"))
        store.append(rows, 64)
        stores.append(store)
    view = GroupView(group, *stores, 64, (k[:, :, :4], v[:, :, :4]), (k[:, :, 68:], v[:, :, 68:]))
    want, _ = blockwise.attend(query, view, None, 0.1, softcap=5.0)
    found = attend(query, StepTokens(exact, ((group, *packed),)), 0.1, softcap=5.0)
    assert (found - want).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------- the command


def test_a_layer_with_real_weights_runs_64_steps_on_real_text(capsys, tmp_path):
    model, tokenizer = load_model("llama", device="cpu")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers, model.config.layer_types = 1, None
    recipe = {"version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "center": {"key": True}, "balance": "key",
              "keep": {"sinks": 4, "window": 16}, "calibration": {"text": "wikitext-validation"}}  # fmt: skip
    ids = tokenizer(load_text("wikitext-validation"), return_tensors="pt", verbose=False).input_ids[0, :512]
    tqcompress.apply(model, recipe, statistics=calibrate(model, ids))
    tqcompress.save(model, tmp_path / "saved", weights=True, tokenizer=tokenizer)
    status, output, errors = run(capsys, "export", "onnx", tmp_path / "out", "--dir", tmp_path / "saved", "--check", 64)
    output = " ".join(output.split())
    assert status == 0, errors
    assert "out: 4 graphs of codecs, model.onnx" in output and "a prompt and 64 steps" in output
    found = re.search(
        r"all( but (\d+))? of (\d+) packed rows are the same bits; logits differ by at most (\S+) ", output
    )
    ties, rows, logits = int(found[2] or 0), int(found[3]), float(found[4])
    assert rows == (CHECKED + 64 - 1) * 3 * 2  # all but sinks, window and the last; 3 heads, keys and values
    assert ties <= 1 and logits < (LOGITS_ERROR if ties else 2e-5)


def test_the_command_exports_codecs_without_weights(capsys, tmp_path):
    model = tiny_model("gemma2")  # every other layer has a sliding window
    tqcompress.apply(model, {"version": 1, "quantizer": "trellis", "key": {"bits": 2}, "value": {"bits": 2}})
    tqcompress.save(model, tmp_path / "saved", base="nowhere")
    status, output, _ = run(capsys, "export", "onnx", tmp_path / "out", "--dir", tmp_path / "saved", "--codecs")
    assert status == 0 and "left out: trellis: encode is not exported to ONNX" in output
    names = sorted(path.name for path in (tmp_path / "out" / "codecs").iterdir())
    assert names == ["layer1.group0.key.decode.onnx", "layer1.group0.value.decode.onnx"]  # layer 3 has the same


@pytest.mark.parametrize(
    ("name", "quantizer", "bits", "reason"),
    [
        ("llama", "trellis", 2, "layer 0: trellis: encode is not exported to ONNX, and a step needs it: its search"),
        ("llama", "fp8", 8, "layer 0: fp8: encode is not exported to ONNX, and a step needs it: ONNX"),
        ("gemma2", "turboquant", 4, "layer 0 has sliding attention; a step is exported only of models"),
    ],
)
def test_a_model_that_cannot_be_exported_is_one_error(capsys, tmp_path, name, quantizer, bits, reason):
    model = tiny_model(name)
    tqcompress.apply(model, {"version": 1, "quantizer": quantizer, "key": {"bits": bits}, "value": {"bits": bits}})
    tqcompress.save(model, tmp_path / "saved", base="nowhere")
    status, _, errors = run(capsys, "export", "onnx", tmp_path / "out", "--dir", tmp_path / "saved")
    assert status == 2 and reason in errors and not (tmp_path / "out").exists()


def test_mistakes(capsys, tmp_path):
    status, _, errors = run(capsys, "export", "onnx", tmp_path / "out", "--dir", tmp_path / "nope")
    assert status == 2 and "nope: no such file" in errors.replace("\n", "")
    model = tiny_model("llama")
    tqcompress.apply(model, {"version": 1, "quantizer": "fp8", "key": {"bits": 8}, "value": {"bits": 8}})
    tqcompress.save(model, tmp_path / "saved", base="nowhere")
    status, _, errors = run(capsys, "export", "onnx", tmp_path / "out", "--dir", tmp_path / "saved", "--codecs")
    assert status == 2 and "fp8: encode is not exported" in errors and "fp8: decode is not exported" in errors
