"""Recipes, artifacts and statistics of somebody else's: each ends in a clear error within a second and bounded memory.

More cases than here run with FUZZ=10 (times as many).
"""

import json
import os
import random
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from recipe_helpers import shape
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model

import tqcompress
from tqcompress import ArtifactError, Recipe, RecipeError, TQCompressError, artifacts
from tqcompress.calibrate import Moments, Statistics
from tqcompress.recipe import shipped_recipes
from tqcompress.resolve import resolve
from tqcompress.strict_yaml import MAX_BYTES

TIMES = int(os.environ.get("FUZZ", 1))
SECONDS, MEGABYTES = 1.0, 64
BASE = "version: 1\nkey: {bits: 3}\nvalue: {bits: 3}\n"


def peak() -> int:
    """Megabytes that this process has needed at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def attempt(function, *allowed: type[Exception]) -> str | None:
    """The error's text, or None if there was none; anything but a short error of one of the types fails."""
    before, memory = time.process_time(), peak()
    try:
        function()
        message = None
    except allowed as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2500, message[:300]
    assert time.process_time() - before < SECONDS and peak() - memory < MEGABYTES
    return message


def attempt_recipe(path: Path, text: "str | bytes") -> str | None:
    """Read and resolve it."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return attempt(lambda: resolve(Recipe.load(path), shape(), str(path)), RecipeError, tqcompress.ModelError)


# -------------------------------------------------------------------------------------------------- recipes


def bombs() -> dict[str, str]:
    """Documents that mean far more than they say, or nothing that ends."""
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    merges = "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 25))
    rules = f"{BASE}rules:\n - &r0 {{layers: [0,1,2,3], skip: true}}\n" + "".join(
        f" - &r{i} [{','.join([f'*r{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    found = {"laughs": laughs, "laughs beside a recipe": BASE + laughs, "merges": merges, "rules": rules}
    found |= {"a list in itself": "&a [*a]", "a mapping in itself": "&a {version: 1, key: *a, value: *a}"}
    found |= {"an option in itself": "version: 1\nkey: &a {bits: 1, foo: *a}\nvalue: {bits: 1}"}
    for count in (40, 1000, 100_000):
        opened = {"[": "]" * count, "{a: ": "1" + "}" * count, "- ": "1", "? ": "1", "&a ": "1", "[[],": "]" * count}
        found |= {f"{count} times {text}": (text * count + end)[:MAX_BYTES] for text, end in opened.items()}
        found |= {f"{count} open {text}": (text * count)[:MAX_BYTES] for text in opened}
    found["an option 400 deep"] = "version: 1\nvalue: {bits: 1}\nkey: {bits: 1, foo: " + "[" * 400 + "]" * 400 + "}"
    found["20,000 rules"] = BASE + "rules:\n" + " - {layers: all, heads: 0, key: {bits: 2}}\n" * 20_000
    found["a long name"] = f"{BASE}name: {'x' * 5_000_000}"
    found["many unknown keys"] = BASE + "".join(f"k{i}: 1\n" for i in range(5000))
    return found


@pytest.mark.parametrize("name", bombs())
def test_recipes_that_grow_without_end(name, tmp_path):
    assert attempt_recipe(tmp_path / "recipe.yaml", bombs()[name]) is not None


PLACES = (
    "version: {}\nkey: {{bits: 3}}\nvalue: {{bits: 3}}", "version: 1\nvalue: {{bits: 3}}\nkey: {{bits: {}}}",
    *(BASE.replace("{", "{{").replace("}", "}}") + more for more in (
        "name: {}", "quantizer: {}", "keep: {{sinks: {}}}", "keep: {{window: {}}}", "max_cache_len: {}", "rules: {}",
        "rules: [{{layers: {}, skip: true}}]", "rules: [{{heads: {}, key: {{bits: 2}}}}]", "balance: {}", "center: {}",
        "budget: {{bits: {}}}", "calibration: {{text: {}}}", "calibration: {{text: a, tokens: {}}}", "{}: 3", "? {}",
        "rules: [{{layers: 0, key: {{seed: {}}}}}]", "rules: [{{layers: 0, key: {{{}: 1}}}}]",
    )),
)  # fmt: skip
VALUES = (
    "9" * 5000, "9" * 900, "-" + "9" * 900, "0x" + "f" * 900, "0x" + "f" * 100_000, "0b" + "1" * 900, "0o" + "7" * 900,
    "1" + ":1" * 400, "1" + ":1" * 3000, "1e999", "1e999999", ".inf", "-.inf", ".nan", "1_0" + "_0" * 300, "-0",
    "2001-99-99", "2001-01-01T99:99:99Z", "0001-01-01", "!!binary zzz", "!!python/object/apply:os.system ['touch x']",
    "!!python/name:os.system", "!!int abc", "!!float abc", "!!bool x", "!!timestamp x", "!!set {a, b}", "!!omap [a: 1]",
    "!!str [a]", "!!map [a]", "!!seq {a: b}", "!foo bar", "=", "<<", "~", "''", '"\\ud800"', '"\\U0010ffff"', '"\\x00"',
    '"\\e[31m"', '"a\\nb"', "[]", "{}", "[[]]", "[{}]", "'" + "1" * 400 + "-" + "2" * 400 + "'", "'²'", "'٣'",
    "'0-99999999999'", "'5-1'", "'--1'", "-999", "on", "true", "0.5", "x" * 900, "é" * 400,
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_hostile_values_everywhere(place, tmp_path):
    for value in VALUES:
        attempt_recipe(tmp_path / "recipe.yaml", place.format(value))
    assert not Path("x").exists()


def test_encodings(tmp_path):
    text = f"{BASE}name: é\n"
    for encoding in ("utf-16", "utf-8-sig", "utf-8"):  # YAML's own
        assert attempt_recipe(tmp_path / "recipe.yaml", text.encode(encoding)) is None
    for encoding in ("utf-32", "utf-16-le", "latin-1", "cp037", "utf-7"):
        message = attempt_recipe(tmp_path / "recipe.yaml", text.encode(encoding))
        assert message is not None or encoding == "utf-7"  # that is ASCII
    nothing = (b"", b"\xef\xbb\xbf")
    for content in (*nothing, b"\0", b"\xff", bytes(range(256)), b"---\n---\n", b"%YAML 9.9\n---\na: 1", b"\t"):
        assert attempt_recipe(tmp_path / "recipe.yaml", content) is not None
        if content not in nothing:
            assert attempt_recipe(tmp_path / "recipe.yaml", BASE.encode() + content) is not None


def test_names_that_are_no_recipes(tmp_path):
    for name in ("x" * 5000, "\0", "../../etc/passwd", "/dev/zero", "/dev/stdin", str(tmp_path), "", ".", "a\nb", "~"):
        assert attempt(lambda name=name: Recipe.load(name), RecipeError) is not None


def test_recipes_with_random_damage(tmp_path):
    """Bytes of shipped recipes changed, removed, doubled, swapped with those of others."""
    rng = random.Random(0)
    texts = [
        (Path(tqcompress.__file__).parent.parent / "recipes" / f"{n}.yaml").read_bytes() for n in shipped_recipes()
    ]
    bits = [
        b"&a ",
        b"*a",
        b"<<: ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"- ",
        b": ",
        b"\n",
        b"'",
        b'"',
        b"!!",
        b"|",
        b">",
        b"\xff",
        b"9" * 30,
    ]
    refused = 0
    for _ in range(1500 * TIMES):
        text = bytearray(rng.choice(texts))
        text = text[: rng.randrange(1, 1500)]
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(text) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                text[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                text[at:at] = rng.choice(bits)
            elif kind == 2:
                del text[at : at + rng.randrange(20)]
            else:
                text[at:at] = text[: rng.randrange(len(text) + 1)]
        refused += attempt_recipe(tmp_path / "recipe.yaml", bytes(text)) is not None
    assert refused > 500 * TIMES


# ------------------------------------------------------------------------------------------------ artifacts


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def good(model, tmp_path_factory) -> bytes:
    """The bytes of an artifact."""
    recipe = {"version": 1, "key": {"bits": 3}, "value": {"bits": 2}, "rules": [{"layers": 1, "skip": True}]}
    tqcompress.apply(model, recipe)
    path = tqcompress.save(model, tmp_path_factory.mktemp("good"), base="base")
    tqcompress.remove(model)
    return (path / artifacts.FILE_NAME).read_bytes()


@pytest.fixture
def refused(model, tmp_path):
    """A function that says why content is refused as an artifact of the model, which it leaves unchanged."""
    path = tmp_path / artifacts.FILE_NAME

    def check(content: bytes | None = None) -> str | None:
        if content is not None:
            path.write_bytes(content)
        message = attempt(lambda: tqcompress.load(model, path), ArtifactError)
        if message is None:
            tqcompress.remove(model)
        assert not hasattr(model, "tqcompress")
        return message

    check.path = path
    return check


def header_of(content: bytes) -> int:
    """Bytes before the tensors."""
    return 8 + struct.unpack("<Q", content[:8])[0]


def test_every_byte_of_the_header_matters(good, refused):
    """Each changed in three ways."""
    assert refused(good) is None
    size = header_of(good)
    for place in range(size):
        for change in (1, 0x80, 0x20)[: 1 if TIMES == 1 and place % 4 else 3]:
            content = bytearray(good)
            content[place] ^= change
            assert refused(bytes(content)) is not None, (place, change)


def test_every_byte_of_the_tensors_matters(good, refused):
    size = header_of(good)
    for place in range(size, len(good), max(1, (len(good) - size) // (300 * TIMES))):
        content = bytearray(good)
        content[place] ^= 1
        assert "checksum" in refused(bytes(content)), place


def test_truncated_and_extended(good, refused):
    size = header_of(good)
    for length in (*range(0, 40), *range(40, len(good), 97), size - 1, size, size + 1, len(good) - 1):
        assert refused(good[:length]) is not None, length
    for more in (b"\0", b"x" * 1000):
        assert refused(good + more) is not None
    for length in (0, 1, 7, size, 2**31, 2**32, 2**63, 2**64 - 1):
        assert refused(struct.pack("<Q", length) + good[8:]) is not None


def test_hostile_headers(good, refused):
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [
        {"a": tensor | {"shape": [2**62, 2**62]}}, {"a": tensor | {"shape": [-1]}}, {"a": tensor | {"shape": [2**70]}},
        {"a": tensor | {"data_offsets": [0, 2**63]}}, {"a": tensor | {"data_offsets": [8, 0]}},
        {"a": tensor, "b": tensor}, {"a": tensor | {"dtype": "X"}}, {"a": tensor | {"shape": "x"}}, {"a": 1}, [], 1,
        {"__metadata__": 1}, {"__metadata__": {"format": 1}}, {"__metadata__": {"format": "tqcompress"}}, {},
        *({name: tensor} for name in ("../../etc/passwd", "/tmp/x", "\0", "a" * 10_000, "layers.0", "..", "é", "\n")),
        *({"a": tensor | {"dtype": dtype, "shape": [8]}} for dtype in ("F8_E4M3", "F8_E5M2", "BOOL", "U8", "F8_E8M0")),
        *({"a": tensor | {"dtype": dtype, "shape": [16]}} for dtype in ("F4", "F6_E2M3", "F6_E3M2")),
    ]  # fmt: skip
    texts = [json.dumps(header).encode() for header in headers]
    texts += [b"[" * 100_000, b'{"a":' * 50_000, b'{"a": ' + b"9" * 100_000 + b"}", b"\xff" * 100, b"{" * 8]
    for text in texts:
        assert refused(struct.pack("<Q", len(text)) + text + b"\0" * 8) is not None, text[:80]


def mutations(data, rng: random.Random):
    """`data` with one value somewhere replaced by something that does not belong there."""
    strange = [
        None,
        True,
        -1,
        2**70,
        1e308,
        math_nan(),
        "",
        "x" * 5000,
        "../..",
        "\0",
        [],
        {},
        [[]],
        {"a": {}},
        0,
        7,
        "os",
    ]
    spots: list = []

    def collect(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    copy = json.loads(json.dumps(data))
    if not isinstance(copy, (dict, list)) or not copy or rng.random() < 0.1:
        return rng.choice(strange)
    collect(copy)
    node, key = rng.choice(spots)
    action = rng.randrange(4)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, list):
        node.append(node[key])
    elif action == 2 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    else:
        node[key] = rng.choice(strange)
    return copy


def math_nan() -> float:
    return float("nan")


def test_forged_metadata(good, refused):
    """Written by somebody who knows how to make the checksum right."""
    rng = random.Random(0)
    refused.path.write_bytes(good)
    with safe_open(refused.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    metadata.pop("sha256")
    accepted = 0
    for _ in range(800 * TIMES):
        forged = dict(metadata)
        key = rng.choice(sorted(forged))
        kind = rng.random()
        if kind < 0.1:
            del forged[key]
        elif kind < 0.3:
            forged[key] = rng.choice(
                ["", "x", "[" * 20_000, "9" * 5000, "null", "[]", "{}", "1", "\U0001f600", "nan", "os"]
            )
        elif key in ("recipe", "plan", "fingerprint", "calibration", "allocation"):
            forged[key] = json.dumps(mutations(json.loads(forged[key]), rng))
        forged["sha256"] = artifacts._digest(tensors, forged)
        save_file(tensors, refused.path, forged)
        message = refused()
        accepted += message is None
    assert accepted < 400 * TIMES  # names, calibration, a recipe's own text: what the plan does not depend on


def test_forged_tensors(good, refused):
    refused.path.write_bytes(good)
    with safe_open(refused.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    metadata.pop("sha256")
    for name, tensor in tensors.items():
        changes = [
            tensor.double(),
            tensor[:0],
            tensor[None],
            tensor.flatten()[0],
            torch.zeros(0),
            tensor.to(torch.uint8),
        ]
        if tensor.is_floating_point():
            changes += [torch.full_like(tensor, value) for value in (float("nan"), float("inf"))]
        for changed in changes:
            forged = tensors | {name: changed.contiguous()}
            save_file(forged, refused.path, metadata | {"sha256": artifacts._digest(forged, metadata)})
            assert name in (refused() or ""), (name, changed.dtype, changed.shape)


def test_inspecting_a_forged_artifact_is_bounded(good, tmp_path, capsys):
    """It builds codecs for the shapes that the file itself gives."""
    from tqcompress.cli import main

    path = tmp_path / artifacts.FILE_NAME
    path.write_bytes(good)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    metadata.pop("sha256")
    for key, value in (
        ("head_dim", 2**20),
        ("num_kv_heads", 2**40),
        ("num_heads", 2**60),
        ("head_dim", 0),
        ("kind", 1),
    ):
        fingerprint = json.loads(metadata["fingerprint"])
        fingerprint["layers"][0][key] = value
        forged = metadata | {"fingerprint": json.dumps(fingerprint)}
        save_file(tensors, path, forged | {"sha256": artifacts._digest(tensors, forged)})
        before, memory = time.process_time(), peak()
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(tmp_path)])
        assert end.value.code == 2 and "malformed" in capsys.readouterr().err
        assert time.process_time() - before < SECONDS and peak() - memory < MEGABYTES


def test_statistics_with_damage(tmp_path):
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    mean = torch.zeros(2, 4, dtype=torch.float64)
    layers = {
        i: {"key": Moments(9, mean.clone(), eye.clone(), eye.clone()), "value": Moments(9, mean.clone(), eye.clone())}
        for i in range(2)
    }
    path = tmp_path / "statistics"
    Statistics(layers, {"text": "t"}).save(path)
    good = path.read_bytes()
    assert Statistics.load(path).source == {"text": "t"}
    for place in range(0, header_of(good)):
        for change in (1, 0x80):
            content = bytearray(good)
            content[place] ^= change
            path.write_bytes(content)
            attempt(lambda: Statistics.load(path), ArtifactError)
    for length in range(0, len(good), 37):
        path.write_bytes(good[:length])
        assert attempt(lambda: Statistics.load(path), ArtifactError) is not None
    tensors = {
        "layers.0.key.mean": mean,
        "layers.0.key.covariance": eye.contiguous(),
        "layers.0.key.query": eye.contiguous(),
    }
    metadata = {"format": "tqcompress statistics", "count": "9", "source": "{}"}
    damaged = [
        (tensors | {"layers.0.key.mean": mean * float("nan")}, metadata), (tensors | {"x": mean}, metadata),
        (tensors | {"layers.x.key.mean": mean}, metadata), (tensors | {"layers.0.key.more": mean}, metadata),
        (tensors | {"layers.0.middle.mean": mean}, metadata), (tensors | {"layers.0.key.mean": mean[:1]}, metadata),
        (tensors | {"layers.0.key.mean": mean.float()}, metadata), (tensors, metadata | {"count": "many"}),
        (tensors, metadata | {"source": "[" * 50_000}), (tensors, {"format": "tqcompress statistics"}), (tensors, {}),
    ]  # fmt: skip
    for these, said in damaged:
        save_file({name: tensor.clone() for name, tensor in these.items()}, path, said)
        assert attempt(lambda: Statistics.load(path), ArtifactError) is not None, said


def test_results_with_damage(tmp_path):
    from tqcompress.records import read

    path = tmp_path / "results.json"
    for text in (
        "[" * 100_000,
        "9" * 100_000,
        "[{}]",
        '[{"version": 1}]',
        "[1]",
        "{}",
        "",
        "\U0001f600",
        "NaN",
        '[{"version": "\\u001b"}]',
    ):
        path.write_text(text)
        assert attempt(lambda: read([path]), TQCompressError) is not None
