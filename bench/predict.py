"""Subject ``predict``: computes what every launch should cost; nothing is measured.

The time of a product is that of its start and of filling its pipeline, plus the largest of four:
the matrix units, in waves of tiles; the shared memory from which they read; the blocks that are
loaded through L2; operands and result through memory. Then follow the store of the last wave and,
if there is one, the launch that adds parts up. Library products are the fastest of :data:`LIBRARY`
by the same model, but without shared memory: their instructions are not known, so shared memory is
assumed to keep up with the matrix units.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import Settings
from bench.predict_copies import copies_us, own_launch_us, text_rows
from bench.report import Column, Table, read
from bench.shapes import AUTOMODEL, SHAPES, Shape, shapes_named
from bench.subjects.insert import work_of
from step37_kernels.ops import tiles as table
from step37_kernels.ops.common import ceil_div
from step37_kernels.ops.tiles import Tile

PROCESSORS = 132
COMMAND = "python -m bench predict"
CHIPS, OPERATIONS = ("H100", "H200"), ("forward", "forward+backward")
MOVES = 26
"""PyTorch operations that bring rows of crops and images into the order of Automodel's model."""
# low, nominal, high, unit, source; "peak" and "bandwidth" are used for the floor only
RATES: dict[str, tuple[float, float, float, str, str]] = {
    "peak": (989, 989, 989, "TFLOP/s", "data sheet, dense bf16"),
    "H100 bandwidth": (3.35, 3.35, 3.35, "TB/s", "data sheet"),
    "H200 bandwidth": (4.8, 4.8, 4.8, "TB/s", "data sheet"),
    "products": (770, 780, 800, "TFLOP/s", "reported: cuBLAS at 8192³ on an H200, random data"),
    "Triton": (0.94, 1, 1, "of products", "reported: 92–98 % of cuBLAS, from start to end"),
    "H100 memory": (2.8, 3.0, 3.1, "TB/s", "reported: copies, bytes read plus written"),
    "H200 memory": (4.1, 4.3, 4.4, "TB/s", "reported: copies, bytes read plus written"),
    "tensor": (
        4096,
        4096,
        4096,
        "FLOP a clock",
        "data sheet: peak, by 132 multiprocessors, 1.83 GHz",
    ),
    "shared": (128, 128, 128, "B a clock", "reported: shared memory of one multiprocessor"),
    "transposing": (0.6, 0.7, 0.8, "of memory", "assumed: packing reads two bytes at a time"),
    "L2": (7.7, 8.5, 10, "TB/s", "reported: L2 to all multiprocessors"),
    "copy": (0.05, 0.08, 0.11, "TB/s", "assumed: one multiprocessor, reading plus writing"),
    "turn": (0.7, 1.0, 1.5, "µs", "assumed: a program that finds no text row to copy"),
    "start": (2.0, 2.3, 3.0, "µs", "reported: the shortest useful kernel"),
    "fill": (1.0, 1.5, 2.0, "µs", "assumed: two trips to memory before the first product"),
    "dependent": (0.7, 1.0, 1.5, "µs", "reported: a launch behind another"),
    "counts": (3.0, 4.0, 5.0, "µs", "assumed: some bytes to the host, behind a launch"),
    "plan": (2.0, 3.0, 5.0, "µs", "assumed: the plan of up to 1024 positions"),
    "sort": (10.0, 20.0, 40.0, "µs", "assumed: torch.sort of the ids, and what selects them"),
    "hidden": (0, 1, 1, "of the shorter", "assumed: counting beside gathering, in one launch"),
    "wait": (10.0, 15.0, 25.0, "µs", "assumed: the host waits for one number of the device"),
    "scan": (0.1, 0.2, 0.4, "µs", "assumed: each further 1024 positions of it"),
}
SIZES, SPLITS = (64, 128, 192, 256), (1, 2, 3, 4, 6, 8)
LIBRARY = [one for one in itertools.product(SIZES, SIZES, SPLITS) if sum(one) < 512]
"""Tiles (rows, columns, parts) of which cuBLAS is assumed to use the best. Two programs share the
larger block of theirs."""
Rates = dict[str, float]
Extents = tuple[int, int, int]  # [M, N] = [M, K] · [K, N]


CLOCKS = {
    "650 TFLOP/s": "sustained under the power limit, the low end",
    "700 TFLOP/s": "sustained under the power limit, the high end",
    "780 TFLOP/s": "nominal: what this page assumes",
    "860 TFLOP/s": "short runs at boost",
}
"""Cases of :func:`rates_of`: what products reach at a clock, and when. Assumed, but for nominal."""


def rates_of(chip: str, case: str) -> Rates:
    """Pick the rates of a chip, in TFLOP/s, TB/s and µs: case nominal, fast, slow or of
    :data:`CLOCKS`, at which products and L2 are faster or slower, and memory is not."""
    found = {}
    for name, (low, nominal, high, unit, _) in RATES.items():
        fast, slow = (low, high) if unit == "µs" else (high, low)
        found[name.removeprefix(f"{chip} ")] = {"fast": fast, "slow": slow}.get(case, nominal)
    if case in CLOCKS:
        clock = float(case.split()[0]) / found["products"]
        found["products"] *= clock
        found["L2"] *= clock
    return found


class Launch(NamedTuple):
    kernel: str
    tile: str
    programs: int
    waves: int
    bound: str
    us: float

    def __str__(self) -> str:
        how = f" ({self.tile}: {self.programs} programs, {self.waves} waves, {self.bound})"
        return f"{self.kernel} {self.us:.1f}{how if self.tile else ''}"


class Demand(NamedTuple):
    """The work of one launch of a product."""

    flops: float
    shared: float  # time of shared memory over that of the matrix unit
    l2: float  # bytes
    memory: float  # bytes
    end: float  # µs that follow the last wave, unless memory is still busy with its results

    def bound(self, rates: Rates) -> tuple[str, float]:
        """Return what bounds the product, and its µs from start to end."""
        multiplying = self.flops / rates["products"] / 1e6
        times = {
            "tensor": multiplying + self.end,
            "shared": multiplying * self.shared + self.end,
            "L2": self.l2 / rates["L2"] / 1e6 + self.end,
            "HBM": self.memory / rates["memory"] / 1e6,
        }
        bound = max(times, key=times.__getitem__)
        return bound, rates["start"] + rates["fill"] + times[bound]


def shared_share(tile: Tile, rates: Rates) -> float:
    """Compute the ratio of shared memory's clocks to the matrix unit's, for a step of a tile.

    Both operands are written to shared memory and read from it. Four warps multiply 64 rows at a
    time: the weight's block is read once for each 64 rows, the features' block by each group of
    four warps that share its rows. 192 rows are two products, of 128 and of 64.
    """
    area = tile.block_m * tile.block_n
    reads = 0
    for rows in (128, 64) if tile.block_m == 192 else (tile.block_m,):
        apart = min(tile.num_warps // 4, rows // 64)  # groups of warps with different rows
        reads += rows * (tile.num_warps // 4 // apart) + rows // 64 * tile.block_n
    moved = 2 * tile.block_k * (tile.block_m + tile.block_n + reads)
    return moved / rates["shared"] / (2 * area * tile.block_k / rates["tensor"])


def sum_us(rates: Rates, parts: float, results: float, start: float) -> float:
    """Predict the µs of a second launch that reads fp32 parts and writes their sums."""
    moving = 8 * parts / rates["L2"] + 2 * results / rates["memory"]
    return rates["dependent"] + start + moving / 1e6


@functools.cache
def library(chip: str, case: str, extents: Extents) -> Launch:
    """Predict the library's product: the fastest of :data:`LIBRARY`."""
    rates = rates_of(chip, case)
    found = (library_by(rates, extents, *choice) for choice in LIBRARY)
    return min(found, key=lambda launch: launch.us)


def library_by(rates: Rates, extents: Extents, *choice: int) -> Launch:
    """Predict the library's product with one ``(block_m, block_n, split)``."""
    (m, n, k), (block_m, block_n, split) = extents, choice
    area, read = block_m * block_n, block_m + block_n - max(block_m, block_n) / 2
    programs = ceil_div(m, block_m) * ceil_div(n, block_n) * split
    waves = ceil_div(programs, PROCESSORS)
    store = 2 * min(programs, PROCESSORS) * area / rates["memory"] / 1e6
    sums = sum_us(rates, split * m * n, m * n, rates["start"]) if split > 1 else 0
    name = f"{block_m}×{block_n}" + f" split {split}" * (split > 1)
    bound, us = Demand(
        flops=waves * PROCESSORS * 2 * area * k / split,
        shared=0,
        l2=2 * programs * read * k / split,
        memory=2 * (m * k + n * k + (m * n if split == 1 else 0)),
        end=store if split == 1 else 0,
    ).bound(rates)
    return Launch("library product", name, programs, waves, bound, us + sums)


def own(rates: Rates, tile: Tile, row_counts: Sequence[int], like: Shape) -> Launch:
    """Predict our product with this tile; a multiprocessor runs one program at a time.

    The store of each wave and the filling of the next are added between them. The launch that adds
    parts up is included.
    """
    shares = table.schedule(tile, row_counts, like.hidden, like.width, PROCESSORS)
    area, read = tile.block_m * tile.block_n, tile.block_m + tile.block_n
    tiles, waves = shares.whole + shares.tail, ceil_div(shares.programs, PROCESSORS)
    store = 2 * area * min(tiles, PROCESSORS) / rates["memory"] / 1e6
    work = ceil_div(shares.whole, PROCESSORS) + (1 / shares.parts if shares.tail else 0)
    rows, hidden, width = sum(row_counts), like.hidden, like.width
    split = bool(shares.partials)
    bound, us = Demand(
        flops=work * PROCESSORS * 2 * area * width / rates["Triton"],
        shared=shared_share(tile, rates),
        l2=2 * tiles * read * width,
        # Results of split tiles are written by the launch that adds up the parts.
        memory=2 * (rows * width + hidden * width + rows * hidden * shares.whole / tiles),
        end=(waves - 1) * (store + rates["fill"]) + (0 if split else store),
    ).bound(rates)
    if split:  # the second launch waits inside the kernel, so its start is hidden
        us += sum_us(rates, shares.partials * area, shares.tail * area, 0)
    name = f"{tile}" + f", {shares.tail} in {shares.parts} parts" * (shares.parts > 1)
    return Launch("project, scatter", name, shares.programs, waves, bound, us)


def moved(rates: Rates, size: float, share: float = 1) -> float:
    """Predict the µs of a launch that only moves ``size`` bytes, at a share of memory's rate."""
    return rates["start"] + size / (share * rates["memory"]) / 1e6


def best(rows: int, chip: str, tiles: Iterable[Tile]) -> list[tuple[float, Tile]]:
    """Rank tiles by the predicted µs of our product of ``rows`` rows, the fastest first."""
    rates = rates_of(chip, "nominal")
    found = [(own(rates, tile, [rows], SHAPES["flickr8k"]).us, tile) for tile in tiles]
    return sorted(found, key=lambda pair: pair[0])


def plan_us(shape: Shape, rates: Rates) -> float:
    """Time the plan's launch by itself."""
    return rates["plan"] + rates["scan"] * max(shape.seq_len / 1024 - 1, 0)


def forward(shape: Shape, chip: str, case: str) -> tuple[list[Launch], float]:
    """List the launches of plan and product with the table's tile, and µs of all together."""
    rates = rates_of(chip, case)
    planning = plan_us(shape, rates)
    plan = Launch("plan", "", 1, 0, "launch", planning)
    project = own(rates, *table_product(shape), shape)
    # The product starts beside the plan, and waits for it in its epilogue.
    late = max(rates["dependent"], planning - project.us)
    launches = [plan, project]
    if shape is AUTOMODEL:  # or after the operations that reorder the plan's rows
        moving = MOVES * (rates["dependent"] + rates["start"])
        launches.insert(1, Launch(f"{MOVES} small operations", "", 0, 0, "launch", moving))
        late = planning + moving + rates["dependent"]
    copies = Launch("text behind the tiles", "", 0, 0, "", copying(shape, chip, case))
    if copies.us >= 0.05:
        launches.append(copies)
    return launches, late + project.us + copies.us


def table_product(shape: Shape) -> tuple[Tile, list[int]]:
    """Look up the tile that multiplies a shape's rows, and count the rows of each source."""
    groups = ((shape.crops, shape.crop_rows), (shape.images, shape.image_rows))
    tile = table.entry(shape.num_rows, torch.bfloat16, 90)
    return tile, [n * each for n, each in groups if n]


@functools.cache
def copying(shape: Shape, chip: str, case: str) -> float:
    """Predict the µs by which text rows, copied by the product's launch, hold up its end."""
    rates, (tile, row_counts) = rates_of(chip, case), table_product(shape)
    shares = table.schedule(tile, row_counts, shape.hidden, shape.width, PROCESSORS)
    work = ceil_div(shares.whole, PROCESSORS) + (1 / shares.parts if shares.tail else 0)
    each = (own(rates, tile, row_counts, shape).us - rates["start"]) / work
    tiles = [0.0] * PROCESSORS
    for program in range(shares.programs):
        first = min(range(PROCESSORS), key=tiles.__getitem__)
        tiles[first] += each if program < shares.whole else each / shares.parts
    rows, hidden, width = shape.num_rows, shape.hidden, shape.width
    product = 2 * (rows * width + hidden * width + rows * hidden)
    return copies_us(shape, tiles, product, rates)


def row(shape: Shape, chip: str, operation: str) -> dict[str, Any]:
    """Predict one operation on one shape: figures of all cases, launches of the nominal one."""
    rows, hidden, width = shape.num_rows, shape.hidden, shape.width
    extents = [(rows, hidden, width), (rows, width, hidden), (hidden, width, rows)]
    extents = extents[: 1 if operation == "forward" else 3]
    totals, bare, launches = [], [], []
    for case in ("nominal", "fast", "slow"):
        rates = rates_of(chip, case)
        products = [library(chip, case, each) for each in extents]
        bare.append(sum(each.us for each in products) + rates["dependent"] * (len(products) - 1))
        made, us = forward(shape, chip, case)
        if len(products) > 1:
            gather = 2 * hidden * (2 * shape.seq_len + rows) / rates["memory"] / 1e6
            behind = [Launch("gradient", "", 0, 0, "HBM", rates["start"] + gather)]
            if shape.crops and shape.images:
                both = moved(rates, 4 * rows * width)
                behind.append(Launch("concatenation of the groups", "", 0, 0, "HBM", both))
            behind += products[1:]
            made += behind
            us += sum(each.us for each in behind) + len(behind) * rates["dependent"]
        totals.append(us)
        launches.append(made)
    rates, work = rates_of(chip, "nominal"), work_of(operation, shape, 2)
    ratios = [ours / theirs for ours, theirs in zip(totals, bare, strict=True)]
    floor = max(work.flops / rates["peak"], work.bytes / rates["bandwidth"]) / 1e6
    return {
        "shape": shape.name, "chip": chip, "operation": operation, "rows": rows,
        "predicted_us": totals[0], "low_us": min(totals), "high_us": max(totals),
        "gemm_us": bare[0], "low_gemm_us": min(bare), "high_gemm_us": max(bare),
        "floor_us": floor, "over_floor": totals[0] / floor,
        "ratio": ratios[0], "low_ratio": min(ratios), "high_ratio": max(ratios),
        "launches": launches[0], "measured": "",
    }  # fmt: skip


def add_measured(rows: Iterable[dict[str, Any]], results: dict[str, Any]) -> None:
    """Add medians of benchmark results to the rows that were predicted for that device."""
    found = {
        (each["shape"], each["operation"], each["implementation"]): each["median_us"]
        for each in results["rows"]
        if (each["subject"], each["variant"], each["dtype"]) == ("insert", "contiguous", "bf16")
    }
    for each in rows:
        key = (each["shape"], each["operation"])
        ours, gemm = found.get((*key, "step37")), found.get((*key, "GEMM alone"))
        if each["chip"] in results["environment"]["device"] and ours and gemm:
            each["measured"] = f"{ours:.1f} µs, product {gemm:.1f}, × {ours / gemm:.2f}"


Range = tuple[float, float, float]
"""A predicted figure: nominal, with all rates at their fast end, with all at their slow end."""


def ranged(chip: str, us: Callable[[Rates], float]) -> Range:
    """Compute µs in all three cases of the rates."""
    nominal, fast, slow = (us(rates_of(chip, case)) for case in ("nominal", "fast", "slow"))
    return nominal, fast, slow


def packing(shape: Shape, chip: str) -> Range:
    """Predict the launch that copies the tower's channels-first view before the product."""
    size = 4 * shape.num_rows * shape.width
    return ranged(chip, lambda r: r["dependent"] + moved(r, size, r["transposing"]))


def unfused(chip: str) -> Range:
    """Predict Megatron's ``main_grad.add_``, which reads and writes fp32 and reads bf16."""
    size = 10 * SHAPES["flickr8k"].hidden * SHAPES["flickr8k"].width
    return ranged(chip, lambda r: r["dependent"] + moved(r, size))


def in_some_uses(shapes: Sequence[Shape], chip: str) -> Table:
    """Make the table of additional launches that some uses need."""
    form = "{:.1f} [{:.0f}–{:.0f}]"
    counts = form.format(*ranged(chip, lambda rates: rates["counts"]))
    added = form.format(*unfused(chip))
    text = (
        f"* The module's copy of counts to the host: {counts} µs a forward, not with `strict`.\n"
        f"* Megatron's `add_` of a weight gradient that is not fused: {added} µs a backward.\n"
        "* Features channels-first, as the vision tower gives them: a forward packs them."
    )
    columns = (Column("shape"), Column("rows"), Column("packing, µs", form))
    lines = [(shape.name, shape.num_rows, packing(shape, chip)) for shape in shapes]
    return Table(title=f"{chip}, added in some uses", text=text, columns=columns, lines=lines)


def by_the_clock(shapes: Sequence[Shape], chip: str) -> Table:
    """Make the table of forwards at several clocks, and of what cuBLAS may choose at 1521 rows."""
    columns = [Column("shape"), *(Column(clock, "{:.0f} µs, × {:.2f}") for clock in CLOCKS)]
    lines = []
    for shape in shapes:
        extents = (shape.num_rows, shape.hidden, shape.width)
        us = [(forward(shape, chip, clock)[1], library(chip, clock, extents)) for clock in CLOCKS]
        lines.append((shape.name, *((ours, ours / bare.us) for ours, bare in us)))
    like = SHAPES["flickr8k"]
    ours, extents = forward(like, chip, "nominal")[1], (like.num_rows, like.hidden, like.width)
    choices = ((128, 128, 1), (128, 192, 1), (192, 128, 1), (128, 256, 1), (256, 128, 1))
    bare = [library_by(rates_of(chip, "nominal"), extents, *choice) for choice in choices]
    tiles = ", ".join(f"{one.tile} {one.us:.0f} µs (× {ours / one.us:.2f})" for one in bare)
    text = (
        "µs of a forward, and × product. The clock moves products and L2, memory keeps its rate.\n"
        + "".join(f"* {clock}: {when}.\n" for clock, when in CLOCKS.items())
        + f"\nAt {like.num_rows} rows the ratio also depends on the tile that cuBLAS takes, which\n"
        f"nobody knows beforehand: {tiles}."
    )
    return Table(title=f"{chip}, by the clock, predicted", text=text, columns=columns, lines=lines)


ONE_IN_2048 = Shape(name="one picture in 2048", seq_len=2048, images=1)


def text_copies(shapes: Sequence[Shape], chip: str) -> Table:
    """Make the table of what copying text rows adds to a forward, here and by a launch of its
    own."""
    form = "{:.1f} [{:.0f}–{:.0f}]"
    columns = (
        Column("shape"), Column("text rows"), Column("by the product's launch, µs", form),
        Column("by a launch of their own, µs", form),
    )  # fmt: skip
    lines = [
        (
            shape.name,
            sum(text_rows(shape)),
            tuple(copying(shape, chip, case) for case in ("nominal", "fast", "slow")),
            ranged(chip, functools.partial(own_launch_us, shape)),
        )
        for shape in (*shapes, ONE_IN_2048)
    ]
    text = """What copying text rows adds to a forward: `bench/predict_copies.py`. The product's
launch copies them, with programs that hold a multiprocessor each, for its shared memory is theirs:
free beside a last wave with idle multiprocessors, behind it where there are none. A launch of their
own would have several programs a multiprocessor, and nothing to run beside. It would be shorter
where text follows full waves, by 1 to 15 µs, at most 4 % of the forward, and longer elsewhere; and
it would cost the host a launch more in every forward. So there is none."""
    return Table(title=f"{chip}, text rows, predicted", text=text, columns=columns, lines=lines)


HEAD = f"""# Predicted times

Made by `{COMMAND} > docs/predicted.md`: arithmetic, see `bench/predict.py`. **No figure here was
measured**, but in the last column. × product: over the predicted cuBLAS product, or three and the
gaps between; × floor: over FLOP by peak or bytes by bandwidth. Ranges: all rates at their slow or
fast end. A product is bounded by the tensor cores, by the shared memory that feeds them, by L2 or
by HBM. Library products are not held to shared memory: they are rather predicted too fast. Why some
forwards are above 1.05 ×: up to four pictures make fewer tiles than there are multiprocessors,
so parts of the reduction go through L2 to a second launch, or small tiles do; and from the second
wave on, each wave's store and the next one's filling are not hidden. Text rows are copied by the
same launch: behind the tiles where no multiprocessor is idle. Ratios are what is claimed; µs carry
the clock that they assume, and tables by the clock say what another one makes of them. The rows of
`insert` run the module, whose product starts beside the plan, as is assumed here; they include its
copy of counts to the host, which stands below among what some uses add. `automodel` is NeMo
Automodel's merge into placeholders, crops among its pictures: PyTorch operations put the plan's
rows in its order, and the product follows them.
"""
RATE_COLUMNS = tuple(map(Column, ("assumed", "low", "nominal", "high", "unit", "source")))
COLUMNS = (
    Column("shape"), Column("rows"), Column("predicted µs", "{:.1f} [{:.0f}–{:.0f}]"),
    Column("product µs", "{:.1f}"), Column("× product", "{:.2f} [{:.2f}–{:.2f}]"),
    Column("× floor", "{:.2f}"), Column("launches"), Column("measured"),
)  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """Make the cells of one row; ranges go from the fast to the slow end of all rates."""
    return (
        row["shape"], row["rows"], (row["predicted_us"], row["low_us"], row["high_us"]),
        row["gemm_us"], (row["ratio"], row["low_ratio"], row["high_ratio"]), row["over_floor"],
        "; ".join(map(str, row["launches"])), row["measured"],
    )  # fmt: skip


def run(settings: Settings) -> Iterator[Table]:
    """Yield the table of assumed rates, and one for each chip and operation."""
    # Imported here, since it takes its rates from this module.
    from bench import predict_embedding, predict_measured

    shapes = shapes_named(settings.shapes)
    # Read first, so that a file that cannot be read ends it before anything is printed.
    measured = [read(Path(path)) for path in settings.options["measured"]]
    rates = [(name, *rate) for name, rate in RATES.items()]
    yield Table(text=HEAD.strip(), columns=RATE_COLUMNS, lines=rates)
    for chip in CHIPS:
        for operation in OPERATIONS:
            rows = [row(shape, chip, operation) for shape in shapes]
            for results in measured:
                add_measured(rows, results)
            title = f"{chip}, {operation}, predicted"
            yield Table(title=title, columns=COLUMNS, lines=map(cells, rows))
        yield in_some_uses(shapes, chip)
        named = [shape for shape in shapes if shape.name in SHAPES]
        if named:
            yield text_copies(named, chip)
            yield by_the_clock(named, chip)
            yield predict_embedding.table_of(named, chip)
    if measured:
        yield predict_measured.table_of(shapes, measured)
