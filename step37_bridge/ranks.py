"""Counts the ranks that a job has and needs, before there is a process group."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

from step37_data.common.checks import checked_int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """The sizes of tensor, pipeline and expert parallelism of a model.

    Experts are never split by tensor parallelism (``expert_tensor_parallel_size`` is 1). The
    context parallel size is 1, because our forward step takes whole packs.

    Raises:
        ValueError: a size is no integer, or below 1.
    """

    tensor: int = 1
    pipeline: int = 8
    expert: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            checked_int(field.name, getattr(self, field.name))

    def ranks_needed(self) -> int:
        """The smallest number of ranks; a job may have any multiple of it."""
        # The tensor ranks of dense layers and the expert ranks of experts are the same ranks.
        return self.pipeline * math.lcm(self.tensor, self.expert)

    def __str__(self) -> str:
        return f"pipeline {self.pipeline} × expert {self.expert} × tensor {self.tensor}"

    def check(self, started: int) -> None:
        """Raise ``ValueError`` if ``started`` ranks cannot hold such a model."""
        needed = self.ranks_needed()
        if started % needed:
            raise ValueError(
                f"{self} needs {needed} ranks or a multiple of them; started: {started}"
            )


def ranks_started() -> int:
    """Return how many ranks ``torchrun`` or ``srun`` started, as Megatron does; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
