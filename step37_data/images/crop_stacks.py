"""Image files to stacks of normalised pixels, where pictures are seen in crops.

Every picture of a pack is decoded once, however many crops it has. For the CPU, Pillow makes the
crops in the decoding threads. For CUDA, the decoded pictures travel in one buffer, and six launches
make everything from it, eight if a picture is larger than 3024 pixels; the values are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from step37_data.images.crop_pixels import (
    PIXEL_ORDERS,
    PixelOrder,
    canvas_image,
    cut,
    full_image,
    normalize_then_resize,
    pad_to_plan,
    prepare_on_device,
)
from step37_data.images.crops import CropPlan, Window, plan_crops
from step37_data.images.decode import (
    ON_BROKEN,
    BrokenImageError,
    BrokenImages,
    OnBroken,
    decode,
    map_threads,
)
from step37_data.images.device import Stack, kernels_match_pillow, to_device, upload
from step37_data.tokens import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.ragged import Crop, RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One full image or crop that is wanted of a picture.

    Attributes:
        path: of the picture.
        kind: ``IMAGE_ITEM_TYPE`` or ``PATCH_ITEM_TYPE``.
        window: where, as in ``ImageEntry``; None is the whole file.
        side: of the result in pixels.
    """

    path: str
    kind: int
    window: Window | None
    side: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picture:
    """A decoded picture.

    Attributes:
        pixels: uint8 ``[h, w, 3]``.
        plan: of its crops; None if it is to be taken as it is.
        broken: None, or why it is black.
        cuts: uint8 ``[h, w, 3]`` of each view, if they were made on the host.
    """

    pixels: npt.NDArray[np.uint8]
    plan: CropPlan | None
    broken: str | None
    cuts: Mapping[View, npt.NDArray[np.uint8]] = field(default_factory=dict)


_Finish = Callable[[_Picture, Sequence[View]], _Picture]
_Pictures = dict[tuple[str, bool], _Picture]


def load_crop_stacks(
    stacks: Sequence[tuple[Sequence[View], int]],
    device: torch.device,
    dtype: torch.dtype,
    on_broken: OnBroken,
    broken: BrokenImages | None,
    threads: int | None,
    pixel_order: PixelOrder,
) -> list[Stack]:
    """Make several ``(views, side)`` at once; the views of a stack are all of that side.

    Raises:
        ValueError: ``pixel_order`` or ``on_broken`` is none of the names they may be.
        BrokenImageError: a file is unreadable, or of another size than its windows were planned
            for, and ``on_broken`` is ``"raise"``.
    """
    if pixel_order not in PIXEL_ORDERS:
        raise ValueError(
            f"pixel_order: expected one of {', '.join(PIXEL_ORDERS)}, got {pixel_order!r}"
        )
    views = [view for of_stack, _ in stacks for view in of_stack]
    if device.type == "cuda" and kernels_match_pillow():
        pictures = _read_all(views, _padded, on_broken, broken, threads)
        images = _stack_on_device(pictures, stacks, device, dtype, pixel_order)
    else:
        finish = _cut_and_resized if pixel_order == "pillow" else _cut
        pictures = _read_all(views, finish, on_broken, broken, threads)
        images = _stack_on_host(pictures, stacks, device, dtype, pixel_order)
    return [
        Stack(images=of_stack, broken=[pictures[_key(view)].broken for view in wanted])
        for of_stack, (wanted, _) in zip(images, stacks, strict=True)
    ]


def find_broken(
    views: Sequence[View],
    on_broken: OnBroken,
    broken: BrokenImages | None,
    threads: int | None,
) -> list[str | None]:
    """Per view None, or what is wrong with its file: what :func:`load_crop_stacks` would find."""
    pictures = _read_all(views, lambda picture, _: picture, on_broken, broken, threads)
    return [pictures[_key(view)].broken for view in views]


def _key(view: View) -> tuple[str, bool]:
    """What a picture is decoded for: a file as it is, or one seen in crops."""
    return view.path, view.window is not None


def _read_all(
    views: Sequence[View],
    finish: _Finish,
    on_broken: OnBroken,
    broken: BrokenImages | None,
    threads: int | None,
) -> _Pictures:
    if on_broken not in ON_BROKEN:
        raise ValueError(f"on_broken: expected one of {', '.join(ON_BROKEN)}, got {on_broken!r}")
    views_of: dict[tuple[str, bool], list[View]] = {}
    for view in views:
        views_of.setdefault(_key(view), []).append(view)
    read = map_threads(
        lambda of_picture: finish(_read(of_picture, on_broken), of_picture),
        views_of.values(),
        threads,
    )
    pictures = dict(zip(views_of, read, strict=True))
    if broken is not None:
        for (path, _), picture in pictures.items():
            broken.record(path, picture.broken)
    return pictures


def _read(views: Sequence[View], on_broken: OnBroken) -> _Picture:
    """Decode the picture of ``views`` and check that their windows are its own."""
    path = views[0].path
    decoded = decode(path, on_broken)
    if views[0].window is None or decoded.broken is not None:
        return _Picture(pixels=decoded.pixels, plan=None, broken=decoded.broken)
    height, width, _ = decoded.pixels.shape
    try:
        plan = plan_crops(width, height)
    except ValueError as error:
        reason = str(error)
    else:
        own = {PATCH_ITEM_TYPE: plan.windows, IMAGE_ITEM_TYPE: (plan.full_window,)}
        stray = [view.window for view in views if view.window not in own[view.kind]]
        if not stray:
            return _Picture(pixels=decoded.pixels, plan=plan, broken=None)
        reason = (
            f"it has {width}×{height} pixels, of which {stray[0]} is no window: it was planned "
            "from another size, or was unreadable then"
        )
    if on_broken == "raise":
        raise BrokenImageError(f"image {path} could not be shown: {reason}")
    logger.warning("image %s could not be shown, black is used in its place: %s", path, reason)
    return _Picture(pixels=np.zeros((1, 1, 3), dtype=np.uint8), plan=None, broken=reason)


def _padded(picture: _Picture, views: Sequence[View]) -> _Picture:  # noqa: ARG001
    if picture.plan is None:
        return picture
    return dataclasses.replace(picture, pixels=pad_to_plan(picture.pixels, picture.plan))


def _cut(picture: _Picture, views: Sequence[View], resize: bool = False) -> _Picture:
    """With Pillow, cut every view out, and resize it to its side if ``resize``."""
    full = Image.fromarray(picture.pixels)
    canvas = full
    if picture.plan is not None:
        full = full_image(full, picture.plan)
        if picture.plan.canvas_size is not None:
            canvas = canvas_image(full, picture.plan)
    cuts = {}
    for view in views:
        image = full
        if view.kind == PATCH_ITEM_TYPE:
            image = canvas
            if picture.plan is not None and view.window is not None:
                image = cut(canvas, view.window)
        if resize:
            image = image.resize((view.side, view.side), Image.Resampling.BILINEAR)
        cuts[view] = np.asarray(image)
    return dataclasses.replace(picture, cuts=cuts)


_cut_and_resized = functools.partial(_cut, resize=True)


def _stack_on_host(
    pictures: _Pictures,
    stacks: Sequence[tuple[Sequence[View], int]],
    device: torch.device,
    dtype: torch.dtype,
    pixel_order: PixelOrder,
) -> list[torch.Tensor]:
    images = []
    for views, side in stacks:
        cuts = [pictures[_key(view)].cuts[view] for view in views]
        if not cuts:
            images.append(torch.empty((0, 3, side, side), dtype=dtype, device=device))
        elif pixel_order == "pillow":
            resized = torch.from_numpy(np.stack(cuts))
            images.append(clip_normalize(to_device(resized, device), dtype=dtype))
        else:
            on_device = [to_device(torch.tensor(pixels), device) for pixels in cuts]
            images.append(normalize_then_resize(on_device, side, dtype=dtype))
    return images


def _stack_on_device(
    pictures: _Pictures,
    stacks: Sequence[tuple[Sequence[View], int]],
    device: torch.device,
    dtype: torch.dtype,
    pixel_order: PixelOrder,
) -> list[torch.Tensor]:
    if not pictures:
        return [torch.empty((0, 3, side, side), dtype=dtype, device=device) for _, side in stacks]
    uploaded = upload([picture.pixels for picture in pictures.values()], device)
    ready = prepare_on_device(uploaded, [picture.plan for picture in pictures.values()])
    number = {key: i for i, key in enumerate(pictures)}
    images = []
    for views, side in stacks:
        source = ready.full
        rectangles = []
        for view in views:
            key = _key(view)
            if view.kind == PATCH_ITEM_TYPE:
                source = ready.canvases
                window = None if pictures[key].plan is None else view.window
                rectangles.append(ready.window_rectangle(number[key], window))
            else:
                rectangles.append(ready.full_rectangle(number[key]))
        images.append(_last_resize(source, rectangles, side, dtype, pixel_order))
    return images


def _last_resize(
    source: RaggedImages,
    rectangles: Sequence[Crop],
    side: int,
    dtype: torch.dtype,
    pixel_order: PixelOrder,
) -> torch.Tensor:
    if pixel_order == "pillow" or not rectangles:
        return resize_clip_normalize(source, side, crops=rectangles, dtype=dtype)
    cuts = [source.image(at.image)[at.top : at.bottom, at.left : at.right] for at in rectangles]
    return normalize_then_resize(cuts, side, dtype=dtype)
