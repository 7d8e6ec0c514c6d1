"""The plan's implementation: layout tables on the device, and the plan by PyTorch operations.

A *run* is ``(features, rows of each)``, one per feature tensor ``[N, L, C]``. The layout of a batch
is a handful of runs however many images it holds, so nothing here loops over images.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

Runs = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""``(start_token, ((features, rows), …))`` of each insertion group."""

PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""``destinations [R]``, ``row_at [S, B]``, ``starts [N]``, ``found [G]``, all int32."""


def num_rows(runs: Runs) -> int:
    """R, rows of all features of all groups."""
    return sum(features * rows for _, group in runs for features, rows in group)


def to_runs(groups: Sequence[tuple[int, Sequence[int]]]) -> Runs:
    """Join neighbours with equal row counts."""
    result = []
    for token, row_counts in groups:
        group: list[tuple[int, int]] = []
        for count in map(operator.index, row_counts):
            if group and group[-1][1] == count:
                group[-1] = (group[-1][0] + 1, count)
            else:
                group.append((1, count))
        result.append((operator.index(token), tuple(group)))
    return tuple(result)


@functools.lru_cache(maxsize=64)
def _host_tables(runs: Runs) -> tuple[int, ...]:
    """``[G + 1, 2]`` (start token, first feature), then ``[N + 1]`` first rows, flattened.

    Numbers, not a tensor, are what is kept for the layouts seen last. A tensor would belong to
    where it was made: to a stream, on which alone it is known to have arrived; to the pool of a
    CUDA graph, which it must not outlive; to a mode, such as that of fake tensors.
    """
    table: list[int] = []
    offsets = [0]
    for token, group in runs:
        table += [token, len(offsets) - 1]
        for features, rows in group:
            first = offsets[-1]
            offsets += [first + rows * k for k in range(1, features + 1)]
    table += [0, len(offsets) - 1]
    return (*table, *offsets)


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 values to the device without waiting for it, also while a CUDA graph is captured."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    if not torch.cuda.is_current_stream_capturing():
        staged = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
        return staged.to(device, non_blocking=True)
    # A captured copy would read its host memory again at every replay, when it is long gone. Fill
    # kernels carry their value in the launch itself; equal steps make one arithmetic sequence.
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


def _device_tables(runs: Runs, device: torch.device) -> tuple[Tensor, Tensor]:
    """The layout of the groups on the device: ``[G + 1, 2]`` int64 and ``[N + 1]`` int32."""
    flat = _upload(_host_tables(runs), device)
    length = 2 * (len(runs) + 1)
    return flat[:length].view(-1, 2), flat[length:].to(torch.int32)


def make_plan(input_ids: Tensor, runs: Runs, triton: bool) -> PlanTensors:
    """Plan by the kernels or by PyTorch; arguments are valid."""
    if triton and runs and input_ids.numel():
        from step37_kernels.ops import plan as ops

        groups = [(token, sum(features for features, _ in group)) for token, group in runs]
        flat = [run for _, group in runs for run in group]
        small = max(len(groups), len(flat)) <= ops.MAX_INLINE
        tables = None if small else _device_tables(runs, input_ids.device)
        return ops.plan_rows(input_ids, groups, flat, tables)
    return _plan_torch(input_ids, runs, _device_tables(runs, input_ids.device)[1])


def _plan_torch(input_ids: Tensor, runs: Runs, offsets: Tensor) -> PlanTensors:
    """Like the kernels it never waits for the device.

    A slot past the end of each result takes what has no place, and is cut off afterwards.
    """
    batch_size, seq_len = input_ids.shape
    num_positions = batch_size * seq_len
    total = num_rows(runs)
    flat_ids = input_ids.flatten()
    index = torch.arange(num_positions, device=input_ids.device)
    first_position = (index % max(seq_len, 1) + 1) * batch_size + index // max(seq_len, 1)
    starts: list[Tensor] = []
    found: list[Tensor] = []
    for token, group in runs:
        capacity = sum(features for features, _ in group)
        match = flat_ids == token
        rank = match.cumsum(0) - 1
        slot = torch.where(match, rank, capacity).clamp_max(capacity)
        slots = first_position.new_full((capacity + 1,), -1)
        starts.append(slots.scatter(0, slot, first_position)[:-1])
        found.append(match.sum())
    start = torch.cat(starts) if starts else index.new_empty(0)

    row = torch.arange(total, device=input_ids.device)
    counts = offsets.diff().long()
    start_of_row = start.repeat_interleave(counts, output_size=total)
    first_of_row = offsets[:-1].long().repeat_interleave(counts, output_size=total)
    position = start_of_row + (row - first_of_row) * batch_size
    lands = (start_of_row >= 0) & (position < num_positions)
    slot = torch.where(lands, position, num_positions)
    row_at = row.new_full((num_positions + 1,), -1).scatter_reduce(0, slot, row, "amax")
    kept = lands & (row_at[slot] == row)
    return (
        torch.where(kept, position, -1).to(torch.int32),
        row_at[:-1].view(seq_len, batch_size).to(torch.int32),
        start.to(torch.int32),
        torch.stack(found).to(torch.int32) if found else start.to(torch.int32),
    )
