"""Subject ``tune``: times the insert's product with several tiles, and cuBLAS.

Nothing is tuned at run time: run this once for a kind of GPU, and change the table in
``ops/tiles.py`` as it advises. Of all tiles that fit the chip it tries those that the model of
``predict`` ranks first. They are compiled before, in separate processes, and left out if they
spill. A tile in the table has to pass ``tests/kernels/compiled/test_resources.py``.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from triton.errors import TritonError

from bench.harness import Implementation, Key, Row, Settings, dtype_name, measure, rotation
from bench.no_gpu import NoDriver, compiled
from bench.oracle import Oracle
from bench.predict import best
from bench.report import Column, Table
from bench.resources import SHARED_LIMIT, insert_blank, only, usage
from bench.shapes import Shape, make_batch, make_case, shapes_named
from bench.subjects.insert import Inputs, floors, work_of
from step37_kernels import plan_insert
from step37_kernels.ops import project
from step37_kernels.ops.tiles import Tile, entry

TRIED = 8
GAIN = 0.02  # a tile has to be this much faster to replace another
ACCUMULATORS = range(32, 193)
"""Registers of a thread for sums: with fewer the matrix unit idles, with more none are left."""
ENTRY = "the table's "


def family() -> Iterator[Tile]:
    """Yield every tile that the kernel supports on Hopper."""
    blocks = itertools.product((64, 128, 192, 256), (64, 128, 256), (64, 128), (4, 8, 16))
    for block_m, block_n, block_k, warps in blocks:
        stages = min(6, SHARED_LIMIT["sm_90"] // (2 * (block_m + block_n) * block_k))
        if stages >= 3 and block_m * block_n // (32 * warps) in ACCUMULATORS:
            yield Tile(block_m, block_n, block_k, warps, stages)


def describe(tile: Tile) -> str:
    """Write a tile out: ``192×256×64, 8 warps, 4 stages``."""
    return f"{tile}, {tile.num_warps} warps, {tile.num_stages} stages"


def candidates(rows: int) -> list[Tile]:
    """List the tiles ranked first for so many rows; first one for each pair of block sizes."""
    ranked: dict[tuple[int, int], list[Tile]] = {}
    for _, tile in best(rows, "H100", family()):
        ranked.setdefault((tile.block_m, tile.block_n), []).append(tile)
    rounds = itertools.zip_longest(*ranked.values())
    return [tile for some in rounds for tile in some if tile is not None][:TRIED]


def problem_of(tile: Tile) -> str | None:
    """Compile a tile for Hopper, without a GPU; returns what is wrong with it, or None."""
    NoDriver("sm_90").install()
    try:
        insert_blank(tile, torch.bfloat16)
    except (TritonError, RuntimeError, ValueError) as error:
        return f"does not compile: {type(error).__name__}: {str(error).splitlines()[-1]}"
    _, stack = usage(compiled(project.project_insert_kernel)[-1].asm["cubin"])
    return f"spills {stack} bytes a thread" if stack else None


def sound(tiles: Sequence[Tile]) -> list[Tile]:
    """Keep the tiles that compile without spills; the others are printed with the reason."""
    workers = max(1, min(len(tiles), len(os.sched_getaffinity(0)) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        answers = [(tile, pool.submit(problem_of, tile)) for tile in tiles]
    found = []
    for tile, answer in answers:
        try:
            problem = answer.result()
        except BrokenProcessPool:
            problem = "the compiler ended its process, or that of another"
        if problem is None:
            found.append(tile)
        else:
            print(f"left out: {describe(tile)}: {problem}")
    return found


def run(settings: Settings) -> Iterator[list[Row] | Table]:
    """Yield one group for each shape, and then advice on the tile table."""
    for shape in shapes_named(settings.shapes):
        tiles = sound(candidates(shape.num_rows))
        rows = run_shape(shape, tiles, settings)
        yield rows
        columns = (Column("shape"), Column("rows"), Column("advice for the tile table"))
        lines = [(shape.name, shape.num_rows, advice(rows))]
        yield Table(columns=columns, lines=lines)


def run_shape(shape: Shape, tiles: Sequence[Tile], settings: Settings) -> list[Row]:
    """Measure the kernel alone with each tile, that of the table first, and cuBLAS."""
    dtype = settings.dtypes[0]
    batch = make_batch(shape, settings.device)
    work = work_of("forward", shape, dtype.itemsize)
    sets = range(rotation(settings.device, work.bytes))
    cases = [make_case(batch, dtype=dtype, layout="contiguous", seed=i) for i in sets]
    inputs = Inputs(batch, cases)
    plan = plan_insert(batch.input_ids, [(t, [each] * n) for t, n, each in batch.groups])

    def sources(i: int) -> tuple[torch.Tensor, ...]:
        case = inputs.case(i)
        return case.embeddings, case.weight, *(x.flatten(0, 1) for x in case.features)

    def with_tile(tile: Tile, operands: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        text, weight, *rows = operands
        with only(tile):
            places = (plan.destinations, plan.row_at)
            return {"output": project.project_insert(text, rows, weight, None, *places)}

    present = entry(shape.num_rows, dtype, 90)
    named = {ENTRY + describe(present): present} | {describe(tile): tile for tile in tiles}
    compared = [
        Implementation(name=n, kind="peer", prepare=sources, run=functools.partial(with_tile, tile))
        for n, tile in named.items()
    ]
    compared.append(next(floors("forward", inputs, "contiguous")))
    oracle = Oracle(cases[0], batch)

    def check(one: Implementation, results: dict[str, torch.Tensor]) -> str | None:
        # All are ours and must accumulate in fp32; an error of one must not end the others.
        return oracle.check(results, narrow_partial_sums=one.kind == "floor")

    short = dtype_name(dtype)
    key = Key(subject="tune", operation="forward", shape=shape.name, dtype=short)
    return measure(key, work, compared, check=check, settings=settings)


def advice(measured: Sequence[Row]) -> str:
    """Say which tile the table should have, from the rows of one shape."""
    times = {row.implementation: row.median_us for row in measured if row.kind == "peer"}
    timed = {name: us for name, us in times.items() if us is not None}
    if not timed:
        return "nothing was timed"
    fastest = min(timed, key=timed.__getitem__)
    present = next(iter(times))
    held, best_us = timed.get(present), timed[fastest]
    if held is not None and held < (1 + GAIN) * best_us:
        return f"{present} stays, {held:.1f} µs; the fastest takes {best_us:.1f} µs"
    before = f"{held:.1f} µs" if held is not None else "which failed"
    return f"take {fastest}, {best_us:.1f} µs, for {present}, {before}"
