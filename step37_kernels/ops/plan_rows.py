"""Computes the plan from token ids: one launch of one program, no host synchronisation.

It finds the start tokens of every group, numbers them in row-major order, and finds, for every
position, the last feature row that is written there: the one with the largest number, since rows
are numbered in insertion order. It uses no atomics, and no result depends on the order of threads.

There is one program for two reasons. Programs would have to wait for each other within the launch.
And the product that follows may start beside it: the product's tiles fill 128 of 132
multiprocessors, and more programs here would keep some of these busy. Chunk by chunk, the program
counts the start tokens before each position and writes the starts. Features of a run are equally
long, so of each run only the feature that began last can cover a position: the work grows with
positions, groups and runs, not with features. For each chunk it computes a running sum, writes the
starts and reads them back through the L2 cache, and compares rows: some 350 instructions a warp, 16
warps, about 1.1 µs; meanwhile the ids of the next chunk are loaded. Predicted on an H100, one
group, with the 2.3 µs of the launch: 3.4 µs for 2048 positions, 7 for 8192, 20 for 32768; all of it
is hidden behind the product's first tiles.

A placeholder is a start token whose feature has one row, written at the token and not after it. In
``[B, S, H]`` positions are numbered in another order. Both are run-time arguments, so one binary
serves all cases.

The layout (tokens, counts) is passed as arguments of the launch if it is small, as it nearly always
is, and otherwise as a table in device memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import INTERPRETED, device_of, let_dependants_start
from step37_kernels.ops.launch import launch
from step37_kernels.runs import FlatRuns

PLAN_BLOCK = 2048
PLAN_WARPS = 16
MAX_INLINE = 4
"""The most groups, and the most runs, that are passed as arguments of the launch."""

_SIZES = ["batch_size", "seq_len", "stride_b", "stride_s", "num_positions", "num_rows"]
_GROUPS = ["token_0", "token_1", "token_2", "token_3", "first_1", "first_2", "first_3"]
_RUNS = ["rows_0", "rows_1", "rows_2", "rows_3", "run_1", "run_2", "run_3"]


@triton.jit
def _load_ids(ids_ptr, index, end, seq_len, stride_b, stride_s, CONTIGUOUS: tl.constexpr):
    if CONTIGUOUS:
        offset = index
    else:
        b = (index // seq_len).to(tl.int64)
        s = (index % seq_len).to(tl.int64)
        offset = b * stride_b + s * stride_s
    return tl.load(ids_ptr + offset, mask=index < end, other=0).to(tl.int64)


@triton.jit
def _position(index, seq_len, batch_size):
    """The position in ``[S, B]`` of the id with this row-major ``index``; no division if B is 1."""
    position = index
    if batch_size > 1:
        position = index % seq_len * batch_size + index // seq_len
    return position


@triton.jit
def _entry(table_ptr, index, at_0, at_1, at_2, at_3, TABLE: tl.constexpr):
    """Read a number of the layout: from the table, or from the four arguments of the launch."""
    if TABLE:
        value = tl.load(table_ptr + index)
    else:
        high = tl.where(index == 2, at_2, at_3)
        value = tl.where(index == 0, at_0, tl.where(index == 1, at_1, high))
    return value


@triton.jit
def _at(few, index):
    """Select ``few[index]`` from a small vector."""
    lane = tl.arange(0, few.shape[0])
    return tl.sum(tl.where(lane == index, few, 0), axis=0)


_COUNTS = ["shift", "vocabulary", "batch_first", "num_features", "num_groups", "num_runs"]


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS, *_GROUPS, *_RUNS])
def plan_kernel(
    ids_ptr,  # [B, S] int32 or int64, any strides
    table_ptr,  # int64, read if TABLE: the layout (see plan_rows)
    starts_ptr,  # [N] int32, out
    counts_ptr,  # [G + 1] int32, out: start tokens of each group, then ids outside the table
    row_at_ptr,  # [S * B] int32, out
    destinations_ptr,  # [R] int32, out
    batch_size,
    seq_len,
    stride_b,
    stride_s,
    num_positions,
    num_rows,
    shift,  # positions from a token to its feature's first row: 1, or 0 of placeholders
    vocabulary,  # count ids at text positions that are negative or not below it; 0 counts none
    batch_first,  # whether row_at is [B, S], and positions are numbered so in destinations
    num_features,
    num_groups,
    num_runs,
    token_0,  # start token and first feature of each group, unless TABLE; first_0 is 0
    token_1,
    token_2,
    token_3,
    first_1,
    first_2,
    first_3,
    rows_0,  # rows of each feature, and first feature, of each run, unless TABLE; run_0 is 0
    rows_1,
    rows_2,
    rows_3,
    run_1,
    run_2,
    run_3,
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,  # at least num_groups
):
    let_dependants_start(INTERPRET)
    lane = tl.arange(0, BLOCK)
    nothing = tl.full([BLOCK], -1, tl.int32)
    for offset in range(0, num_rows, BLOCK):
        tl.store(destinations_ptr + offset + lane, nothing, mask=offset + lane < num_rows)
    tl.debug_barrier()  # other threads write the rows over this

    firsts_ptr = table_ptr + num_groups
    runs_ptr = firsts_ptr + num_groups + 1
    begins_ptr = runs_ptr + num_runs
    row_1 = run_1 * rows_0
    row_2 = row_1 + (run_2 - run_1) * rows_1
    row_3 = row_2 + (run_3 - run_2) * rows_2
    few = tl.arange(0, FEW)
    counts = tl.zeros([FEW], tl.int32)  # start tokens of each group so far
    unknown = tl.zeros([BLOCK], tl.int32)
    ids = _load_ids(ids_ptr, lane, num_positions, seq_len, stride_b, stride_s, CONTIGUOUS)
    for chunk in range(0, num_positions, BLOCK):
        index = chunk + lane
        inside = index < num_positions
        position = _position(index, seq_len, batch_size)
        next_ids = _load_ids(
            ids_ptr, index + BLOCK, num_positions, seq_len, stride_b, stride_s, CONTIGUOUS
        )
        best = nothing
        for group in range(0, num_groups):
            token = _entry(table_ptr, group, token_0, token_1, token_2, token_3, TABLE)
            first = _entry(firsts_ptr, group, first_1 * 0, first_1, first_2, first_3, TABLE)
            end = _entry(firsts_ptr + 1, group, first_1, first_2, first_3, num_features, TABLE)
            first, end = first.to(tl.int32), end.to(tl.int32)
            match = ((ids == token.to(tl.int64)) & inside).to(tl.int32)
            # So many features have begun at or before this position.
            begun = first + _at(counts, group) + tl.cumsum(match, axis=0) - match
            first_row = position + shift * batch_size
            tl.store(starts_ptr + begun, first_row, mask=(match != 0) & (begun < end))
            begun += match * (1 - shift)
            counts += tl.where(few == group, tl.sum(match, axis=0), 0)
            tl.debug_barrier()  # other threads read these starts
            for run in range(0, num_runs):
                begin = _entry(begins_ptr, run, run_1 * 0, run_1, run_2, run_3, TABLE)
                stop = _entry(begins_ptr + 1, run, run_1, run_2, run_3, num_features, TABLE)
                begin, stop = begin.to(tl.int32), stop.to(tl.int32)
                if (begin < stop) & (begin >= first) & (begin < end):
                    rows = _entry(runs_ptr, run, rows_0, rows_1, rows_2, rows_3, TABLE)
                    row = _entry(
                        begins_ptr + num_runs + 1, run, row_1 * 0, row_1, row_2, row_3, TABLE
                    )
                    rows, row = rows.to(tl.int32), row.to(tl.int32)
                    feature = tl.minimum(begun, stop) - 1  # the feature of this run that began last
                    exists = inside & (feature >= begin)
                    start = tl.load(starts_ptr + feature, mask=exists, other=-1)
                    distance = position - start
                    if batch_size == 1:
                        step = distance
                        lands = start >= 0
                    else:
                        step = distance // batch_size
                        lands = (start >= 0) & (distance % batch_size == 0)
                    lands &= (step >= 0) & (step < rows)
                    claims = row + (feature - begin) * rows + step
                    best = tl.maximum(best, tl.where(lands, claims, -1))
        outside = inside & (best < 0) & ((ids < 0) | (ids >= vocabulary)) & (vocabulary > 0)
        unknown += outside.to(tl.int32)
        if batch_first != 0:
            position = index
        tl.store(row_at_ptr + position, best, mask=inside)
        tl.store(destinations_ptr + best, position, mask=inside & (best >= 0))
        ids = next_ids

    tl.store(counts_ptr + few, counts, mask=few < num_groups)
    tl.store(counts_ptr + num_groups, tl.sum(unknown, axis=0))
    for group in range(0, num_groups):
        first = _entry(firsts_ptr, group, first_1 * 0, first_1, first_2, first_3, TABLE)
        end = _entry(firsts_ptr + 1, group, first_1, first_2, first_3, num_features, TABLE)
        first, end = first.to(tl.int32), end.to(tl.int32)
        for offset in range(first + _at(counts, group), end, BLOCK):
            tl.store(starts_ptr + offset + lane, nothing, mask=offset + lane < end)


def fits_into_a_launch(runs: FlatRuns) -> bool:
    """Whether the layout fits into the arguments of the launch, so that no table is needed."""
    return max(len(runs.tokens), len(runs.features)) <= MAX_INLINE


def plan_rows(
    input_ids: Tensor,
    runs: FlatRuns,
    table: Tensor | None,
    *,
    shift: int = 1,
    batch_first: bool = False,
    vocabulary: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel that makes the plan.

    Args:
        input_ids: ``[B, S]`` int32 or int64, B·S > 0.
        runs: of all groups; empty if only ids outside the vocabulary are counted.
        table: None if the runs :func:`fits_into_a_launch`; else the same numbers on the device,
            flat int64: start token of each group; first feature of each, then N; rows of each
            feature of each run; first feature of each run, then N; first row of each run.
        shift: positions from a token to its feature's first row: 1, or 0 of placeholders.
        batch_first: number positions ``b * S + s``.
        vocabulary: count the ids at text positions that are negative or not below this; 0 counts
            none.

    Returns:
        ``destinations [R]``, ``row_at [S, B]`` (``[B, S]`` if ``batch_first``), ``starts [N]``,
        ``counts [G + 1]``: start tokens of each group, then ids so counted; all int32.
    """
    batch_size, seq_len = input_ids.shape
    num_positions = batch_size * seq_len
    layout = _layout_of(runs, table is None)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=input_ids.device)
    destinations = empty(layout.num_rows)
    row_at = empty(batch_size, seq_len) if batch_first else empty(seq_len, batch_size)
    starts, counts = empty(layout.num_features), empty(layout.num_groups + 1)
    with device_of(input_ids):
        launch(
            plan_kernel,
            (1,),
            *(input_ids, input_ids if table is None else table),
            *(starts, counts, row_at, destinations),
            *(batch_size, seq_len, *input_ids.stride(), num_positions, layout.num_rows),
            *(shift, vocabulary, int(batch_first)),
            *(layout.num_features, layout.num_groups, layout.num_runs, *layout.inline),
            *(table is not None, input_ids.is_contiguous(), INTERPRETED, PLAN_BLOCK, layout.few),
            num_warps=PLAN_WARPS,
        )
    return destinations, row_at, starts, counts


class _Layout(NamedTuple):
    """The numbers of a launch that the runs alone decide."""

    num_rows: int
    num_features: int
    num_groups: int
    num_runs: int
    few: int
    inline: tuple[int, ...]
    """Tokens, first feature of each group, rows, first feature of each run, as the kernel takes
    them; zeros where there is a table."""


@functools.lru_cache(maxsize=64)
def _layout_of(runs: FlatRuns, inline: bool) -> _Layout:
    num_groups, num_features = len(runs.tokens), runs.num_features
    if inline:
        few = MAX_INLINE
        numbers = (
            *_padded(runs.tokens, MAX_INLINE, 0),
            *_padded(_ends(runs.group_sizes), MAX_INLINE - 1, num_features),
            *_padded(runs.rows, MAX_INLINE, 0),
            *_padded(_ends(runs.features), MAX_INLINE - 1, num_features),
        )
    else:
        few = triton.next_power_of_2(num_groups)
        numbers = (0,) * (len(_GROUPS) + len(_RUNS))
    return _Layout(runs.num_rows, num_features, num_groups, len(runs.features), few, numbers)


def _ends(counts: Sequence[int]) -> list[int]:
    """Return the running totals, without the last one."""
    return list(itertools.accumulate(counts))[:-1]


def _padded(values: Sequence[int], length: int, fill: int) -> tuple[int, ...]:
    return (*values, *(fill,) * (length - len(values)))
