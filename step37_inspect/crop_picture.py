"""Describes and draws how one picture is cut into crops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PureWindowsPath

from step37_data.images.crop_pixels import canvas_image, full_image
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, picture_size, plan_crops
from step37_data.images.decode import read_rgb
from step37_data.text.tokens import IMAGE_START_TOKEN, PATCH_NEWLINE_TOKEN, ImageTokens
from step37_inspect import style


def describe_picture(path: str, *, as_viewed: bool = False) -> Iterator[str]:
    """Yield full image, canvas, windows and token layout of a picture file, line by line.

    Args:
        path: of the image file.
        as_viewed: see the picture as viewers show it: turned by its EXIF, for example.
    """
    plan = plan_crops(*picture_size(path, as_viewed=as_viewed))
    yield f"picture   {path}: {_size(plan.size)} pixels"
    if plan.padded_size != plan.size:
        yield f"padded    {_size(plan.padded_size)}, the picture at the top left"
    yield f"full      {_size(plan.full_size)}, resized to {_size((IMAGE_SIZE, IMAGE_SIZE))}"
    if not plan.windows:
        yield "canvas    none, no crops"
    else:
        down = sum(plan.newline_mask) + 1
        windows = f"{len(plan.windows) // down} × {down} windows of {_size(plan.windows[0][2:])}"
        resized = f"each resized to {_size((CROP_SIZE, CROP_SIZE))}"
        yield f"canvas    {_size(plan.canvas_size)}, {windows}, {resized}"
    for number, (x, y, _, _) in enumerate(plan.windows):
        yield f"          crop {number} from x = {x}, y = {y}"
    crops = f"{len(plan.windows)} crops, {sum(plan.newline_mask)} newlines"
    yield f"tokens    {plan.num_tokens}: {crops}, 1 full image"
    runs = ImageTokens().token_runs(plan.newline_mask)
    tokens = " ".join(token if count == 1 else f"{count}×{token}" for token, count in runs)
    tokens = tokens.replace(f"{PATCH_NEWLINE_TOKEN} ", f"{PATCH_NEWLINE_TOKEN}\n")
    for line in tokens.replace(f" {IMAGE_START_TOKEN}", f"\n{IMAGE_START_TOKEN}").splitlines():
        yield f"          {line}"


def draw_crops(path: str, *, as_viewed: bool = False) -> style.Figure:
    """Draw the canvas with its crops framed and numbered; without crops, the full image.

    Args:
        path: of the image file.
        as_viewed: show the picture as viewers do.
    """
    picture = read_rgb(path, as_viewed=as_viewed)
    plan = plan_crops(*picture.size)
    shown = canvas_image(full_image(picture, plan), plan)
    right, bottom = plan.canvas_reach
    inches = 9.6 / max(right, bottom)
    crops = f"{len(plan.windows)} crops and the full image" if plan.windows else "no crops"
    width, height = max(right * inches, 4) + 0.4, bottom * inches + 0.95
    sheet = style.sheet_of(width, height, f"{PureWindowsPath(path).name}: {_size(plan.size)}")
    axes = sheet.add_axes((0.2 / width, 0.2 / height, 1 - 0.4 / width, 1 - 0.95 / height))
    axes.imshow(shown, extent=(0, shown.width, shown.height, 0))
    axes.set(xlim=(0, right), ylim=(bottom, 0), xticks=[], yticks=[], anchor="W")
    axes.set_facecolor(style.PADDING)
    axes.set_title(f"{crops}: {plan.num_tokens} tokens", loc="left", size=9)
    frame = {"facecolor": "none", "edgecolor": style.BROKEN, "linewidth": 1.5, "zorder": 3}
    tag = {"facecolor": "white", "edgecolor": style.BROKEN, "pad": 3}
    for number, (x, y, across, down) in enumerate(plan.windows):
        style.box(axes, (x, y, across, down), **frame)
        axes.annotate(f"{number}", (x, y), (5, -12), textcoords="offset points", bbox=tag)
    return sheet


def _size(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
