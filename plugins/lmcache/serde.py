"""The serde as LMCache asks for it; what it does to a chunk is in `chunk`."""

import logging

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer
from lmcache.v1.memory_management import MemoryObj
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tqcompress import ArtifactError

from . import NAME
from .chunk import ChunkPacker

log = logging.getLogger("lmcache.tqcompress")


class Settings(BaseModel):
    """What stands beside `"type": "tqcompress"`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    artifact: str  # a directory that `tqcompress apply --out` wrote, or the artifact in it
    device: str = "cpu"  # where vectors are encoded and decoded
    max_workers: int = Field(default=1, ge=1)  # threads


class PackingSerializer(Serializer):
    """Packs chunks `[2, layers, tokens, kv_heads * head_dim]`."""

    def __init__(self, packer: ChunkPacker):
        self.packer = packer
        self._told: set[int] = set()

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """The bytes of a packed chunk, exactly. Raises `ArtifactError` if chunks do not fit the artifact."""
        if len(layout_desc.shapes) != 1:
            raise ArtifactError(
                f"{self.packer.path}: found chunks of {len(layout_desc.shapes)} tensors, {layout_desc.shapes}; only "
                "chunks with all layers in one tensor can be packed"
            )
        shape, dtype = layout_desc.shapes[0], layout_desc.dtypes[0]
        size = self.packer.nbytes(shape, dtype)
        if size not in self._told:
            self._told.add(size)
            log.info(
                "tqcompress: chunks of %d tokens take %d bytes for %d, %.3f bits a value",
                shape[2], size, shape.numel() * dtype.itemsize, 8 * size / shape.numel(),
            )  # fmt: skip
        return size

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Pack `src` into the bytes of `dst`; returns how many. Raises `ArtifactError` or `ModelError`."""
        packed, room = self.packer.pack(_tensor(src)), _tensor(dst).flatten()
        room[: len(packed)].copy_(packed)
        return len(packed)


class PackingDeserializer(Deserializer):
    """Unpacks what `PackingSerializer` packed."""

    def __init__(self, packer: ChunkPacker):
        self.packer = packer

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fill the chunk `dst`. Raises `ArtifactError` if `src` holds none like it, packed with this artifact."""
        self.packer.unpack(_tensor(src).flatten(), _tensor(dst))


def create(kwargs: dict[str, object]) -> AsyncSerdeProcessor:
    """The serde of LMCache's settings. Raises `ArtifactError`."""
    try:
        settings = Settings.model_validate(kwargs)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"serde {NAME}: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            f"known are {', '.join(Settings.model_fields)}"
        ) from None
    packer = ChunkPacker(settings.artifact, settings.device)
    return AsyncSerdeProcessor(PackingSerializer(packer), PackingDeserializer(packer), settings.max_workers)


def _tensor(memory: MemoryObj) -> Tensor:
    tensor: Tensor | None = memory.tensor
    if tensor is None:
        raise ArtifactError(f"serde {NAME}: LMCache gave a buffer without a tensor")
    return tensor
