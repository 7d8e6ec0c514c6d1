"""One picture as it is seen in crops: described in lines, and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PureWindowsPath

import numpy as np

from step37_data.images.crop_pixels import canvas_image, full_image
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, picture_size, plan_crops
from step37_data.images.decode import read_rgb
from step37_data.inspect import style
from step37_data.text.tokens import IMAGE_START_TOKEN, PATCH_NEWLINE_TOKEN, ImageTokens

# In inches.
MARGIN, TOP, LONG_SIDE = 0.16, 0.72, 9.6


def describe_picture(path: str) -> Iterator[str]:
    """Full image, canvas, windows and token layout of a picture file, line by line."""
    plan = plan_crops(*picture_size(path))
    yield f"picture   {path}: {_size(plan.size)} pixels"
    if plan.padded_size != plan.size:
        yield f"padded    {_size(plan.padded_size)}, the picture at the top left"
    yield f"full      {_size(plan.full_size)}, resized to {_size((IMAGE_SIZE, IMAGE_SIZE))}"
    if not plan.windows:
        yield "canvas    none, no crops"
    else:
        across = len({x for x, *_ in plan.windows})
        grid = f"{across} × {len(plan.windows) // across} windows"
        yield (
            f"canvas    {_size(plan.canvas_size)}, {grid} "
            f"of {_size(plan.windows[0][2:])}, each resized to {_size((CROP_SIZE, CROP_SIZE))}"
        )
    for number, (x, y, _, _) in enumerate(plan.windows):
        yield f"          crop {number} from x = {x}, y = {y}"
    crops = f"{len(plan.windows)} crops, {sum(plan.newline_mask)} newlines"
    yield f"tokens    {plan.num_tokens}: {crops}, 1 full image"
    runs = ImageTokens().token_runs(plan.newline_mask)
    tokens = " ".join(token if count == 1 else f"{count}×{token}" for token, count in runs)
    tokens = tokens.replace(f"{PATCH_NEWLINE_TOKEN} ", f"{PATCH_NEWLINE_TOKEN}\n")
    for line in tokens.replace(f" {IMAGE_START_TOKEN}", f"\n{IMAGE_START_TOKEN}").splitlines():
        yield f"          {line}"


def draw_crops(path: str) -> style.Figure:
    """The canvas with its crops framed and numbered, or the full image where there are none."""
    picture = read_rgb(path)
    plan = plan_crops(*picture.size)
    shown = full_image(picture, plan)
    if plan.windows:
        shown = canvas_image(shown, plan)
    corners = [(x + width, y + height) for x, y, width, height in plan.windows]
    right, bottom = np.max([shown.size, *corners], axis=0).tolist()
    scale = LONG_SIDE / max(right, bottom)
    width = max(right * scale, 4 - 2 * MARGIN)
    sheet, axes = style.figure(width + 2 * MARGIN, TOP + bottom * scale + MARGIN)
    crops = f"{len(plan.windows)} crops and the full image" if plan.windows else "no crops"
    title = f"{PureWindowsPath(path).name}: {_size(plan.size)}, {crops}"
    style.label(axes, MARGIN, 0.25, title, 11, width, weight="bold")
    style.label(axes, MARGIN, 0.5, f"{plan.num_tokens} tokens", 9, width)
    style.box(axes, MARGIN, TOP, right * scale, bottom * scale, facecolor=style.PADDING)
    style.show(axes, shown, MARGIN, TOP, shown.width * scale, shown.height * scale)
    frame = {"facecolor": "none", "edgecolor": style.BROKEN, "linewidth": 1.5}
    tag = {"facecolor": "white", "edgecolor": style.BROKEN, "pad": 3}
    for number, window in enumerate(plan.windows):
        x, y, across, down = np.multiply(window, scale).tolist()
        style.box(axes, MARGIN + x, TOP + y, across, down, **frame)
        style.label(axes, MARGIN + x + 0.05, TOP + y + 0.12, str(number), 10, bbox=tag)
    return sheet


def _size(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
