"""One pack, described and drawn: whose tokens are where, what is trained, which image is which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from step37_data.images.crop_pixels import canvas_image, cut, full_image
from step37_data.images.crops import Window, plan_crops
from step37_data.images.decode import BrokenImageError, read_rgb
from step37_data.inspect import style
from step37_data.template import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_RIGHT, _THUMBNAIL, _CAPTION, _PIXELS = 0.16, 1.06, 0.22, 160


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpan:
    """Where the rows of one image stand in the pack: ``[start, end)`` in tokens.

    Attributes:
        window: of a picture seen in crops, else None.
    """

    start: int
    end: int
    path: str
    kind: int
    window: Window | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One sub-sequence of a pack: ``[start, end)`` in tokens.

    Attributes:
        source: ``(data set, index in it)``, None for padding.
        loss: ``[start, end)`` of every run of positions whose label is trained.
        images: its images and crops, in the order of their tokens.
    """

    start: int
    end: int
    source: tuple[int, int] | None
    loss: tuple[tuple[int, int], ...]
    images: tuple[ImageSpan, ...]

    @property
    def loss_tokens(self) -> int:
        return sum(end - start for start, end in self.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackDescription:
    """A pack: its segments, and how full it is.

    Attributes:
        index: of the pack.
        capacity: tokens that fit.
        used: tokens of samples, without padding.
    """

    index: int
    capacity: int
    used: int
    segments: tuple[Segment, ...]

    @property
    def fill(self) -> float:
        """Share of the capacity in use; above 1 for an oversize sample kept alone."""
        return self.used / self.capacity


def describe_pack(
    packed: Mapping[str, Any],
    pieces: Sequence[tuple[int, int]],
    *,
    index: int,
    capacity: int,
    start_tokens: Mapping[int, tuple[int, int]],
) -> PackDescription:
    """Find segments, trained positions and images in a packed dictionary.

    Args:
        packed: what ``pack_samples`` gives.
        pieces: ``(data set, index)`` of its samples, in order.
        index, capacity: of the pack.
        start_tokens: ``{item type: (start token id, rows)}``.

    Raises:
        ValueError: start tokens and image paths differ in number.
    """
    tokens = packed["tokens"].numpy()
    bounds = packed["cu_seqlens"].tolist()
    images: list[ImageSpan] = []
    for kind, (token, rows) in start_tokens.items():
        starts = np.flatnonzero(tokens == token) + 1
        entries = [entry for entry in packed["image_paths"] if entry[1] == kind]
        if len(starts) != len(entries):
            raise ValueError(
                f"pack {index}: {len(starts)} start tokens {token} for {len(entries)} image paths"
            )
        images += [
            ImageSpan(
                start=start,
                end=start + rows,
                path=path,
                kind=kind,
                window=window[0] if window else None,
            )
            for start, (path, _, *window) in zip(starts.tolist(), entries, strict=True)
        ]
    images.sort(key=lambda image: image.start)
    segments = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        trained = packed["loss_masks"][start:end].numpy() > 0
        edges = np.flatnonzero(np.diff(np.concatenate(([False], trained, [False])).astype(int)))
        segments.append(
            Segment(
                start=start,
                end=end,
                source=pieces[number] if number < len(pieces) else None,
                loss=tuple((start + a, start + b) for a, b in edges.reshape(-1, 2).tolist()),
                images=tuple(image for image in images if start <= image.start < end),
            )
        )
    return PackDescription(
        index=index,
        capacity=capacity,
        used=bounds[len(pieces)],
        segments=tuple(segments),
    )


PACK_COLUMNS = ("segment", "sample", "tokens", "trained", "images", "text trained")


def pack_rows(pack: PackDescription, trained: Sequence[str]) -> list[tuple[str, ...]]:
    """A row of :data:`PACK_COLUMNS` for each segment; ``trained`` holds its text."""
    return [
        (
            str(number),
            "padding" if segment.source is None else str(segment.source[1]),
            f"{segment.start}–{segment.end}",
            " ".join(f"{a}–{b}" for a, b in segment.loss),
            ", ".join(f"{_file_name(image)} {image.start}–{image.end}" for image in segment.images),
            repr(text)[1:-1],
        )
        for number, (segment, text) in enumerate(zip(pack.segments, trained, strict=True))
    ]


def pack_title(pack: PackDescription, packs: int) -> str:
    loss = sum(segment.loss_tokens for segment in pack.segments)
    return (
        f"pack {pack.index} of {packs}: {pack.used} of {pack.capacity} tokens "
        f"({pack.fill:.1%}), {pack.segments[-1].end} with padding, {loss} trained"
    )


def pack_lines(pack: PackDescription, packs: int, trained: Sequence[str]) -> Iterator[str]:
    """The pack as a table, line by line."""
    yield pack_title(pack, packs)
    rows = [PACK_COLUMNS, *pack_rows(pack, trained)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(PACK_COLUMNS) - 1)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]]).rstrip()


def draw_pack(pack: PackDescription) -> Figure:
    """The pack as lines of 256 tokens, coloured by what they are, and a thumbnail per image.

    A black bar begins a sample, with its number; the thumbnails carry the same number.
    """
    length = max(pack.capacity, pack.segments[-1].end)
    lines = -(-length // TOKENS_A_LINE)
    images = [(n, image) for n, segment in enumerate(pack.segments) for image in segment.images]
    a_row = int(WIDTH // (_THUMBNAIL + 0.09))
    cell = _THUMBNAIL + _CAPTION
    below = TOP + lines * (LINE + GAP) + 0.1
    sheet, axes = style.figure(
        LEFT + WIDTH + _RIGHT, below + -(-len(images) // a_row) * (cell + 0.06) + 0.04
    )
    samples = sum(segment.source is not None for segment in pack.segments)
    title = f"Pack {pack.index}: {samples} samples, {pack.used} of {pack.capacity} tokens"
    style.label(axes, LEFT, 0.24, f"{title} ({pack.fill:.1%})", 12, weight="bold")
    style.legend(axes, LEFT, 0.56, list(_LOOKS.items()))

    thumbnails = [_thumbnail(image) for _, image in images]
    broken = {image.path for (_, image), small in zip(images, thumbnails, strict=True) if not small}
    for line in range(lines):
        style.label(
            axes, LEFT - 0.1, cell_at(line * TOKENS_A_LINE)[1] + LINE / 2,
            str(line * TOKENS_A_LINE), 8, ha="right", color=style.FRAME,
        )  # fmt: skip
    for start, end, kind, name in _spans(pack, length, broken):
        pieces = list(_pieces(start, end))
        longest = max(pieces, key=lambda piece: piece[2])
        for x, y, width in pieces:
            style.box(axes, x, y, width, LINE, **_LOOKS[kind])
            if name and (x, y, width) == longest:
                style.label(axes, x + 0.04, y + LINE / 2, style.fit(name, width - 0.08, 8), 8)
    _number_samples(axes, pack)
    for place, ((number, image), small) in enumerate(zip(images, thumbnails, strict=True)):
        x = LEFT + place % a_row * (_THUMBNAIL + 0.09)
        y = below + place // a_row * (cell + 0.06)
        if small is None:
            style.box(axes, x, y, _THUMBNAIL, _THUMBNAIL, **_LOOKS["unreadable"])
        else:
            scale = _THUMBNAIL / max(small.size)
            width, height = small.width * scale, small.height * scale
            style.show(axes, small, x, y + _THUMBNAIL - height, width, height)
        name = style.fit(f"{number}: {_file_name(image)}", _THUMBNAIL, 8)
        style.label(axes, x, y + _THUMBNAIL + 0.11, name, 8)
    return sheet


def _spans(
    pack: PackDescription, length: int, broken: set[str]
) -> Iterator[tuple[int, int, str, str]]:
    """``(start, end, look, name)``, later ones over earlier ones."""
    yield 0, length, "padding or room", ""
    kinds = {IMAGE_ITEM_TYPE: "image", PATCH_ITEM_TYPE: "crop"}
    for segment in pack.segments:
        if segment.source is not None:
            yield segment.start, segment.end, "text", ""
        for start, end in segment.loss:
            yield start, end, "trained", ""
        for image in segment.images:
            kind = "unreadable" if image.path in broken else kinds[image.kind]
            yield image.start, image.end, kind, "" if kind == "unreadable" else _file_name(image)


def _number_samples(axes: Axes, pack: PackDescription) -> None:
    for number, segment in enumerate(pack.segments):
        x, y = cell_at(segment.start)
        style.box(axes, x - 0.012, y - 0.05, 0.024, LINE + 0.1, facecolor=style.INK)
        # Between the bar and the first image there is room for a number, if the text is long.
        first = segment.images[0].start if segment.images else segment.end
        room = next(_pieces(segment.start, max(first, segment.start + 1)))[2]
        if segment.source is not None and style.width_of(str(number), 8) < room - 0.06:
            style.label(axes, x + 0.04, y + LINE / 2, str(number), 8, weight="bold")


def _pieces(start: int, end: int) -> Iterator[tuple[float, float, float]]:
    """Left, top and width of a span on each line that it lies on."""
    while start < end:
        stop = min(end, (start // TOKENS_A_LINE + 1) * TOKENS_A_LINE)
        x, y = cell_at(start)
        yield x, y, (stop - start) * WIDTH / TOKENS_A_LINE
        start = stop


def cell_at(token: int) -> tuple[float, float]:
    """Left and top of a token, in inches."""
    line, column = divmod(token, TOKENS_A_LINE)
    return LEFT + column * WIDTH / TOKENS_A_LINE, TOP + line * (LINE + GAP)


def _file_name(image: ImageSpan) -> str:
    return image.path.replace("\\", "/").rpartition("/")[2]


def _thumbnail(image: ImageSpan) -> Image.Image | None:
    try:
        picture = read_rgb(image.path)
    except BrokenImageError:  # shown in the picture as unreadable
        return None
    if image.kind == PATCH_ITEM_TYPE and image.window is not None:
        plan = plan_crops(*picture.size)
        picture = cut(canvas_image(full_image(picture, plan), plan), image.window)
    picture.thumbnail((_PIXELS, _PIXELS))
    return picture
