"""One matrix product at one number of feature rows, as ``bench tune`` times it: operands, the right
result, our kernel with any tile, and cuBLAS."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import (
    CpuClock,
    Implementation,
    Key,
    Work,
    clock_for,
    dtype_name,
    rotation,
)
from bench.resources import SHARED_LIMIT
from bench.tune.products import HIDDEN, WIDTH, Operands, launch
from bench.tune.table import Chip, Extents, describe
from step37_kernels.ops.tiles import Product, Tile
from step37_kernels.testing import product_bound

CUBLAS = "GEMM alone"
"""As in the other subjects, so that their table has its ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where tiles are timed, and on products of what size."""

    device: torch.device
    chip: Chip
    clock: CpuClock
    hidden: int = HIDDEN
    width: int = WIDTH

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """A CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        # 99 KiB: what the smaller chips of each generation have.
        shared = SHARED_LIMIT.get(f"sm_{capability}", 99 * 1024)
        chip = Chip(capability, properties.multi_processor_count, shared)
        return cls(device=device, chip=chip, clock=clock_for(device))


class Problem:
    """A product at one number of rows: inputs, the right result, and how to get it."""

    def __init__(self, product: Product, rows: int, dtype: torch.dtype, target: Target) -> None:
        self.product = product
        self.rows = rows
        self.dtype = dtype
        self.extents = Extents.of(product, rows, target.hidden, target.width)
        self._device = target.device
        # Pictures of 169 rows with a marker before and behind each.
        places = torch.arange(rows, device=target.device)
        self._destinations = places + 2 * (places // 169) + 1
        self._narrow_destinations = self._destinations.int()
        self._positions = rows + 2 * (rows // 169) + 2
        m, n, k = dataclasses.astuple(self.extents)
        out_bytes = m * n * (8 if product == "accumulate_weight" else dtype.itemsize)
        self.work = Work(
            flops=2 * m * n * k, bytes=(m + n) * k * dtype.itemsize + out_bytes, rows=rows
        )
        self.key = Key(
            subject="tune",
            operation=product,
            shape=f"{rows} rows",
            variant="",
            dtype=dtype_name(dtype),
        )
        self._held: Tensor | None = None
        if product == "accumulate_weight":
            generator = torch.Generator(target.device).manual_seed(1)
            self._held = torch.randn(m, n, generator=generator, device=target.device)
        sets = rotation(target.device, self.work.bytes)
        self._sets = [self._make(target, seed) for seed in range(sets)]
        a, b = (factor.double() for factor in self._factors(self._sets[0]))
        held = None if self._held is None else self._held.double()
        self._exact = a @ b if held is None else a @ b + held
        rounded_to = dtype if held is None else torch.float32
        self._bound = product_bound(a, b, [rounded_to], plus=held)

    def _make(self, target: Target, seed: int) -> Operands:
        generator = torch.Generator(target.device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=target.device, dtype=self.dtype)

        weight = normal(target.hidden, target.width) / target.width**0.5
        if self._held is not None:
            out = torch.empty_like(self._held)
        elif self.product == "forward":
            out = torch.empty_like(weight).new_empty(self._positions, 1, target.hidden)
        else:
            out = torch.empty_like(weight if self.product == "grad_weight" else weight[:0])
        return Operands(
            x=normal(self.rows, target.width),
            grad=normal(self.rows, target.hidden),
            weight=weight,
            out=out,
        )

    def _factors(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """``[M, K]`` and ``[K, N]``."""
        if self.product == "forward":
            return operands.x, operands.weight.T
        if self.product == "grad_features":
            return operands.grad, operands.weight
        return operands.grad.T, operands.x

    def prepare(self, i: int) -> Operands:
        """Set ``i``, with nothing of an earlier result in it."""
        operands = self._sets[i % len(self._sets)]
        if self._held is None:
            operands.out.fill_(float("nan"))
        else:
            operands.out.copy_(self._held)
        return operands

    def run(self, tile: Tile, operands: Operands) -> Tensor:
        """The product by our kernel with this tile: ``out``, or a new tensor."""
        return launch(self.product, tile, operands, self._narrow_destinations)

    def implementation(self, tile: Tile) -> Implementation:
        return Implementation(
            name=describe(tile),
            kind="ours",
            prepare=self.prepare,
            run=functools.partial(self.run, tile),
        )

    def cublas(self) -> Implementation:
        """The bare product of the same shape, into new memory."""
        return Implementation(
            name=CUBLAS,
            kind="floor",
            prepare=lambda i: self._factors(self._sets[i % len(self._sets)]),
            run=lambda factors: torch.matmul(*factors),
        )

    def check(self, implementation: Implementation, result: Tensor) -> str | None:
        """What is wrong with a result on set 0, or None. Nobody judges cuBLAS."""
        if implementation.kind != "ours":
            return None
        if self.product == "forward":
            rows = result.flatten(0, 1)
            others = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            others[self._destinations] = False
            if not rows[others].isnan().all():
                return "writes rows that are not its own"
            result = rows[self._destinations]
        error = (result.double() - self._exact).abs_()
        if not error.isfinite().all():
            return "holds NaN or infinity"
        share = float((error / self._bound).max())
        if share > 1:
            return f"off by {float(error.max()):.3g}, {share:.3g} of what rounding allows"
        return None
