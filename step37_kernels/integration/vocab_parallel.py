"""Gives Megatron's ``VocabParallelEmbedding`` a gradient that touches only looked-up rows.

This is used if the embedding has to be called: under tensor parallelism, with dropout, and in the
second lookup of multi-token prediction.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from step37_kernels.dispatch import TRITON_DTYPES, use_triton
from step37_kernels.integration.main_grad import has_main_grad
from step37_kernels.integration.patching import Mixin, with_mixin, without_mixin
from step37_kernels.lookup import LookUp, check_ids

_changed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class RowGradient(Mixin):
    """Adds the gradient of a ``VocabParallelEmbedding`` row by row; its subclass's first base.

    If the weight has a ``main_grad``, gradients are added to the rows that were looked up; ids of
    other tensor-parallel ranks have no row here. If it has none, stock's forward runs.
    """

    weight: Tensor
    tp_group: Any
    vocab_start_index: int
    reduce_scatter_embeddings: bool

    def forward(self, input_: Tensor) -> Tensor:
        """Look ``[B, S]`` ids up: ``[B, S, H]``, or ``[S / ranks, B, H]`` if sequence-parallel."""
        weight = self.weight
        if why_dense(weight) is not None or not torch.is_grad_enabled():
            stock: Tensor = super().forward(input_)  # type: ignore[misc]
            return stock
        from megatron.core.tensor_parallel import mappings

        ids, outside = input_, float("nan")
        if self.tp_group.size() > 1:
            ids, outside = input_ - self.vocab_start_index, 0.0
        else:
            check_ids(ids, None, weight.shape[0])
        triton = use_triton("auto", weight.device) and weight.dtype in TRITON_DTYPES
        rows = LookUp.apply(weight, ids, None, (weight,), triton, outside)
        result: Tensor
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            result = mappings.reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        else:
            result = mappings.reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
        return result

    def __setstate__(self, state: Any) -> None:
        """Register a copy or an unpickled module, so that ``unpatch_step37`` undoes it too."""
        super().__setstate__(state)  # type: ignore[misc]
        _changed.add(self)  # type: ignore[arg-type]


def why_dense(weight: Tensor) -> str | None:
    """Why the gradient of the table is stock's; None: it goes to rows of its ``main_grad``."""
    if not weight.requires_grad:
        return "it is frozen"
    if hasattr(weight, "__fsdp_param__"):
        return "Megatron-FSDP shards it"
    if not has_main_grad(weight):
        return "no main_grad: Megatron's DDP sets it"
    return None


def use_row_gradient(model: nn.Module) -> None:
    """Give every ``VocabParallelEmbedding`` in ``model`` the row-by-row gradient."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "VocabParallelEmbedding" and kind.__module__.startswith("megatron."):
            if not isinstance(module, RowGradient):
                module.__class__ = with_mixin(RowGradient, kind)
            _changed.add(module)


def restore_dense_gradient(model: nn.Module | None = None) -> None:
    """Undo :func:`use_row_gradient` in ``model``, or everywhere if that is None.

    A module whose class was derived from ours meanwhile, by FSDP2, keeps its class. Stock's forward
    runs in it, because FSDP2 sets no ``main_grad``.
    """
    for module in list(_changed if model is None else model.modules()):
        kind = type(module)
        if issubclass(kind, RowGradient):
            module.__class__ = without_mixin(kind)
            _changed.discard(module)
