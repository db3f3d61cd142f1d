"""`tqcompress.json`: what exported graphs there are, and all that a caller must know of the cache."""

import json
from pathlib import Path
from typing import Any

from ..compression import Compression
from ..errors import ArtifactError
from ..output import replace_file
from ..plan import SIDES

MANIFEST = "tqcompress.json"


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `tqcompress.json` says. Raises `ArtifactError`."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; `tqcompress export onnx` writes one")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def write_manifest(
    directory: Path, compression: Compression, step: str | None, files: dict[tuple[str, str], dict[str, str]]
) -> None:
    """Write `tqcompress.json`: what there is, and all that a caller must know of the cache.

    Args:
        step: the file of the model's step.
        files: those of the codecs' graphs, by the codec's name in `compression.codecs` and its side.
    """
    plan, layers = compression.plan, []
    for index, shape in enumerate(plan.model.layers):
        groups = []
        for j, group in enumerate(plan.layer_groups(index)):
            sides: dict[str, Any] = {}
            for side in SIDES:
                spec, layout = getattr(group, side), plan.layout(group, side)
                sides[side] = {
                    "quantizer": spec.quantizer,
                    "bits": spec.bits,
                    **files.get((f"{index}-{j}", side), {}),
                    "fields": {
                        name: {
                            "dtype": str(field.dtype).removeprefix("torch."),
                            "size": field.size,
                            "tokens": field.tokens,
                        }
                        for name, field in layout.fields.items()
                    },
                }
            groups.append({"heads": list(group.heads), **sides})
        block = plan.block(index) if groups else 1
        layers.append({"kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "block": block, "groups": groups})
    content = {
        "format_version": 1,
        "model": plan.model.name,
        "step": step,
        "sinks": plan.sinks,
        "window": plan.window,
        "layers": layers,
    }
    replace_file(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
