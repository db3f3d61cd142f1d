"""The quantizer `sign`, as a plugin's author would test it: alone, and in a model that generates."""

import pytest
import torch
from tqcompress_example.sign import Sign
from transformers import LlamaConfig, LlamaForCausalLM

import tqcompress
from tqcompress.packing import unpack


def build(bits=1, **options):
    return Sign(tqcompress.TensorSpec("sign", bits, options), tqcompress.HeadShape(2, 64, "key"))


def vectors():
    return torch.randn(3, 2, 5, 64, generator=torch.Generator().manual_seed(0))


def test_a_vector_becomes_its_signs_times_the_mean_of_its_absolute_values():
    x = vectors()
    expected = x.sign() * x.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(build().decode(build().encode(x)), expected, rtol=1e-3, atol=0)


def test_rms_keeps_the_length_and_mean_has_the_smaller_error():
    x = vectors()
    mean, rms = (codec.decode(codec.encode(x)) for codec in (build(), build(scale="rms")))
    torch.testing.assert_close(rms.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    assert (mean - x).norm() < (rms - x).norm()


def test_the_fused_kernels_are_told_of_scales_that_keep_the_length():
    x, codec = vectors(), build(scale="rms")
    packed, levels = codec.encode(x), codec.levels()
    units = levels.levels[unpack(packed, levels.bits, 64)]
    assert torch.equal(units * packed["scale"].float() @ levels.back, codec.decode(packed))
    length = (x @ levels.into).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(packed["scale"].float(), length / units.norm(dim=-1, keepdim=True), rtol=1e-3, atol=0)
    assert build().levels() is None


def test_zeros_stay_zeros():
    x = torch.zeros(1, 2, 1, 64)
    assert torch.equal(build().decode(build().encode(x)), x)


def test_the_packed_rows_are_those_of_the_layout():
    codec, layout = build(), build().layout()
    packed = codec.encode(vectors())
    assert {name: (rows.dtype, rows.shape[-1]) for name, rows in packed.items()} == {
        name: (field.dtype, field.size) for name, field in layout.fields.items()
    }
    assert layout.nbytes_per_token == 64 / 8 + 2


@pytest.mark.parametrize("bits, options", [(2, {}), (1, {"scale": "median"}), (1, {"scales": "mean"})])
def test_other_bits_and_options_are_refused(bits, options):
    with pytest.raises(ValueError):
        build(bits, **options)


def test_a_model_generates_with_a_recipe_that_names_it():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    recipe = {"version": 1, "quantizer": "sign", "key": {"bits": 1}, "value": {"bits": 1, "scale": "rms"}}
    plan = tqcompress.apply(model, recipe | {"keep": {"sinks": 1, "window": 4}})
    prompt = torch.randint(64, (1, 24))
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape[1] == 32
    assert {group.value.options["scale"] for group in plan.groups} == {"rms"}
    assert out.past_key_values.layers[0].nbytes < plan.dense_nbytes(31, dtype=torch.float32) / 4
