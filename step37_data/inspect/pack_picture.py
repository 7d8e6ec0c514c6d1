"""One pack, described and drawn: whose tokens are where, what is trained, which image is which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from step37_data.images.crop_pixels import canvas_image, cut, full_image
from step37_data.images.crops import plan_crops
from step37_data.images.decode import BrokenImageError, read_rgb
from step37_data.inspect import style
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.text.placeholders import ImageEntry
from step37_data.text.tokens import PATCH_ITEM_TYPE

_LOOKS: dict[str, dict[str, Any]] = {
    "text": {"facecolor": style.TEXT},
    "trained": {"facecolor": style.TRAINED},
    "image": {"facecolor": style.IMAGE},
    "crop": {"facecolor": style.CROP},
    "padding or room": {"facecolor": style.PADDING, "edgecolor": "#c9ccd2", "hatch": "////"},
    "unreadable": {"facecolor": "white", "edgecolor": style.BROKEN, "hatch": "xxxx"},
}
# All in inches. A line is 256 tokens: a caption of twelve is as wide as a finger.
TOKENS_A_LINE = 256
LEFT, TOP, LINE, GAP, WIDTH = 0.62, 0.92, 0.28, 0.09, 10.24
_TOKEN = WIDTH / TOKENS_A_LINE
_A_ROW, _THUMBNAIL, _PIXELS = 8, 1.06, 160


class ImageSpan(NamedTuple):
    """Where the rows of one image stand in the pack: ``[start, end)`` in tokens."""

    start: int
    end: int
    entry: ImageEntry

    @property
    def name(self) -> str:
        """Of the file, whatever system its path is of."""
        return PureWindowsPath(str(self.entry.path)).name


class Segment(NamedTuple):
    """One sub-sequence of a pack: ``[start, end)`` in tokens.

    Attributes:
        source: ``(data set, index in it)``, None for padding.
        loss: ``[start, end)`` of every run of positions whose label is trained.
        images: its images and crops, in the order of their tokens.
        text: what it trains.
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
        number: of the pack, among so many ``packs``.
        capacity: tokens that fit.
    """

    number: int
    packs: int
    capacity: int
    segments: list[Segment]

    @property
    def used(self) -> int:
        """Tokens of samples, without padding."""
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
        packs: of ``pack_samples``, from data sets that have a ``Step37MultimodalTemplate``.
        number: of the pack.

    Raises:
        ValueError: start tokens and image paths differ in number.
    """
    packed, pieces, template = packs[number], packs.pieces(number), packs.datasets[0].template
    images: list[ImageSpan] = []
    for kind, (_, token, rows) in template.kinds.items():
        starts = np.flatnonzero(packed["tokens"].numpy() == token) + 1
        entries = [ImageEntry(*entry) for entry in packed["image_paths"] if entry[1] == kind]
        if len(starts) != len(entries):
            told = f"{len(starts)} start tokens {token} for {len(entries)} image paths"
            raise ValueError(f"pack {number}: {told}")
        images += map(ImageSpan, starts.tolist(), (starts + rows).tolist(), entries)
    images.sort(key=lambda image: image.start)
    segments = []
    bounds = itertools.pairwise(packed["cu_seqlens"].tolist())
    for source, (start, end) in itertools.zip_longest(pieces, bounds):
        trained = packed["loss_masks"][start:end].numpy() > 0
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)) + start
        loss = [(a, b) for a, b in edges.reshape(-1, 2).tolist()]
        labels = (packed["labels"][a:b].tolist() for a, b in loss)
        text = "".join(map(template.tokenizer.decode, labels))
        within = [image for image in images if start <= image.start < end]
        segments.append(Segment(start, end, source, loss, within, text))
    return PackDescription(number, len(packs), packs.max_length, segments)


def pack_lines(pack: PackDescription) -> Iterator[str]:
    """The pack as a table, line by line."""
    yield pack.title
    widths = [max(map(len, column)) for column in zip(*pack.table, strict=True)]
    for row in pack.table:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def draw_pack(pack: PackDescription) -> style.Figure:
    """The pack as lines of 256 tokens, coloured by what they are, and a thumbnail per image.

    A black bar begins a sample, with its number; the thumbnails carry the same number.
    """
    length = max(pack.capacity, pack.segments[-1].end)
    lines = range(0, length, TOKENS_A_LINE)
    images = [(number, i) for number, segment in enumerate(pack.segments) for i in segment.images]
    below = TOP + len(lines) * (LINE + GAP) + 0.1
    height = below + -(-len(images) // _A_ROW) * 1.34 + 0.04
    sheet, axes = style.figure(LEFT + WIDTH + 0.16, height)
    style.label(axes, LEFT, 0.24, pack.title.capitalize(), 12, WIDTH, weight="bold")
    style.legend(axes, LEFT, 0.56, list(_LOOKS.items()))
    for token in lines:
        y = cell_at(token)[1] + LINE / 2
        style.label(axes, LEFT - 0.1, y, str(token), 8, ha="right", color=style.FRAME)
    _paint(axes, 0, length, "padding or room")
    for number, segment in enumerate(pack.segments):
        if segment.source is not None:
            _paint(axes, segment.start, segment.end, "text")
        for start, end in segment.loss:
            _paint(axes, start, end, "trained")
        x, y = cell_at(segment.start)
        style.box(axes, x - 0.012, y - 0.05, 0.024, LINE + 0.1, facecolor=style.INK)
        # Between the bar and the first image there is room for a number, if the text is long.
        line_end = segment.start // TOKENS_A_LINE * TOKENS_A_LINE + TOKENS_A_LINE
        text_end = min([line_end, segment.end, *(image.start for image in segment.images)])
        room = (text_end - segment.start) * _TOKEN - 0.06
        if segment.source is not None and style.width_of(str(number), 8) < room:
            style.label(axes, x + 0.04, y + LINE / 2, str(number), 8, weight="bold")
    for place, (number, image) in enumerate(images):
        x, y = LEFT + place % _A_ROW * 1.15, below + place // _A_ROW * 1.34
        style.label(axes, x, y + _THUMBNAIL + 0.11, f"{number}: {image.name}", 8, _THUMBNAIL)
        if (small := _thumbnail(image.entry)) is None:
            style.box(axes, x, y, _THUMBNAIL, _THUMBNAIL, **_LOOKS["unreadable"])
            _paint(axes, image.start, image.end, "unreadable")
        else:
            kind = "crop" if image.entry.kind == PATCH_ITEM_TYPE else "image"
            _paint(axes, image.start, image.end, kind, image.name)
            width, height = (side * _THUMBNAIL / max(small.size) for side in small.size)
            style.show(axes, small, x, y + _THUMBNAIL - height, width, height)
    return sheet


def _paint(axes: style.Axes, start: int, end: int, look: str, name: str = "") -> None:
    """A span on every line that it lies on, with its name where there is most room."""
    breaks = range(start // TOKENS_A_LINE * TOKENS_A_LINE + TOKENS_A_LINE, end, TOKENS_A_LINE)
    pieces = [(b - a, *cell_at(a)) for a, b in itertools.pairwise([start, *breaks, end])]
    for tokens, x, y in pieces:
        style.box(axes, x, y, tokens * _TOKEN, LINE, **_LOOKS[look])
    tokens, x, y = max(pieces, key=lambda piece: piece[0])
    style.label(axes, x + 0.04, y + LINE / 2, name, 8, tokens * _TOKEN - 0.08)


def cell_at(token: int) -> tuple[float, float]:
    """Left and top of a token, in inches."""
    line, column = divmod(token, TOKENS_A_LINE)
    return LEFT + column * _TOKEN, TOP + line * (LINE + GAP)


def _thumbnail(entry: ImageEntry) -> Image.Image | None:
    try:
        picture = read_rgb(entry.path)
    except BrokenImageError:  # shown in the picture as unreadable
        return None
    if entry.kind == PATCH_ITEM_TYPE and entry.window is not None:
        plan = plan_crops(*picture.size)
        picture = cut(canvas_image(full_image(picture, plan), plan), entry.window)
    picture.thumbnail((_PIXELS, _PIXELS))
    return picture
