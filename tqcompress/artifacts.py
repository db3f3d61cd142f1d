"""The artifact `tqcompress.safetensors`: codec tensors, and the recipe and plan that give them meaning.

Nothing in it is code. Its sha256 covers the tensors and the metadata, so any change is found at loading.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .allocate import Allocation
from .errors import ArtifactError, TQCompressError
from .output import replace_file
from .plan import Plan
from .recipe import Recipe
from .shape import LayerShape, ModelShape
from .version import __version__

FILE_NAME = "tqcompress.safetensors"
FORMAT, FORMAT_VERSION = "tqcompress", 1


@dataclass(frozen=True)
class Artifact:
    """A verified artifact."""

    path: Path
    recipe: Recipe
    plan: dict[str, Any]
    fingerprint: dict[str, Any]
    model_name: str
    model_dtype: str
    calibration: dict[str, Any] | None  # what the tensors were fitted on
    allocation: Allocation | None  # what came of the recipe's budget
    tensors: dict[str, Tensor]

    def model(self) -> ModelShape:
        """The shape of the model that the artifact was made for."""
        layers = tuple(LayerShape(**layer) for layer in self.fingerprint["layers"])
        dtype = getattr(torch, self.model_dtype)
        return ModelShape(self.model_name, self.fingerprint["model_type"], dtype, layers, self.fingerprint["rope"])

    def plan_for(self, model: ModelShape) -> Plan:
        """The stored plan. Raises `ArtifactError` if `model` differs in what the plan depends on."""
        want, found = self.fingerprint, json.loads(json.dumps(model.fingerprint()))
        for key in want:
            if want[key] != found[key]:
                raise ArtifactError(
                    f"{self.path}: made for {self.model_name} ({key}: {_short(want[key])}), "
                    f"but the model {model.name} has {key}: {_short(found[key])}"
                )
        try:
            return Plan.from_dict(self.plan, model)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{self.path}: the plan is malformed: {error!r}") from None

    def restore(self, state: dict[str, Tensor]) -> None:
        """Copy the stored tensors into a codec state of the same names, shapes and dtypes."""
        if missing := sorted(set(state) ^ set(self.tensors)):
            raise ArtifactError(f"{self.path}: tensors do not match the plan; missing or unexpected: {missing[:3]}")
        for name, target in state.items():
            stored = self.tensors[name]
            if stored.shape != target.shape or stored.dtype != target.dtype:
                raise ArtifactError(
                    f"{self.path}: {name} is {stored.dtype} {list(stored.shape)}; "
                    f"the plan needs {target.dtype} {list(target.shape)}"
                )
        for name, target in state.items():
            target.copy_(self.tensors[name])


def write(
    directory: Path,
    recipe: Recipe,
    plan: Plan,
    state: dict[str, Tensor],
    calibration: dict[str, Any] | None = None,
    allocation: Allocation | None = None,
) -> Path:
    """Write the artifact and `recipe.yaml`; each file appears whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "tqcompress_version": __version__,
        "recipe": recipe.model_dump_json(exclude_defaults=True),
        "plan": json.dumps(plan.to_dict(), sort_keys=True),
        "fingerprint": json.dumps(plan.model.fingerprint(), sort_keys=True),
        "calibration": json.dumps(calibration, sort_keys=True),
        "allocation": json.dumps(allocation and asdict(allocation), sort_keys=True),
        "model_name": plan.model.name,
        "model_dtype": str(plan.model.dtype).removeprefix("torch."),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    replace_file(directory / "recipe.yaml", recipe.dump().encode())
    return replace_file(directory / FILE_NAME, _in_order(to_bytes(tensors, metadata)))


def read(path: Path) -> Artifact:
    """Read and verify an artifact, given its file or directory. Raises `ArtifactError`."""
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; `tqcompress apply --out DIR` or tqcompress.save writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged or not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a tqcompress artifact (format: {metadata.get('format')!r})")
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format version {version!r}, written by tqcompress {metadata.get('tqcompress_version')}; "
            f"this is tqcompress {__version__}, which reads up to {FORMAT_VERSION}: upgrade tqcompress"
        )
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ArtifactError(f"{path}: the checksum does not match, the file was changed after it was written")
    try:
        recipe = Recipe.parse(json.loads(metadata["recipe"]), f"{path}: recipe")
        plan, fingerprint = json.loads(metadata["plan"]), json.loads(metadata["fingerprint"])
        calibration = json.loads(metadata.get("calibration", "null"))
        allocation = TypeAdapter(Allocation | None).validate_json(metadata.get("allocation", "null"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("allocation", *first["loc"])))
        raise ArtifactError(f"{path}: the metadata is malformed: {place}: {first['msg']}") from None
    except (KeyError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: the metadata is malformed: {error!r}") from None
    except TQCompressError as error:
        raise ArtifactError(str(error)) from None
    name, dtype = metadata["model_name"], metadata["model_dtype"]
    return Artifact(path, recipe, plan, fingerprint, name, dtype, calibration, allocation, tensors)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with the keys of its header sorted: the same artifact is the same file."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
