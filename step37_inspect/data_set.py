"""Describes and draws a data set: lengths, how full packs are, dropped samples, broken images."""

from __future__ import annotations

import csv
import dataclasses
import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
from tqdm.contrib.concurrent import thread_map

from step37_data.common.threads import default_threads
from step37_data.images.decode import why_broken
from step37_data.packed_dataloader import Fill
from step37_data.packing import OversizePolicy, pack, pack_balanced, pack_best_fit
from step37_inspect import style
from step37_inspect.histogram import Histogram, draw_histogram
from step37_inspect.viewer_difference import TREATMENTS

_BAR_WIDTH = 40
# The most dropped samples, and samples of unusual length, that lines name; the page has all.
_SHOWN, _NAMED = 20, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSetDescription:
    """A data set's samples and images, and how full its packs are.

    Attributes:
        name: folder, split and caption column.
        sizes: integers ``[N]``, tokens of every sample in the order drawn, dropped ones included.
        images: number of image files.
        capacity: tokens of a pack.
        oversize: what happens to longer samples.
        broken: unreadable images, each path with the reason; None if images were not read.
        loads: integers ``[N]``, vision tokens of every sample. They are needed to show the fill of
            balanced packing.
        files: the image file of every sample, ``[N]``, to name some of them; may be left out.
        shown_otherwise: by path, how a viewer shows an image otherwise than stock reads it.
        skipped_rows: rows of the metadata without a file name or a caption.
        as_viewed: whether images are used as viewers show them, as far as ``as_viewed`` does so.
    """

    name: str
    sizes: np.ndarray
    images: int
    capacity: int
    oversize: OversizePolicy
    broken: Mapping[str, str] | None
    loads: np.ndarray | None = None
    files: Sequence[str] = ()
    shown_otherwise: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skipped_rows: int = 0
    as_viewed: bool = False

    @functools.cached_property
    def fills(self) -> dict[str, Fill]:
        """How full packs are: by next-fit, by best-fit and, if there are ``loads``, balanced."""
        how = (self.sizes, self.capacity, self.oversize)
        ways = {"next_fit": (np.arange(len(self.sizes)), pack(*how))}
        ways["best_fit"] = pack_best_fit(*how)
        if self.loads is not None:
            ways["balanced"] = pack_balanced(self.sizes, self.loads, self.capacity, self.oversize)
        return {
            name: Fill.of(self.sizes[order], result, self.capacity)
            for name, (order, result) in ways.items()
        }

    @functools.cached_property
    def longer(self) -> list[tuple[str, int]]:
        """File and length of every sample that is longer than a pack, in the order drawn."""
        return self._named(self.sizes > self.capacity)

    @functools.cached_property
    def far_off(self) -> list[tuple[str, int]]:
        """File and length of every sample of unusual length, the longest first."""
        body = self.histogram.body
        found = self._named((self.sizes < body.start) | (self.sizes >= body.stop))
        return sorted(found, key=lambda each: -each[1])

    def _named(self, chosen: np.ndarray) -> list[tuple[str, int]]:
        return [
            (self.files[number] if self.files else f"sample {number}", int(self.sizes[number]))
            for number in np.flatnonzero(chosen).tolist()
        ]

    @functools.cached_property
    def histogram(self) -> Histogram:
        return Histogram.of(self.sizes)

    @property
    def lengths(self) -> str:
        low, middle, high = np.percentile(self.sizes, [5, 50, 95]).round().astype(int).tolist()
        ends = f"{self.sizes.min()} to {self.sizes.max()} tokens"
        return f"{ends}, median {middle}, 90 % from {low} to {high}"

    @property
    def packings(self) -> list[str]:
        return [
            f"{name}: {fill}" if fill.samples else f"{name}: no packs, {fill.dropped} dropped"
            for name, fill in self.fills.items()
        ]

    @property
    def outliers(self) -> str:
        """A sentence that names some samples of unusual length; empty if there are none."""
        if not self.far_off:
            return ""
        names = [f"{PureWindowsPath(file).name} ({size})" for file, size in self.far_off]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"far from the other lengths: {', '.join(names[:_NAMED])}{more}"

    @property
    def too_long(self) -> str:
        """A sentence on samples that are longer than a pack; empty if there are none."""
        if not self.longer:
            return ""
        fate = "dropped" if self.oversize == "drop" else "each alone in a pack"
        count = f"{len(self.longer)} of {len(self.sizes)} samples"
        return f"{count} have more than {self.capacity} tokens: {fate}"

    @functools.cached_property
    def used_otherwise(self) -> dict[str, str]:
        """By path, how an image is used otherwise than a viewer shows it."""
        found = {}
        for path, told in self.shown_otherwise.items():
            left = [kind for kind in told.split("; ") if not (self.as_viewed and _mended(kind))]
            if left:
                found[path] = "; ".join(left)
        return found

    @property
    def unlike_a_viewer(self) -> str:
        """Tells how many images are used otherwise than a viewer shows them; empty if none are."""
        count = len(self.used_otherwise)
        told = "are not used as a viewer shows them"
        return f"{count} of {self.images} files {told}" if count else ""

    @property
    def treatments(self) -> list[tuple[str, int, str, str]]:
        """Kinds of images that a viewer shows otherwise than stock reads them.

        Each with the number of its files, how these are used as stock reads them, and with
        ``as_viewed``.
        """
        kinds = [kind for told in self.shown_otherwise.values() for kind in told.split("; ")]
        return [
            (kind, kinds.count(kind), *treatment)
            for kind, treatment in TREATMENTS.items()
            if kind in kinds
        ]

    @property
    def unreadable(self) -> str:
        if self.broken is None:
            return "not read (--skip-images)"
        return f"{len(self.broken)} of {self.images} files cannot be read"


def skipped_rows(metadata: Path, caption_key: str, sample_count: int | None) -> int:
    """Count rows without file name or caption before the last of ``sample_count`` samples."""
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, restval="")
        whole = (
            bool(row.get(caption_key, "").strip() and row["file_name"].strip()) for row in rows
        )
        found = skipped = 0
        for is_whole in whole:
            found += is_whole
            skipped += not is_whole
            if found == sample_count:
                break
    return skipped


def find_broken_images(paths: Sequence[str], quiet: bool = False) -> dict[str, str]:
    """Decode every file; return the paths that cannot be read, in order, with the reason."""
    bar = {"desc": "Reading images", "unit": "file", "disable": quiet}
    found = thread_map(why_broken, paths, max_workers=default_threads(), **bar)
    return {path: why for path, why in zip(paths, found, strict=True) if why is not None}


def data_set_lines(data: DataSetDescription) -> Iterator[str]:
    """Yield the description, line by line."""
    yield f"data set  {data.name}: {len(data.sizes)} samples, {data.images} image files"
    if data.skipped_rows:
        yield f"skipped   {data.skipped_rows} rows without a file name or a caption"
    yield f"lengths   {data.lengths}, {data.sizes.sum()} in all"
    counts = data.histogram.counts(data.sizes)
    for bin_, count in zip(data.histogram.bins, counts, strict=True):
        bar = "#" * round(_BAR_WIDTH * count / max(counts))
        yield f"  {bin_.start:8} – {bin_.stop - 1:<8} {bar:<{_BAR_WIDTH}} {count}"
    if data.far_off:
        yield f"          {data.outliers}"
    yield f"packs     oversize samples: {data.oversize}"
    yield from (f"          {packing}" for packing in data.packings)
    if data.longer:
        yield f"too long  {data.too_long}"
        yield from (f"          {path}: {size} tokens" for path, size in data.longer[:_SHOWN])
        if len(data.longer) > _SHOWN:
            yield f"          and {len(data.longer) - _SHOWN} more; --html lists all"
    yield f"images    {data.unreadable}"
    yield from (f"          {path}: {reason}" for path, reason in (data.broken or {}).items())
    for kind, count, as_stock, as_viewed in data.treatments:
        used, other = (as_viewed, as_stock) if data.as_viewed else (as_stock, as_viewed)
        instead = f"{'without' if data.as_viewed else 'with'} --as-viewed {other}"
        also = instead if _mended(kind) else "also with --as-viewed"
        files = f"{count} file{'s' if count > 1 else ''}"
        yield f"viewer    {kind}: {files}, used {used}; {also}"
    if data.used_otherwise:
        yield f"pixels    {data.unlike_a_viewer}"
        yield from (f"          {path}: {told}" for path, told in data.used_otherwise.items())


def _mended(kind: str) -> bool:
    """Whether ``as_viewed`` shows pictures of this kind as a viewer does."""
    return TREATMENTS[kind].as_viewed != TREATMENTS[kind].as_stock


def draw_data_set(data: DataSetDescription, *, narrow: bool = False) -> style.Figure:
    """Draw a histogram of the lengths and of how full packs get, with drops and broken images.

    Args:
        data: what is drawn.
        narrow: draw them one below the other, for a telephone.
    """
    width, height, letters = (3.8, 9.6, 34) if narrow else (11, 4.6, 60)
    sheet = style.sheet_of(width, height, data.name)
    below_title = 1 - style.TITLE_HEIGHT / height
    sheet.set_layout_engine("constrained", rect=(0, 0, 1, below_title), w_pad=0.15, h_pad=0.1)
    colour = style.BROKEN if data.broken else style.INK
    read = f"{data.images} images: {data.unreadable}"
    sheet.supxlabel(read, x=0.2 / width, ha="left", size=9, color=colour)
    lengths, filled = sheet.subplots(*((2, 1) if narrow else (1, 2)))
    longer = data.sizes > data.capacity
    # The legend leaves "_" out.
    told = [textwrap.fill(data.lengths, letters), "_"]
    if longer.any():
        count = f"{longer.sum()} longer than the {data.capacity} tokens of a pack"
        told[1] = textwrap.fill(count, letters)
        if data.capacity in range(data.histogram.body.start, data.histogram.body.stop):
            lengths.axvline(data.capacity, color=style.BROKEN, linestyle="--", linewidth=1.5)
    if data.far_off:
        told[0] += "\n" + textwrap.fill(data.outliers, letters)
    draw_histogram(lengths, data.histogram, [data.sizes[~longer], data.sizes[longer]], told)
    shares = [np.minimum(100 * fill.tokens / data.capacity, 100) for fill in data.fills.values()]
    told = [textwrap.fill(packing, min(letters, 48)) for packing in data.packings]
    colours = style.SERIES[: len(shares)]
    filled.hist(shares, range(0, 101, 5), label=told, color=colours, edgecolor="white")
    filled.set_xlim(0, 100)
    for axes, title, across, up in (
        (lengths, f"Lengths of {len(data.sizes)} samples", "tokens of a sample", "samples"),
        (filled, "How full packs get", f"% of {data.capacity} tokens", "packs"),
    ):
        for hatch, bars in zip(("", "///", "..."), axes.containers, strict=False):
            for bar in bars:
                bar.set_hatch(hatch)
        axes.set_title(title, loc="left", size=10)
        axes.set(xlabel=across, ylabel=up)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="y", integer=True)
        # Below the axes, where it covers no bar.
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.18), frameon=False, fontsize=9)
    return sheet
