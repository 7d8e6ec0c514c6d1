"""Defines the targets of the kernels, and judges whether a run reached them.

The target of the insert is the time of the bare matrix product of the same shape. The target of the
pixel kernels is the time of a copy of as many bytes, or a multiple of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.shapes import shapes_named

Record = dict[str, Any]
Figure = Callable[[dict[str, Record]], float | None]
"""Computes the figure of a target from the rows of a group, given by implementation."""

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def time_over(ours: str, *theirs: str) -> Figure:
    """Make the figure: our time over the least of theirs, whose names begin with these texts."""

    def figure(group: dict[str, Record]) -> float | None:
        others = [row["median_us"] for name, row in group.items() if name.startswith(theirs)]
        times = [us for us in others if us]
        own = group.get(ours, {}).get("median_us")
        return own / min(times) if own and times else None

    return figure


def syncs(group: dict[str, Record]) -> float | None:
    """Return the most host synchronisations of a row of ours."""
    counts = [row["host_syncs"] for row in group.values() if row["kind"] == "ours"]
    return max((count for count in counts if count is not None), default=None)


def memory_over_output(group: dict[str, Record]) -> float | None:
    """Compute our peak memory over that of the output."""
    ours = group.get("step37", {})
    if ours.get("peak_bytes") is None:
        return None
    (shape,) = shapes_named([ours["shape"]])
    return float(ours["peak_bytes"] / (shape.seq_len * shape.hidden * ITEM_BYTES[ours["dtype"]]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure that should be at most ``limit`` in every group that the target applies to."""

    text: str
    subject: str = "insert"
    operations: tuple[str, ...]
    layouts: tuple[str, ...] = ("contiguous", "channels-first")  # values of the group's ``variant``
    shapes: tuple[str, ...] = ()  # all if empty
    figure: Figure
    limit: float
    accepted: float | None = None
    """A weaker limit, accepted as long as the rates behind the target have not been measured."""

    def verdict(self, worst: float) -> str:
        if worst <= self.limit:
            return "met"
        return "accepted" if self.accepted and worst <= self.accepted else "missed"


PEERS = ("stock", "masked_scatter", "index_copy", "Megatron-Bridge", "torch.compile")
FORWARD, BOTH = ("forward",), ("forward+backward",)
EVERY = ("forward", "backward", "forward+backward")
CONTIGUOUS = ("contiguous",)
GEMM, COPY = "GEMM alone", "copy of as many bytes"
LARGE = ("flickr8k", "long", "huge", "multicrop")


def forward_over(text: str, *theirs: str, **more: Any) -> Target:
    """Make a target for our forward over the fastest of theirs."""
    return Target(text=text, operations=FORWARD, figure=time_over("step37", *theirs), **more)


def times_stock(shape: str, times: float) -> Target:
    """Make a target: forward and backward so many times faster than stock."""
    text, stock = f"forward + backward / stock, {shape}", time_over("step37", "stock")
    return Target(text=text, operations=BOTH, shapes=(shape,), figure=stock, limit=1 / times)


def pixels(subject: str, operation: str, shape: str, limit: float) -> Target:
    """Make a target for a pixel kernel over a copy that moves as many bytes."""
    return Target(
        text=f"{operation} / {COPY}", subject=subject, operations=(operation,), layouts=("",),
        shapes=(shape,), figure=time_over("step37", COPY), limit=limit,
    )  # fmt: skip


TARGETS = (
    forward_over(
        "forward / GEMM alone, R ≥ 1521 (≤ 1.05 accepted)", GEMM,
        layouts=CONTIGUOUS, shapes=LARGE, limit=1.0, accepted=1.05,
    ),
    forward_over(
        "forward / GEMM alone, one image", GEMM,
        layouts=CONTIGUOUS, shapes=("one-image",), limit=1.15,
    ),
    forward_over(
        "forward on the channels-first view / nn.Linear on that view", "nn.Linear alone",
        layouts=("channels-first",), limit=1.05,
    ),
    Target(
        text="forward + backward / three GEMMs alone", operations=BOTH, layouts=CONTIGUOUS,
        shapes=LARGE, figure=time_over("step37", GEMM), limit=1.1,
    ),
    Target(
        text="fastest peer, torch.compile included", operations=FORWARD + BOTH,
        figure=time_over("step37", *PEERS), limit=1.0,
    ),
    times_stock("flickr8k", 3),
    times_stock("long", 3.5),
    times_stock("huge", 7),
    times_stock("multicrop", 5),
    Target(text="host synchronisations", operations=EVERY, figure=syncs, limit=0),
    Target(
        text="peak memory of forward / its output", operations=FORWARD, layouts=CONTIGUOUS,
        shapes=LARGE, figure=memory_over_output, limit=1.05,
    ),
    pixels("normalize", "normalize", "64 × 728×728", 1 / 0.7),
    pixels("resize", "resize+normalize", "64 × 500×375 → 728", 2.0),
)  # fmt: skip


def judge(groups: Sequence[Sequence[Record]]) -> Iterator[tuple[Target, float, str]]:
    """Yield each target that a run has figures for: its worst figure, and in which group."""
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
