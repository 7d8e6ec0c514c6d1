"""One picture as it is seen in crops: described in lines, and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from step37_data.images.crop_pixels import canvas_image, full_image
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, plan_crops
from step37_data.images.decode import read_rgb
from step37_data.inspect import style
from step37_data.placeholders import token_runs
from step37_data.tokens import IMAGE_START_TOKEN, PATCH_NEWLINE_TOKEN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches.
MARGIN, TOP, LONG_SIDE = 0.16, 0.72, 9.6


def describe_picture(path: str, size: tuple[int, int]) -> Iterator[str]:
    """Full image, canvas, windows and token layout of a picture of ``size``, line by line."""
    plan = plan_crops(*size)
    yield f"picture   {path}: {_size(plan.size)} pixels"
    if plan.padded_size != plan.size:
        yield f"padded    {_size(plan.padded_size)}, the picture at the top left"
    yield f"full      {_size(plan.full_size)}, resized to {_size((IMAGE_SIZE, IMAGE_SIZE))}"
    if plan.canvas_size is None:
        yield "canvas    none, no crops"
    else:
        across = len({x for x, *_ in plan.windows})
        down = len(plan.windows) // across
        yield (
            f"canvas    {_size(plan.canvas_size)}, {across} × {down} windows "
            f"of {_size(plan.windows[0][2:])}, each resized to {_size((CROP_SIZE, CROP_SIZE))}"
        )
    for number, (x, y, _, _) in enumerate(plan.windows):
        yield f"          crop {number} from x = {x}, y = {y}"
    yield (
        f"tokens    {plan.num_tokens}: {len(plan.windows)} crops, {sum(plan.newline_mask)} "
        "newlines, 1 full image"
    )
    line: list[str] = []
    for token, count in token_runs(plan.newline_mask):
        if token == IMAGE_START_TOKEN and line:
            yield "          " + " ".join(line)
            line = []
        line.append(token if count == 1 else f"{count}×{token}")
        if token == PATCH_NEWLINE_TOKEN:
            yield "          " + " ".join(line)
            line = []
    yield "          " + " ".join(line)


def draw_crops(path: str) -> Figure:
    """The canvas with its crops framed and numbered, or the full image where there are none."""
    picture = read_rgb(path)
    plan = plan_crops(*picture.size)
    shown = full_image(picture, plan)
    if plan.canvas_size is not None:
        shown = canvas_image(shown, plan)
    right = max([shown.width, *(x + width for x, _, width, _ in plan.windows)])
    bottom = max([shown.height, *(y + height for _, y, _, height in plan.windows)])
    scale = LONG_SIDE / max(right, bottom)
    crops = f"{len(plan.windows)} crops and the full image" if plan.windows else "no crops"
    title = f"{path.replace(chr(92), '/').rpartition('/')[2]}: {_size(plan.size)}, {crops}"
    width = max(2 * MARGIN + right * scale, 4.0)
    sheet, axes = style.figure(width, TOP + bottom * scale + MARGIN)
    title = style.fit(title, width - 2 * MARGIN, 11, "bold")
    style.label(axes, MARGIN, 0.25, title, 11, weight="bold")
    tokens = style.fit(f"{plan.num_tokens} tokens", width - 2 * MARGIN, 9)
    style.label(axes, MARGIN, 0.5, tokens)
    style.box(axes, MARGIN, TOP, right * scale, bottom * scale, facecolor=style.PADDING)
    small = shown.resize(tuple(max(1, round(side * scale * style.DPI)) for side in shown.size))
    style.show(axes, small, MARGIN, TOP, shown.width * scale, shown.height * scale)
    for number, (x, y, window_width, window_height) in enumerate(plan.windows):
        left, top = MARGIN + x * scale, TOP + y * scale
        frame = {"facecolor": "none", "edgecolor": style.BROKEN, "linewidth": 1.5}
        style.box(axes, left, top, window_width * scale, window_height * scale, **frame)
        tag = 0.12 + style.width_of(str(number), 10)
        style.box(axes, left, top, tag, 0.22, facecolor="white", edgecolor=style.BROKEN)
        style.label(axes, left + 0.06, top + 0.11, str(number), 10)
    return sheet


def _size(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
