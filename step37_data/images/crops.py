"""Where the crops of a picture lie, and what stands for it in the text: from its size alone.

Step-3.7 sees a picture as one full image of 728×728 and, unless the picture is small and roughly
square, a grid of crops of 504×504, cut from a *canvas*: the picture resized so that whole windows
cover it.

    picture ──(pad to a square)──(cap at 3024)──▶ full image ──▶ 728 × 728
                                                      └──▶ canvas ──▶ windows ──▶ 504 × 504 each

A picture of 500×333 pixels is longer than 1.5 times its height, so its window is 333 pixels wide.
1.5 windows fit across, which becomes two: the canvas is 666×333, the windows begin at x = 0 and
x = 333. Its text is two crops of 83 tokens and a full image of 171: 337 tokens.

Nothing here looks at pixels; ``step37_data.images.crop_pixels`` does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from step37_data.tokens import (
    IMAGE_END_TOKEN,
    IMAGE_ITEM_TYPE,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKEN_COUNT,
    PATCH_END_TOKEN,
    PATCH_ITEM_TYPE,
    PATCH_NEWLINE_TOKEN,
    PATCH_START_TOKEN,
    PATCH_TOKEN_COUNT,
)

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
# Padding to a square turns a file of some hundred bytes into side² · 3: 768 MiB at this side.
_MAX_SQUARE_SIDE = 16384

Window = tuple[int, int, int, int]
"""A rectangle in pixels: x, y, width, height."""

ImageEntry = tuple[str, int] | tuple[str, int, Window | None]
"""What ``image_paths`` holds: path, item type and, of a picture seen in crops, the window.

The window of a crop lies on the canvas, that of the full image is ``CropPlan.full_window``. Without
one, the whole file is meant, as it is.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropPlan:
    """How a picture of one size is seen. Sizes are (width, height) in pixels.

    Attributes:
        size: of the picture.
        padded_size: of the picture in the top left corner of a black square; ``size`` unless the
            picture is thin and tiny.
        full_size: of the full image before it is resized to 728×728: ``padded_size``, at most 3024
            a side.
        canvas_size: what ``full_size`` is resized to for the crops; None if there are none.
        windows: x, y, width, height of each crop on the canvas, row by row. A window that reaches
            beyond the canvas is black there.
        newline_mask: per crop, whether ``<patch_newline>`` follows it: after every row but the
            last.
    """

    size: tuple[int, int]
    padded_size: tuple[int, int]
    full_size: tuple[int, int]
    canvas_size: tuple[int, int] | None
    windows: tuple[Window, ...]
    newline_mask: tuple[bool, ...]

    @property
    def full_window(self) -> Window:
        """The full image as a window of itself."""
        return (0, 0, *self.full_size)

    @property
    def num_tokens(self) -> int:
        """Tokens that stand for the picture in the text, start and end tokens included."""
        crops = len(self.windows) * (PATCH_TOKEN_COUNT + 2) + sum(self.newline_mask)
        return crops + IMAGE_TOKEN_COUNT + 2


def plan_crops(width: int, height: int) -> CropPlan:
    """Plan the crops of a picture of ``width`` × ``height`` pixels, as the model was trained.

    The comparisons are made in double precision on purpose: 330 / 150 - 2 exceeds 0.2 there, so
    330 pixels are three windows of 150, though 30 / 150 does not exceed it.

    Raises:
        ValueError: a side is below 1, or the picture is so thin that nothing of its shorter side
            is left at 3024, or that the square around it would take more than 768 MiB.
    """
    if width < 1 or height < 1:
        raise ValueError(f"picture: expected at least 1×1 pixels, got {width}×{height}")
    padded = _padded_size(width, height)
    if padded != (width, height) and padded[0] > _MAX_SQUARE_SIDE:
        raise ValueError(
            f"picture: {width}×{height} pixels are too thin: the square around them would be of "
            f"{padded[0]} pixels a side, more than {_MAX_SQUARE_SIDE}"
        )
    full = _capped_size(*padded)
    if min(full) < 1:
        raise ValueError(
            f"picture: {width}×{height} pixels are too thin: at {MAX_SIDE} pixels on the longer "
            "side nothing is left of the shorter one"
        )
    window = _window_side(max(full), min(full))
    canvas: tuple[int, int] | None = None
    windows: tuple[Window, ...] = ()
    newline_mask: tuple[bool, ...] = ()
    if window is not None:
        canvas = (_canvas_side(full[0], window), _canvas_side(full[1], window))
        # A side of the canvas is a multiple of the window, or less than one window.
        lefts = range(0, canvas[0], window)
        tops = range(0, canvas[1], window)
        windows = tuple((x, y, window, window) for y in tops for x in lefts)
        newline_mask = tuple(x == lefts[-1] and y != tops[-1] for y in tops for x in lefts)
    return CropPlan(
        size=(width, height),
        padded_size=padded,
        full_size=full,
        canvas_size=canvas,
        windows=windows,
        newline_mask=newline_mask,
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


def token_runs(
    newline_mask: Sequence[bool],
    *,
    image_token: str = IMAGE_TOKEN,
    image_start_token: str = IMAGE_START_TOKEN,
    image_end_token: str = IMAGE_END_TOKEN,
    patch_start_token: str = PATCH_START_TOKEN,
    patch_end_token: str = PATCH_END_TOKEN,
    image_token_count: int = IMAGE_TOKEN_COUNT,
    patch_token_count: int = PATCH_TOKEN_COUNT,
) -> list[tuple[str, int]]:
    """What stands for a picture in the text: its crops row by row, then the full image.

    Args:
        newline_mask: of the picture's plan.
        image_token, image_start_token, image_end_token, patch_start_token, patch_end_token: names.
        image_token_count, patch_token_count: ``image_token`` per full image and per crop.

    Returns:
        ``(token, how often in a row)``; two crops side by side, without the end, are
        ``<patch_start>`` 1, ``<im_patch>`` 81, ``<patch_end>`` 1, ``<patch_start>`` 1, …
    """
    runs: list[tuple[str, int]] = []
    for newline in newline_mask:
        runs += [(patch_start_token, 1), (image_token, patch_token_count), (patch_end_token, 1)]
        if newline:
            runs.append((PATCH_NEWLINE_TOKEN, 1))
    return [*runs, (image_start_token, 1), (image_token, image_token_count), (image_end_token, 1)]


def token_layout(plan: CropPlan) -> list[str]:
    """The names of the ``plan.num_tokens`` tokens that stand for a picture, one after the other."""
    return [token for token, count in token_runs(plan.newline_mask) for _ in range(count)]


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) from the header of an image file; no pixel is decoded.

    Raises:
        Exception: Pillow cannot read the header; ``step37_data.images.decode.DECODE_ERRORS`` lists
            what that is known to raise.
    """
    # Imported here: planning needs no Pillow.
    from step37_data.images.decode import open_image

    with open_image(path) as image:
        return image.size


def plan_file(path: str) -> CropPlan:
    """Plan the crops of an image file from its header.

    A file that is unreadable, or too thin to plan, is planned as the black picture that decoding
    puts in its place; decoding also reports it.
    """
    from step37_data.images.decode import BROKEN_SIZE, DECODE_ERRORS

    try:
        return plan_crops(*picture_size(path))
    except DECODE_ERRORS as error:
        logger.debug("image %s is planned as unreadable: %s", path, error)
        return plan_crops(*BROKEN_SIZE)


class SampleImages:
    """The images of a sample, dealt out to its placeholders in their order.

    Attributes:
        given: ``(path, item type)`` of the sample.
    """

    def __init__(self, given: Sequence[tuple[str, int]]) -> None:
        self.given: list[ImageEntry] = list(given)
        self._left = {
            wanted: [path for path, kind in reversed(given) if kind == wanted]
            for wanted in (IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE)
        }
        self._dealt: list[ImageEntry] = []

    @property
    def seen(self) -> list[ImageEntry]:
        """What the placeholders stand for, and images that no placeholder was left for."""
        surplus = [(path, kind) for kind, paths in self._left.items() for path in reversed(paths)]
        return [*self._dealt, *surplus]

    def see_whole(self, kind: int) -> None:
        """Deal out the next file of ``kind`` as it is; where none is left, none."""
        if self._left[kind]:
            self._dealt.append((self._left[kind].pop(), kind))

    def see_in_crops(self) -> tuple[bool, ...]:
        """Deal out the windows of the next image, where one is left; the mask of its newlines."""
        if not self._left[IMAGE_ITEM_TYPE]:
            return ()
        path = self._left[IMAGE_ITEM_TYPE].pop()
        plan = plan_file(path)
        self._dealt += [(path, PATCH_ITEM_TYPE, window) for window in plan.windows]
        self._dealt.append((path, IMAGE_ITEM_TYPE, plan.full_window))
        return plan.newline_mask
