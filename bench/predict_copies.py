"""Simulates what copying text rows adds to the product's launch, for :mod:`bench.predict`.

The programs of a launch share its binary, and with it the product's shared memory: a multiprocessor
holds one of them, be it a tile or a copy. They begin in order, tiles first, each on the first
multiprocessor that is free. So copies are free where the last wave of tiles leaves multiprocessors
idle for long enough, and otherwise follow it, one program after the other.
"""

from __future__ import annotations

import bisect
import functools
import heapq
from collections.abc import Mapping, Sequence

import torch

from bench.shapes import Shape, make_batch
from step37_kernels.ops.project import COPY_BLOCK_P


@functools.cache
def text_rows(shape: Shape) -> tuple[int, ...]:
    """Count the text rows in each program's block of positions; many blocks have none."""
    is_text = torch.ones(-(-shape.seq_len // COPY_BLOCK_P) * COPY_BLOCK_P, dtype=torch.int64)
    is_text[shape.seq_len :] = 0
    is_text[make_batch(shape, torch.device("cpu")).destinations] = 0
    return tuple(is_text.view(-1, COPY_BLOCK_P).sum(1).tolist())


def copies_us(
    shape: Shape, tiles: Sequence[float], product: float, rates: Mapping[str, float]
) -> float:
    """Simulate a launch with its copies and without; returns the µs between the two ends.

    Args:
        shape: whose text rows are copied.
        tiles: µs of each multiprocessor's tiles together.
        product: bytes that the tiles bring from memory in that time.
        rates: ``memory`` and ``copy`` in TB/s, ``turn`` in µs.
    """
    blocks, row_bytes = text_rows(shape), 4 * shape.hidden  # bf16, read and written
    idle = sorted(tiles)
    end = idle[-1]
    share = sum(blocks) / (COPY_BLOCK_P * len(blocks))  # of the copying programs, so many copy
    free = list(idle)
    for rows in blocks:
        begin = heapq.heappop(free)
        others = max(bisect.bisect_right(idle, begin) * share, 1)
        memory = rates["memory"] - (product / end / 1e6 if begin < end else 0)
        rate = min(rates["copy"], max(memory, 0.1 * rates["memory"]) / others)
        heapq.heappush(free, begin + rates["turn"] + rows * row_bytes / rate / 1e6)
    return max(free) - end


def own_launch_us(shape: Shape, rates: Mapping[str, float]) -> float:
    """Time the copies as a launch of their own behind the product: they would fill all
    multiprocessors, and hide nowhere."""
    return rates["dependent"] + sum(text_rows(shape)) * 4 * shape.hidden / rates["memory"] / 1e6
