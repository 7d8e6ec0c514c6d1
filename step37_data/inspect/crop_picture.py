"""One picture as it is seen in crops: described in lines, and drawn."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw

from step37_data.images.crop_pixels import canvas_image, full_image
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, plan_crops
from step37_data.images.decode import read_rgb
from step37_data.placeholders import token_runs
from step37_data.tokens import IMAGE_START_TOKEN, PATCH_NEWLINE_TOKEN

_LINE, _MARGIN, _OUTSIDE = (214, 60, 60), 8, (240, 240, 240)
_LARGEST_DRAWN = 1600


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


def draw_crops(path: str) -> Image.Image:
    """The canvas with its windows numbered, or the full image of a picture without crops."""
    picture = read_rgb(path)
    plan = plan_crops(*picture.size)
    shown = full_image(picture, plan)
    if plan.canvas_size is not None:
        shown = canvas_image(shown, plan)
    right = max([shown.width, *(x + width for x, _, width, _ in plan.windows)])
    bottom = max([shown.height, *(y + height for _, y, _, height in plan.windows)])
    scale = min(1.0, _LARGEST_DRAWN / max(right, bottom))

    def at(x: int, y: int) -> tuple[int, int]:
        return _MARGIN + round(x * scale), _MARGIN + round(y * scale)

    drawn = Image.new("RGB", tuple(side + _MARGIN for side in at(right, bottom)), _OUTSIDE)
    width, height = (max(1, round(side * scale)) for side in shown.size)
    drawn.paste(shown.resize((width, height)), at(0, 0))
    draw = ImageDraw.Draw(drawn)
    for number, (x, y, window_width, window_height) in enumerate(plan.windows):
        draw.rectangle((*at(x, y), *at(x + window_width, y + window_height)), None, _LINE, 2)
        left, top = at(x, y)
        draw.text((left + 6, top + 4), str(number), _LINE)
    return drawn


def _size(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
