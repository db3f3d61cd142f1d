"""The fused backend: which groups get which kernel, and that a cache reads and writes through it as through torch.

Kernels are interpreted on the CPU (the plain ones) or compiled on CUDA (those that the backend chooses).
"""

import pytest
import torch
from codec_helpers import moments
from kernels_helpers import DEVICE
from test_blockwise import make_view
from tqcompress.plugins import fused

from tqcompress import HeadShape, ModelError, TensorSpec, blockwise
from tqcompress.cli import main
from tqcompress.plan import build_codec
from tqcompress.registry import plugins
from tqcompress.store import TokenStore
from tqcompress_kernels import plain

OUTLIERS = {"channels": 16, "bits": 4}
HERE = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
CUDA = torch.device("cuda")


def codecs(key: TensorSpec, value: TensorSpec, dim: int = 128):
    return {side: build_codec(spec, HeadShape(2, dim, side)) for side, spec in (("key", key), ("value", value))}


def turboquant(bits, **options):
    return TensorSpec("turboquant", bits, options)


def trellis(bits, **options):
    return TensorSpec("trellis", bits, options)


@pytest.mark.parametrize(
    ("key", "value", "dim", "name", "reason"),
    [
        (turboquant(4), turboquant(2), 128, "triton int8", "int8 tensor cores"),
        (turboquant(8), turboquant(3, scale="log8"), 128, "triton int8", "int8 tensor cores"),
        (turboquant(5), turboquant(4), 128, "triton plain", "keys have 5-bit levels"),
        (turboquant(2.5), turboquant(3.25), 128, "triton int8", "int8 tensor cores"),
        (turboquant(2), turboquant(2.5), 64, "triton int8", "int8 tensor cores"),
        (turboquant(2), turboquant(3.25), 64, "triton plain", "value rows of 48 codes"),
        (turboquant(4.5), turboquant(4), 128, "triton plain", "keys have 5-bit levels"),
        (turboquant(2, outliers={"channels": 16, "bits": 4}), turboquant(4), 64, "triton int8", "int8 tensor cores"),
        (turboquant(4), turboquant(4, levels="lloyd-max"), 128, "triton plain", "values have levels that are not"),
        (turboquant(4), turboquant(3), 80, "triton plain", "value rows of 80 codes"),
        (TensorSpec("affine", 4), turboquant(4), 128, "torch", "affine keys have no levels"),
        (trellis(3), trellis(2, states=16), 128, "triton int8", "int8 tensor cores"),
        (trellis(2, states=1024), turboquant(4), 128, "triton int8", "int8 tensor cores"),
        (trellis(2), trellis(2), 64, "triton int8", "int8 tensor cores"),
        (trellis(2), trellis(2), 72, "triton plain", "key rows of 72 trellis codes"),
        (trellis(1, states=1024), trellis(2), 128, "torch", "trellis keys: 1024 states at 1 bits have 512 path costs"),
        (turboquant(4), turboquant(4), 20, "torch", "head_dim 20"),
    ],
)
def test_each_group_gets_the_fastest_kernel_and_the_reason(key, value, dim, name, reason):
    backend = plugins().hook.tqcompress_backend(group=None, codecs=codecs(key, value, dim), device=CUDA)
    assert backend.name == name
    assert reason in backend.reason


def test_a_cpu_gets_none():
    pair = codecs(turboquant(4), turboquant(4))
    assert plugins().hook.tqcompress_backend(group=None, codecs=pair, device=torch.device("cpu")) is None


def test_inspect_tells_the_backend(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 1, '
        '"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}'
    )
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "balanced", "--model", str(tmp_path), "--device", "cuda"])
    assert not stop.value.code
    assert "triton int8" in " ".join(capsys.readouterr().out.split())


def fused_group(view):
    """The fused group of a view's codecs, here."""
    group = fused.FusedGroup(view.codecs.key, view.codecs.value, HERE)
    if DEVICE == "cpu":
        group.split = plain.split
    return group


def moved(view):
    for store, codec in ((view.key, view.codecs.key), (view.value, view.codecs.value)):
        store.map(lambda states: states.to(HERE))
        codec.to(HERE)
    view.__dict__["sinks"], view.__dict__["recent"] = (
        tuple(states.to(HERE) for states in pair) for pair in (view.sinks, view.recent)
    )
    return view


@pytest.mark.parametrize(
    ("key", "value", "share", "queries", "padded", "softcap"),
    [
        (turboquant(4), turboquant(3), 2, 1, False, None),
        (turboquant(3, rotation="dense"), turboquant(2, scale="log8"), 1, 3, False, None),
        (turboquant(2), turboquant(4), 2, 1, True, 20.0),
        (turboquant(4, center=True, balance="key"), turboquant(3, center=True), 2, 1, False, None),
        (turboquant(3, balance="diagonal"), turboquant(2), 1, 3, True, 20.0),
        (turboquant(4), turboquant(4), 2, 2, True, None),
        (turboquant(4), turboquant(4), 1, 40, False, None),
        (turboquant(4, center=True), turboquant(3, center=True), 2, 40, True, 20.0),
        (turboquant(2.5), turboquant(3.25, scale="log8"), 2, 1, True, None),
        (
            turboquant(2, balance="key", center=True, outliers=OUTLIERS),
            turboquant(2, outliers=OUTLIERS),
            2,
            1,
            False,
            20.0,
        ),
        (turboquant(3, outliers=OUTLIERS), turboquant(2.5), 2, 40, True, None),
        (trellis(3), trellis(2, states=64), 2, 1, False, None),
        (trellis(2, center=True, balance="key"), turboquant(3), 1, 3, False, None),
    ],
)
def test_it_attends_as_torch_does(key, value, share, queries, padded, softcap, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    view, _, _ = make_view(key, value, 2, 2, 64, 4, 150, 5 + queries, generator)
    view = moved(view)
    tokens = 4 + 150 + 5 + queries
    query = torch.randn(2, 2 * share, queries, 64, generator=generator).to(HERE)
    mask = torch.ones(2, tokens, dtype=torch.bool, device=HERE) if padded else None
    if padded:
        mask[1, 4:30] = False
    want, want_lse = blockwise.attend(query, view, mask, 0.125, softcap)
    monkeypatch.setattr(blockwise, "attend", None)
    got, got_lse = fused_group(view).attend(query, view, mask, 0.125, softcap)
    # fp16 operands (plain) round by 2^-11, int8 ones by 1/64000 of a column's largest number.
    assert (got - want).norm() < 1e-3 * want.norm()
    assert (got_lse - want_lse).abs().max() < 2e-3


def test_any_other_mask_goes_to_torch_and_that_is_said_once():
    generator = torch.Generator().manual_seed(0)
    view = moved(make_view(turboquant(4), turboquant(4), 2, 2, 64, 4, 40, 8, generator)[0])
    query = torch.randn(2, 2, 3, 64, generator=generator).to(HERE)
    mask = (torch.rand(2, 1, 3, 52, generator=generator) < 0.5).to(HERE)
    want = blockwise.attend(query, view, mask, 0.125)
    fused._tell.cache_clear()
    with pytest.warns(UserWarning, match="do not take masks that differ between heads") as said:
        got = [fused_group(view).attend(query, view, mask, 0.125) for _ in range(2)][-1]
    assert len(said) == 1
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "spec",
    [
        turboquant(3),
        turboquant(4),
        turboquant(3, center=True),
        turboquant(4, center=True, balance="key"),
        turboquant(2.5),
        turboquant(2, center=True, balance="key", outliers=OUTLIERS),
        trellis(2, states=16),
        trellis(4, states=16, center=True, balance="key"),
    ],
)
def test_it_appends_what_the_codec_encodes(spec):
    """Into the room behind the last row; what is there already stays."""
    codec = build_codec(spec, HeadShape(2, 64, "key"))
    if codec.needs_statistics:
        codec.fit(moments(64))
    generator = torch.Generator().manual_seed(0)
    parts = [20, 1, 9] if codec.name == "trellis" else [70, 1, 19]  # interpreted, a search takes long
    x = torch.randn(2, 2, sum(parts), 64, generator=generator)
    want = codec.encode(x)
    codec = codec.to(HERE)
    store = TokenStore(codec.layout(), 2, 2, HERE)
    group = fused.FusedGroup(codec, codec, HERE)
    for part in x.to(HERE).split(parts, dim=2):
        store.reserve(part.shape[2])
        group.append(codec, part, store)
        store.length += part.shape[2]
    for name, rows in store.read().items():
        # The codec rotates in float32, the kernel more precisely: a code next to a boundary may differ.
        assert (rows.cpu() != want[name]).sum() <= 1 + 2e-3 * rows.numel()


def test_a_model_that_moved_is_told_what_to_do():
    pair = codecs(turboquant(4), turboquant(4))
    group = fused.FusedGroup(pair["key"], pair["value"], torch.device("cuda", 7))
    with pytest.raises(ModelError, match=r"was on cuda:7 .* now runs on cpu; call tqcompress\.apply again"):
        group.append(pair["key"], torch.zeros(1, 2, 1, 128), None)
