"""``python -m bench predict``: what every launch should cost, by arithmetic; nothing is measured.

A product takes its start and its pipeline's filling, then the slowest of three: the matrix units,
in whole waves of tiles over the multiprocessors; the blocks that come through L2; the operands and
the result through memory. The last wave's store follows, and that of every wave where a program has
its multiprocessor to itself. Library products are the best of :data:`LIBRARY` by the same model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.insert import work_of
from bench.shapes import SHAPES, Shape, shapes_named
from step37_kernels.ops.common import ceil_div
from step37_kernels.ops.tiles import Tile, _table

CHIPS = ("H100", "H200")
OPERATIONS = ("forward", "forward+backward")
CASES = ("nominal", "fast", "slow")
COMMAND = "python -m bench predict"
RATES: dict[str, tuple[float, float, float, str, str]] = {
    # low, nominal, high, unit, source
    "multiprocessors": (132, 132, 132, "", "data sheet (SXM)"),
    "peak": (989, 989, 989, "TFLOP/s", "data sheet, dense bf16; of the floor only"),
    "H100 bandwidth": (3.35, 3.35, 3.35, "TB/s", "data sheet; of the floor only"),
    "H200 bandwidth": (4.8, 4.8, 4.8, "TB/s", "data sheet; of the floor only"),
    "products": (770, 780, 800, "TFLOP/s", "published: cuBLAS at 8192³ on an H200, random data"),
    "Triton's share": (0.94, 1, 1, "of that", "published: 92–98 % of cuBLAS, launch to end"),
    "H100 memory": (2.8, 3.0, 3.1, "TB/s", "published: copies, bytes read plus written"),
    "H200 memory": (4.1, 4.3, 4.4, "TB/s", "published: copies, bytes read plus written"),
    "L2": (7.7, 8.5, 10, "TB/s", "published: L2 to all multiprocessors"),
    "copy": (0.05, 0.08, 0.11, "TB/s", "assumed: one multiprocessor; 64 bytes a clock at most"),
    "start": (2.0, 2.3, 3.0, "µs", "published: the shortest useful kernel"),
    "fill": (1.0, 1.5, 2.0, "µs", "assumed: two trips to memory before the first product"),
    "dependent": (0.7, 1.0, 1.5, "µs", "published: a launch behind another"),
    "plan": (2.0, 3.0, 5.0, "µs", "assumed: scan and assignment of up to 1024 positions"),
    "scan": (0.1, 0.2, 0.4, "µs", "assumed: every further 1024 positions of the plan"),
}
IN_TIME = ("start", "fill", "dependent", "plan", "scan")
"""Rates that are better when they are low."""
ONE_LAUNCH = 16384
"""Positions up to which the plan is one launch."""
LIBRARY = [
    (m, n, split)
    for m in (64, 128, 192, 256)
    for n in (64, 128, 192, 256)
    for split in (1, 2, 3, 4, 6, 8)
    if m * n <= 256 * 192
]
"""What cuBLAS is taken to choose among, always the best: tiles of ``m × n``, pairs of which share
the larger operand's block; its stores are hidden."""


class Rates:
    """The rates of one chip, all nominal, or all at their fast or slow end."""

    def __init__(self, chip: str, case: str = "nominal") -> None:
        self._chip, self._case = chip, case

    def __getitem__(self, name: str) -> float:
        name = name if name in RATES else f"{self._chip} {name}"
        low, nominal, high, *_ = RATES[name]
        fast, slow = (low, high) if name in IN_TIME else (high, low)
        return {"nominal": nominal, "fast": fast, "slow": slow}[self._case]

    def moving(self, numbytes: float, through: str = "memory") -> float:
        """µs."""
        return numbytes / self[through] / 1e6


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch as the model sees it."""

    kernel: str
    tile: str
    tiles: int
    waves: float
    bound: str
    us: float


def product(
    rates: Rates,
    extents: tuple[int, int, int],
    blocks: tuple[int, int],
    *,
    name: str = "library product",
    split: int = 1,
    share: float = 1.0,
    hidden_store: bool = True,
    stream_k: bool = False,
    multicast: bool = False,
    sum_apart: bool = True,
) -> Launch:
    """``[M, N] = [M, K] · [K, N]`` of 16-bit numbers in tiles of ``blocks``."""
    (m, n, k), (block_m, block_n) = extents, blocks
    processors = int(rates["multiprocessors"])
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    programs = tiles * split
    whole_waves = ceil_div(programs, processors)
    waves = max(1.0, tiles / processors) if stream_k else float(whole_waves)
    flops = 2 * block_m * block_n * k / split
    store = rates.moving(2 * min(programs, processors) * block_m * block_n)
    store *= 1 if hidden_store else whole_waves
    if split > 1:  # the parts, in fp32 through L2, then their sum
        store = rates["dependent"] + rates.moving(8 * split * m * n, "L2")
        store += rates["start"] if sum_apart else 0
    elif stream_k:
        store += rates["dependent"] + rates.moving(8 * processors * block_m * block_n, "L2")
    read = block_m + block_n - (max(blocks) / 2 if multicast else 0)
    unit = rates["products"] * share / processors
    times = {
        "tensor": store + waves * flops / unit / 1e6,
        "L2": store + rates.moving(2 * programs * read * k / split, "L2"),
        "HBM": rates.moving(2 * (m * k + n * k + m * n)),
        "launch": rates["start"],
    }
    bound = max(times, key=times.__getitem__)
    tile = f"{block_m}×{block_n}" + f" split {split}" * (split > 1) + " stream-K" * stream_k
    us = rates["start"] + rates["fill"] + times[bound]
    return Launch(name, tile, programs, round(waves, 2), bound, us)


@functools.lru_cache(maxsize=None)
def library(chip: str, case: str, extents: tuple[int, int, int]) -> Launch:
    """The library's product."""
    rates = Rates(chip, case)
    found = (
        product(rates, extents, (m, n), split=split, multicast=True) for m, n, split in LIBRARY
    )
    return min(found, key=lambda launch: launch.us)


def moved(rates: Rates, name: str, numbytes: float) -> Launch:
    """A kernel that only moves bytes."""
    us = rates.moving(numbytes)
    bound = "HBM" if us > rates["start"] else "launch"
    return Launch(name, "", 0, 0, bound, rates["start"] + us)


def own(tile: Tile, rows: int, shape: Shape, rates: Rates) -> Launch:
    """Our product with this tile."""
    resident = (tile.block_m + tile.block_n) * tile.block_k * 2 * tile.num_stages
    return dataclasses.replace(
        product(
            rates,
            (rows, shape.hidden, shape.width),
            (tile.block_m, tile.block_n),
            name="project and scatter",
            split=tile.split_k,
            share=rates["Triton's share"],
            hidden_store=tile.persistent or 2 * resident <= 227 * 1024,
        ),
        tile=str(tile),
    )


def best(
    rows: int, chip: str, tiles: Iterable[Tile], shape: Shape = SHAPES["flickr8k"]
) -> list[tuple[float, Tile]]:
    """µs of our product of ``rows`` rows with each tile, the fastest first."""
    rates = Rates(chip)
    timed = [(own(tile, rows, shape, rates).us, tile) for tile in tiles]
    return sorted(timed, key=lambda pair: pair[0])


def forward(shape: Shape, chip: str, case: str, tile: Tile) -> tuple[list[Launch], float]:
    """Launches of plan and product, and µs of both together."""
    rates = Rates(chip, case)
    planning = rates["plan"] + rates["scan"] * max(shape.seq_len / 1024 - 1, 0)
    whole = shape.seq_len <= ONE_LAUNCH
    plan = Launch("plan", "", 1, 0, "launch", planning)
    project = own(tile, shape.num_rows, shape, rates)
    idle = -project.tiles % int(rates["multiprocessors"])
    # The product starts beside the plan and waits for it in its epilogue; where no multiprocessor
    # is idle, a tile starts late. A plan of several launches is waited for.
    late = rates["dependent"] + (0 if idle and whole else planning)
    # Idle multiprocessors copy text rows during the last wave; the rest is copied after it.
    text = 4 * (shape.seq_len - shape.num_rows) * shape.hidden
    wave = project.us / max(project.waves, 1)
    beside = idle * rates["copy"] * 1e6 * wave
    us = late + project.us + rates.moving(max(text - beside, 0))
    return [plan, project], us


def row(shape: Shape, chip: str, operation: str, tile: Tile) -> dict[str, Any]:
    """One operation on one shape: figures of all cases, launches of the nominal one."""
    rows, hidden, width = shape.num_rows, shape.hidden, shape.width
    extents = [(rows, hidden, width), (rows, width, hidden), (hidden, width, rows)]
    extents = extents[: 3 if operation == "forward+backward" else 1]
    totals, bare, launches = [], [], []
    for case in CASES:
        rates = Rates(chip, case)
        products = [library(chip, case, each) for each in extents]
        gaps = rates["dependent"] * (len(products) - 1)
        bare.append(sum(each.us for each in products) + gaps)
        made, us = forward(shape, chip, case, tile)
        if len(products) > 1:
            gather = moved(rates, "gather gradient", 2 * hidden * (2 * shape.seq_len + rows))
            made += [gather, *products[1:]]
            us += gather.us + sum(each.us for each in products[1:]) + 3 * rates["dependent"]
        totals.append(us)
        launches.append([dataclasses.asdict(each) for each in made])
    rates = Rates(chip)
    work = work_of(operation, shape, 2)
    floor = max(work.flops / rates["peak"] / 1e6, rates.moving(work.bytes, "bandwidth"))
    ratios = [ours / theirs for ours, theirs in zip(totals, bare, strict=True)]
    return {
        "shape": shape.name, "chip": chip, "operation": operation, "rows": rows,
        "predicted_us": totals[0], "low_us": min(totals), "high_us": max(totals),
        "gemm_us": bare[0], "floor_us": floor,
        "ratio": ratios[0], "low_ratio": min(ratios), "high_ratio": max(ratios),
        "over_floor": totals[0] / floor, "launches": launches[0],
    }  # fmt: skip


def rows_of(shapes: Sequence[Shape], chips: Sequence[str] = CHIPS) -> list[dict[str, Any]]:
    """Every shape on every chip, both operations, with the table's tiles."""
    table = _table(90, 2)["forward"]
    return [
        row(shape, chip, operation, table.pick(shape.num_rows))
        for chip in chips
        for operation in OPERATIONS
        for shape in shapes
    ]


def add_measured(rows: Iterable[dict[str, Any]], paths: Iterable[Path]) -> None:
    """Put medians of benchmark results beside what was predicted, where device and shape agree."""
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        device = results["environment"]["device"]
        found = {
            (each["shape"], each["operation"], each["implementation"]): each["median_us"]
            for each in results["rows"]
            if (each["subject"], each["variant"], each["dtype"]) == ("insert", "contiguous", "bf16")
        }
        for each in rows:
            if each["chip"] in device:
                key = (each["shape"], each["operation"])
                for field, name in (("measured_us", "step37"), ("measured_gemm_us", "GEMM alone")):
                    if found.get((*key, name)):
                        each[field] = found[*key, name]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rates, then one table a chip and operation."""
    lines = ["# Predicted times", "", f"Made by `{COMMAND} > docs/predicted.md`: arithmetic, see"]
    lines += ["`bench/predict.py`. **No figure here was measured.** Ranges take all rates at their"]
    lines += ["fast and at their slow end. × product: over the predicted cuBLAS product (forward +"]
    lines += ["backward: three). × floor: over FLOP ÷ peak or bytes ÷ bandwidth.", ""]
    lines += ["| assumed | low | nominal | high | unit | source |", "|---|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(map(str, rate))} |" for name, rate in RATES.items()]
    measured = any("measured_us" in each for each in rows)
    columns = ["shape", "rows", "predicted µs", "product µs", "× product", "× floor", "launches"]
    columns += ["measured µs", "measured product µs", "measured ×"] * measured
    titles = dict.fromkeys((each["chip"], each["operation"]) for each in rows)
    for chip, operation in titles:
        lines += ["", f"## {chip}, {operation}, predicted", "", f"| {' | '.join(columns)} |"]
        lines.append("|---" * len(columns) + "|")
        for each in rows:
            if (each["chip"], each["operation"]) != (chip, operation):
                continue
            launches = "; ".join(_shown(launch) for launch in each["launches"])
            cells = [each["shape"], str(each["rows"])]
            cells.append("{predicted_us:.1f} [{low_us:.0f}–{high_us:.0f}]".format(**each))
            cells.append(f"{each['gemm_us']:.1f}")
            cells.append("{ratio:.2f} [{low_ratio:.2f}–{high_ratio:.2f}]".format(**each))
            cells += [f"{each['over_floor']:.2f}", launches]
            ours, gemm = each.get("measured_us"), each.get("measured_gemm_us")
            figures = (ours, gemm, ours / gemm if ours and gemm else None)
            cells += [f"{figure:.2f}" if figure else "" for figure in figures] if measured else []
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(launch: dict[str, Any]) -> str:
    text = f"{launch['kernel']} {launch['us']:.1f}"
    if launch["tile"]:
        text += " ({tile}, {tiles} tiles, {waves:g} waves, {bound})".format(**launch)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or one JSON object."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help='print {"rows": […]}')
    parser.add_argument("--shapes", help="comma-separated (all, and images-1 … images-16)")
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="results in JSON")
    options = parser.parse_args(arguments)
    every = ",".join([*SHAPES, *(f"images-{k}" for k in range(1, 17))])
    try:
        shapes = shapes_named([name for name in (options.shapes or every).split(",") if name])
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    rows = rows_of(shapes)
    add_measured(rows, options.measured)
    print(json.dumps({"rows": rows}, indent=1) if options.json else markdown(rows))


if __name__ == "__main__":
    main()
