"""Holds what a GPU measured against what :mod:`bench.predict` assumed: one table, the worst first.

The files are those that ``python -m bench`` and ``make gpu`` write. A figure that several files
have is compared once for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench import predict
from bench.predict import CHIPS, OPERATIONS, RATES, Range, Rates, ranged
from bench.predict_embedding import added
from bench.report import Column, Table
from bench.shapes import Shape

Results = dict[str, Any]


class Found(NamedTuple):
    """One assumption beside what was measured of it."""

    what: str
    shape: str
    unit: str
    assumed: Range
    measured: float

    @property
    def off(self) -> float:
        """Measured over assumed."""
        return self.measured / self.assumed[0]

    @property
    def verdict(self) -> str:
        within = min(self.assumed) <= self.measured <= max(self.assumed)
        return "within its range" if within else "outside its range"


def chip_of(results: Results) -> str | None:
    """Name the chip that results are of; None for one that the model does not know."""
    device = results["environment"].get("device", "")
    return next((name for name in CHIPS if name in device), None)


def compared(shapes: Sequence[Shape], results: Results, chip: str) -> Iterator[Found]:
    """Yield what one file of results says of the model."""
    yield from _rates(results["ceilings"], chip)
    us = {
        (
            row["subject"],
            row["operation"],
            row["variant"],
            row["implementation"],
            row["shape"],
        ): row["median_us"]
        for row in results["rows"]
        if row["median_us"] and row["dtype"] in ("bf16", "int64")
    }
    for shape in shapes:
        for found in _times(shape, chip):
            measured = us.get((*found.key, shape.name))
            if measured:
                yield Found(found.what, shape.name, "µs", found.assumed, measured)
        contiguous, view = (
            us.get(("insert", "forward", variant, "step37", shape.name))
            for variant in ("contiguous", "channels-first")
        )
        if contiguous and view and view > contiguous:
            packing = predict.packing(shape, chip)
            yield Found("packing, channels-first", shape.name, "µs", packing, view - contiguous)


class _Time(NamedTuple):
    what: str
    key: tuple[str, str, str, str]
    """Subject, operation, variant, implementation."""
    assumed: Range


def _times(shape: Shape, chip: str) -> Iterator[_Time]:
    """Yield the times that rows of a shape measure, with what the model says of them."""

    def planning(rates: Rates) -> float:
        return predict.plan_us(shape, rates)

    yield _Time("the plan alone", ("plan", "plan", "", "step37"), ranged(chip, planning))
    counts = ranged(chip, lambda rates: rates["counts"])
    for operation in OPERATIONS:
        row = predict.row(shape, chip, operation)
        bare = (row["gemm_us"], row["low_gemm_us"], row["high_gemm_us"])
        key = ("insert", operation, "contiguous")
        yield _Time(f"library products, {operation}", (*key, "GEMM alone"), bare)
        ours = (row["predicted_us"], row["low_us"], row["high_us"])
        yield _Time(f"ours, {operation}", (*key, "step37"), added(ours, counts))


def _rates(ceilings: Results, chip: str) -> Iterator[Found]:
    """Yield the rates of a large product and a large copy."""
    for name, unit, rate in (
        ("products", "TFLOP/s", ceilings["flops_per_s"].get("bf16")),
        (f"{chip} memory", "TB/s", ceilings["copy_bytes_per_s"]),
    ):
        if rate:
            low, nominal, high, *_ = RATES[name]
            yield Found(name, "", unit, (nominal, low, high), rate / 1e12)


def table_of(shapes: Sequence[Shape], measured: Sequence[Results]) -> Table:
    """Make the table: every assumption that the files say something of, the most wrong first."""
    known = [(chip, results) for results in measured if (chip := chip_of(results))]
    found = [(chip, one) for chip, results in known for one in compared(shapes, results, chip)]
    found.sort(key=lambda pair: -abs(math.log(pair[1].off)))
    lines = [
        (chip, one.what, one.shape, one.assumed, one.measured, one.unit, one.off, one.verdict)
        for chip, one in found
    ]
    return Table(
        title="Which assumption was wrong, and by how much",
        text="\n".join(
            [
                "Measured over assumed, the farthest from 1 first. The rates of the chip move all",
                "times. Where products are as assumed and ours is not, the model is wrong.",
                "",
                *(_source(results) for results in measured),
            ]
        ),
        columns=(
            Column("chip"), Column("assumption"), Column("shape"),
            Column("assumed", "{:.4g} [{:.4g}–{:.4g}]"), Column("measured", "{:.4g}"),
            Column("unit"), Column("× assumed", "{:.2f}"), Column("measured is"),
        ),
        lines=lines,
    )  # fmt: skip


def _source(results: Results) -> str:
    """Write where results are from, with the clocks that nvidia-smi told; or that none is used."""
    environment = results["environment"]
    named = [name for name in ("torch", "triton", "commit", "date") if environment.get(name)]
    parts = [f"{name} {environment[name]}" for name in named]
    for shape, state in results.get("state", {}).items():
        parts.append(f"before {shape} " + ", ".join(f"{k} {v}" for k, v in state.items()))
    unknown = "" if chip_of(results) else " (of a chip that this page knows nothing of: not used)"
    return f"* {environment.get('device', 'no device')}{unknown}: {'; '.join(parts)}"
