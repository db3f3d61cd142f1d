"""LMCache's storage manager with the serde: chunks go to files, leave memory, and come back."""

import contextlib
import time
from pathlib import Path

import pytest
import torch
from conftest import CHUNK
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import parse_args
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor
from lmcache.v1.distributed.storage_manager import StorageManager
from tqcompress.plugins.lmcache import NAME, register
from tqcompress.plugins.lmcache.chunk import HEADER, ChunkPacker
from transformers import DynamicCache

from tqcompress import ArtifactError

KEYS = [ObjectKey(bytes([i]) * 32, "smollm2", ObjectKey.ComputeKVRank(1, 0, 1, 0)) for i in range(4)]
WITHIN = 60  # seconds


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Twice, as it may happen."""
    register()
    register()


@contextlib.contextmanager
def storage(folder: Path, artifact: Path):
    """LMCache's storage manager: memory, and files in `folder`."""
    adapter = f'{{"type": "fs", "base_path": "{folder}", "serde": {{"type": "{NAME}", "artifact": "{artifact}"}}}}'
    manager = StorageManager(
        parse_args(["--l1-size-gb", "0.25", "--eviction-policy", "LRU", "--no-l1-use-lazy", "--l2-adapter", adapter])
    )
    try:
        yield manager
    finally:
        manager.close()


def layout_of(chunk: torch.Tensor) -> MemoryLayoutDesc:
    """What LMCache is told of a chunk."""
    return MemoryLayoutDesc(shapes=[chunk.shape], dtypes=[chunk.dtype])


def store(manager: StorageManager, folder: Path, chunks: list[torch.Tensor]) -> list[Path]:
    """Put chunks into memory and wait for their files."""
    places = manager.reserve_write(KEYS, layout_of(chunks[0]))
    for key, chunk in zip(KEYS, chunks, strict=True):
        places[key].tensor.copy_(chunk)
    manager.finish_write(KEYS)
    until = time.monotonic() + WITHIN
    while len(files := sorted(folder.rglob("*.data"))) < len(chunks):
        assert time.monotonic() < until, "the chunks were not stored"
        time.sleep(0.05)
    return files


def load(manager: StorageManager, like: torch.Tensor) -> list[torch.Tensor]:
    """What comes back of all chunks, from files alone."""
    group = GroupedObjectKeys(KEYS, 0, layout_of(like))
    handle = manager.submit_prefetch_task(PrefetchTaskSpec([group]))
    assert manager.wait_prefetch_status(handle, WITHIN)
    result = manager.query_prefetch_status(handle)
    count = result.l2_hit_count
    with manager.read_prefetched_results(KEYS[:count]) as found:
        loaded = [place.tensor.clone() for place in found or []]
    manager.finish_read_prefetched(KEYS[:count])
    return loaded


def test_lossless_chunks_come_back_bit_for_bit(artifacts, chunks, tmp_path):
    """Through another storage manager, as after a restart."""
    with storage(tmp_path, artifacts["lossless"]) as manager:
        store(manager, tmp_path, chunks)
    with storage(tmp_path, artifacts["lossless"]) as manager:
        loaded = load(manager, chunks[0])
    assert len(loaded) == len(chunks)
    assert all(torch.equal(found, chunk) for found, chunk in zip(loaded, chunks, strict=True))


def test_four_bits(artifacts, chunks, token_ids, model, tmp_path):
    """Files have the bytes that were promised; what comes back is what the codecs decode, and serves the model."""
    with storage(tmp_path, artifacts["four"]) as manager:
        files = store(manager, tmp_path, chunks)
    with storage(tmp_path, artifacts["four"]) as manager:
        loaded = load(manager, chunks[0])
    packer = ChunkPacker(artifacts["four"])
    for found, chunk in zip(loaded, chunks, strict=True):
        want = torch.empty_like(chunk)
        packer.unpack(packer.pack(chunk), want)
        assert torch.equal(found, want)
    # 30 layers of 3 heads of 64: 4 bits and a scale of 16 for keys and values; of 256 tokens, 4 in 16 bits.
    size = HEADER.size + 30 * 3 * 2 * (252 * (64 * 4 // 8 + 2) + 4 * 64 * 2)
    assert [file.stat().st_size for file in files] == [size] * 4
    print(f"{8 * size / chunks[0].numel():.3f} bits a value")
    plain, packed = (_next_loss(model, token_ids, parts) for parts in (chunks, loaded))
    print(f"loss of the 64 tokens after them: {plain:.4f} exact, {packed:.4f} at 4 bits")
    assert abs(packed - plain) < 0.03


def test_another_artifact_is_a_miss(artifacts, chunks, tmp_path, caplog):
    """Chunks of before are not found any more, and the log says why; nothing wrong is read."""
    with storage(tmp_path, artifacts["four"]) as manager:
        store(manager, tmp_path, chunks)
    with storage(tmp_path, artifacts["other"]) as manager:
        assert load(manager, chunks[0]) == []
    assert "packed with another artifact" in caplog.text
    with storage(tmp_path, artifacts["lossless"]) as manager:
        assert load(manager, chunks[0]) == []


def test_errors_reach_who_configures(artifacts, tmp_path):
    """A setting that does not exist, an artifact that does not, a layout that is another model's."""
    with pytest.raises(ArtifactError, match=r"serde tqcompress: bits: .*; known are artifact, device, max_workers"):
        create_serde_processor(SerdeConfig(NAME, {"artifact": str(artifacts["four"]), "bits": 4}))
    with pytest.raises(ArtifactError, match="no such file"):
        create_serde_processor(SerdeConfig(NAME, {"artifact": str(tmp_path / "none")}))
    serde = create_serde_processor(SerdeConfig(NAME, {"artifact": str(artifacts["four"])}))
    shape = torch.Size([2, 28, CHUNK, 192])
    with pytest.raises(ArtifactError, match="has 30 layers"):
        serde.estimate_serialized_size(MemoryLayoutDesc(shapes=[shape], dtypes=[torch.bfloat16]))
    with pytest.raises(ArtifactError, match="2 tensors"):
        serde.estimate_serialized_size(MemoryLayoutDesc(shapes=[shape] * 2, dtypes=[torch.bfloat16] * 2))
    serde.close()


@torch.no_grad()
def _next_loss(model, token_ids: torch.Tensor, parts: list[torch.Tensor]) -> float:
    """The mean loss of the text's last tokens, the cache holding what `parts` say of all before."""
    whole = torch.cat(parts, dim=2)
    whole = whole.unflatten(-1, (model.config.num_key_value_heads, -1)).transpose(2, 3)
    cache = DynamicCache([(whole[0, i][None], whole[1, i][None]) for i in range(whole.shape[1])])
    rest = token_ids[:, len(parts) * CHUNK :]
    logits = model(rest, past_key_values=cache).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, rest[0, 1:]))
