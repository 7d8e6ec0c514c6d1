"""Describes and draws one pack: the tokens of each sample and image, and which are trained."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from step37_data.common.image_entry import PATCH_ITEM_TYPE, ImageEntry
from step37_data.images.crop_pixels import canvas_image, cut, full_image
from step37_data.images.crops import plan_crops
from step37_data.images.decode import BrokenImageError, read_rgb
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_inspect import style

_LOOKS: dict[str, dict[str, Any]] = {
    "text": {"facecolor": style.TEXT},
    "trained": {"facecolor": style.TRAINED},
    "image": {"facecolor": style.IMAGE},
    "crop": {"facecolor": style.CROP},
    "padding or room": {"facecolor": style.PADDING, "edgecolor": "#c9ccd2", "hatch": "////"},
    "unreadable": {"facecolor": "white", "edgecolor": style.BROKEN, "hatch": "xxxx"},
}
# At 256 tokens a line, a caption of twelve tokens is half an inch wide.
TOKENS_A_LINE, THUMBNAILS_A_ROW = 256, 8
# In inches.
_LEFT, _LINE, _THUMBNAIL = 0.62, 0.37, 1.06


class _Layout(NamedTuple):
    """How a pack is spread over the sheet: lines of tokens, then rows of thumbnails.

    Attributes:
        width: of a line, in inches.
        legend_rows: of the legend between title and lines.
    """

    tokens_a_line: int
    thumbnails_a_row: int
    width: float
    legend_rows: int

    @property
    def top(self) -> float:
        """Where the first line begins, in inches."""
        return 0.69 + 0.23 * self.legend_rows


_WIDE = _Layout(TOKENS_A_LINE, THUMBNAILS_A_ROW, width=10.24, legend_rows=1)
_NARROW = _Layout(96, 2, width=3.0, legend_rows=3)


class ImageSpan(NamedTuple):
    """The positions of one image's rows in the pack: ``[start, end)`` in tokens.

    Attributes:
        kind: ``"image"`` or ``"crop"``.
    """

    start: int
    end: int
    entry: ImageEntry
    kind: str

    @property
    def name(self) -> str:
        """The name of the image file, from a path of any operating system."""
        return PureWindowsPath(str(self.entry.path)).name


class Segment(NamedTuple):
    """One sub-sequence of a pack: ``[start, end)`` in tokens.

    Attributes:
        source: ``(data set, index in it)``, None for padding.
        loss: ``[start, end)`` of every run of positions that count in the loss.
        images: its images and crops, in the order of their tokens.
        text: the trained tokens as text.
    """

    start: int
    end: int
    source: tuple[int, int] | None
    loss: list[tuple[int, int]]
    images: list[ImageSpan]
    text: str


class PackDescription(NamedTuple):
    """A pack: its segments, and how full it is.

    Attributes:
        number: index of the pack.
        packs: how many packs there are.
        capacity: tokens that fit in a pack.
        segments: the samples of the pack in order, and padding at the end.
        as_viewed: whether its pictures are shown as image viewers show them.
    """

    number: int
    packs: int
    capacity: int
    segments: list[Segment]
    as_viewed: bool = False

    @property
    def used(self) -> int:
        """The number of tokens of samples, without padding."""
        return max(segment.end for segment in self.segments if segment.source is not None)

    @property
    def title(self) -> str:
        loss = sum(end - start for segment in self.segments for start, end in segment.loss)
        full = f"{self.used} of {self.capacity} tokens ({self.used / self.capacity:.1%})"
        rest = f"{self.segments[-1].end} with padding, {loss} trained"
        return f"pack {self.number} of {self.packs}: {full}, {rest}"

    @property
    def table(self) -> list[tuple[str, str, str, str, str, str]]:
        """The names of the columns, then a row for each segment."""
        rows = [("segment", "sample", "tokens", "trained", "images", "text trained")]
        for number, (start, end, source, loss, images, text) in enumerate(self.segments):
            sample = "padding" if source is None else str(source[1])
            trained = " ".join(f"{a}–{b}" for a, b in loss)
            shown = ", ".join(f"{image.name} {image.start}–{image.end}" for image in images)
            rows.append((str(number), sample, f"{start}–{end}", trained, shown, repr(text)[1:-1]))
        return rows


def describe_pack(packs: MixedPackedDataloader, number: int) -> PackDescription:
    """Find segments, trained positions and images in a pack.

    Args:
        packs: packs made by ``pack_samples``, from data sets with a ``Step37MultimodalTemplate``.
        number: index of the pack.

    Raises:
        ValueError: start tokens and image paths differ in number.
    """
    packed, pieces, template = packs[number], packs.pieces(number), packs.datasets[0].template
    images: list[ImageSpan] = []
    for kind, (name, token, rows) in template.kinds.items():
        starts = (np.flatnonzero(packed["tokens"].numpy() == token) + 1).tolist()
        entries = [ImageEntry(*entry) for entry in packed["image_paths"] if entry[1] == kind]
        if len(starts) != len(entries):
            told = f"{len(starts)} start tokens {token} for {len(entries)} image paths"
            raise ValueError(f"pack {number}: {told}")
        spans = zip(starts, entries, strict=True)
        images += [ImageSpan(start, start + rows, entry, name) for start, entry in spans]
    segments = []
    bounds = itertools.pairwise(packed["cu_seqlens"].tolist())
    for source, (start, end) in itertools.zip_longest(pieces, bounds):
        trained = packed["loss_masks"][start:end].numpy() > 0
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)) + start
        loss = [(a, b) for a, b in edges.reshape(-1, 2).tolist()]
        labels = (packed["labels"][a:b].tolist() for a, b in loss)
        text = "".join(map(template.tokenizer.decode, labels))
        within = sorted(image for image in images if start <= image.start < end)
        segments.append(Segment(start, end, source, loss, within, text))
    as_viewed = packed.get("as_viewed", False)
    return PackDescription(number, len(packs), packs.max_length, segments, as_viewed)


def pack_lines(pack: PackDescription) -> Iterator[str]:
    """Yield the pack as a table, line by line."""
    yield pack.title
    widths = [max(map(len, column)) for column in zip(*pack.table, strict=True)]
    for row in pack.table:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def draw_pack(pack: PackDescription, *, narrow: bool = False) -> style.Figure:
    """Draw the pack as lines of 256 tokens, coloured by what they are, and a thumbnail per image.

    A black bar with a number marks where a sample begins; its thumbnails have the same number.

    Args:
        pack: what is drawn.
        narrow: draw lines of 96 tokens, for a telephone.
    """
    layout = _NARROW if narrow else _WIDE
    a_line = layout.tokens_a_line
    length = max(pack.capacity, pack.segments[-1].end)
    firsts = range(0, length, a_line)
    images = [(number, i) for number, segment in enumerate(pack.segments) for i in segment.images]
    below = layout.top + len(firsts) * _LINE
    width = _LEFT + layout.width + 0.16
    height = below + -(-len(images) // layout.thumbnails_a_row) * 1.34 + 0.14
    sheet, axes = style.figure(width, height, pack.title.capitalize())
    rows = layout.legend_rows
    style.legend(axes, (0.2, 0.5 + 0.1 * rows), _LOOKS, rows=rows)
    # In tokens across and lines down.
    over, down = layout.width / width, len(firsts) * _LINE / height
    where = (_LEFT / width, 1 - below / height, over, down)
    lines = sheet.add_axes(where, xlim=(0, a_line), ylim=(len(firsts), 0), frame_on=False)
    lines.set(xticks=[], yticks=np.arange(len(firsts)) + 0.38, yticklabels=firsts)
    lines.tick_params(length=0, labelsize=8, labelcolor=style.INK)
    paint = functools.partial(_paint, lines, layout)
    paint((0, length), "padding or room")
    for number, segment in enumerate(pack.segments):
        if segment.source is not None:
            paint((segment.start, segment.end), "text")
            # The number stands between the bar and the first image, if there is room for it.
            line_end = segment.start // a_line * a_line + a_line
            text_end = min([line_end, segment.end, *(image.start for image in segment.images)])
            paint((segment.start, text_end), "text", name=str(number))
        for span in segment.loss:
            paint(span, "trained")
        line, column = divmod(segment.start, a_line)
        bar = (column - 0.3, line - 0.13, 0.6, 1.02)
        style.box(lines, bar, facecolor=style.INK, clip_on=False)
    for place, (number, image) in enumerate(images):
        row, column = divmod(place, layout.thumbnails_a_row)
        x, y = _LEFT + column * 1.15, below + 0.1 + row * 1.34
        below_it = (x, y + _THUMBNAIL + 0.11)
        style.label(axes, below_it, f"{number}: {image.name}", size=8, width=_THUMBNAIL)
        if (small := _thumbnail(image.entry, as_viewed=pack.as_viewed)) is None:
            style.box(axes, (x, y, _THUMBNAIL, _THUMBNAIL), **_LOOKS["unreadable"])
            paint((image.start, image.end), "unreadable")
        else:
            style.show(axes, small, (x, y), _THUMBNAIL)
            paint((image.start, image.end), image.kind, name=image.name)
    return sheet


def _paint(
    lines: style.Axes, layout: _Layout, span: tuple[int, int], look: str, *, name: str = ""
) -> None:
    """Colour the tokens ``[start, end)``, which may lie on several lines, and write the name.

    The name is on the line of the middle token, which has the most space.
    """
    start, end = span
    a_line = layout.tokens_a_line
    for line in range(start // a_line, -(-end // a_line)):
        # The axes cut off what lies before or after this line.
        place = (start - line * a_line, line, end - start, 0.76)
        style.box(lines, place, **_LOOKS[look])
    line = (start + end) // 2 // a_line
    left, right = np.clip(np.array([start, end]) - line * a_line, 0, a_line)
    room = (right - left - 2) * layout.width / a_line
    style.label(lines, (left + 1, line + 0.38), name, size=8, width=room)


def _thumbnail(entry: ImageEntry, *, as_viewed: bool) -> Image.Image | None:
    try:
        picture = read_rgb(entry.path, as_viewed=as_viewed)
    except BrokenImageError:  # shown in the picture as unreadable
        return None
    if entry.kind == PATCH_ITEM_TYPE and entry.window is not None:
        plan = plan_crops(*picture.size)
        picture = cut(canvas_image(full_image(picture, plan), plan), entry.window)
    picture.thumbnail((160, 160))
    return picture
