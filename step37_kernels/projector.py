"""What calling a projector means: its weight and bias and nothing else, or more than that."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class ZeroGradient(torch.autograd.Function):
    """The embeddings as they are, and in backward zeros for everything else that comes in."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        # Not the tensor itself: autograd would make that a view, which no later layer may change.
        return embeddings.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(
                ctx.parameters, ctx.needs_input_grad[1:], strict=True
            )
        ]
        return grad_output, *zeros


def run_forward_pre_hooks(module: nn.Module) -> None:
    """What calling ``module`` would do first, where :func:`_is_plain` allows it.

    Megatron's wrappers see to a module's own parameters there: DDP with ``overlap_param_gather``
    waits for those still on their way, Megatron-FSDP gathers them.
    """
    for key, hook in tuple(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            hook(module, (), {})
        else:
            hook(module, ())


def is_plain(projector: nn.Module) -> bool:
    """Whether calling the projector means its weight and bias and nothing else.

    Forward pre-hooks may read the input, or make the weight; Megatron's do neither.
    """
    pre_hooks = projector._forward_pre_hooks.values()
    return (
        type(projector) is nn.Linear
        and "forward" not in vars(projector)
        and not (projector._forward_hooks or projector._backward_hooks)
        and not projector._backward_pre_hooks
        and all(_is_of_megatron(hook) for hook in pre_hooks)
    )


def _is_of_megatron(hook: Callable[..., Any]) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return getattr(function, "__module__", "").split(".")[0] in ("megatron", "megatron_fsdp")


def input_width(projector: nn.Module) -> int:
    for module in projector.modules():
        if isinstance(width := getattr(module, "in_features", None), int):
            return width
    raise ValueError(
        f"align_projector ({type(projector).__name__}): nothing in it has in_features, by which a "
        "text-only step could call it; pass text_only_gradient=False"
    )


@functools.cache
def warn_unfused(kind: str, name: str = "align_projector") -> None:
    logger.warning(
        "%s (%s) is more than a weight and a bias (an adapter, a hook, a shard): it "
        "is called, and its rows are inserted by PyTorch",
        name,
        kind,
    )
