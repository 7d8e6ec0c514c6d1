"""From token ids to destination rows: three short integer kernels, no host synchronisation.

1. ``locate``  finds the start tokens of every group and numbers them in row-major order.
2. ``claim``   lets every feature row claim its position; the largest row number wins, and since
               rows are numbered in insertion order that is the latest write. An integer maximum
               does not depend on the order of the programs: deterministic.
3. ``settle``  gives each row its position if its claim held, and −1 otherwise.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import device_of

LOCATE_BLOCK = 2048
LOCATE_WARPS = 8
ROW_BLOCK = 256
_RUNTIME = ["batch_size", "seq_len", "stride_b", "stride_s", "num_positions"]


@triton.jit
def _matches(ids_ptr, token, index, total, seq_len, stride_b, stride_s):
    b = (index // seq_len).to(tl.int64)
    s = (index % seq_len).to(tl.int64)
    inside = index < total
    ids = tl.load(ids_ptr + b * stride_b + s * stride_s, mask=inside, other=0).to(tl.int64)
    return ((ids == token) & inside).to(tl.int32)


@triton.jit(do_not_specialize=_RUNTIME)
def locate_kernel(
    ids_ptr,  # [B, S] int32 or int64, any strides
    group_ptr,  # [G, 2] int64: start token, number of the group's first feature (then [1]: N)
    starts_ptr,  # [N] int32, out
    found_ptr,  # [G] int32, out
    row_at_ptr,  # [S * B] int32, out: filled with −1
    batch_size,
    seq_len,
    stride_b,
    stride_s,
    num_positions,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    token = tl.load(group_ptr + 2 * group)
    first = tl.load(group_ptr + 2 * group + 1).to(tl.int32)
    capacity = tl.load(group_ptr + 2 * group + 3).to(tl.int32) - first

    # Each program counts the matches of all blocks before its own again: the ids are a few
    # kilobytes in L2, and nobody has to wait for another program.
    before = tl.zeros([BLOCK], dtype=tl.int32)
    for earlier in range(0, block):
        before += _matches(
            ids_ptr, token, earlier * BLOCK + lane, num_positions, seq_len, stride_b, stride_s
        )
    index = block * BLOCK + lane
    match = _matches(ids_ptr, token, index, num_positions, seq_len, stride_b, stride_s)
    rank = tl.sum(before, axis=0) + tl.cumsum(match, axis=0) - 1
    position = (index % seq_len + 1) * batch_size + index // seq_len
    tl.store(starts_ptr + first + rank, position, mask=(match != 0) & (rank < capacity))

    if group == 0:
        tl.store(row_at_ptr + index, tl.full([BLOCK], -1, tl.int32), mask=index < num_positions)
    if block == tl.num_programs(0) - 1:
        found = tl.sum(before, axis=0) + tl.sum(match, axis=0)
        tl.store(found_ptr + group, found)
        for offset in range(found, capacity, BLOCK):
            tl.store(
                starts_ptr + first + offset + lane,
                tl.full([BLOCK], -1, tl.int32),
                mask=offset + lane < capacity,
            )


@triton.jit
def _rows_of(offsets_ptr, starts_ptr, batch_size, num_positions, BLOCK: tl.constexpr):
    """Row numbers of this program's block of one feature, their positions, and which count."""
    feature = tl.program_id(0)
    first = tl.load(offsets_ptr + feature)
    count = tl.load(offsets_ptr + feature + 1) - first
    start = tl.load(starts_ptr + feature).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.where(start >= 0, start + lane.to(tl.int64) * batch_size, -1)
    exists = lane < count
    # s * B + b < S * B says exactly that s < S: a span cannot run into another batch column.
    lands = exists & (position >= 0) & (position < num_positions)
    return first + lane, position, exists, lands


@triton.jit(do_not_specialize=["batch_size", "num_positions"])
def claim_kernel(
    offsets_ptr,  # [N + 1] int32: first row of each feature, then R
    starts_ptr,  # [N] int32
    row_at_ptr,  # [S * B] int32, in and out
    batch_size,
    num_positions,
    BLOCK: tl.constexpr,
):
    row, position, _, lands = _rows_of(offsets_ptr, starts_ptr, batch_size, num_positions, BLOCK)
    tl.atomic_max(row_at_ptr + position, row, mask=lands)


@triton.jit(do_not_specialize=["batch_size", "num_positions"])
def settle_kernel(
    offsets_ptr,  # [N + 1] int32
    starts_ptr,  # [N] int32
    row_at_ptr,  # [S * B] int32
    destinations_ptr,  # [R] int32, out
    batch_size,
    num_positions,
    BLOCK: tl.constexpr,
):
    row, position, exists, lands = _rows_of(
        offsets_ptr, starts_ptr, batch_size, num_positions, BLOCK
    )
    winner = tl.load(row_at_ptr + position, mask=lands, other=-1)
    kept = tl.where(winner == row, position, -1).to(tl.int32)
    tl.store(destinations_ptr + row, kept, mask=exists)


def plan_rows(
    input_ids: Tensor, group_table: Tensor, offsets: Tensor, num_rows: int, max_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the three kernels.

    Args:
        input_ids: ``[B, S]`` int32 or int64, B·S > 0.
        group_table: ``[G + 1, 2]`` int64, G > 0: start token and first feature of each group;
            the last line's second entry is N.
        offsets: ``[N + 1]`` int32: first row of each feature, then R.
        num_rows: R.
        max_rows: rows of the longest feature.

    Returns:
        ``destinations [R]``, ``row_at [S, B]``, ``starts [N]``, ``found [G]``, all int32.
    """
    batch_size, seq_len = input_ids.shape
    num_positions = batch_size * seq_len
    num_groups = group_table.shape[0] - 1
    num_features = offsets.shape[0] - 1
    empty = functools.partial(torch.empty, dtype=torch.int32, device=input_ids.device)
    destinations = empty(num_rows)
    row_at = empty(seq_len, batch_size)
    starts = empty(num_features)
    found = empty(num_groups)
    with device_of(input_ids):
        locate_kernel[(triton.cdiv(num_positions, LOCATE_BLOCK), num_groups)](
            input_ids,
            group_table,
            starts,
            found,
            row_at,
            batch_size,
            seq_len,
            input_ids.stride(0),
            input_ids.stride(1),
            num_positions,
            BLOCK=LOCATE_BLOCK,
            num_warps=LOCATE_WARPS,
        )
        if num_rows:
            grid = (num_features, triton.cdiv(max_rows, ROW_BLOCK))
            claim_kernel[grid](offsets, starts, row_at, batch_size, num_positions, BLOCK=ROW_BLOCK)
            settle_kernel[grid](
                offsets, starts, row_at, destinations, batch_size, num_positions, BLOCK=ROW_BLOCK
            )
    return destinations, row_at, starts, found
