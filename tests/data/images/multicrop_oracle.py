"""The rule of the crops, step by step and with Pillow, for the tests: slow, and nothing of ours."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from PIL import Image

BILINEAR = Image.Resampling.BILINEAR


class Seen(NamedTuple):
    """How a picture is seen.

    ``full``: the picture after padding and cap; ``crops``: the windows, before their last resize.
    """

    full: Image.Image
    crops: list[Image.Image]
    canvas_size: tuple[int, int] | None
    windows: list[tuple[int, int, int, int]]
    newline_mask: list[bool]
    tokens: list[str]


def starts(dim: int, window: int) -> list[int]:
    """Step 6 along one axis."""
    count = 1 if dim <= window else ceil((dim - window) / window + 1)
    result = [window * i for i in range(count)]
    if count > 1 and result[-1] + window > dim:
        result[-1] = dim - window
    return result


def canvas_side(dim: int, window: int) -> int:
    """Step 5 along one axis."""
    r = dim / window
    if r < 1:
        return dim
    return window * (int(r) + 1 if r - dim // window > 0.2 else int(r))


def window_side(long: int, short: int) -> int:
    """Step 4; 0 is none."""
    if long <= 728:
        return short if long / short > 1.5 else 0
    return min(short, 504) if long / short > 4 else 504


def see(picture: Image.Image) -> Seen:
    """Steps 1 to 7."""
    w, h = picture.size
    if min(w, h) < 32 and (w / h > 4 or w / h < 1 / 4):
        square = Image.new("RGB", (max(w, h), max(w, h)), 0)
        square.paste(picture, (0, 0))
        picture = square
        w, h = picture.size
    before_cap = (w, h)
    if max(w, h) > 3024:
        scale = 3024 / max(w, h)
        w, h = int(w * scale), int(h * scale)
    full = picture.resize((w, h), BILINEAR)

    window = window_side(max(w, h), min(w, h))
    canvas_size = None
    windows: list[tuple[int, int, int, int]] = []
    crops: list[Image.Image] = []
    mask: list[bool] = []
    tokens: list[str] = []
    if window:
        canvas_size = (canvas_side(w, window), canvas_side(h, window))
        canvas = full
        if canvas_size != before_cap:
            canvas = full.resize(canvas_size, BILINEAR)
        xs, ys = starts(canvas_size[0], window), starts(canvas_size[1], window)
        for row, y in enumerate(ys):
            for column, x in enumerate(xs):
                windows.append((x, y, window, window))
                crops.append(canvas.crop((x, y, x + window, y + window)))
                mask.append(column == len(xs) - 1 and row < len(ys) - 1)
                tokens += ["<patch_start>"] + ["<im_patch>"] * 81 + ["<patch_end>"]
                if mask[-1]:
                    tokens.append("<patch_newline>")
    tokens += ["<im_start>"] + ["<im_patch>"] * 169 + ["<im_end>"]
    return Seen(full, crops, canvas_size, windows, mask, tokens)
