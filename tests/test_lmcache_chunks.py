"""Packed chunks of the LMCache plugin, without LMCache: what comes back, how many bytes it took, what is refused."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from tqcompress.plugins.lmcache.chunk import HEADER, ChunkPacker

import tqcompress
from tqcompress import ArtifactError, ModelError
from tqcompress.api import restored

TOKENS, LAYERS, HEADS, DIM, SINKS = 37, 3, 2, 16, 3
KEEP = {"sinks": SINKS, "window": 0}
RECIPES = {
    "mixed": {
        "version": 1, "key": {"bits": 4}, "value": {"bits": 3}, "keep": KEEP,
        "rules": [
            {"layers": [1], "skip": True},
            {"layers": [2], "heads": [1], "key": {"bits": 8}, "value": {"bits": 2, "seed": 5}},
        ],
    },
    "blocks": {
        "version": 1, "quantizer": "affine", "key": {"bits": 4, "group": 16}, "value": {"bits": 4, "group": 16},
        "keep": KEEP,
    },
    "lossless": {"version": 1, "quantizer": "exact", "key": {"bits": 32}, "value": {"bits": 32}, "keep": KEEP},
}  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A saved directory for each recipe."""
    root, model = tmp_path_factory.mktemp("artifacts"), tiny_model("llama")
    for name, recipe in RECIPES.items():
        tqcompress.apply(model, recipe)
        tqcompress.save(model, root / name, base="tiny")
        tqcompress.remove(model)
    return {name: root / name for name in RECIPES}


def chunk_of(dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Random keys and values `[2, layers, tokens, kv_heads * head_dim]`."""
    return torch.randn(2, LAYERS, tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(packer: ChunkPacker, chunk: torch.Tensor) -> torch.Tensor:
    """The chunk with every packed token decoded, by the codecs alone."""
    layers = restored(packer.artifact, replace(packer.model, dtype=chunk.dtype)).layers
    want = chunk.clone()
    for index, layer in layers.items():
        count = (chunk.shape[2] - SINKS) // layer.block * layer.block
        for group in layer.groups:
            for side, codec in enumerate((group.key, group.value)):
                for i, head in enumerate(group.heads):
                    place = (side, index, slice(SINKS, SINKS + count), slice(head * DIM, (head + 1) * DIM))
                    alone = codec.of_heads([i])
                    want[place] = alone.decode(alone.encode(chunk[place][None, None]))[0, 0].to(chunk.dtype)
    return want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixed", "blocks"])
def test_what_comes_back_is_what_the_codecs_decode(artifacts, name, dtype):
    """Skipped layers, the first tokens, and those that fill no block come back as they were."""
    packer, chunk = ChunkPacker(artifacts[name]), chunk_of(dtype)
    found = torch.full_like(chunk, torch.nan)
    packer.unpack(packer.pack(chunk), found)
    assert torch.equal(found, expected(packer, chunk))
    assert not torch.equal(found, chunk)


@pytest.mark.parametrize("tokens", [TOKENS, SINKS, 1])
def test_lossless_chunks_are_bit_equal(artifacts, tokens):
    """Also a chunk that is not longer than the tokens that stay exact, and bytes behind the end do not matter."""
    packer, chunk = ChunkPacker(artifacts["lossless"]), chunk_of(torch.float32, tokens)
    found = torch.full_like(chunk, torch.nan)
    packer.unpack(torch.cat([packer.pack(chunk), torch.full((9,), 255, dtype=torch.uint8)]), found)
    assert torch.equal(found, chunk)


def test_bytes_are_counted(artifacts):
    """The size is known beforehand, to the byte: header, exact tokens, codes and scales of two bytes."""
    packer, chunk = ChunkPacker(artifacts["mixed"]), chunk_of()
    packed = TOKENS - SINKS
    skipped, first = 2 * TOKENS * HEADS * DIM * 2, 2 * SINKS * HEADS * DIM * 2
    plain = DIM * 4 // 8 + DIM * 3 // 8 + 4  # of a token and head: keys, values, two scales
    other = DIM * 8 // 8 + DIM * 2 // 8 + 4
    want = HEADER.size + skipped + 2 * first + packed * (2 * plain) + packed * (plain + other)
    assert packer.nbytes(chunk.shape, chunk.dtype) == len(packer.pack(chunk)) == want
    blocks = ChunkPacker(artifacts["blocks"])
    assert blocks.nbytes(chunk.shape, chunk.dtype) == len(blocks.pack(chunk))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (
            chunk_of(torch.float64),
            "found chunks of torch.float64 .*allowed are torch.float32, torch.float16, torch.bfl",
        ),
        (chunk_of()[0], r"\[3, 37, 32\]; allowed are \[2, layers, tokens, kv_heads \* head_dim\]"),
        (chunk_of()[:, :2], r"\[2, 2, 37, 32\]; the model .* has 3 layers"),
        (chunk_of()[..., :16], "layer 0 of the model .* has 2 KV heads of 16"),
    ],
)
def test_other_chunks_are_refused(artifacts, chunk, message):
    """The error names the artifact, what was found and what is allowed, before anything is packed or written."""
    packer = ChunkPacker(artifacts["mixed"])
    for attempt in (
        lambda: packer.nbytes(chunk.shape, chunk.dtype),
        lambda: packer.pack(chunk),
        lambda: packer.unpack(torch.zeros(1 << 16, dtype=torch.uint8), chunk),
    ):
        with pytest.raises(ArtifactError, match=f"mixed.*{message}"):
            attempt()


def test_other_bytes_are_refused(artifacts):
    """Storage outlives servers: another artifact's chunk, one of another shape, a changed byte, a short file."""
    packer, chunk = ChunkPacker(artifacts["mixed"]), chunk_of()
    stored, place = packer.pack(chunk), torch.zeros_like(chunk)

    def refused(stored: torch.Tensor, message: str, place: torch.Tensor = place) -> None:
        with pytest.raises(ArtifactError, match=f"mixed.*{message}"):
            packer.unpack(stored, place)
        assert not place.any()

    refused(ChunkPacker(artifacts["lossless"]).pack(chunk), "packed with another artifact")
    refused(stored, r"is torch.bfloat16 \[2, 3, 37, 32\], asked for was .*\[2, 3, 36, 32\]", place[:, :, :36])
    refused(stored, r"is torch.bfloat16 .*, asked for was torch.float16", place.half())
    refused(torch.zeros_like(stored), "was not packed by tqcompress")
    for at in (HEADER.size, HEADER.size + 1000, len(stored) - 1):
        changed = stored.clone()
        changed[at] ^= 1
        refused(changed, "has changed since it was packed")
    refused(stored[:-1], "has .* bytes; ")


def test_what_no_scale_can_hold_is_an_error(artifacts):
    """Not a chunk that reads as not-a-number."""
    chunk = chunk_of()
    chunk[1, 2, 20, DIM] = torch.inf
    with pytest.raises(ModelError, match=r"layer 2, KV heads \[1\]: .* cannot store these values"):
        ChunkPacker(artifacts["mixed"]).pack(chunk)
