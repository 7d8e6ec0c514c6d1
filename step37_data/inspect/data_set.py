"""A data set, described and drawn: lengths, how full packs get, what is dropped, what is broken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from step37_data.images.decode import BrokenImageError, read_rgb
from step37_data.inspect import style
from step37_data.packing import OversizePolicy, pack, pack_best_fit
from step37_data.threads import default_threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS, _BAR_WIDTH = 16, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """What one packing makes of the data set.

    Attributes:
        tokens: int64 ``[P]``, tokens of samples in each pack.
        dropped: samples left out because they are longer than a pack.
        share: of the capacity of all packs, in use.
    """

    tokens: np.ndarray
    dropped: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetDescription:
    """A data set: what it holds and what packing makes of it.

    Attributes:
        name: folder, split and column of the captions.
        sizes: int64 ``[N]``, tokens of every sample in the order drawn, dropped ones included.
        images: number of image files.
        capacity: tokens of a pack.
        oversize: what happens to longer samples.
        fills: by the name of the packing.
        broken: the reason by path; None where images were not read.
    """

    name: str
    sizes: np.ndarray
    images: int
    capacity: int
    oversize: OversizePolicy
    fills: Mapping[str, Fill]
    broken: Mapping[str, str] | None


def describe_fills(sizes: np.ndarray, capacity: int, oversize: OversizePolicy) -> dict[str, Fill]:
    """Both packings of samples of these ``sizes``, int64 ``[N]``."""
    order, best = pack_best_fit(sizes, capacity, oversize)
    fills = {}
    for name, drawn, result in (
        ("next_fit", sizes, pack(sizes, capacity, oversize)),
        ("best_fit", sizes[order], best),
    ):
        ranges = result.packed_sample_ranges
        ends = np.concatenate(([0], np.cumsum(drawn)))
        tokens = ends[ranges.starts + ranges.counts] - ends[ranges.starts]
        room = max(1, result.num_packed_samples * capacity)
        fills[name] = Fill(
            tokens=tokens, dropped=result.num_droped, share=float(tokens.sum() / room)
        )
    return fills


def find_broken_images(paths: Sequence[str], *, progress: bool = True) -> dict[str, str]:
    """Decode every file; the ones that cannot be read, each with the reason, in order."""

    def reason(path: str) -> str | None:
        try:
            read_rgb(path)
        except BrokenImageError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(default_threads()) as pool:
        found = tqdm(
            pool.map(reason, paths),
            total=len(paths),
            desc="Reading images",
            unit="file",
            disable=not progress,
        )
        return {path: why for path, why in zip(paths, found, strict=True) if why is not None}


def data_set_lines(data: DataSetDescription) -> Iterator[str]:
    """The description, line by line."""
    sizes = data.sizes
    yield f"data set  {data.name}: {len(sizes)} samples, {data.images} image files"
    low, middle, high = np.percentile(sizes, [5, 50, 95]).round().astype(int).tolist()
    yield (
        f"lengths   {sizes.min()} to {sizes.max()} tokens, median {middle}, "
        f"90 % from {low} to {high}, {int(sizes.sum())} in all"
    )
    edges, counts = _histogram(sizes)
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(_BAR_WIDTH * count / max(counts))
        yield f"  {start:8} – {stop - 1:<8} {bar:<{_BAR_WIDTH}} {count}"
    yield f"packs     of {data.capacity} tokens, oversize samples: {data.oversize}"
    for name, fill in data.fills.items():
        yield (
            f"          {name}: {len(fill.tokens)} packs, {fill.share:.1%} filled, "
            f"{fill.dropped} dropped"
        )
    if data.broken is None:
        yield "images    not read (--skip-images)"
        return
    yield f"images    {len(data.broken)} of {data.images} files cannot be read"
    for path, reason in data.broken.items():
        yield f"          {path}: {reason}"


def _histogram(sizes: np.ndarray) -> tuple[list[int], list[int]]:
    """Edges and counts of bars of one width in whole tokens."""
    width = -(-(int(np.ptp(sizes)) + 1) // _BARS)
    counts = np.bincount((sizes - sizes.min()) // width).tolist()
    return [int(sizes.min()) + width * bar for bar in range(len(counts) + 1)], counts


def draw_data_set(data: DataSetDescription) -> Figure:
    """Histogram of lengths, how full the packs of both packings get, drops and broken images."""
    sheet = style.sheet_of(11, 4.6)
    sheet.text(0.055, 0.945, style.fit(data.name, 10, 12, "bold"), fontsize=12, weight="bold",
               va="center", parse_math=False)  # fmt: skip
    held = f"{len(data.sizes)} samples, {data.images} image files"
    sheet.text(0.055, 0.885, held, fontsize=9, va="center", color=style.INK)
    lengths = sheet.add_axes((0.055, 0.31, 0.41, 0.46))
    edges, counts = _histogram(data.sizes)
    looks: dict[str, Any] = {"edgecolor": "white", "align": "edge"}
    width = edges[1] - edges[0]
    colours = [style.BROKEN if edge > data.capacity else style.SERIES[0] for edge in edges[:-1]]
    lengths.bar(edges[:-1], counts, width, color=colours, **looks)
    _dress(lengths, "Lengths", "tokens of a sample", "samples")
    low, middle, high = np.percentile(data.sizes, [5, 50, 95])
    told = [
        f"median {middle:.0f} tokens, 90 % from {low:.0f} to {high:.0f}, longest {data.sizes.max()}"
    ]
    if edges[-1] > data.capacity:
        lengths.axvline(data.capacity, color=style.BROKEN, linestyle="--", linewidth=1.5)
        told.append(f"dashed: the {data.capacity} tokens of a pack")
    if data.broken is None:
        told.append("images were not read")
    else:
        told.append(f"{len(data.broken)} of {data.images} image files cannot be read")
    for place, line in enumerate(told):
        colour = style.BROKEN if data.broken and line is told[-1] else style.INK
        sheet.text(0.055, 0.155 - 0.052 * place, line, fontsize=9, va="center", color=colour)

    filled = sheet.add_axes((0.545, 0.31, 0.41, 0.46))
    bins = np.linspace(0, 100, 21)
    for place, (name, fill) in enumerate(data.fills.items()):
        share = np.minimum(100 * fill.tokens / data.capacity, 100)
        counted = np.histogram(share, bins)[0]
        filled.bar(
            bins[:-1] + 0.4 + 2.1 * place, counted, 2.1, align="edge",
            color=style.SERIES[place], hatch=("", "///")[place], edgecolor="white",
            label=f"{name}: {len(fill.tokens)} packs, {fill.share:.1%} filled, "
            f"{fill.dropped} samples dropped",
        )  # fmt: skip
    _dress(filled, "How full packs get", f"% of {data.capacity} tokens", "packs")
    filled.set_xlim(0, 100)
    # Below the axes, where no bar is.
    filled.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.28), frameon=False, fontsize=9)
    return sheet


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=style.INK)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(integer=True)
