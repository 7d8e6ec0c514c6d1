"""Launching a kernel for the second time without asking Triton again what it is.

``kernel[grid](…)`` looks at every argument, builds a key of strings and finds the compiled kernel:
about 10 µs of Python a launch, more than a small projection takes on the GPU. A :class:`Launcher`
finds the compiled kernel by the few things that can differ between two calls of one launcher, and
hands the arguments to it as Triton would have.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from step37_kernels.ops.common import INTERPRETED

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
# Elsewhere Triton launches by itself: in releases whose CompiledKernel.run was not seen to take
# these arguments, and on AMD, where it also specialises on the size of a tensor.
_KNOWN = (
    not INTERPRETED
    and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
    and torch.version.hip is None
)


class Constants(dict[str, Any]):
    """Constexpr arguments and compile options of a kernel; compared by identity, which is cheap.

    Made by cached functions, so that equal ones are the same object.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class Launcher:
    """A kernel whose parameters are tensors, then ``fixed`` integers, then ``varying`` integers
    (all of them ``do_not_specialize``), then constexprs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Any, ...],
        fixed: tuple[int, ...],
        varying: tuple[int, ...],
        constants: Constants,
    ) -> None:
        """Launch on the current device and stream.

        Args:
            grid: programs along each axis.
            tensors: the pointer arguments; tensor descriptors among them.
            fixed: sizes that a model does not change, which Triton specialises.
            varying: sizes that change from batch to batch.
            constants: constexpr arguments and compile options.
        """
        if not _KNOWN:
            self.kernel[grid](*tensors, *fixed, *varying, **constants)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        # What Triton compiles a kernel for: types, 16-byte alignment, the values of the specialised
        # integers, and whether the others fit into 32 bits.
        key = (
            constants,
            device,
            fixed,
            *[_INT32_MIN <= value <= _INT32_MAX for value in varying],
            *[
                (tensor.dtype, tensor.data_ptr() % 16 == 0)
                if isinstance(tensor, Tensor)
                else (tensor.base.dtype, *tensor.block_shape)
                for tensor in tensors
            ],
        )
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*tensors, *fixed, *varying, **constants)
            first = len(tensors) + len(fixed) + len(varying)
            rest = tuple(constants[name] for name in self.kernel.arg_names[first:])
            self._compiled[key] = (compiled, rest)
            return
        compiled, rest = found
        stream = driver.get_current_stream(device)
        arguments = (*tensors, *fixed, *varying, *rest)
        runtime = triton.knobs.runtime
        compiled.run(
            *grid,
            *(1,) * (3 - len(grid)),
            stream,
            compiled.function,
            compiled.packed_metadata,
            compiled.launch_metadata(grid, stream, *arguments),
            runtime.launch_enter_hook,
            runtime.launch_exit_hook,
            *arguments,
        )
