"""Models that several processes share: which KV heads this one holds, and which process writes files.

A plan, statistics and an artifact are always of the whole model, its heads numbered as there: every process makes the
same. What one process needs of them is chosen by its `HeadShard`, and nowhere else.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")  # modules whose output holds the keys


@dataclass(frozen=True)
class HeadShard:
    """The KV heads of a process under tensor parallelism: as many neighbours as any other's, in the order of ranks."""

    rank: int = 0
    size: int = 1  # processes that the heads are split among
    group: Any = None  # their process group

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "HeadShard":
        """The shard of a model that transformers loaded with `tp_plan`; all heads of any other model.

        Some architectures gather their projections (Phi-3, OLMo 2): every process then holds all heads.
        """
        split = (getattr(model, "_tp_size", None) or 1) > 1 and any(
            name.rpartition(".")[2] in KEY_PROJECTIONS and style == "colwise" for name, style in model.tp_plan.items()
        )
        if not split:
            return cls()
        mesh = model._device_mesh if model._device_mesh.ndim == 1 else model._device_mesh["tp"]
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group())

    def heads(self, count: int, layer: int) -> range:
        """Which of the `count` KV heads of a layer are here. Raises `ModelError` if they do not divide evenly."""
        if count % self.size:
            raise ModelError(
                f"layer {layer}: its {count} KV heads do not divide evenly among the {self.size} processes of tensor "
                f"parallelism; use a number of processes that divides {count}, or device_map='auto' in one"
            )
        here = count // self.size
        return range(self.rank * here, (self.rank + 1) * here)

    def gather(self, here: Tensor) -> Tensor:
        """All heads, `[heads, ...]`, from those that each process gives; all processes must call this."""
        if self.size == 1:
            return here
        parts = [torch.empty_like(here, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, here.contiguous(), self.group)
        return torch.cat(parts)


def is_shared(model: "PreTrainedModel") -> bool:
    """Whether transformers spread the model over several processes."""
    return getattr(model, "_device_mesh", None) is not None


def writes_files(model: "PreTrainedModel") -> bool:
    """Whether this process is the one that writes: the first of those that share a model."""
    return not is_shared(model) or torch.distributed.get_rank() == 0
