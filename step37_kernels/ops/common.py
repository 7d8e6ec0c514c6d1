"""Helpers of all kernels: interpreter work-arounds, whole vectors, the device guard."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter (fixed when they are imported).

The interpreter's bf16 arithmetic is wrong (``tl.dot`` multiplies raw bits, fp32 → bf16 truncates).
So kernels take this flag as a constexpr; if it is set they convert bf16 operands to fp32, and round
by integer arithmetic. Compiled kernels contain neither.
"""


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Round fp32 ``x`` to ``dtype``, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Integer rounding would turn some NaNs into infinity.
        nearest = tl.where(x != x, bits >> 16, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def let_dependants_start(INTERPRET: tl.constexpr):
    """Allow the next kernel, if launched with ``launch_pdl=True``, to start before this one ends.

    That kernel has to wait for our results itself. Does nothing where there is no programmatic
    dependent launch: before sm_90, on AMD, and in the interpreter.
    """
    if not INTERPRET and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()


VECTOR = tl.constexpr(8)
"""Elements that a thread loads or stores at once: 16 bytes of a 16-bit type."""


@triton.jit
def in_vectors(value, ALIGNED: tl.constexpr):
    """Return ``value`` in a form that shows the compiler a multiple of :data:`VECTOR`, if ALIGNED.

    Kernels do not specialise on sizes and strides. So Triton cannot prove that an address that is
    computed with one is aligned, and would load element by element.
    """
    if ALIGNED:
        value = value // VECTOR * VECTOR
    return value


def whole_vectors(*values: int) -> bool:
    """Whether all sizes and strides, in elements, are multiples of :data:`VECTOR`."""
    return not any(value % VECTOR.value for value in values)


def ceil_div(a: int, b: int) -> int:
    """Divide and round up, on the host; ``triton.cdiv`` takes two microseconds there."""
    return -(-a // b)


_HERE: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, on which Triton launches, inside a ``with`` block."""
    if tensor.is_cuda and torch.cuda.current_device() != tensor.device.index:
        return torch.cuda.device_of(tensor)
    return _HERE
