"""From token ids to destination rows: short integer kernels, no host synchronisation.

Up to :data:`MAX_POSITIONS`, one launch of one program, ``plan``. Above, and where the layout does
not fit into the arguments of a launch, two launches of many programs:

1. ``locate``  finds the start tokens of every group and numbers them in row-major order.
2. ``assign``  finds, for every position, the latest feature row that claims it: the largest row
               number, since rows are numbered in insertion order. Each position has one program,
               each row at most one position: no atomics, nothing depends on the order of programs.

One program, because nobody has to wait for another within a launch then, and because the product
that follows may start beside it: its tiles fill 128 of 132 multiprocessors, and more programs here
would take theirs away for as long as they last. Chunk by chunk it counts the start tokens before
each position and writes the starts down. Features of a run are equally long, so only the last one
to have begun can win a position from its run: the work grows with positions, groups and runs, never
with features. A chunk's dependent steps are a running sum, the starts' way to the L2 cache and
back, and the claims: some 350 instructions a warp, 16 warps, about 1.1 µs, while the ids of the
next chunk are on the way. Predicted on an H100, one group, the launch's 2.3 µs included: 3.4 µs for
2048 positions, 7 for 8192, 11 for 16384; behind the product's first tiles, none of it shows.

What the host knows of the layout (tokens, counts) travels in the launch itself where it is small,
as it nearly always is, and in two tables in device memory where it is not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import INTERPRETED, ceil_div, device_of, let_dependants_start
from step37_kernels.ops.launch import launch

MAX_POSITIONS = 16384
"""S·B up to which one program makes the whole plan."""
PLAN_BLOCK = 2048
PLAN_WARPS = 16
LOCATE_BLOCK = 2048
LOCATE_WARPS = 8
ASSIGN_BLOCK = 128
ASSIGN_CHUNK = 32
MAX_INLINE = 4
"""Groups, and runs of features with equal row counts, that fit into the arguments of a launch."""

_SIZES = [
    *["batch_size", "seq_len", "stride_b", "stride_s", "num_positions", "num_rows"],
    "num_features",
]
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
    """Where the id with this row-major ``index`` is in ``[S, B]``; without dividing if B is 1."""
    position = index
    if batch_size > 1:
        position = index % seq_len * batch_size + index // seq_len
    return position


@triton.jit
def _matches(ids_ptr, token, index, end, seq_len, stride_b, stride_s, CONTIGUOUS: tl.constexpr):
    ids = _load_ids(ids_ptr, index, end, seq_len, stride_b, stride_s, CONTIGUOUS)
    return ((ids == token) & (index < end)).to(tl.int32)


@triton.jit
def _pick(index, at_0, at_1, at_2, at_3):
    high = tl.where(index == 2, at_2, at_3)
    return tl.where(index == 0, at_0, tl.where(index == 1, at_1, high))


@triton.jit
def _at(few, index):
    """``few[index]`` of a handful of numbers."""
    lane = tl.arange(0, few.shape[0])
    return tl.sum(tl.where(lane == index, few, 0), axis=0)


@triton.jit(do_not_specialize=[*_SIZES, "num_groups", "num_runs", *_GROUPS, *_RUNS])
def plan_kernel(
    ids_ptr,  # [B, S] int32 or int64, any strides
    starts_ptr,  # [N] int32, out
    found_ptr,  # [G] int32, out
    row_at_ptr,  # [S * B] int32, out
    destinations_ptr,  # [R] int32, out
    batch_size,
    seq_len,
    stride_b,
    stride_s,
    num_positions,
    num_rows,
    num_features,
    num_groups,
    num_runs,
    token_0,  # start token and first feature of each group; first_0 is 0
    token_1,
    token_2,
    token_3,
    first_1,
    first_2,
    first_3,
    rows_0,  # rows of each feature, and first feature, of each run; run_0 is 0
    rows_1,
    rows_2,
    rows_3,
    run_1,
    run_2,
    run_3,
    CONTIGUOUS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    let_dependants_start(INTERPRET)
    lane = tl.arange(0, BLOCK)
    nothing = tl.full([BLOCK], -1, tl.int32)
    for offset in range(0, num_rows, BLOCK):
        tl.store(destinations_ptr + offset + lane, nothing, mask=offset + lane < num_rows)
    tl.debug_barrier()  # the rows that land are written over it, by other threads

    row_1 = run_1 * rows_0
    row_2 = row_1 + (run_2 - run_1) * rows_1
    row_3 = row_2 + (run_3 - run_2) * rows_2
    few = tl.arange(0, FEW)
    counts = tl.zeros([FEW], tl.int32)  # start tokens of each group so far
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
            token = _pick(group, token_0, token_1, token_2, token_3).to(tl.int64)
            first = _pick(group, first_1 * 0, first_1, first_2, first_3)
            end = _pick(group, first_1, first_2, first_3, num_features)
            match = ((ids == token) & inside).to(tl.int32)
            # Features up to this one have begun, at or before this position.
            begun = first + _at(counts, group) + tl.cumsum(match, axis=0) - match
            tl.store(starts_ptr + begun, position + batch_size, mask=(match != 0) & (begun < end))
            counts += tl.where(few == group, tl.sum(match, axis=0), 0)
            tl.debug_barrier()  # other threads read these starts
            for run in range(0, num_runs):
                begin = _pick(run, run_1 * 0, run_1, run_2, run_3)
                stop = _pick(run, run_1, run_2, run_3, num_features)
                if (begin < stop) & (begin >= first) & (begin < end):
                    rows = _pick(run, rows_0, rows_1, rows_2, rows_3)
                    row = _pick(run, row_1 * 0, row_1, row_2, row_3)
                    feature = tl.minimum(begun, stop) - 1  # the last of the run to have begun
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
        tl.store(row_at_ptr + position, best, mask=inside)
        tl.store(destinations_ptr + best, position, mask=inside & (best >= 0))
        ids = next_ids

    tl.store(found_ptr + few, counts, mask=few < num_groups)
    for group in range(0, num_groups):
        first = _pick(group, first_1 * 0, first_1, first_2, first_3)
        end = _pick(group, first_1, first_2, first_3, num_features)
        for offset in range(first + _at(counts, group), end, BLOCK):
            tl.store(starts_ptr + offset + lane, nothing, mask=offset + lane < end)


@triton.jit(do_not_specialize=[*_SIZES, *_GROUPS])
def locate_kernel(
    ids_ptr,  # [B, S] int32 or int64, any strides
    group_ptr,  # [G, 2] int64, read if TABLE: start token, number of the group's first feature
    starts_ptr,  # [N] int32, out
    found_ptr,  # [G] int32, out
    destinations_ptr,  # [R] int32, out: filled with −1
    batch_size,
    seq_len,
    stride_b,
    stride_s,
    num_positions,
    num_rows,
    num_features,
    token_0,  # start token and first feature of each group, unless TABLE; first_0 is 0
    token_1,
    token_2,
    token_3,
    first_1,
    first_2,
    first_3,
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    if TABLE:
        token = tl.load(group_ptr + 2 * group)
        first = tl.load(group_ptr + 2 * group + 1).to(tl.int32)
        end = tl.load(group_ptr + 2 * group + 3).to(tl.int32)
    else:
        token = _pick(group, token_0, token_1, token_2, token_3).to(tl.int64)
        first = _pick(group, first_1 * 0, first_1, first_2, first_3)
        end = _pick(group, first_1, first_2, first_3, num_features)
    capacity = end - first

    # Each program counts the matches of all blocks before its own again: the ids are a few
    # kilobytes in L2, and nobody has to wait for another program. The last one walks over nearly
    # all ids, so there are no divisions on the way where ids are contiguous, as they nearly always
    # are; and the end is a multiple of BLOCK, so that loads are wide.
    before = tl.zeros([BLOCK], dtype=tl.int32)
    for earlier in range(0, block):
        before += _matches(
            ids_ptr, token, earlier * BLOCK + lane, block * BLOCK, seq_len, stride_b, stride_s,
            CONTIGUOUS,
        )  # fmt: skip
    index = block * BLOCK + lane
    match = _matches(ids_ptr, token, index, num_positions, seq_len, stride_b, stride_s, CONTIGUOUS)
    rank = tl.sum(before, axis=0) + tl.cumsum(match, axis=0) - 1
    position = (index % seq_len + 1) * batch_size + index // seq_len
    tl.store(starts_ptr + first + rank, position, mask=(match != 0) & (rank < capacity))

    nothing = tl.full([BLOCK], -1, tl.int32)
    if group == 0:
        for offset in range(block * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
            rows = offset + lane
            tl.store(destinations_ptr + rows, nothing, mask=rows < num_rows)
    if block == tl.num_programs(0) - 1:
        found = tl.sum(before, axis=0) + tl.sum(match, axis=0)
        tl.store(found_ptr + group, found)
        for offset in range(found, capacity, BLOCK):
            tl.store(starts_ptr + first + offset + lane, nothing, mask=offset + lane < capacity)


@triton.jit
def _claim(
    best,  # [BLOCK] the latest row so far
    s,
    b,
    starts_ptr,
    offsets_ptr,
    batch_size,
    feature,
    end,
    first_row,
    rows,
    TABLE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``best`` after features ``feature`` … ``end − 1``, of ``rows`` rows each unless TABLE."""
    for chunk in range(feature, end, CHUNK):
        k = chunk + tl.arange(0, CHUNK)
        exists = k < end
        start = tl.load(starts_ptr + k, mask=exists, other=-1)
        if TABLE:
            first = tl.load(offsets_ptr + k, mask=exists, other=0)
            count = tl.load(offsets_ptr + k + 1, mask=exists, other=0) - first
        else:
            first = first_row + (k - feature) * rows
            count = tl.zeros_like(k) + rows
        step = s[:, None] - (start // batch_size)[None, :]
        lands = (start >= 0)[None, :] & (b[:, None] == (start % batch_size)[None, :])
        lands &= (step >= 0) & (step < count[None, :])
        claims = tl.where(lands, first[None, :] + step, -1)
        best = tl.maximum(best, tl.max(claims, axis=1))
    return best


@triton.jit(do_not_specialize=["batch_size", "num_positions", "num_features", *_RUNS])
def assign_kernel(
    starts_ptr,  # [N] int32: s * B + b of each feature's first row, or −1
    offsets_ptr,  # [N + 1] int32, read if TABLE: first row of each feature, then R
    row_at_ptr,  # [S * B] int32, out
    destinations_ptr,  # [R] int32, in as −1, and out
    batch_size,
    num_positions,
    num_features,
    rows_0,  # rows of each feature, and first feature, of each run, unless TABLE; run_0 is 0
    rows_1,
    rows_2,
    rows_3,
    run_1,
    run_2,
    run_3,
    TABLE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    let_dependants_start(INTERPRET)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = position // batch_size
    b = position % batch_size
    best = tl.full([BLOCK], -1, tl.int32)
    if TABLE:
        best = _claim(
            best, s, b, starts_ptr, offsets_ptr, batch_size, 0, num_features, 0, 0, TABLE, CHUNK
        )
    else:
        row_1 = run_1 * rows_0
        row_2 = row_1 + (run_2 - run_1) * rows_1
        row_3 = row_2 + (run_3 - run_2) * rows_2
        best = _claim(
            best, s, b, starts_ptr, offsets_ptr, batch_size, 0, run_1, 0, rows_0, TABLE, CHUNK
        )
        best = _claim(
            best, s, b, starts_ptr, offsets_ptr, batch_size, run_1, run_2, row_1, rows_1,
            TABLE, CHUNK,
        )  # fmt: skip
        best = _claim(
            best, s, b, starts_ptr, offsets_ptr, batch_size, run_2, run_3, row_2, rows_2,
            TABLE, CHUNK,
        )  # fmt: skip
        best = _claim(
            best, s, b, starts_ptr, offsets_ptr, batch_size, run_3, num_features, row_3, rows_3,
            TABLE, CHUNK,
        )  # fmt: skip
    inside = position < num_positions
    tl.store(row_at_ptr + position, best, mask=inside)
    tl.store(destinations_ptr + best, position, mask=inside & (best >= 0))


def plan_rows(
    input_ids: Tensor,
    groups: Sequence[tuple[int, int]],
    runs: Sequence[tuple[int, int]],
    tables: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel, or the two kernels.

    Args:
        input_ids: ``[B, S]`` int32 or int64, B·S > 0.
        groups: ``(start token, features)`` of each group, at least one.
        runs: ``(features, rows of each)``: the features of all groups, in order.
        tables: the same on the device where groups or runs are more than :data:`MAX_INLINE`:
            ``[G + 1, 2]`` int64 start token and first feature of each group (the last line's
            second entry is N), ``[N + 1]`` int32 first row of each feature, then R.

    Returns:
        ``destinations [R]``, ``row_at [S, B]``, ``starts [N]``, ``found [G]``, all int32.
    """
    batch_size, seq_len = input_ids.shape
    num_positions = batch_size * seq_len
    num_features = sum(features for _, features in groups)
    num_rows = sum(features * rows for features, rows in runs)
    if tables is None:
        group_table = offsets = input_ids  # not read
        tokens = _padded([token for token, _ in groups], MAX_INLINE, 0)
        firsts = _padded(_ends(groups, 1), MAX_INLINE - 1, num_features)
        rows = _padded([each for _, each in runs], MAX_INLINE, 0)
        run_firsts = _padded(_ends(runs, 0), MAX_INLINE - 1, num_features)
    else:
        group_table, offsets = tables
        tokens = rows = (0,) * MAX_INLINE
        firsts = run_firsts = (0,) * (MAX_INLINE - 1)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=input_ids.device)
    destinations = empty(num_rows)
    row_at = empty(seq_len, batch_size)
    starts = empty(num_features)
    found = empty(len(groups))
    sizes = (batch_size, seq_len, *input_ids.stride(), num_positions, num_rows, num_features)
    contiguous = input_ids.is_contiguous()
    with device_of(input_ids):
        if tables is None and num_positions <= MAX_POSITIONS:
            launch(
                plan_kernel,
                (1,),
                *(input_ids, starts, found, row_at, destinations),
                *(*sizes, len(groups), len(runs), *tokens, *firsts, *rows, *run_firsts),
                CONTIGUOUS=contiguous,
                INTERPRET=INTERPRETED,
                BLOCK=PLAN_BLOCK,
                FEW=MAX_INLINE,
                num_warps=PLAN_WARPS,
            )
        else:
            launch(
                locate_kernel,
                (ceil_div(num_positions, LOCATE_BLOCK), len(groups)),
                *(input_ids, group_table, starts, found, destinations),
                *(*sizes, *tokens, *firsts),
                TABLE=tables is not None,
                CONTIGUOUS=contiguous,
                BLOCK=LOCATE_BLOCK,
                num_warps=LOCATE_WARPS,
            )
            launch(
                assign_kernel,
                (ceil_div(num_positions, ASSIGN_BLOCK),),
                *(starts, offsets, row_at, destinations),
                *(batch_size, num_positions, num_features, *rows, *run_firsts),
                TABLE=tables is not None,
                INTERPRET=INTERPRETED,
                BLOCK=ASSIGN_BLOCK,
                CHUNK=ASSIGN_CHUNK,
            )
    return destinations, row_at, starts, found


def _ends(counted: Sequence[tuple[int, int]], index: int) -> list[int]:
    """Running totals of one entry of each pair, without the last."""
    return list(itertools.accumulate(pair[index] for pair in counted))[:-1]


def _padded(values: Sequence[int], length: int, fill: int) -> tuple[int, ...]:
    return (*values, *(fill,) * (length - len(values)))
