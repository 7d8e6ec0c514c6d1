"""The pixels of a picture as it is seen in crops: the full image and the windows, 8-bit.

Twice the same chain, with the same result bit for bit: with Pillow, a picture at a time, for
decoding threads on the host; and on a device, all pictures of a pack at once from one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from step37_data.images.crops import CropPlan, Window
from step37_kernels.dispatch import Impl
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.ragged import Crop, RaggedImages
from step37_kernels.pixels.resize import resize_uint8

PixelOrder = Literal["pillow", "serving"]
PIXEL_ORDERS = get_args(PixelOrder)

_BILINEAR = Image.Resampling.BILINEAR


def full_image(picture: Image.Image, plan: CropPlan) -> Image.Image:
    """The picture padded and capped as ``plan`` says: RGB of ``plan.full_size``."""
    if plan.padded_size != plan.size:
        square = Image.new("RGB", plan.padded_size)
        square.paste(picture, (0, 0))
        picture = square
    # A resize to the size it has copies the picture, which costs a pass over its memory.
    return picture if picture.size == plan.full_size else picture.resize(plan.full_size, _BILINEAR)


def canvas_image(full: Image.Image, plan: CropPlan) -> Image.Image:
    """The canvas that ``plan.windows`` are cut from, of the full image."""
    if plan.canvas_size is None:
        raise ValueError(f"plan: a picture of {plan.size[0]}×{plan.size[1]} pixels has no crops")
    return full if full.size == plan.canvas_size else full.resize(plan.canvas_size, _BILINEAR)


def cut(canvas: Image.Image, window: Window) -> Image.Image:
    """A window of a canvas, black where it reaches beyond."""
    x, y, width, height = window
    return canvas.crop((x, y, x + width, y + height))


def pad_to_plan(pixels: npt.NDArray[np.uint8], plan: CropPlan) -> npt.NDArray[np.uint8]:
    """``[h, w, 3]`` in the top left corner of a black picture of ``plan.padded_size``."""
    if plan.padded_size == plan.size:
        return pixels
    width, height = plan.padded_size
    padded = np.zeros((height, width, 3), dtype=np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return padded


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePictures:
    """Pictures on a device, ready for the last resize.

    Attributes:
        full: the full images, one for each picture.
        canvases: the canvases, with room for windows that reach beyond them.
        canvas_of: per picture its canvas, None if it has no crops.
    """

    full: RaggedImages
    canvases: RaggedImages
    canvas_of: list[int | None]

    def full_rectangle(self, picture: int) -> Crop:
        """All of a full image, as a rectangle of ``full``."""
        height, width = self.full.shapes[picture]
        return Crop(image=picture, left=0, top=0, right=width, bottom=height)

    def window_rectangle(self, picture: int, window: Window | None) -> Crop:
        """A window of a picture, as a rectangle of ``canvases``; for None all of its canvas."""
        canvas = self.canvas_of[picture]
        if canvas is None:
            raise ValueError(f"picture {picture} has no crops, asked for window {window}")
        if window is None:
            height, width = self.canvases.shapes[canvas]
            window = (0, 0, width, height)
        x, y, width, height = window
        return Crop(image=canvas, left=x, top=y, right=x + width, bottom=y + height)


def prepare_on_device(
    pictures: RaggedImages, plans: Sequence[CropPlan | None], *, impl: Impl = "auto"
) -> DevicePictures:
    """Full images and canvases of pictures in one buffer, with two launches, or four.

    Args:
        pictures: each of its plan's ``padded_size``.
        plans: one for each picture; None takes the picture as it is for both.
        impl: of the resize.
    """
    full = pictures
    full_shapes = [
        shape if plan is None else plan.full_size[::-1]
        for shape, plan in zip(pictures.shapes, plans, strict=True)
    ]
    if any(a != b for a, b in zip(full_shapes, pictures.shapes, strict=True)):
        full = resize_uint8(pictures, full_shapes, impl=impl)
    canvas_of: list[int | None] = []
    sources: list[int] = []
    sizes, room = [], []
    for i, plan in enumerate(plans):
        if plan is not None and plan.canvas_size is None:
            canvas_of.append(None)
            continue
        canvas_of.append(len(sources))
        sources.append(i)
        size = full_shapes[i]
        enough = size
        if plan is not None and plan.canvas_size is not None:
            size = plan.canvas_size[::-1]
            x, y, width, height = plan.windows[-1]
            enough = (max(size[0], y + height), max(size[1], x + width))
        sizes.append(size)
        room.append(enough)
    cropped = RaggedImages(
        data=full.data,
        offsets=[full.offsets[i] for i in sources],
        shapes=[full.shapes[i] for i in sources],
    )
    canvases = resize_uint8(cropped, sizes, padded_sizes=room, impl=impl)
    return DevicePictures(full=full, canvases=canvases, canvas_of=canvas_of)


def normalize_then_resize(
    pictures: Sequence[torch.Tensor], size: int, *, dtype: torch.dtype
) -> torch.Tensor:
    """The last resize as serving does it: normalise in fp32, then resize with antialiasing.

    The numbers are those of ``ToTensor``, ``Normalize`` and ``Resize(BILINEAR, antialias=True)`` of
    torchvision, on the device of the pictures.

    Args:
        pictures: uint8 ``[h_i, w_i, 3]`` each, at least one, on one device.
        size: side of the results.
        dtype: the results are rounded to it.

    Returns:
        ``[N, 3, size, size]``.
    """
    device = pictures[0].device
    out = torch.empty((len(pictures), 3, size, size), dtype=dtype, device=device)
    for i, picture in enumerate(pictures):
        normalized = clip_normalize(picture[None], dtype=torch.float32)
        if normalized.shape[-2:] != (size, size):
            normalized = F.interpolate(
                normalized, (size, size), mode="bilinear", align_corners=False, antialias=True
            )
        out[i] = normalized[0]
    return out
