"""Decides whether a projector's weight and bias can stand in for calling it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from step37_kernels.dispatch import Impl

logger = logging.getLogger(__name__)

_COMPUTED_IN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ZeroGradient(torch.autograd.Function):
    """Returns the embeddings; backward gives zeros to all other inputs."""

    # Forward and setup_context apart, as torch.func requires.
    @staticmethod
    def forward(embeddings: Tensor, *parameters: Tensor) -> Tensor:
        del parameters
        # Not the tensor itself: autograd would make it a view, which no layer may change in place.
        return embeddings.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in inputs[1:]]

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
    """Run the forward pre-hooks of a module that is not called, if :func:`plain_projector` allows
    that.

    Megatron's wrappers prepare a module's parameters in them: DDP with ``overlap_param_gather``
    waits until they have arrived, Megatron-FSDP gathers them.
    """
    for key, hook in tuple(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            hook(module, (), {})
        else:
            hook(module, ())


class PlainProjector(NamedTuple):
    """A projector whose weight and bias stand for calling it."""

    module: nn.Linear
    weight: Tensor
    """``[H, C]``"""
    bias: Tensor | None
    """``[H]``"""

    def after_hooks(self) -> PlainProjector:
        """Run the module's forward pre-hooks, which may put another weight and bias there."""
        if not self.module._forward_pre_hooks:
            return self
        run_forward_pre_hooks(self.module)
        return PlainProjector(self.module, self.module.weight, self.module.bias)


def plain_projector(projector: nn.Module) -> PlainProjector | str:
    """Return the projector's weight and bias, or what calling it means besides them.

    Forward pre-hooks are allowed if they are Megatron's: others may read the input or make the
    weight. A weight of another class than PyTorch's own (quantised, distributed) may define its own
    product, and is not allowed.
    """
    if type(projector) is not nn.Linear:
        return f"it is a {type(projector).__name__}"
    if "forward" in vars(projector):
        return "the instance has a forward of its own"
    weight = projector.weight
    if type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        return f"its weight is a {type(weight).__name__} (quantised or distributed)"
    if not hooks_are_of_megatron(projector):
        return "it has hooks"
    return PlainProjector(projector, weight, projector.bias)


def plain_beside(projector: nn.Module, device: torch.device) -> PlainProjector | str:
    """Return the projector's weight and bias, or why it is called beside text rows on ``device``.

    They stand for it if :func:`plain_projector` says so and they are on that device.
    """
    plain = plain_projector(projector)
    if isinstance(plain, str):
        return plain
    devices = devices_of_plain(plain)
    if devices != {device}:
        return f"it is on {_listed(devices)}, the word embeddings are on {device}"
    return plain


def hooks_are_of_megatron(module: nn.Module) -> bool:
    """Whether the module has no hooks but forward pre-hooks of Megatron's, if any."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    before = module._forward_pre_hooks
    return not before or all(_is_of_megatron(hook) for hook in before.values())


def _is_of_megatron(hook: Callable[..., Any]) -> bool:
    function = getattr(hook, "func", hook)  # for a functools.partial
    return getattr(function, "__module__", "").split(".")[0] in ("megatron", "megatron_fsdp")


def tensors_of(projector: nn.Module) -> list[Tensor]:
    """List the projector's parameters; if it has none, tensors named ``weight`` and ``bias``.

    A wrapper may keep the parameters elsewhere and set plain tensors in their place, as FSDP 1 does
    with ``use_orig_params=False``, and ``DataParallel`` in its replicas.
    """
    parameters: list[Tensor] = list(projector.parameters())
    if parameters:
        return parameters
    attributes = (getattr(projector, name, None) for name in ("weight", "bias"))
    return [tensor for tensor in attributes if isinstance(tensor, Tensor)]


def input_like(projector: nn.Module, embeddings: Tensor) -> tuple[torch.device, torch.dtype]:
    """Find the device and dtype in which a projector that is called takes features.

    The dtype is that of its first tensor with a floating dtype of 16, 32 or 64 bits. If there is
    none, it is the embeddings' dtype: a weight that is stored in another form (4 bits in uint8,
    int8, float8) does not show which dtype its product takes.
    """
    tensors = tensors_of(projector)
    dtypes = [tensor.dtype for tensor in tensors if tensor.dtype in _COMPUTED_IN]
    device = tensors[0].device if tensors else embeddings.device
    return device, dtypes[0] if dtypes else embeddings.dtype


def input_width(projector: nn.Module) -> int | None:
    """Find ``in_features`` of the projector or of a module in it; None if there is none."""
    widths = (getattr(module, "in_features", None) for module in projector.modules())
    return next((width for width in widths if isinstance(width, int)), None)


def devices_of_plain(plain: PlainProjector) -> set[torch.device]:
    """Where the weight and the bias are."""
    devices = {plain.weight.device}
    if plain.bias is not None:
        devices.add(plain.bias.device)
    return devices


def check_has_values(projector: nn.Module, name: str) -> None:
    """Raise ``ValueError`` if a parameter of the projector is on the meta device.

    Offloading leaves parameters there; features that are moved to it lose their values.
    """
    for parameter_name, parameter in projector.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name}.{parameter_name}: expected values, got a parameter on the meta device, "
                "where accelerate's cpu_offload and disk_offload leave it (or nobody has loaded "
                f"it yet); leave {name} out of the offloading, "
                f"e.g. accelerate.hooks.remove_hook_from_module({name}, recurse=True)"
            )


def refuse_called(projector: nn.Module, name: str, impl: Impl, device: torch.device) -> None:
    """Raise ``ValueError`` where :func:`plain_beside` has a reason and ``impl="triton"`` asks for a
    kernel, which multiplies by a weight that is beside the text rows, and can call no module."""
    if impl != "triton":
        return
    plain = plain_projector(projector)
    if isinstance(plain, str):
        raise ValueError(
            f"impl='triton': {name} ({type(projector).__name__}) is more than a weight and a bias; "
            "pass impl='auto' or 'torch' to have it called"
        )
    devices = _listed(devices_of_plain(plain))
    raise ValueError(
        f"impl='triton': {name} is on {devices}, the word embeddings are on {device}; put both "
        "on one device, or pass impl='auto' or 'torch' to have the projector called on its own"
    )


def allow_called(projector: nn.Module, name: str, impl: Impl, device: torch.device) -> None:
    """See to it that a projector that :func:`plain_beside` has a reason for may be called, and say
    so in the log once.

    Raises:
        ValueError: see :func:`refuse_called`.
    """
    refuse_called(projector, name, impl, device)
    if torch.compiler.is_compiling():
        return
    plain = plain_projector(projector)
    if isinstance(plain, str):
        warn_unfused(name, type(projector).__name__)
    else:
        warn_elsewhere(name, _listed(devices_of_plain(plain)), str(device))


def _listed(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))


@functools.cache
def warn_unfused(name: str, kind: str) -> None:
    logger.warning(
        "%s (%s) is more than a weight and a bias (an adapter, a hook, a shard): it "
        "is called, and its rows are inserted by PyTorch",
        name,
        kind,
    )


@functools.cache
def warn_elsewhere(name: str, devices: str, device: str) -> None:
    logger.warning(
        "%s is on %s, the word embeddings are on %s: it is called there, and its rows are copied "
        "and inserted by PyTorch",
        name,
        devices,
        device,
    )
