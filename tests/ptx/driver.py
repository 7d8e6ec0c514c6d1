"""A Triton driver that launches: it interprets the compiled kernels' PTX, on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.no_gpu import NoDriver, compiled
from tests.ptx import arithmetic, asynchronous, movement
from tests.ptx.blocks import Blocks, Launch, Run
from tests.ptx.memory import Descriptor, GlobalMemory, Traffic
from tests.ptx.operands import BUILDERS, guarded, unknown
from tests.ptx.program import PARAMETER_SPACE, Program, PtxError, parse

INSTRUCTIONS = (arithmetic, movement, asynchronous)
"""The modules that register what instructions do."""
_CONTROL = ("bra", "ret", "bar")
_LANES = 16384
"""Threads that run in lockstep, where blocks do not have to run one by one."""


class Kernel:
    """One compiled kernel, ready to be launched."""

    def __init__(self, ptx: str) -> None:
        self.program = parse(ptx)
        self._runs = [_build(self.program, each) for each in self.program.instructions]

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: list[int],
        memory: GlobalMemory,
        *,
        descriptors: dict[int, Descriptor] | None = None,
        shared_bytes: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        """Run all blocks.

        Args:
            grid: how many, along three axes; none at all is no launch.
            arguments: the value of each parameter, pointers as addresses; those that Triton adds
                at the end may be left out.
            memory: what the pointers lead to.
            descriptors: by the index of their parameter.
            shared_bytes: of a block's shared memory.
            traffic: where to count loads and stores.
        """
        if grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
            raise PtxError(f"a grid of {grid} blocks")
        parameters = self.program.parameters
        data = np.zeros(self.program.parameter_bytes, np.uint8)
        for parameter, argument in zip(parameters, arguments, strict=False):
            if parameter.size <= 8:
                raw = (argument % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
                data[parameter.offset : parameter.offset + parameter.size] = list(raw)
        launch = Launch(
            program=self.program,
            runs=self._runs,
            grid=grid,
            parameters=data,
            descriptors={
                PARAMETER_SPACE + parameters[index].offset: descriptor
                for index, descriptor in (descriptors or {}).items()
            },
            memory=memory,
            shared_bytes=shared_bytes,
            traffic=traffic,
        )
        total = grid[0] * grid[1] * grid[2]
        step = 1 if self.program.asynchronous else max(1, _LANES // self.program.threads)
        with np.errstate(all="ignore"):
            for first in range(0, total, step):
                Blocks(launch, np.arange(first, min(first + step, total))).run()


def _build(program: Program, found: Any) -> Run | None:
    if found.parts[0] in _CONTROL:
        return None
    if found.parts[0] not in BUILDERS:
        raise unknown(found)
    return guarded(found, BUILDERS[found.parts[0]](program, found))


@functools.cache
def _kernel(ptx: str) -> Kernel:
    return Kernel(ptx)


_launched: list[Traffic] | None = None
_fresh: frozenset[int] = frozenset()
"""Addresses of the tensors that the last launch wrote to."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Traffic]]:
    """The launches in here; asynchronous copies are not counted."""
    global _launched
    _launched = []
    try:
        yield _launched
    finally:
        _launched = None


def _record(kernel: str) -> Traffic | None:
    if _launched is None:
        return None
    _launched.append(Traffic(kernel))
    return _launched[-1]


class _Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._source, self._metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        global _fresh
        types = list(self._source.signature.values())
        (binary,) = (each for each in compiled(self._source.fn) if each.run is self)
        kernel = _kernel(binary.asm["ptx"])
        layouts = iter(getattr(self._metadata, "tensordesc_meta", None) or ())
        values: list[int] = []
        descriptors: dict[int, Descriptor] = {}
        tensors: dict[int, np.ndarray] = {}
        for argument, type_name in zip(rest[-len(types) :], types, strict=True):
            if type_name == "constexpr":
                continue
            if isinstance(argument, TensorDescriptor):
                layout = next(layouts, None)
                if layout is None:  # no copy engine: Triton makes pointers of it
                    values += _decomposed(argument)
                else:
                    descriptors[len(values)] = _descriptor(argument, layout)
                    values += [0, *argument.shape, *argument.strides]
                tensors.update([_bytes_behind(argument.base)])
            elif isinstance(argument, Tensor):
                values.append(argument.data_ptr())
                tensors.update([_bytes_behind(argument)])
            else:
                values.append(_integer(argument, type_name))
        memory = GlobalMemory({base: data for base, data in tensors.items() if data.nbytes}, _fresh)
        kernel.launch(
            (x, y, z),
            values,
            memory,
            descriptors=descriptors,
            shared_bytes=self._metadata.shared,
            traffic=_record(self._source.fn.__name__),
        )
        _fresh = memory.written


def _bytes_behind(tensor: Tensor) -> tuple[int, np.ndarray]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _decomposed(argument: TensorDescriptor) -> list[int]:
    """The parameters that Triton makes of a descriptor for a GPU without a copy engine."""
    sizes = [*argument.shape, *argument.strides]
    options = [argument.padding == "nan"]
    if hasattr(argument, "round_f32_to_tf32"):  # in Triton 3.9, not in 3.6
        options.append(argument.round_f32_to_tf32)
    return [argument.base.data_ptr(), *sizes, *map(int, options), *sizes]


def _descriptor(argument: TensorDescriptor, layout: dict[str, Any]) -> Descriptor:
    return Descriptor(
        base=argument.base.data_ptr(),
        itemsize=layout["elem_size"],
        shape=argument.shape,
        strides=argument.strides,
        box=layout["block_size"],
        swizzle=layout["swizzle"],
    )


def _integer(argument: float, type_name: str) -> int:
    """A number as the bits of its parameter."""
    if type_name == "fp32":
        return int(np.float32(argument).view(np.uint32))
    bits, signed = int(type_name[1:]), type_name.startswith("i")
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if bits > 1 and not lowest <= argument <= highest:
        raise PtxError(f"{argument} does not fit into {type_name}")
    return int(argument)


class PtxDriver(NoDriver):
    """Compiles for ``architecture`` and interprets what comes out."""

    def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:  # type: ignore[override]
        return _Launcher(source, metadata)


def install(architecture: str) -> None:
    """Let this process's kernels run on CPU tensors, compiled for ``architecture``.

    Before the first launch, and with ``TRITON_INTERPRET`` unset or 0.
    """
    from step37_kernels import dispatch as _dispatch
    from step37_kernels.ops import tiles

    PtxDriver(architecture).install()
    _dispatch.kernels_run_on_cpu = lambda: True
    tiles._capability = lambda _: int(architecture.removeprefix("sm_"))
