"""One pack, described and drawn: whose tokens are where, what is trained, which image is which."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from step37_data.images.crop_pixels import canvas_image, cut, full_image
from step37_data.images.crops import Window, plan_crops
from step37_data.images.decode import DECODE_ERRORS, read_rgb
from step37_data.template import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE

_BACKGROUND, _INK, _FRAME = (255, 255, 255), (30, 30, 30), (120, 120, 120)
_TEXT, _LOSS, _IMAGE = (205, 208, 214), (70, 160, 90), (72, 118, 196)
_CROP, _PADDING, _BROKEN = (150, 96, 186), (240, 240, 240), (214, 60, 60)
_LEGEND = (
    ("text", _TEXT), ("trained", _LOSS), ("image", _IMAGE), ("crop", _CROP),
    ("padding or room", _PADDING), ("unreadable", _BROKEN),
)  # fmt: skip
_TOKENS_A_LINE, _TOKEN_WIDTH, _LINE_HEIGHT, _LINE_GAP = 256, 4, 20, 6
_MARGIN, _HEADER, _THUMBNAIL, _LABEL = 16, 44, 112, 14


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


def draw_pack(pack: PackDescription) -> Image.Image:
    """The pack as lines of 256 tokens, coloured by what they are, and a thumbnail per image."""
    length = max(pack.capacity, pack.segments[-1].end)
    lines = -(-length // _TOKENS_A_LINE)
    width = _TOKENS_A_LINE * _TOKEN_WIDTH + 2 * _MARGIN
    images = [(n, image) for n, segment in enumerate(pack.segments) for image in segment.images]
    a_row = (width - 2 * _MARGIN) // (_THUMBNAIL + 8)
    thumbnail_rows = -(-len(images) // a_row)
    tokens_height = lines * (_LINE_HEIGHT + _LINE_GAP)
    height = _HEADER + tokens_height + thumbnail_rows * (_THUMBNAIL + 2 * _LABEL) + 2 * _MARGIN
    picture = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default()
    samples = sum(segment.source is not None for segment in pack.segments)
    title = f"pack {pack.index}: {samples} samples, {pack.used} of {pack.capacity} tokens"
    draw.text((_MARGIN, 8), f"{title} ({pack.fill:.1%})", _INK, font)
    left = _MARGIN
    for name, colour in _LEGEND:
        draw.rectangle((left, 27, left + 10, 37), colour, _FRAME)
        draw.text((left + 15, 26), name, _INK, font)
        left += 30 + int(draw.textlength(name, font))

    thumbnails = [_thumbnail(image) for _, image in images]
    broken = {image.path for (_, image), small in zip(images, thumbnails, strict=True) if not small}
    colours = _token_colours(pack, lines * _TOKENS_A_LINE, length, broken)
    for line in range(lines):
        row = colours[line * _TOKENS_A_LINE : (line + 1) * _TOKENS_A_LINE]
        strip = Image.fromarray(row[None]).resize(
            (_TOKENS_A_LINE * _TOKEN_WIDTH, _LINE_HEIGHT), Image.Resampling.NEAREST
        )
        picture.paste(strip, (_MARGIN, _top(line)))
    for number, segment in enumerate(pack.segments):
        x, line = _place(segment.start)
        draw.line((x, _top(line) - 2, x, _top(line) + _LINE_HEIGHT + 1), _INK, 2)
        if segment.source is not None:
            draw.text((x + 4, _top(line) + 3), str(number), _INK, font)

    first = _HEADER + tokens_height + _MARGIN
    for place, ((number, image), small) in enumerate(zip(images, thumbnails, strict=True)):
        x = _MARGIN + place % a_row * (_THUMBNAIL + 8)
        y = first + place // a_row * (_THUMBNAIL + 2 * _LABEL)
        if small is None:
            draw.rectangle((x, y, x + _THUMBNAIL, y + _THUMBNAIL), None, _BROKEN, 2)
            draw.text((x + 6, y + 6), "unreadable", _BROKEN, font)
        else:
            picture.paste(small, (x, y))
        label = f"{number}: {image.path.replace(chr(92), '/').rpartition('/')[2]}"
        draw.text((x, y + _THUMBNAIL + 1), label[:18], _INK, font)
    return picture


def _token_colours(pack: PackDescription, count: int, length: int, broken: set[str]) -> np.ndarray:
    colours = np.full((count, 3), _BACKGROUND, dtype=np.uint8)
    colours[:length] = _PADDING
    kinds = {IMAGE_ITEM_TYPE: _IMAGE, PATCH_ITEM_TYPE: _CROP}
    for segment in pack.segments:
        if segment.source is not None:
            colours[segment.start : segment.end] = _TEXT
        for start, end in segment.loss:
            colours[start:end] = _LOSS
        for image in segment.images:
            colour = _BROKEN if image.path in broken else kinds[image.kind]
            colours[image.start : image.end] = colour
    return colours


def _top(line: int) -> int:
    return _HEADER + line * (_LINE_HEIGHT + _LINE_GAP)


def _place(token: int) -> tuple[int, int]:
    """Left edge in pixels, and line, of a token."""
    line, column = divmod(token, _TOKENS_A_LINE)
    return _MARGIN + column * _TOKEN_WIDTH, line


def _thumbnail(image: ImageSpan) -> Image.Image | None:
    try:
        picture = read_rgb(image.path)
    except DECODE_ERRORS:  # shown in the picture as unreadable
        return None
    if image.kind == PATCH_ITEM_TYPE and image.window is not None:
        plan = plan_crops(*picture.size)
        picture = cut(canvas_image(full_image(picture, plan), plan), image.window)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture
