"""Plans where the crops of a picture are and how many tokens it takes, from its size alone.

Step-3.7 sees a picture as one full image of 728×728 and, unless the picture is small and roughly
square, a grid of crops of 504×504, cut from a *canvas*: the picture resized so that whole windows
cover it.

    picture ──(pad to a square)──(cap at 3024)──▶ full image ──▶ 728 × 728
                                                      └──▶ canvas ──▶ windows ──▶ 504 × 504 each

A picture of 500×333 pixels is longer than 1.5 times its height, so its window is 333 pixels wide.
1.5 windows fit across, which becomes two: the canvas is 666×333, the windows begin at x = 0 and
x = 333. Its text is two crops of 83 tokens and a full image of 171: 337 tokens.

This module reads no pixels; ``step37_data.images.crop_pixels`` cuts the crops.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from step37_data.common.image_entry import IMAGE_TOKEN_COUNT, PATCH_TOKEN_COUNT, ImageFile, Window

logger = logging.getLogger(__name__)

IMAGE_SIZE = 728
CROP_SIZE = 504
MAX_SIDE = 3024

_TINY_SIDE = 32
_THIN = 4
_SMALL_LONG_SIDE = 728
_SMALL_ELONGATED = 1.5
_ELONGATED = 4
_ROUND_UP_ABOVE = 0.2
# Padding to a square takes side² · 3 bytes, even for a tiny file: 768 MiB at this side.
_MAX_SQUARE_SIDE = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class CropPlan:
    """The full image and the crops for a picture of one size. Sizes are (width, height) in pixels.

    Attributes:
        size: the picture's size.
        padded_size: the size after padding with black to a square, which only thin and tiny
            pictures need; else ``size``.
        full_size: the size of the full image before it is resized to 728×728: ``padded_size``, but
            at most 3024 a side.
        canvas_size: the size to which the full image is resized before crops are cut.
        windows: x, y, width, height of each crop on the canvas, row by row. A part of a window
            outside the canvas is black.
        newline_mask: for each crop, whether ``<patch_newline>`` follows it: at the end of every
            row but the last.
    """

    size: tuple[int, int]
    padded_size: tuple[int, int]
    full_size: tuple[int, int]
    canvas_size: tuple[int, int]
    windows: tuple[Window, ...] = ()
    newline_mask: tuple[bool, ...] = ()

    @property
    def full_window(self) -> Window:
        """The window that covers the whole full image."""
        return (0, 0, *self.full_size)

    @property
    def canvas_reach(self) -> tuple[int, int]:
        """The size of the canvas together with the parts of windows outside it."""
        x, y, width, height = self.windows[-1] if self.windows else self.full_window
        return max(self.canvas_size[0], x + width), max(self.canvas_size[1], y + height)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the picture in the text, including start and end tokens."""
        crops = len(self.windows) * (PATCH_TOKEN_COUNT + 2) + sum(self.newline_mask)
        return crops + IMAGE_TOKEN_COUNT + 2


def plan_crops(width: int, height: int) -> CropPlan:
    """Plan the crops of a picture of ``width`` × ``height`` pixels, as the model was trained.

    Comparisons are made in double precision, as in the model's own code. There 330 / 150 - 2 is
    above 0.2, so 330 pixels make three windows of 150, although 30 / 150 is not above 0.2.

    Raises:
        ValueError: a side is below 1; or the picture is so thin that its shorter side vanishes when
            the longer is reduced to 3024, or that padding it would take more than 768 MiB.
    """
    if width < 1 or height < 1:
        raise ValueError(f"picture: expected at least 1×1 pixels, got {width}×{height}")
    padded = _padded_size(width, height)
    if padded != (width, height) and padded[0] > _MAX_SQUARE_SIDE:
        square = f"the square is of {padded[0]} pixels a side, more than {_MAX_SQUARE_SIDE}"
        raise ValueError(f"picture: {width}×{height} pixels are too thin: {square}")
    full = _capped_size(*padded)
    if min(full) < 1:
        left = f"at {MAX_SIDE} pixels a side nothing is left of the shorter one"
        raise ValueError(f"picture: {width}×{height} pixels are too thin: {left}")
    whole = CropPlan(size=(width, height), padded_size=padded, full_size=full, canvas_size=full)
    window = _window_side(max(full), min(full))
    if window is None:
        return whole
    canvas = (_canvas_side(full[0], window), _canvas_side(full[1], window))
    # A side of the canvas is a multiple of the window, or less than one window.
    lefts = range(0, canvas[0], window)
    tops = range(0, canvas[1], window)
    return replace(
        whole,
        canvas_size=canvas,
        windows=tuple((x, y, window, window) for y in tops for x in lefts),
        newline_mask=tuple(x == lefts[-1] and y != tops[-1] for y in tops for x in lefts),
    )


def plan_whole(width: int, height: int) -> CropPlan:
    """Make the plan of a file that is used without crops: one window that covers all of it."""
    size = (width, height)
    return CropPlan(
        size=size, padded_size=size, full_size=size, canvas_size=size, windows=((0, 0, *size),)
    )


def _padded_size(width: int, height: int) -> tuple[int, int]:
    ratio = width / height
    if min(width, height) < _TINY_SIDE and (ratio > _THIN or ratio < 1 / _THIN):
        return max(width, height), max(width, height)
    return width, height


def _capped_size(width: int, height: int) -> tuple[int, int]:
    if max(width, height) <= MAX_SIDE:
        return width, height
    scale = MAX_SIDE / max(width, height)
    return int(width * scale), int(height * scale)


def _window_side(long: int, short: int) -> int | None:
    ratio = long / short
    if long <= _SMALL_LONG_SIDE:
        return short if ratio > _SMALL_ELONGATED else None
    return min(short, CROP_SIZE) if ratio > _ELONGATED else CROP_SIZE


def _canvas_side(side: int, window: int) -> int:
    ratio = side / window
    if ratio < 1:
        return side
    whole = int(ratio)
    return window * (whole + 1 if ratio - side // window > _ROUND_UP_ABOVE else whole)


def picture_size(path: ImageFile, *, as_viewed: bool = False) -> tuple[int, int]:
    """Read (width, height) of a picture from the header of its file; no pixel is decoded.

    Args:
        path: of the image file, or its content.
        as_viewed: ``ImageOptions.as_viewed`` with which the picture will be read: if EXIF turns it
            by 90 degrees, width and height are exchanged.

    Raises:
        BrokenImageError: Pillow cannot read the header.
    """
    # Imported here, so that plan_crops works without Pillow.
    from step37_data.images.decode import open_image, shown_size

    with open_image(path) as image:
        return shown_size(image, as_viewed=as_viewed)


def plan_file(path: ImageFile, *, as_viewed: bool = False) -> CropPlan:
    """Plan the crops of an image file from its header.

    For a file that is unreadable or too thin, it plans the black picture with which decoding
    replaces it; decoding also reports it.

    Args:
        path: of the image file, or its content.
        as_viewed: ``ImageOptions.as_viewed`` with which the picture will be read: width and height
            depend on it.
    """
    from step37_data.images.decode import BROKEN_SIZE

    try:
        return plan_crops(*picture_size(path, as_viewed=as_viewed))
    except ValueError as error:  # includes BrokenImageError
        logger.debug("image %s is planned as unreadable: %s", path, error)
        return plan_crops(*BROKEN_SIZE)
