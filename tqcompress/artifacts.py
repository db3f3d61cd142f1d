"""The artifact `tqcompress.safetensors`: codec tensors, and the recipe and plan that give them meaning.

Nothing in it is code. Its sha256 covers the tensors and the metadata, so any change is found at loading.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .allocate import Allocation
from .errors import ArtifactError, ModelError, TQCompressError
from .output import replace_file
from .plan import Plan
from .recipe import Recipe
from .shape import LayerShape, ModelShape
from .strict_yaml import shown
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
            _check_heads(self.plan, model.layers)
            return Plan.from_dict(self.plan, model)
        except ModelError as error:  # nothing to compress
            raise ArtifactError(f"{self.path}: {error}") from None
        except ValueError as error:
            raise ArtifactError(f"{self.path}: the plan is malformed: {error}") from None

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
            if not bool(stored.isfinite().all()):
                raise ArtifactError(f"{self.path}: {name} is not finite")
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
    except (SafetensorError, AttributeError) as error:  # a dtype that this torch has not
        raise ArtifactError(f"{path}: damaged or not a safetensors file: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from None
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a tqcompress artifact (format: {shown(metadata.get('format'))})")
    version = metadata.get("format_version", "")
    if version not in {str(i) for i in range(1, FORMAT_VERSION + 1)}:
        raise ArtifactError(
            f"{path}: format version {shown(version)}, written by {shown(metadata.get('tqcompress_version'))}; "
            f"this is tqcompress {__version__}, which reads up to {FORMAT_VERSION}: upgrade tqcompress"
        )
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ArtifactError(f"{path}: the checksum does not match, the file was changed after it was written")
    try:
        recipe = Recipe.parse(_json(metadata, "recipe"), f"{path}: recipe")
        plan, fingerprint = _json(metadata, "plan"), _json(metadata, "fingerprint")
        calibration, found = (_json(metadata, key, None) for key in ("calibration", "allocation"))
        _PLAN.validate_python(plan)
        _FINGERPRINT.validate_python(fingerprint)
        TypeAdapter(dict[str, Any] | None).validate_python(calibration)
        allocation = TypeAdapter(Allocation | None).validate_python(found)
        name, dtype = metadata["model_name"], metadata["model_dtype"]
    except ValidationError as error:
        first, what = error.errors()[0], error.title.lower().strip("_")
        raise ArtifactError(f"{path}: the metadata is malformed: {what}: {_place(first)}{first['msg']}") from None
    except (KeyError, ValueError, RecursionError) as error:
        if isinstance(error, TQCompressError):
            raise ArtifactError(str(error)) from None
        raise ArtifactError(f"{path}: the metadata is malformed: {shown(error)}") from None
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ArtifactError(f"{path}: the metadata is malformed: model_dtype is {shown(dtype)}")
    if sum(layer["num_kv_heads"] * layer["head_dim"] ** 2 for layer in fingerprint["layers"]) > MAX_SQUARES:
        raise ArtifactError(f"{path}: the metadata is malformed: no model has heads so many and so large")
    return Artifact(path, recipe, plan, fingerprint, name, dtype, calibration, allocation, tensors)


# What the metadata may be; sizes are bounded, because codecs of these sizes are built before tensors are compared.
class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Count = Annotated[int, Field(ge=0, le=1 << 40)]
_Size = Annotated[int, Field(ge=1, le=1024)]
MAX_SQUARES = 1 << 28  # of head_dim, summed over KV heads and layers


class _Layer(_Strict):
    kind: str
    num_heads: Annotated[int, Field(ge=1, le=1 << 16)]
    num_kv_heads: _Size
    head_dim: _Size
    sliding_window: _Count | None


class _Fingerprint(_Strict):
    model_type: str
    rope: str
    layers: Annotated[list[_Layer], Field(max_length=1024)]


class _Spec(_Strict):
    quantizer: str
    bits: Annotated[float, Field(gt=0, le=32)]
    options: dict[str, Any]


class _Group(_Strict):
    layer: _Count
    heads: Annotated[list[_Count], Field(min_length=1, max_length=1024)]
    key: _Spec
    value: _Spec


class _Plan(_Strict):
    groups: list[_Group]
    sinks: _Count
    window: _Count
    exact: dict[str, str]


_PLAN, _FINGERPRINT = TypeAdapter(_Plan), TypeAdapter(_Fingerprint)


def _json(metadata: dict[str, str], key: str, *default: Any) -> Any:
    return json.loads(metadata[key]) if key in metadata or not default else default[0]


def _place(error: Any) -> str:
    return "".join(f"{part if isinstance(part, int) else shown(part, quotes=False)}: " for part in error["loc"])


def _check_heads(plan: dict[str, Any], layers: tuple[LayerShape, ...]) -> None:
    """Raise `ValueError` unless every KV head of every layer that does not stay exact is in one group."""
    heads: dict[int, list[int]] = {}
    for group in plan["groups"]:
        heads.setdefault(group["layer"], []).extend(group["heads"])
    for index, found in heads.items():
        if index >= len(layers) or sorted(found) != list(range(layers[index].num_kv_heads)):
            raise ValueError(f"layer {index} has the KV heads {shown(found)}")
    if wrong := {str(i) for i in range(len(layers)) if i not in heads} ^ plan["exact"].keys():
        raise ValueError(f"layers {shown(sorted(wrong))} are both compressed and exact, or neither")


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
        if tensor.numel():  # an empty one has no bytes, and no stride to view it by
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
