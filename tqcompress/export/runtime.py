"""Running an exported model under onnxruntime: the cache as numpy arrays, and the check against torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codec import Codec
from ..errors import ArtifactError, TQCompressError
from ..plan import SIDES
from .manifest import read_manifest
from .step import ModelStep

# Of the logits' root mean square. Rounding of float32 sums is 1e-6 of it, but one code at a tie, which goes the other
# way, changes a coordinate of one key among all: less than a thousandth.
LOGITS_ERROR = 1e-3

Arrays = dict[str, np.ndarray]


class OnnxModel:
    """An exported model and one cache of it.

    `model(ids)` takes the next tokens, int64 `[batch, new]`, and returns the logits behind the last of them, float32
    `[batch, vocabulary]`. The prompts of a batch are of one length.
    """

    def __init__(self, directory: Path):
        session = sessions()
        manifest = read_manifest(directory)
        if manifest["step"] is None:
            raise ArtifactError(f"{directory}: holds codecs alone; export it without --codecs")
        self.layers, self.sinks, self.window = manifest["layers"], manifest["sinks"], manifest["window"]
        self.session = session(str(directory / manifest["step"]))
        self.names = [output.name for output in self.session.get_outputs()]
        self.past: Arrays = {}
        self.tokens = 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """One step."""
        inputs = self.inputs(ids)
        outputs = dict(zip(self.names, self.session.run(None, inputs), strict=True))
        self.advance(outputs, ids.shape[1])
        logits: np.ndarray = outputs["logits"]
        return logits

    def inputs(self, ids: np.ndarray) -> Arrays:
        """What the graph takes: of the exact tokens, those between the sinks and the last `window` leave."""
        past = self.past or self._empty(len(ids))
        places = np.arange(self.tokens, self.tokens + ids.shape[1], dtype=np.int64)
        feed = past | {"input_ids": ids, "position_ids": np.tile(places, (len(ids), 1))}
        for index, layer in enumerate(self.layers):
            if not layer["groups"]:
                continue
            exact = past[f"past.{index}.key"].shape[2]
            whole = max(0, exact - self.sinks - self.window) // layer["block"] * layer["block"]
            for side in SIDES:
                states = past[f"past.{index}.{side}"]
                sinks, leaving, rest = np.split(states, [self.sinks, self.sinks + whole], axis=2)
                feed[f"leaving.{index}.{side}"] = leaving
                feed[f"past.{index}.{side}"] = np.concatenate([sinks, rest], axis=2)
        return feed

    def advance(self, outputs: Arrays, new: int) -> None:
        """Keep what the graph returned for `new` tokens."""
        self.past = {name.replace("present", "past", 1): x for name, x in outputs.items() if name != "logits"}
        self.tokens += new

    def _empty(self, batch: int) -> Arrays:
        past: Arrays = {}
        for index, layer in enumerate(self.layers):
            for side in SIDES:
                shape = (batch, layer["kv_heads"], 0, layer["head_dim"])
                past[f"past.{index}.{side}"] = np.zeros(shape, np.float32)
                for j, group in enumerate(layer["groups"]):
                    for name, field in group[side]["fields"].items():
                        shape = (batch, len(group["heads"]), 0, field["size"])
                        past[f"past.{index}.{j}.{side}.{name}"] = np.zeros(shape, field["dtype"])
        return past


def sessions() -> Any:
    """onnxruntime's `InferenceSession`. Raises `TQCompressError` if it is not installed."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        raise TQCompressError("onnxruntime is not installed; install the extra tqcompress[onnx]") from None
    return InferenceSession


@dataclass(frozen=True)
class Agreement:
    """How far a step under onnxruntime is from torch's, from the same cache.

    `rows` packed rows were compared, of which `ties` differ: both are as near to the vector, up to rounding. `wrong`
    ones are not. `logits` is the largest difference, in units of the logits' root mean square.
    """

    rows: int
    ties: int
    wrong: int
    logits: float


@torch.no_grad()
def compare(model: OnnxModel, step: ModelStep, ids: Iterable[Tensor]) -> Iterator[Agreement]:
    """Take `ids`, `[new]` tokens for each step, in torch and under onnxruntime, and go on with the latter's cache."""
    for new in ids:
        feed = model.inputs(new[None].numpy())
        got = dict(zip(model.names, model.session.run(None, feed), strict=True))
        given = {name: as_tensor(array) for name, array in feed.items()}
        logits, present = step(given.pop("input_ids"), given.pop("position_ids"), given)
        rows = ties = wrong = 0
        for index, groups in enumerate(step.groups):
            for j, group in enumerate(groups):
                for side, codec in zip(SIDES, (group.key, group.value), strict=True):
                    vectors = given[f"leaving.{index}.{side}"][:, list(group.heads)]
                    names = {field: f"present.{index}.{j}.{side}.{field}" for field in codec.layout().fields}
                    found = {field: as_tensor(got[name]) for field, name in names.items()}
                    counts = differing(codec, vectors, found, {field: present[name] for field, name in names.items()})
                    rows, ties, wrong = rows + vectors[..., 0].numel(), ties + counts[0], wrong + counts[1]
        difference = (as_tensor(got["logits"]) - logits).abs().max() / logits.square().mean().sqrt()
        yield Agreement(rows, ties, wrong, float(difference))
        model.advance(got, len(new))


def as_tensor(array: np.ndarray) -> Tensor:
    """A copy, with ordinary strides: empty arrays have others."""
    return torch.from_numpy(array.copy()).clone(memory_format=torch.contiguous_format)


def differing(codec: Codec, vectors: Tensor, found: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[int, int]:
    """Packed rows of `vectors`, the last of those in `found` and `want`, that differ: at ties, and otherwise.

    Sums of float32 numbers depend on their order, so a coordinate that lies on a border between two levels, or a scale
    between two numbers of its format, may go either way. Both rows are then as good: their squared errors differ by at
    most 1e-4 of the squared length, which is what half a unit of an fp16 scale is worth.
    """
    tokens = vectors.shape[2]
    unequal = torch.zeros(vectors.shape[:3], dtype=torch.bool)
    for name, field in codec.layout().fields.items():
        new = tokens // field.tokens
        (old, found[name]), (same, want[name]) = (
            rows[name].split([rows[name].shape[2] - new, new], dim=2) for rows in (found, want)
        )
        if not torch.equal(old, same):  # handed through
            return 0, vectors[..., 0].numel()
        unequal |= (found[name] != want[name]).any(-1).repeat_interleave(field.tokens, dim=2)
    errors = [(codec.decode(rows) - vectors).square().sum(-1) for rows in (found, want)]
    wrong = unequal & ((errors[0] - errors[1]).abs() > 1e-4 * vectors.square().sum(-1))
    return int((unequal & ~wrong).sum()), int(wrong.sum())
