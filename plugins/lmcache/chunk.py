"""A chunk of the cache as bytes, and back.

A chunk is some consecutive tokens of a sequence, all layers: `[2, layers, tokens, kv_heads * head_dim]`. Nobody says
where in the sequence it was, so its first `sinks` tokens stay exact wherever that is, as they must if it comes first.
Packed it is a header, then each layer by itself: its exact tokens, then its groups of heads, keys before values, field
after field. Layers that the plan leaves exact are stored as they are. The size follows from the shape alone.
"""

import hashlib
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tqcompress import ArtifactError, ModelError, artifacts
from tqcompress.api import restored
from tqcompress.view import LayerCodecs, take_heads

log = logging.getLogger("lmcache.tqcompress")

# Magic, sha256 of the artifact's file, layers, tokens, values of a token, dtype, checksum of the rest.
HEADER = struct.Struct("<8s16s5I")
MAGIC = b"tqchunk1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ChunkPacker:
    """Packs chunks of the model that an artifact was made for. Threads may share it.

    Raises `ArtifactError` if there is no sound artifact at `path`, a file or a directory.
    """

    def __init__(self, path: "str | Path", device: "str | torch.device" = "cpu"):
        self.artifact = artifacts.read(Path(path))
        self.path, self.device = self.artifact.path, torch.device(device)
        self.digest = hashlib.sha256(self.path.read_bytes()).digest()[:16]
        self.model = self.artifact.model()
        self._layers: dict[torch.dtype, dict[int, LayerCodecs]] = {}
        plan = self.artifact.plan_for(self.model)
        self._codecs(self.model.dtype)  # now, and not with the first chunk, it fails if it must
        if plan.window:
            log.warning(
                "tqcompress: the recipe's window of %d exact tokens does not exist in stored chunks; exact are the "
                "first %d tokens of each", plan.window, plan.sinks,
            )  # fmt: skip

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Bytes of a packed chunk of that shape. Raises `ArtifactError` if it is none of the artifact's model."""
        self._check(shape, dtype)
        _, layers, tokens, hidden = shape
        total, codecs = HEADER.size, self._codecs(dtype)
        for index in range(layers):
            layer = codecs.get(index)
            start, stop = _packed_part(layer, tokens)
            total += 2 * (tokens - (stop - start)) * hidden * dtype.itemsize
            for group in layer.groups if layer else ():
                row = sum(codec.layout().nbytes_per_token for codec in (group.key, group.value))
                total += round(len(group.heads) * (stop - start) * row)
        return total

    def pack(self, chunk: Tensor) -> Tensor:
        """The bytes of a chunk `[2, layers, tokens, kv_heads * head_dim]`, uint8 on the CPU.

        Raises `ArtifactError` if it is none of the artifact's model, `ModelError` if a codec cannot store its values.
        """
        self._check(chunk.shape, chunk.dtype)
        body = torch.cat([part.contiguous().flatten().view(torch.uint8).cpu() for part in self._parts(chunk)])
        return torch.cat([torch.frombuffer(bytearray(self._header(chunk, body)), dtype=torch.uint8), body])

    def unpack(self, stored: Tensor, chunk: Tensor) -> None:
        """Fill `chunk` with what `pack` made bytes of; `stored` may be longer.

        Raises `ArtifactError` if that was a chunk of another shape or dtype, packed with another artifact, or if bytes
        have changed; `chunk` is then unchanged.
        """
        size = self.nbytes(chunk.shape, chunk.dtype)
        if len(stored) < size:
            raise ArtifactError(f"{self.path}: a stored chunk has {len(stored)} bytes; {_told(chunk)} takes {size}")
        stored = stored[:size].cpu()
        self._check_header(bytes(stored[: HEADER.size].tolist()), chunk, stored[HEADER.size :])
        reader = _Reader(stored, HEADER.size)
        codecs = self._codecs(chunk.dtype)
        for index in range(chunk.shape[1]):
            self._fill(chunk[:, index], codecs.get(index), reader)

    def _parts(self, chunk: Tensor) -> Iterator[Tensor]:
        """What is stored, in order."""
        codecs = self._codecs(chunk.dtype)
        for index in range(chunk.shape[1]):
            layer = codecs.get(index)
            start, stop = _packed_part(layer, chunk.shape[2])
            yield chunk[:, index, :start]
            yield chunk[:, index, stop:]
            if layer is None or start == stop:
                continue
            middle = _by_head(chunk[:, index, start:stop], layer).to(self.device)
            for group in layer.groups:
                for states, codec in zip(middle, (group.key, group.value), strict=True):
                    vectors = take_heads(states[None], group)
                    packed = codec.encode(vectors)
                    if not (vectors.isfinite().all() and codec.fits(packed)):
                        raise ModelError(
                            f"layer {index}, KV heads {list(group.heads)}: {codec.name} cannot store these "
                            f"{codec.shape.side}s, they are infinite, not a number, or too large for the scale's format"
                        )
                    yield from (packed[name] for name in codec.layout().fields)

    def _fill(self, place: Tensor, layer: LayerCodecs | None, reader: "_Reader") -> None:
        """Fill one layer of a chunk, `[2, tokens, hidden]`."""
        tokens, hidden = place.shape[1:]
        start, stop = _packed_part(layer, tokens)
        place[:, :start] = reader.take((2, start, hidden), place.dtype)
        place[:, stop:] = reader.take((2, tokens - stop, hidden), place.dtype)
        if layer is None or start == stop:
            return
        middle = _by_head(place[:, start:stop], layer)
        for group in layer.groups:
            for states, codec in zip(middle, (group.key, group.value), strict=True):
                packed = {
                    name: reader.take(
                        (1, len(group.heads), (stop - start) // field.tokens, field.size), field.dtype
                    ).to(self.device)
                    for name, field in codec.layout().fields.items()
                }
                states[list(group.heads)] = codec.decode(packed)[0].to(states)

    def _codecs(self, dtype: torch.dtype) -> dict[int, LayerCodecs]:
        """The codecs of every layer that is packed, for a model that computes in that dtype."""
        if dtype not in self._layers:
            devices = dict.fromkeys(range(len(self.model.layers)), self.device)
            self._layers[dtype] = restored(self.artifact, replace(self.model, dtype=dtype), devices).layers
        return self._layers[dtype]

    def _check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise `ArtifactError` unless chunks of that shape are of the artifact's model."""
        found = f"{self.path}: found chunks of {dtype} {list(shape)}; "
        if dtype not in DTYPES:
            raise ArtifactError(f"{found}allowed are {', '.join(map(str, DTYPES))}")
        if len(shape) != 4 or shape[0] != 2:
            raise ArtifactError(f"{found}allowed are [2, layers, tokens, kv_heads * head_dim]")
        if shape[1] != len(self.model.layers):
            raise ArtifactError(f"{found}the model {self.model.name} has {len(self.model.layers)} layers")
        for index, layer in enumerate(self.model.layers):
            if shape[3] != layer.num_kv_heads * layer.head_dim:
                raise ArtifactError(
                    f"{found}layer {index} of the model {self.model.name} has {layer.num_kv_heads} KV heads of "
                    f"{layer.head_dim}; models that several processes share are not supported"
                )

    def _header(self, chunk: Tensor, body: Tensor) -> bytes:
        _, layers, tokens, hidden = chunk.shape
        return HEADER.pack(MAGIC, self.digest, layers, tokens, hidden, DTYPES.index(chunk.dtype), _checksum(body))

    def _check_header(self, found: bytes, chunk: Tensor, body: Tensor) -> None:
        """Raise `ArtifactError` unless that is the header of such a chunk, stored with this artifact."""
        magic, digest, layers, tokens, hidden, dtype, checksum = HEADER.unpack(found)
        if magic != MAGIC:
            raise ArtifactError(f"{self.path}: a stored chunk begins with {magic!r}; it was not packed by tqcompress")
        if digest != self.digest:
            raise ArtifactError(
                f"{self.path}: a stored chunk was packed with another artifact (sha256 {digest.hex()}, this one is "
                f"{self.digest.hex()}); use that one, or empty the storage"
            )
        if [2, layers, tokens, hidden] != list(chunk.shape) or dtype != DTYPES.index(chunk.dtype):
            held = f"{DTYPES[dtype] if dtype < len(DTYPES) else 'unknown'} [2, {layers}, {tokens}, {hidden}]"
            raise ArtifactError(f"{self.path}: a stored chunk is {held}, asked for was {_told(chunk)}")
        if checksum != _checksum(body):
            raise ArtifactError(f"{self.path}: a stored chunk of {_told(chunk)} has changed since it was packed")


class _Reader:
    """Takes tensors off a row of bytes."""

    def __init__(self, stored: Tensor, start: int):
        self.stored, self.at = stored, start

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor."""
        start, self.at = self.at, self.at + prod(shape) * dtype.itemsize
        return self.stored[start : self.at].clone().view(dtype).view(shape)  # a copy: views must be aligned


def _packed_part(layer: LayerCodecs | None, tokens: int) -> tuple[int, int]:
    """From which token of a chunk to which it is packed; the others are exact."""
    if layer is None:
        return tokens, tokens
    start = min(layer.sinks, tokens)
    return start, start + (tokens - start) // layer.block * layer.block


def _by_head(states: Tensor, layer: LayerCodecs) -> Tensor:
    """Keys and values `[2, tokens, hidden]` as `[2, kv_heads, tokens, head_dim]`, a view."""
    heads: Tensor = states.unflatten(-1, (layer.num_kv_heads, layer.head_dim)).transpose(1, 2)
    return heads


def _checksum(body: Tensor) -> int:
    return zlib.crc32(body.numpy().data)


def _told(chunk: Tensor) -> str:
    return f"{chunk.dtype} {list(chunk.shape)}"
