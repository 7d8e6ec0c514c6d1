"""Makes the plan's tensors, by the kernel or by PyTorch operations."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from step37_kernels.runs import FlatRuns

PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""``destinations [R]``, ``row_at [S, B]`` (``[B, S]`` of a batch-first plan), ``starts [N]``,
``counts [G + 1]`` (start tokens of each group, then ids outside the vocabulary), all int32."""

# The cache below keeps host integers, never a tensor on the device. A cached tensor could be used
# on another stream before its copy has ended, after the CUDA graph whose pool holds its memory is
# gone, or outside the mode (fake tensors, for example) in which it was made.


@functools.lru_cache(maxsize=64)
def _table_of(runs: FlatRuns) -> tuple[int, ...]:
    """The table that :func:`step37_kernels.ops.plan_rows.plan_rows` reads for many runs."""
    first_rows = itertools.accumulate(map(operator.mul, runs.features, runs.rows), initial=0)
    return (
        *runs.tokens,
        *itertools.accumulate(runs.group_sizes, initial=0),
        *runs.rows,
        *itertools.accumulate(runs.features, initial=0),
        *list(first_rows)[:-1],
    )


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy int64 values to the device; the host does not wait. Works in a CUDA graph capture."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    if not torch.cuda.is_current_stream_capturing():
        staged = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
        return staged.to(device, non_blocking=True)
    # A captured copy would read its host memory at every replay, after that memory was freed. So
    # in a capture the values are written by kernels whose launch carries them, one arithmetic
    # sequence at a time.
    parts: list[Tensor] = []
    first = 0
    while first < len(values):
        end = min(first + 2, len(values))
        step = values[end - 1] - values[first]
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        steps = torch.arange(end - first, dtype=torch.int64, device=device)
        parts.append(steps.mul_(step).add_(values[first]))
        first = end
    return torch.cat(parts)


def is_outside(input_ids: Tensor, num_rows: int) -> Tensor:
    """Mark the ids that are no row of a table of ``num_rows``."""
    return (input_ids < 0) | (input_ids >= num_rows)


def make_plan(
    input_ids: Tensor,
    runs: FlatRuns,
    *,
    shift: int,
    batch_first: bool,
    vocabulary: int,
    triton: bool,
) -> PlanTensors:
    """Make the plan by the kernel or by PyTorch; arguments are not checked, the host does not wait.

    Args:
        input_ids: ``[B, S]``.
        runs: of all groups.
        shift: positions from a token to its feature's first row: 1, or 0 of placeholders.
        batch_first: number positions ``b * S + s``.
        vocabulary: count the ids at text positions that are negative or not below this; 0 counts
            none.
        triton: by the kernel.
    """
    if triton and (runs.tokens or vocabulary) and input_ids.numel():
        from step37_kernels.ops import plan_rows as ops

        table = None
        if not ops.fits_into_a_launch(runs):
            table = _upload(_table_of(runs), input_ids.device)
        return ops.plan_rows(
            input_ids,
            runs,
            table,
            shift=shift,
            batch_first=batch_first,
            vocabulary=vocabulary,
        )
    # A run without features at the end, so that the table is never empty.
    each, repeats = _upload([*runs.rows, 0, *runs.features, 0], input_ids.device).view(2, -1)
    rows_each = each.repeat_interleave(repeats, output_size=runs.num_features)
    total = runs.num_rows
    # Rows without a place go to a slot past the end of each result, which is cut off afterwards.
    batch_size, seq_len = input_ids.shape
    num_positions = batch_size * seq_len
    flat_ids = input_ids.flatten()
    index = torch.arange(num_positions, device=input_ids.device)
    first_position = (index % max(seq_len, 1) + shift) * batch_size + index // max(seq_len, 1)
    starts: list[Tensor] = []
    counts: list[Tensor] = []
    for token, capacity in zip(runs.tokens, runs.group_sizes, strict=True):
        match = flat_ids == token
        rank = match.cumsum(0) - 1
        slot = torch.where(match, rank, capacity).clamp_max(capacity)
        slots = first_position.new_full((capacity + 1,), -1)
        starts.append(slots.scatter(0, slot, first_position)[:-1])
        counts.append(match.sum())
    start = torch.cat(starts) if starts else index.new_empty(0)

    row = torch.arange(total, device=input_ids.device)
    start_of_row = start.repeat_interleave(rows_each, output_size=total)
    first_row = rows_each.cumsum(0) - rows_each
    first_of_row = first_row.repeat_interleave(rows_each, output_size=total)
    position = start_of_row + (row - first_of_row) * batch_size
    lands = (start_of_row >= 0) & (position < num_positions)
    slot = torch.where(lands, position, num_positions)
    row_at = row.new_full((num_positions + 1,), -1).scatter_reduce(0, slot, row, "amax")
    kept = lands & (row_at[slot] == row)
    row_at = row_at[:-1].to(torch.int32).view(seq_len, batch_size)
    outside = (row_at < 0) & is_outside(input_ids.T, vocabulary)
    counts.append(outside.sum() * bool(vocabulary))
    if batch_first:
        row_at = row_at.t().contiguous()
        position = position % max(batch_size, 1) * seq_len + position // max(batch_size, 1)
    return (
        torch.where(kept, position, -1).to(torch.int32),
        row_at,
        start.to(torch.int32),
        torch.stack(counts).to(torch.int32),
    )
