"""Adds gradients to Megatron's ``main_grad``, as its ``gradient_accumulation_fusion`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from step37_kernels.ranges import profiled


def has_main_grad(weight: Tensor) -> bool:
    """Whether the weight has a ``main_grad`` that is not None, or will have one in backward."""
    present = getattr(weight, "main_grad", None) is not None
    return present or hasattr(weight, "__fsdp_param__")


def check_has_main_grad(weight: Tensor, name: str = "weight") -> None:
    """Raise ``ValueError`` unless the weight has a ``main_grad``, or will have one in backward."""
    if not has_main_grad(weight):
        raise ValueError(
            f"{name}: gradient_accumulation_fusion=True needs {name}.main_grad, which "
            "Megatron's DistributedDataParallel sets; it has none"
        )


def into_main_grad(weight: Tensor, put: Callable[[Tensor, bool], None]) -> Tensor | None:
    """Put a gradient into ``weight.main_grad``; returns what autograd gets in its place.

    ``put`` is called with ``main_grad`` and whether to add to it. It has to store instead under
    Megatron-FSDP, which provides a new buffer, and for a weight marked ``overwrite_main_grad``. If
    the weight has ``grad_added_to_main_grad``, that becomes True and a gradient of arbitrary values
    is returned, so that the hooks of data parallelism run; it is zeros if the weight is marked
    ``zero_out_wgrad``.

    Raises:
        ValueError: ``main_grad`` is None or freed, has another shape than the weight, or is not
            contiguous.
    """
    owner: Any = weight
    fsdp = hasattr(owner, "__fsdp_param__")
    if fsdp:
        owner.main_grad = owner.get_main_grad()
    overwrite = fsdp or getattr(owner, "overwrite_main_grad", False)
    put(_checked_main_grad(weight, "weight"), not overwrite)
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    owner.grad_added_to_main_grad = True
    if getattr(owner, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def rows_into_main_grad(table: Tensor, put: Callable[[Tensor], None]) -> Tensor | None:
    """Add a gradient to some rows of ``table.main_grad``; returns what autograd gets in its place.

    ``put`` is called with ``main_grad`` and adds to the rows that it has a gradient for. Nothing of
    the table's size is allocated: autograd gets an empty sparse gradient, because Megatron's hook
    with ``overlap_grad_reduce`` needs some gradient, or None if there is no such hook.
    ``grad_added_to_main_grad`` is not changed, so that the hook also adds the gradient of another
    use of the table (tied output weights, a second lookup); adding an empty sparse gradient to that
    does not change it.

    Raises:
        ValueError: ``main_grad`` is None or freed, has another shape than the table, or is not
            contiguous.
    """
    owner: Any = table
    main_grad = _checked_main_grad(table, "table")
    if getattr(owner, "overwrite_main_grad", False):
        main_grad.zero_()
    put(main_grad)
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    return torch.sparse_coo_tensor(
        torch.empty((1, 0), dtype=torch.int64, device=table.device),
        torch.empty((0, *table.shape[1:]), dtype=table.dtype, device=table.device),
        table.shape,
        is_coalesced=True,
        check_invariants=False,
    )


def _checked_main_grad(weight: Tensor, name: str) -> Tensor:
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ValueError(f"{name}.main_grad: there was one in forward, and is none in backward")
    if main_grad.shape != weight.shape or not main_grad.is_contiguous():
        raise ValueError(
            f"{name}.main_grad: expected {tuple(weight.shape)}, contiguous, got "
            f"{tuple(main_grad.shape)} with strides {main_grad.stride()}"
        )
    freed = not torch.compiler.is_compiling() and main_grad.untyped_storage().nbytes() == 0
    if freed and main_grad.numel():
        raise ValueError(
            f"{name}.main_grad: its memory is freed, as Megatron's offload_grad_buffers() does; "
            "restore it before backward"
        )
    return main_grad


class MainGrad(torch.autograd.Function):
    """Returns the weight, and sends its gradient to ``main_grad``; used by ``impl="torch"``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fused_into: tuple[Tensor]) -> Tensor:
        # In a tuple, so that autograd does not take the parameter for a second input.
        ctx.fused_into = fused_into
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        def put(main_grad: Tensor, add: bool) -> None:
            if add:
                main_grad.add_(gradient)
            else:
                main_grad.copy_(gradient)

        with profiled("gradient"):
            return into_main_grad(ctx.fused_into[0], put), None
