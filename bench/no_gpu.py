"""Compiles kernels without a GPU, by a Triton driver that launches nothing.

Kernels are specialised, cached and compiled by Triton's own launch path.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from step37_kernels import dispatch


class _Utils:
    def __init__(self) -> None:
        self._handles = itertools.count(1)

    def load_binary(self, *_: object) -> tuple[int, ...]:
        """Module, function (a new number each time), registers, spills, most threads."""
        return 0, next(self._handles), 0, 0, 1024

    def unload_module(self, *_: object) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20, "multiprocessor_count": 132}


@dataclasses.dataclass
class NoDriver:
    """Replaces Triton's driver for a chosen architecture; kernels are compiled but not launched."""

    architecture: str  # ``sm_90`` and the like, or AMD's ``gfx942``
    on_launch: Callable[..., None] = lambda *_: None  # called instead of each launch
    utils = _Utils()

    def install(self) -> None:
        """Make this the driver of the process, and allow ``impl="triton"`` for CPU tensors.

        Call it before the first launch. It raises ``RuntimeError`` if TRITON_INTERPRET is set.
        """
        if triton.knobs.runtime.interpret:
            raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels are not compiled")
        triton.runtime.driver.set_active(self)
        dispatch.kernels_run_on_cpu = lambda: True

    def get_current_target(self) -> GPUTarget:
        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return self.on_launch


def compiled(kernel: Any) -> list[Any]:
    """List what Triton has compiled of a ``@triton.jit`` function, oldest first."""
    return list(kernel.device_caches[0][0].values())
