"""What every kernel file shares: interpreter work-arounds, the device guard."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter (fixed when they are imported).

Its bf16 arithmetic is wrong (``tl.dot`` multiplies raw bits, fp32 → bf16 truncates), so kernels
take this flag as a constexpr, lift bf16 operands to fp32 and round by integer arithmetic there.
Compiled kernels never see either.
"""


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 ``x`` rounded to ``dtype``, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding by integers would carry some NaNs into infinity.
        nearest = tl.where(x != x, bits >> 16, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def let_dependants_start(INTERPRET: tl.constexpr):
    """A kernel launched next with ``launch_pdl=True`` may start, and waits itself for our results.

    Nothing without programmatic dependent launch: before sm_90, on AMD, in the interpreter.
    """
    if not INTERPRET and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()


VECTOR = tl.constexpr(8)
"""Elements of a vector that is loaded or stored as one, 16 bytes of the 16-bit types."""


@triton.jit
def in_vectors(value, ALIGNED: tl.constexpr):
    """Tell the compiler that ``value`` is a multiple of :data:`VECTOR`, if ALIGNED says that it is.

    Triton knows nothing about a size or stride that it does not specialise. It cannot prove that an
    address made with one is aligned, and would load element by element.
    """
    if ALIGNED:
        value = value // VECTOR * VECTOR
    return value


def whole_vectors(*values: int) -> bool:
    """Whether all sizes and strides, in elements, are multiples of :data:`VECTOR`."""
    return not any(value % VECTOR.value for value in values)


def ceil_div(a: int, b: int) -> int:
    """``triton.cdiv`` on the host, where that one takes two microseconds."""
    return -(-a // b)


_HERE: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one for a launch; Triton launches on the current GPU."""
    if tensor.is_cuda and torch.cuda.current_device() != tensor.device.index:
        return torch.cuda.device_of(tensor)
    return _HERE
