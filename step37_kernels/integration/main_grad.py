"""Megatron's fused weight gradient (``gradient_accumulation_fusion``), by its conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def check_has_main_grad(weight: Tensor) -> None:
    """Raise ``ValueError`` unless the weight has a ``main_grad``, or will have one in backward."""
    if not (hasattr(weight, "main_grad") or hasattr(weight, "__fsdp_param__")):
        raise ValueError(
            "weight: gradient_accumulation_fusion=True needs weight.main_grad, which "
            "Megatron's DistributedDataParallel sets; it has none"
        )


def into_main_grad(weight: Tensor, put: Callable[[Tensor, bool], None]) -> Tensor | None:
    """Put a gradient into ``weight.main_grad``; what autograd is given in its place.

    ``put`` gets ``main_grad`` and whether to add to it: not under Megatron-FSDP, which hands out a
    new buffer, and not for a weight marked ``overwrite_main_grad``. Where the weight has
    ``grad_added_to_main_grad``, that becomes True and a gradient without meaning is returned, so
    that the hooks of data parallelism run; zeros if the weight is marked ``zero_out_wgrad``.

    Raises:
        ValueError: ``main_grad`` has another shape than the weight, or is not contiguous.
    """
    owner: Any = weight
    fsdp = hasattr(owner, "__fsdp_param__")
    if fsdp:
        owner.main_grad = owner.get_main_grad()
    main_grad = owner.main_grad
    if main_grad.shape != weight.shape or not main_grad.is_contiguous():
        raise ValueError(
            f"weight.main_grad: expected {tuple(weight.shape)}, contiguous, got "
            f"{tuple(main_grad.shape)} with strides {main_grad.stride()}"
        )
    put(main_grad, not (fsdp or getattr(owner, "overwrite_main_grad", False)))
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    owner.grad_added_to_main_grad = True
    if getattr(owner, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


class MainGrad(torch.autograd.Function):
    """Identity on a weight whose gradient goes to its ``main_grad``; for the PyTorch path."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fused_into: tuple[Tensor]) -> Tensor:
        # In a tuple: the parameter itself, not an input that a gradient is returned for.
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

        return into_main_grad(ctx.fused_into[0], put), None
