"""Which tiles are worth timing, and from times to a tile table: what ``bench tune`` needs no GPU
for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from step37_kernels.ops.common import ceil_div
from step37_kernels.ops.tiles import Product, Tile, _Buckets

Table = Mapping[Product, _Buckets]
Times = Mapping[Product, Mapping[int, Mapping[Tile, float]]]
"""Median µs of the tiles that passed their gate, by product and feature rows."""

GAIN = 0.02
"""A tile has to be this much faster to take another's place."""
ITEM_BYTES = 2
ACCUMULATORS = range(32, 129)
"""Registers a thread for the sums: fewer starve the matrix unit, more leave none for addresses."""
HOPPER = 90


@dataclass(frozen=True, slots=True)
class Chip:
    """What decides which tiles can run and which could be fast."""

    capability: int
    processors: int
    """Multiprocessors."""
    shared: int
    """Bytes of shared memory that one block may have."""


@dataclass(frozen=True, slots=True)
class Extents:
    """``[M, N] = [M, K] · [K, N]``, as the kernels see a product."""

    m: int
    n: int
    k: int

    @classmethod
    def of(cls, product: Product, rows: int, hidden: int, width: int) -> Extents:
        if product == "forward":
            return cls(rows, hidden, width)
        if product == "grad_features":
            return cls(rows, width, hidden)
        return cls(hidden, width, rows)

    def tiles(self, block_m: int, block_n: int) -> int:
        return ceil_div(self.m, block_m) * ceil_div(self.n, block_n)


def describe(tile: Tile) -> str:
    """All of a tile: ``128×64×128 TMA, 4 warps, 4 stages, group 8``."""
    return f"{tile}, {tile.num_warps} warps, {tile.num_stages} stages, group {tile.group_m}"


def candidates(product: Product, extents: Extents, chip: Chip, present: Tile) -> list[Tile]:
    """Tiles to time for a product of 16-bit operands, the present one first.

    The whole grid of block sizes, warps, stages and kinds has thousands; left out is what cannot
    run on the chip, and what counting says is slow for this number of rows.
    """
    known = {dataclasses.astuple(present)}
    found = [present]
    for tile in _worth_timing(product, extents, chip):
        if dataclasses.astuple(tile) not in known:
            known.add(dataclasses.astuple(tile))
            found.append(tile)
    return found


def accumulators(tile: Tile) -> int:
    """Registers a thread that hold the sums."""
    return tile.block_m * tile.block_n // (32 * tile.num_warps)


def _worth_timing(product: Product, extents: Extents, chip: Chip) -> Iterator[Tile]:
    for block_m, block_n in _blocks(extents, chip):
        tiles = extents.tiles(block_m, block_n)
        for warps, split_k in itertools.product((4, 8), _splits(product, tiles, chip)):
            for block_k, stages in _pipelines(block_m, block_n, extents, chip):
                tile = Tile(block_m, block_n, block_k, 8, warps, stages, split_k=split_k)
                if accumulators(tile) in ACCUMULATORS:
                    yield from _kinds(product, tile, extents, chip)


def _blocks(extents: Extents, chip: Chip) -> Iterator[tuple[int, int]]:
    for block_m, block_n in itertools.product((64, 128, 256), repeat=2):
        if block_m >= 2 * max(extents.m, 64) or block_n >= 2 * max(extents.n, 64):
            continue  # at least half of such a tile would be beyond the edge
        # Where there are tiles for several waves, the smaller ones only read more.
        reads_little = block_m * block_n >= 64 * (block_m + block_n)
        if reads_little or extents.tiles(block_m, block_n) <= 3 * chip.processors:
            yield block_m, block_n


def _splits(product: Product, tiles: int, chip: Chip) -> list[int]:
    """Into how many parts K may go: enough programs for half of the chip, two for each
    multiprocessor at most."""
    if product.endswith("weight") or tiles >= chip.processors:
        return [1]  # the weight's kernel does not split; and tiles enough need no split
    wanted = range(chip.processors // 2, 2 * chip.processors + 1)
    return [split for split in (1, 2, 3, 4) if tiles * split in wanted] or [4]


def _pipelines(
    block_m: int, block_n: int, extents: Extents, chip: Chip
) -> Iterator[tuple[int, int]]:
    """(block_k, stages): as many as fit, and as fit twice, for two programs a multiprocessor."""
    for block_k in (32, 64, 128):
        if block_k >= 2 * max(extents.k, 64):
            continue
        stage = (block_m + block_n) * block_k * ITEM_BYTES
        if block_k == 32 and extents.k > 256 and 4 * 2 * stage <= chip.shared:
            continue  # blocks of 64 are deep enough there, half as many, and leave no rest
        for share in (chip.shared, chip.shared // 2):
            deepest = next((n for n in (5, 4, 3) if n * stage <= share), None)
            if deepest:
                yield block_k, deepest


def _kinds(product: Product, tile: Tile, extents: Extents, chip: Chip) -> Iterator[Tile]:
    replace = dataclasses.replace
    num_m = ceil_div(extents.m, tile.block_m)
    groups = [group for group in (4, 16) if num_m > min(group, tile.group_m)]
    if chip.capability != HOPPER:
        yield tile
        yield from (replace(tile, group_m=group) for group in groups)
        return
    many_sums = accumulators(tile) == ACCUMULATORS[-1]
    adds = product == "accumulate_weight"
    if adds and many_sums:
        tile = replace(tile, subtiles=2)  # reads what it adds to: in one piece, that spills
    by_copy_engine = replace(tile, tma=True)
    yield by_copy_engine
    if tile.block_k != 64:
        return  # what is left to vary was seen with 64
    whole_and_halves = [by_copy_engine]
    if tile.split_k == 1:
        yield tile
        if adds != many_sums:
            whole_and_halves.append(replace(by_copy_engine, subtiles=2))
            yield whole_and_halves[1]
    if extents.tiles(tile.block_m, tile.block_n) > chip.processors:
        for one in whole_and_halves:
            # Sums in fp32 go through shared memory beside the stages of the next tile.
            stages = min(tile.num_stages, 3) if adds else tile.num_stages
            yield replace(one, persistent=True, num_stages=stages)
    yield from (replace(by_copy_engine, group_m=group) for group in groups)


def winner(times: Mapping[Tile, float], *preferred: Tile) -> Tile:
    """The fastest, unless a preferred one is less than :data:`GAIN` behind; the first such."""
    best = min(times, key=times.__getitem__)
    for tile in preferred:
        if tile in times and times[tile] < (1 + GAIN) * times[best]:
            return tile
    return best


def propose(times: Times, present: Table) -> dict[Product, _Buckets]:
    """The table that the times speak for.

    At each row count that was timed stands its :func:`winner`; the present tile is preferred, and
    then that of the row count before, so that tiles change only for a gain. Between two row counts
    with different tiles lies a bound: the present one, or else their geometric mean. Buckets of the
    present table in which nothing was timed stay as they are.
    """
    return {
        product: _propose(times.get(product, {}), buckets) for product, buckets in present.items()
    }


def _propose(times: Mapping[int, Mapping[Tile, float]], present: _Buckets) -> _Buckets:
    found: list[tuple[int, Tile]] = []  # up to this number of rows, this tile
    before: list[Tile] = []
    low = 0
    for high, tile in zip([*present.bounds, _ENDLESS], present.tiles, strict=True):
        chosen: list[tuple[int, Tile]] = []
        for rows in sorted(times):
            if low < rows <= high and times[rows]:
                before = [winner(times[rows], tile, *before)]
                chosen.append((rows, before[0]))
        for (rows, one), (more, _) in itertools.pairwise(chosen):
            found.append((_between(rows, more), one))
        if not chosen:
            before = [tile]
        found.append((high, before[0]))
        low = high
    merged = [
        (bound, tile)
        for (bound, tile), (_, after) in zip(found, [*found[1:], (0, None)], strict=True)
        if after is None or dataclasses.astuple(tile) != dataclasses.astuple(after)
    ]
    return _Buckets(tuple(bound for bound, _ in merged[:-1]), tuple(tile for _, tile in merged))


_ENDLESS = 2**63


def _between(rows: int, more: int) -> int:
    """A bound that serves ``rows`` by the tile before it and ``more`` by the one behind."""
    middle = math.isqrt(rows * more)
    rounded = 64 * round(middle / 64)  # rows come in blocks of at least as many
    return rounded if rows <= rounded < more else middle


def source(name: str, table: Table, notes: Iterable[str]) -> str:
    """A table as ``ops/tiles.py`` has it, below notes of where it comes from."""
    lines = [line for note in notes for line in textwrap.wrap(note, 98, break_long_words=False)]
    lines = [f"# {line}" for line in lines]
    lines.append(f"{name}: dict[Product, _Buckets] = {{")
    for product, buckets in table.items():
        lines += [f'    "{product}": _Buckets(', f"        {buckets.bounds!r},", "        ("]
        lines += [f"            {_call(tile)}," for tile in buckets.tiles]
        lines += ["        ),", "    ),"]
    return "\n".join([*lines, "}", ""])


def _call(tile: Tile) -> str:
    """``Tile(64, 64, 128, 8, 4, 4, tma=True)``: what has a default only where it differs."""
    arguments = []
    for field in dataclasses.fields(tile):
        value = getattr(tile, field.name)
        if field.default is dataclasses.MISSING:
            arguments.append(repr(value))
        elif value != field.default:
            arguments.append(f"{field.name}={value!r}")
    return f"Tile({', '.join(arguments)})"
