"""A data set, described and drawn: lengths, how full packs get, what is dropped, what is broken."""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.contrib.concurrent import thread_map

from step37_data.common.threads import default_threads
from step37_data.images.decode import why_broken
from step37_data.packed_dataloader import Fill
from step37_data.packing import OversizePolicy, pack, pack_best_fit
from step37_inspect import style

_BARS, _BAR_WIDTH = 16, 40


@dataclass(frozen=True, kw_only=True)
class DataSetDescription:
    """A data set: what it holds and what packing makes of it.

    Attributes:
        name: folder, split and column of the captions.
        sizes: integers ``[N]``, tokens of every sample in the order drawn, dropped ones included.
        images: number of image files.
        capacity: tokens of a pack.
        oversize: what happens to longer samples.
        broken: the reason by path; None where images were not read.
    """

    name: str
    sizes: np.ndarray
    images: int
    capacity: int
    oversize: OversizePolicy
    broken: Mapping[str, str] | None

    @functools.cached_property
    def fills(self) -> dict[str, Fill]:
        """By the name of the packing, of both that need sizes only."""
        order, best = pack_best_fit(self.sizes, self.capacity, self.oversize)
        next_fit = pack(self.sizes, self.capacity, self.oversize)
        return {
            "next_fit": Fill.of(self.sizes, next_fit, self.capacity),
            "best_fit": Fill.of(self.sizes[order], best, self.capacity),
        }

    @property
    def lengths(self) -> str:
        low, middle, high = np.percentile(self.sizes, [5, 50, 95]).round().astype(int).tolist()
        ends = f"{self.sizes.min()} to {self.sizes.max()} tokens"
        return f"{ends}, median {middle}, 90 % from {low} to {high}"

    @property
    def packings(self) -> list[str]:
        return [f"{name}: {fill}" for name, fill in self.fills.items()]

    @property
    def unreadable(self) -> str:
        if self.broken is None:
            return "not read (--skip-images)"
        return f"{len(self.broken)} of {self.images} files cannot be read"


def find_broken_images(paths: Sequence[str], quiet: bool = False) -> dict[str, str]:
    """Decode every file; the ones that cannot be read, each with the reason, in order."""
    bar = {"desc": "Reading images", "unit": "file", "disable": quiet}
    found = thread_map(why_broken, paths, max_workers=default_threads(), **bar)
    return {path: why for path, why in zip(paths, found, strict=True) if why is not None}


def data_set_lines(data: DataSetDescription) -> Iterator[str]:
    """The description, line by line."""
    yield f"data set  {data.name}: {len(data.sizes)} samples, {data.images} image files"
    yield f"lengths   {data.lengths}, {data.sizes.sum()} in all"
    edges, counts = _histogram(data.sizes)
    for (start, stop), count in zip(itertools.pairwise(edges), counts, strict=True):
        bar = "#" * round(_BAR_WIDTH * count / max(counts))
        yield f"  {start:8} – {stop - 1:<8} {bar:<{_BAR_WIDTH}} {count}"
    yield f"packs     oversize samples: {data.oversize}"
    yield from (f"          {packing}" for packing in data.packings)
    yield f"images    {data.unreadable}"
    yield from (f"          {path}: {reason}" for path, reason in (data.broken or {}).items())


def _histogram(sizes: np.ndarray) -> tuple[list[int], list[int]]:
    """Edges and counts of bars of one width in whole tokens."""
    low, high = int(sizes.min()), int(sizes.max())  # sizes may be as narrow as one byte
    width = -(-(high - low + 1) // _BARS)
    edges = np.arange(low, high + width + 1, width)
    return edges.tolist(), np.histogram(sizes, edges)[0].tolist()


def draw_data_set(data: DataSetDescription) -> style.Figure:
    """Histogram of lengths, how full the packs of both packings get, drops and broken images."""
    sheet = style.sheet_of(11, 4.6, data.name)
    sheet.set_layout_engine("constrained", rect=(0, 0, 1, 0.9), w_pad=0.15, h_pad=0.1)
    colour = style.BROKEN if data.broken else style.INK
    read = f"{data.images} images: {data.unreadable}"
    sheet.supxlabel(read, x=0.2 / 11, ha="left", size=9, color=colour)
    lengths, filled = sheet.subplots(1, 2)
    longer = data.sizes > data.capacity
    told = [data.lengths, "_"]  # which the legend leaves out
    if longer.any():
        told[1] = f"{longer.sum()} longer than the {data.capacity} tokens of a pack"
        lengths.axvline(data.capacity, color=style.BROKEN, linestyle="--", linewidth=1.5)
    looks = {"stacked": True, "color": [style.SERIES[0], style.BROKEN], "edgecolor": "white"}
    parts = [data.sizes[~longer], data.sizes[longer]]
    lengths.hist(parts, _histogram(data.sizes)[0], label=told, **looks)
    shares = [np.minimum(100 * fill.tokens / data.capacity, 100) for fill in data.fills.values()]
    told = [textwrap.fill(packing, 48) for packing in data.packings]
    filled.hist(shares, range(0, 101, 5), label=told, color=style.SERIES[:2], edgecolor="white")
    filled.set_xlim(0, 100)
    for axes, title, across, up in (
        (lengths, f"Lengths of {len(data.sizes)} samples", "tokens of a sample", "samples"),
        (filled, "How full packs get", f"% of {data.capacity} tokens", "packs"),
    ):
        for bar in axes.containers[1]:
            bar.set_hatch("///")
        axes.set_title(title, loc="left", size=10)
        axes.set(xlabel=across, ylabel=up)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(integer=True)
        # Below the axes, where no bar is.
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.18), frameon=False, fontsize=9)
    return sheet
