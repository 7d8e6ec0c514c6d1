"""Subject ``plan``: times computing the destination of every feature row from token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.harness import Implementation, Key, Kind, Row, Settings, Work, measure
from bench.shapes import Batch, Shape, make_batch, shapes_named
from step37_kernels import plan_insert
from step37_kernels.dispatch import Impl


def locations(batch: Batch) -> Tensor:
    """Find where features begin as stock does, which reads their positions one by one."""
    found = []
    for token, _, _ in batch.groups:
        for location in (batch.input_ids == token).nonzero():
            found.append(int(location[0].item()) + int(location[1].item()) + 1)
    return torch.tensor(found)


def run(settings: Settings) -> Iterator[list[Row]]:
    """Yield one group for each shape."""
    for shape in shapes_named(settings.shapes):
        yield run_shape(shape, settings)


def run_shape(shape: Shape, settings: Settings) -> list[Row]:
    """Measure the group of one shape."""
    batch = make_batch(shape, settings.device)
    groups = [(token, [rows] * n) for token, n, rows in batch.groups]

    def check(implementation: Implementation, result: Any) -> str | None:
        wanted = batch.destinations
        if implementation.kind == "stock":
            starts = torch.tensor([rows for _, n, rows in batch.groups for _ in range(n)])
            wanted = wanted.cpu()[starts.cumsum(0) - starts]
        same = torch.equal(result.to(wanted), wanted)
        return None if same else "rows do not land where the batch was laid out"

    def destinations(impl: Impl) -> Tensor:
        return plan_insert(batch.input_ids, groups, impl=impl).destinations

    ways: list[tuple[str, Kind, Callable[[object], Tensor]]] = [
        ("step37", "ours", lambda _: destinations(settings.impl)),
        ("stock (starts only)", "stock", lambda _: locations(batch)),
        ("PyTorch operations", "peer", lambda _: destinations("torch")),
    ]
    compared = [Implementation(name=n, kind=k, prepare=int, run=run) for n, k, run in ways]
    key = Key(subject="plan", operation="plan", shape=shape.name, dtype="int64")
    # Ids are read; destinations and row_at are written, both int32.
    moved = batch.input_ids.nbytes + 4 * (shape.num_rows + shape.seq_len)
    work = Work(flops=0, bytes=moved, rows=shape.num_rows)
    return measure(key, work, compared, check=check, settings=settings)
