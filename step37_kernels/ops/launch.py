"""Launches kernels, with a clear error where a CUDA graph capture makes that impossible."""

from __future__ import annotations

from typing import Any

import torch

from step37_kernels.ops.common import INTERPRETED


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch ``kernel[grid](*arguments, **options)`` on the current device and stream.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along each axis.
        arguments, options: of the kernel; the options include compile and launch options.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the kernel was never launched with such
            arguments. The driver would have to load it, which it cannot do in a capture.
    """
    if not INTERPRETED and _capturing():
        binary = kernel.warmup(*arguments, grid=grid, **options)  # compiled, not loaded
        if binary is not None and binary.module is None:
            raise RuntimeError(
                f"{kernel.__name__} would be launched for the first time inside a CUDA graph "
                "capture, where no kernel can be loaded; run one forward and backward with the "
                "same shapes before the capture"
            )
    kernel[grid](*arguments, **options)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
