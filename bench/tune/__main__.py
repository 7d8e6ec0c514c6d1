"""Subject ``tune``: time tiles of the matrix products, and propose a table for ``ops/tiles.py``.

Nothing is tuned at run time: this is run once for a kind of GPU, and a person pastes what it
prints. For each product and number of feature rows, :func:`bench.tune.table.candidates` are

1. compiled, for aligned operands and for others, in processes of their own; a tile that spills,
   or needs more shared memory than there is, is left out;
2. gated: every element of one result on poisoned memory, against float64;
3. timed, a few samples each; then the best of them again, beside the present table's tile, the
   proposal for the row count before, and cuBLAS, in turn and for longer.

The budget is shared evenly: what one row count leaves goes to those after it. What is pasted has
to pass ``tests/kernels/test_resources.py``, which asks more of the compiled kernels (under each
Triton release that is to be supported).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from triton.errors import TritonError

from bench import report
from bench.harness import (
    LATE,
    CpuClock,
    Implementation,
    Key,
    Row,
    Settings,
    Work,
    dtype_name,
    environment,
    gate,
    measure_ceilings,
    sample_rounds,
)
from bench.tune.compile_pool import Usage, compile_all, request
from bench.tune.problem import CUBLAS, Problem, Target
from bench.tune.table import (
    HOPPER,
    Chip,
    Extents,
    Table,
    Times,
    candidates,
    describe,
    propose,
    source,
    winner,
)
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.ops.tiles import Product, Tile, _table

ROWS = (64, 81, 169, 338, 507, 1014, 1521, 2197, 6591, 26364)
"""Multiples of a picture's 169 rows and a crop's 81: one or two in each bucket of the table."""
PRODUCTS: tuple[Product, ...] = get_args(Product)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 5
FINAL_SECONDS = 2.0
"""At most, for the last round of one product and row count."""
COMPILE_SHARE = 0.4
"""Of the budget, at most."""
Spec = tuple[object, ...]
"""A tile's values: tiles themselves are compared by identity."""


@dataclass(slots=True)
class Group:
    """What became of the tiles of one product and row count."""

    key: Key
    work: Work
    present: Tile
    rows: dict[Tile, Row]
    """Figures, or the problem, of every tile."""
    finalists: dict[Tile, float]
    """Median µs of those that were timed for long, beside each other; the fastest first."""
    cublas: Row

    def table(self) -> str:
        """The best tiles, the present one, and cuBLAS; then what failed its gate."""
        key = self.key
        timed = sum(row.median_us is not None for row in self.rows.values())
        lines = [
            "",
            f"{key.operation}, {key.shape}, {key.dtype}: {timed} of {len(self.rows)} tiles timed",
            f"{'µs':>9}{'TFLOP/s':>9}{'× cuBLAS':>10}{'× present':>11}",
        ]
        held = self.finalists.get(self.present)
        cublas = self.cublas.median_us

        def line(name: str, us: float) -> str:
            over_cublas, over_present = (f"{us / to:.3f}" if to else "" for to in (cublas, held))
            rate = f"{self.work.flops / us / 1e6:.1f}"
            return f"{us:9.1f}{rate:>9}{over_cublas:>10}{over_present:>11}  {name}"

        for place, (tile, us) in enumerate(self.finalists.items()):
            if tile is self.present:
                lines.append(line(f"{describe(tile)} (present)", us))
            elif place < SHOWN:
                lines.append(line(describe(tile), us))
        if cublas is not None:
            lines.append(line("cuBLAS", cublas))
        if held is None:
            problem = self.rows[self.present].problem
            lines.append(f"  the present tile, {describe(self.present)}: {problem}")
        for tile, row in self.rows.items():
            if row.problem and row.problem.startswith(GATE):
                lines.append(f"  not proposed: {describe(tile)}: {row.problem.removeprefix(GATE)}")
        return "\n".join(lines)


GATE = "on the device: "
"""Before the problem of a tile that compiled."""


def compile_tiles(
    groups: Mapping[tuple[Product, int], Sequence[Tile]],
    dtype: torch.dtype,
    chip: Chip,
    deadline: float,
) -> Callable[[Product, Tile], str | None]:
    """Compile whatever is to be timed; the result says why a tile is not, or None."""
    if INTERPRETED:
        return lambda *_: None
    # All groups' first choices before their second ones.
    ranks = itertools.zip_longest(*([(key[0], tile) for tile in g] for key, g in groups.items()))
    wanted = [pair for rank in ranks for pair in rank if pair is not None]
    requests = dict.fromkeys(
        request(product, variant, dtype)
        for product, tile in wanted
        for variant in (tile, tile.by_pointers)
    )
    begin = time.perf_counter()
    workers = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
    answers = compile_all(list(requests), chip.capability, deadline, workers)
    seconds = time.perf_counter() - begin
    print(f"{len(answers)} of {len(requests)} kernels compiled in {seconds:.0f} s", flush=True)

    def problem_of(product: Product, tile: Tile) -> str | None:
        for variant, prefix in ((tile, ""), (tile.by_pointers, "by pointers: ")):
            problem = _problem(answers.get(request(product, variant, dtype)), chip)
            if problem:
                return prefix + problem
        return None

    return problem_of


def _problem(answer: Usage | str | None, chip: Chip) -> str | None:
    if answer is None:
        return LATE
    if isinstance(answer, str):
        return answer
    if answer.stack:
        return f"spills {answer.stack} bytes a thread"
    if answer.shared > chip.shared:
        return f"needs {answer.shared} bytes of shared memory"
    return None


def time_group(
    problem: Problem,
    tiles: Sequence[Tile],
    problem_of: Callable[[Product, Tile], str | None],
    before: Spec | None,
    clock: CpuClock,
    until: float,
) -> Group:
    """Gate and time the tiles of one product and row count.

    Args:
        problem: what to compute.
        tiles: the present one first.
        problem_of: why a tile is not to be run.
        before: values of the tile to time beside the best, whatever its first figures.
        clock: of the device.
        until: ``time.perf_counter()`` at which it should be done.
    """
    row = Row(key=problem.key, work=problem.work, implementation="", kind="ours")
    rows: dict[Tile, Row] = {}
    passed: dict[str, Tile] = {}
    compared: dict[Tile, Implementation] = {}
    begin = time.perf_counter()
    for tile in tiles:
        why = problem_of(problem.product, tile)
        # Half of the time: the other half is for timing what passed.
        if why is None and time.perf_counter() > begin + 0.5 * (until - begin) and compared:
            why = LATE
        if why is None:
            compared[tile] = problem.implementation(tile)
            why = _gate(compared[tile], problem, clock)
        name = describe(tile)
        rows[tile] = dataclasses.replace(row, implementation=name, problem=why)
        if why is None:
            passed[name] = tile
        else:
            compared.pop(tile, None)
    cublas = problem.cublas()
    gate(cublas, problem.check, clock, problem.work.bytes)
    first = sample_rounds(list(compared.values()), clock, 0)
    best = sorted(passed, key=lambda name: first[name]["median_us"])
    kept = {
        passed[name]
        for place, name in enumerate(best)
        if place <= SHOWN or passed[name] is tiles[0] or dataclasses.astuple(passed[name]) == before
    }
    left = min(FINAL_SECONDS, max(until - time.perf_counter(), 0))
    finals = [one for tile, one in compared.items() if tile in kept]
    second = sample_rounds([*finals, cublas], clock, left)
    for name, tile in passed.items():
        rows[tile] = dataclasses.replace(rows[tile], **second.get(name, first[name]))
    finalists = {
        passed[name]: figures["median_us"]
        for name, figures in sorted(second.items(), key=lambda item: item[1]["median_us"])
        if name in passed
    }
    floor = dataclasses.replace(row, implementation=CUBLAS, kind="floor", **second[CUBLAS])
    return Group(problem.key, problem.work, tiles[0], rows, finalists, floor)


def _gate(implementation: Implementation, problem: Problem, clock: CpuClock) -> str | None:
    """What is wrong with a tile on the device, or None."""
    out_bytes = problem.extents.m * problem.extents.n * problem.dtype.itemsize
    try:
        why = gate(implementation, problem.check, clock, out_bytes)
    except (TritonError, RuntimeError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        try:
            clock.settle()
        except RuntimeError:
            # An illegal access, say: nothing runs in this process any more.
            raise RuntimeError(
                f"{problem.product}, {problem.rows} rows: the device gave up at "
                f"{implementation.name}"
            ) from error
    return GATE + why if why else None


def tune(options: argparse.Namespace, target: Target) -> bool:
    """Time, show, propose and write; whether anything was timed."""
    begin = time.perf_counter()
    # Python's start before this, and what is under way at the end, take time too.
    deadline = begin + 0.9 * options.budget
    dtype = DTYPES[options.dtype]
    present = _table(target.chip.capability, dtype.itemsize)
    tiles = {
        (product, rows): candidates(
            product,
            Extents.of(product, rows, target.hidden, target.width),
            target.chip,
            present[product].pick(rows),
        )
        for rows in options.rows
        for product in options.products
    }
    where = environment(target.device)
    ceilings = measure_ceilings(Settings(device=target.device, dtypes=(dtype,), row_seconds=0.05))
    problem_of = compile_tiles(tiles, dtype, target.chip, begin + COMPILE_SHARE * options.budget)
    groups: list[Group] = []
    times: dict[Product, dict[int, dict[Tile, float]]] = collections.defaultdict(dict)
    before: dict[Product, Spec] = {}
    try:
        for number, ((product, rows), few) in enumerate(tiles.items()):
            now = time.perf_counter()
            if now > deadline:
                print(f"{product}, {rows} rows: {LATE}")
                continue
            until = now + (deadline - now) / (len(tiles) - number)
            # Its operands are gigabytes at the most rows: no name keeps them.
            group = time_group(
                Problem(product, rows, dtype, target),
                few,
                problem_of,
                before.get(product),
                target.clock,
                until,
            )
            print(group.table(), flush=True)
            groups.append(group)
            if group.finalists:
                times[product][rows] = group.finalists
                before[product] = dataclasses.astuple(winner(group.finalists, few[0]))
    finally:
        # Whatever ends the run early, what was measured is kept.
        proposal = proposed_source(times, present, target, dtype, where)
        print("", proposal, sep="\n")
        results = report.to_json(
            [row for group in groups for row in (*group.rows.values(), group.cublas)],
            ceilings,
            where,
        )
        print("written:", write({**results, "proposal": proposal}, options.out, where["device"]))
    return bool(times)


def proposed_source(
    times: Times,
    present: Table,
    target: Target,
    dtype: torch.dtype,
    where: Mapping[str, str],
) -> str:
    """The proposal as it can be pasted, with a note of where it comes from."""
    names = ("device", "driver", "torch", "triton", "commit", "date")
    origin = ", ".join(f"{name} {where[name]}" for name in names if where[name])
    counts = "; ".join(
        f"{product} at {', '.join(map(str, rows))} rows" for product, rows in times.items()
    )
    notes = [
        f"Proposed by `python -m bench tune`: {origin}.",
        f"Timed in {dtype_name(dtype)}: {counts or 'nothing, so this is the present table'}.",
    ]
    name = "_HOPPER" if target.chip.capability == HOPPER else "_DEFAULT"
    return source(name, propose(times, present), notes)


def write(results: report.Record, folder: Path, device: str) -> Path:
    """Keep the run as JSON, as the other subjects do; where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.file_name(device)}-tune.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def _counts(text: str) -> list[int]:
    return sorted({int(count) for count in text.split(",") if count})


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line → options, with what does not exist refused."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tune", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--rows",
        type=_counts,
        default=list(ROWS),
        help=f"comma-separated numbers of feature rows ({','.join(map(str, ROWS))})",
    )
    parser.add_argument(
        "--products",
        type=_names,
        default=list(PRODUCTS),
        help=f"comma-separated, of {', '.join(PRODUCTS)} (all)",
    )
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp16; they share a table")
    parser.add_argument("--budget", type=float, default=360, help="seconds it may take (360)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    for product in options.products:
        if product not in PRODUCTS:
            parser.error(f"--products {product!r}: expected some of {', '.join(PRODUCTS)}")
    if not options.rows or options.rows[0] < 1:
        parser.error(f"--rows {options.rows}: expected numbers from 1 on")
    if options.dtype not in DTYPES:
        parser.error(f"--dtype {options.dtype!r}: expected one of {', '.join(DTYPES)}")
    return options


def main(arguments: Sequence[str] | None = None, target: Target | None = None) -> int:
    """Run the subject, on the GPU unless another target is given; 1 if nothing could be timed."""
    options = parse(arguments)
    if target is None:
        if not torch.cuda.is_available() or torch.version.hip:
            print("tune: needs an NVIDIA GPU, and there is none here")
            return 0
        target = Target.of(torch.device("cuda"))
    return 0 if tune(options, target) else 1


if __name__ == "__main__":
    sys.exit(main())
