"""What the kernels are meant to reach, and whether a run reached it.

The insert is free: it costs what the bare matrix product of the same shape costs. Pixels move at
the speed of memory: as fast as a copy of as many bytes, or a share of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.shapes import shapes_named

Record = dict[str, Any]
Figure = Callable[[dict[str, Record]], float | None]
"""From the rows of a group, by implementation, to the figure of a target."""

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def time_over(ours: str, *theirs: str) -> Figure:
    """Our time over the least of theirs, each given by how its name begins."""

    def figure(group: dict[str, Record]) -> float | None:
        times = [
            row["median_us"]
            for name, row in group.items()
            if name.startswith(theirs) and row["median_us"]
        ]
        own = group.get(ours, {}).get("median_us")
        return own / min(times) if own and times else None

    return figure


def syncs(group: dict[str, Record]) -> float | None:
    """Most host synchronisations of ours."""
    counts = [row["host_syncs"] for row in group.values() if row["kind"] == "ours"]
    return max((count for count in counts if count is not None), default=None)


def memory_over_stock(group: dict[str, Record]) -> float | None:
    """Our peak above the output over stock's; in place, nothing is allocated for the output."""
    ours, stock = (group.get(name, {}).get("peak_bytes") for name in ("step37 in place", "stock"))
    if ours is None or stock is None:
        return None
    (shape,) = shapes_named([group["stock"]["shape"]])
    above = stock - shape.seq_len * shape.hidden * ITEM_BYTES[group["stock"]["dtype"]]
    return float(ours / above) if above > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure that is to be at most ``limit`` in every group that it speaks of."""

    text: str
    subject: str = "insert"
    operations: tuple[str, ...]
    layouts: tuple[str, ...] = ("contiguous", "channels-first")
    """Values of the group's ``variant``."""
    shapes: tuple[str, ...] = ()
    """All if empty."""
    figure: Figure
    limit: float


IN_PLACE = "step37 in place"
PEERS = ("stock", "masked_scatter", "index_copy", "Megatron-Bridge", "torch.compile")
TARGETS = (
    Target(
        text="forward / GEMM alone",
        operations=("forward",),
        layouts=("contiguous",),
        shapes=("flickr8k", "long", "huge"),
        figure=time_over(IN_PLACE, "GEMM alone"),
        limit=1.05,
    ),
    Target(
        text="forward / GEMM alone, one image",
        operations=("forward",),
        layouts=("contiguous",),
        shapes=("one-image",),
        figure=time_over(IN_PLACE, "GEMM alone"),
        limit=1.3,
    ),
    Target(
        text="forward on the channels-first view / nn.Linear on that view",
        operations=("forward",),
        layouts=("channels-first",),
        figure=time_over(IN_PLACE, "nn.Linear alone"),
        limit=1.05,
    ),
    Target(
        text="forward / fastest peer",
        operations=("forward",),
        figure=time_over(IN_PLACE, *PEERS),
        limit=1.0,
    ),
    Target(
        text="forward + backward / stock, flickr8k",
        operations=("forward+backward",),
        shapes=("flickr8k",),
        figure=time_over(IN_PLACE, "stock"),
        limit=1 / 3,
    ),
    Target(
        text="forward + backward / stock, long",
        operations=("forward+backward",),
        shapes=("long",),
        figure=time_over(IN_PLACE, "stock"),
        limit=1 / 5,
    ),
    Target(
        text="forward + backward / best torch.compile",
        operations=("forward+backward",),
        figure=time_over(IN_PLACE, "torch.compile"),
        limit=1 / 1.15,
    ),
    Target(
        text="dX and dW kernels / GEMM alone",
        operations=("dX", "dW"),
        figure=time_over("step37 kernel alone", "GEMM alone"),
        limit=1.1,
    ),
    Target(
        text="host synchronisations",
        operations=("forward", "backward", "forward+backward"),
        figure=syncs,
        limit=0,
    ),
    Target(
        text="memory above the output / stock's",
        operations=("forward",),
        layouts=("contiguous",),
        figure=memory_over_stock,
        limit=0.05,
    ),
    Target(
        text="normalise / copy of as many bytes",
        subject="normalize",
        operations=("normalize",),
        layouts=("",),
        shapes=("64 × 728×728",),
        figure=time_over("step37", "copy of as many bytes"),
        limit=1 / 0.7,
    ),
    Target(
        text="resize + normalise / copy of as many bytes",
        subject="resize",
        operations=("resize+normalize",),
        layouts=("",),
        shapes=("64 × 500×375 → 728",),
        figure=time_over("step37", "copy of as many bytes"),
        limit=2.0,
    ),
)


def judge(groups: Sequence[Sequence[Record]]) -> Iterator[tuple[Target, float, str]]:
    """Each target that a run speaks to: its worst figure, and in which group that was."""
    for target in TARGETS:
        figures = []
        for group in groups:
            first = group[0]
            if (
                first["subject"] == target.subject
                and first["operation"] in target.operations
                and first["variant"] in target.layouts
                and first["shape"] in (target.shapes or (first["shape"],))
            ):
                figure = target.figure({row["implementation"]: row for row in group})
                if figure is not None:
                    where = (first["shape"], first["variant"], first["dtype"], first["operation"])
                    figures.append((figure, ", ".join(filter(None, where))))
        if figures:
            yield (target, *max(figures))
