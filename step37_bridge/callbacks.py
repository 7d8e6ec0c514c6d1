"""Measures steps with Bridge's embedding, then with the fused one, in one training job.

Megatron is not imported here: any object with the methods of its ``Callback`` is a callback.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from step37_bridge.command_line import say
from step37_data.common.checks import checked_int
from step37_kernels.image_insert_embedding import ImageInsertEmbedding
from step37_kernels.integration.options import InsertOptions
from step37_kernels.megatron import replace_in

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from step37_kernels.integration.options import InsertKeywords

__all__ = ["CompareWithStock", "Measured"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Measured:
    """Time and memory of some training steps on this rank."""

    seconds: float
    """Median time of a step."""
    peak_bytes: int | None
    """Peak memory of tensors on the device; None without CUDA."""

    def __str__(self) -> str:
        told = f"{1000 * self.seconds:.1f} ms a step"
        if self.peak_bytes is not None:
            told += f", at most {self.peak_bytes / _GIB:.3f} GiB"
        return told


class CompareWithStock:
    """A callback for Megatron-Bridge's training that compares its embedding with the fused one.

    After ``warmup`` steps it measures ``steps`` steps with Bridge's embedding. It then replaces the
    embedding in the model (:func:`step37_kernels.megatron.replace_in`), lets ``warmup`` steps pass
    again, measures ``steps`` more, and prints both results on the first rank, which has the
    embedding. Training continues with the fused embedding. A step is timed from the first
    microbatch to the end of the optimizer, and the device is idle at both ends, so a measured step
    is a little longer than others.

    Start it without :func:`.patch_step37`, and with every step on the same pack
    (``dataset.fixed_pack_idx=0``): otherwise the packs differ, too.

    Args:
        steps: how many steps are measured with each embedding.
        warmup: how many steps pass before each measurement, at least 1: kernels are compiled then.
        **options: options of ``replace_in``, the fields of :class:`.InsertOptions`.

    Attributes:
        results: a :class:`Measured` under ``"stock"`` and ``"fused"``, each after its steps.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(
        self, *, steps: int = 20, warmup: int = 3, **options: Unpack[InsertKeywords]
    ) -> None:
        self._steps = checked_int("steps", steps)
        self._warmup = checked_int("warmup", warmup)
        InsertOptions(**options)
        self._options = options
        self.results: dict[str, Measured] = {}
        self._times: list[float] = []
        self._peak: int | None = None
        self._left_alone = 0
        self._began: float | None = None

    def on_train_start(self, context: Any) -> None:
        """Refuse a training in which there is nothing to compare.

        Raises:
            ValueError: the training has too few steps, the model has the fused embedding already,
                or it replays CUDA graphs.
        """
        state = context.state
        wanted = 2 * (self._warmup + self._steps)
        left = state.cfg.train.train_iters - state.train_state.step
        if left < wanted:
            raise ValueError(
                f"CompareWithStock: {self._steps} steps of each kind and {self._warmup} before "
                f"them are {wanted}, and cfg.train.train_iters leaves {left}"
            )
        for chunk in context.model:
            if any(isinstance(module, ImageInsertEmbedding) for module in chunk.modules()):
                raise ValueError(
                    "CompareWithStock: the model has the fused embedding from the start: build it "
                    "without patch_step37() and replace_in()"
                )
        graphs = getattr(state.cfg.model, "cuda_graph_impl", None)
        if graphs not in (None, "none"):
            raise ValueError(
                f"CompareWithStock: cfg.model.cuda_graph_impl is {graphs!r}, and captured graphs "
                'run what was there at first: set it to "none"'
            )

    def on_train_step_start(self, context: Any) -> None:  # noqa: ARG002 - Bridge passes it
        """Start timing a step, unless both embeddings have been measured."""
        if len(self.results) == 2:
            return
        if self._left_alone == self._warmup and not self._times and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._began = _now()

    def on_train_step_end(self, context: Any) -> None:
        """Count the step; after the last one of an embedding, replace it, or print the results."""
        if self._began is None:
            return
        seconds, self._began = _now() - self._began, None
        if self._left_alone < self._warmup:
            self._left_alone += 1
            return
        self._times.append(seconds)
        if torch.cuda.is_available():
            self._peak = max(self._peak or 0, torch.cuda.max_memory_allocated())
        if len(self._times) == self._steps:
            self._finish_kind(context)

    def _finish_kind(self, context: Any) -> None:
        measured = Measured(statistics.median(self._times), self._peak)
        self._times, self._peak, self._left_alone = [], None, 0
        if not self.results:
            self.results["stock"] = measured
            replace_in(context.model, **self._options)
            return
        self.results["fused"] = measured
        told = "; ".join(f"{kind} {value}" for kind, value in self.results.items())
        say(f"{self._steps} steps each on the first rank: {told}")


def _now() -> float:
    """Return the time in seconds, after waiting for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
