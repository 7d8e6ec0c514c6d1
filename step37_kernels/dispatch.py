"""Decides which implementation runs, from ``impl`` and the device.

``auto``    Triton for CUDA tensors, PyTorch otherwise.
``triton``  Triton. On a CPU tensor only with Triton's interpreter (``TRITON_INTERPRET=1`` set
            before a kernel is first imported), else ``ValueError``.
``torch``   PyTorch, on any device.

An explicit ``triton`` or ``torch`` is never replaced by the other.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that the kernels compute with."""
_CHOICES = ("auto", "triton", "torch")
# Looked up once, here: torch.compile of PyTorch 2.11 cannot trace the look-up.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def check_impl(impl: Impl) -> None:
    """Raise ``ValueError`` unless ``impl`` is one of the three."""
    if impl not in _CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(_CHOICES)}, got {impl!r}")


def check_kernel_dtype(tensor: Tensor, name: str) -> None:
    """Raise ``ValueError`` if the kernels cannot compute in the dtype of this tensor."""
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"{name}: the Triton kernels take bfloat16, float16 and float32, got "
            f"{tensor.dtype}; pass impl='torch'"
        )


def use_triton(impl: Impl, device: torch.device) -> bool:
    """Decide whether to launch Triton kernels for tensors on ``device``.

    Args:
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.
        device: where the operation's tensors are.

    Returns:
        True to launch Triton kernels, False for the PyTorch implementation.

    Raises:
        ValueError: ``impl`` is none of the three, ``"triton"`` was asked for on a device that
            Triton cannot run on, or Triton is to run inside a transform of ``torch.func``, whose
            tensors have no memory that a kernel could read.
        ImportError: Triton is to run but is not installed.
    """
    check_impl(impl)
    kind = device.type
    if impl == "torch" or (impl == "auto" and kind != "cuda"):
        return False
    if not _TRITON_INSTALLED:
        raise ImportError(
            f"impl={impl!r} on {device} needs Triton, which is not installed; "
            "install 'triton', or pass impl='torch'"
        )
    if kind != "cuda" and not (kind == "cpu" and kernels_run_on_cpu()):
        raise ValueError(
            f"impl='triton': Triton kernels need CUDA tensors, got {device}; pass impl='torch', "
            "or set TRITON_INTERPRET=1 before importing to run them in Triton's interpreter"
        )
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "torch.func (grad, vmap, …) does not reach the Triton kernels: pass impl='torch'"
        )
    return True


def kernels_run_on_cpu() -> bool:
    """Whether kernels take CPU tensors in this process: only in Triton's interpreter."""
    from step37_kernels.ops.common import INTERPRETED

    return INTERPRETED
