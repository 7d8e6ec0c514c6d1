"""The pixels of a picture as it is seen in crops: the full image and the windows, 8-bit.

Twice the same chain, with the same result bit for bit: with Pillow, a picture at a time, for
decoding threads on the host; and on a device, all pictures of a pack at once from one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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


def padded_image(picture: Image.Image, plan: CropPlan) -> Image.Image:
    """The picture in the top left corner of a black one of ``plan.padded_size``."""
    if plan.padded_size == plan.size:
        return picture
    square = Image.new("RGB", plan.padded_size)
    square.paste(picture, (0, 0))
    return square


def full_image(picture: Image.Image, plan: CropPlan) -> Image.Image:
    """The picture padded and capped as ``plan`` says: RGB of ``plan.full_size``."""
    picture = padded_image(picture, plan)
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
    if window == (0, 0, *canvas.size):
        return canvas
    return canvas.crop((x, y, x + width, y + height))


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

    def window_rectangle(self, picture: int, window: Window) -> Crop:
        """A window of a picture, as a rectangle of ``canvases``."""
        canvas = self.canvas_of[picture]
        if canvas is None:
            raise ValueError(f"picture {picture} has no crops, asked for window {window}")
        x, y, width, height = window
        return Crop(image=canvas, left=x, top=y, right=x + width, bottom=y + height)


def prepare_on_device(
    pictures: RaggedImages, plans: Sequence[CropPlan], *, impl: Impl = "auto"
) -> DevicePictures:
    """Full images and canvases of pictures in one buffer, with four launches at most.

    Args:
        pictures: each of its plan's ``padded_size``.
        plans: one for each picture.
        impl: of the resize.
    """
    full = pictures
    full_shapes = [plan.full_size[::-1] for plan in plans]
    if full_shapes != list(pictures.shapes):
        full = resize_uint8(pictures, full_shapes, impl=impl)
    canvas_of: list[int | None] = []
    offsets: list[int] = []
    shapes, sizes, padded_sizes = [], [], []
    for offset, shape, plan in zip(full.offsets, full_shapes, plans, strict=True):
        if plan.canvas_size is None:
            canvas_of.append(None)
            continue
        canvas_of.append(len(offsets))
        offsets.append(offset)
        shapes.append(shape)
        sizes.append(plan.canvas_size[::-1])
        x, y, width, height = plan.windows[-1]
        padded_sizes.append((max(sizes[-1][0], y + height), max(sizes[-1][1], x + width)))
    canvases = RaggedImages(data=full.data, offsets=offsets, shapes=shapes)
    # A file that is taken as it is is a canvas already.
    if not sizes == padded_sizes == shapes:
        canvases = resize_uint8(canvases, sizes, padded_sizes=padded_sizes, impl=impl)
    return DevicePictures(full=full, canvases=canvases, canvas_of=canvas_of)


def normalize_then_resize(
    pictures: Sequence[torch.Tensor], size: int, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The last resize as serving does it: normalise in fp32, then resize with antialiasing.

    The numbers are those of ``ToTensor``, ``Normalize`` and ``Resize(BILINEAR, antialias=True)`` of
    torchvision, on that device.

    Args:
        pictures: uint8 ``[h_i, w_i, 3]`` each, on ``device``.
        size: side of the results.
        dtype: the results are rounded to it.
        device: of the results.

    Returns:
        ``[N, 3, size, size]``.
    """
    out = torch.empty((len(pictures), 3, size, size), dtype=dtype, device=device)
    for i, picture in enumerate(pictures):
        normalized = clip_normalize(picture[None], dtype=torch.float32)
        if normalized.shape[-2:] != (size, size):
            normalized = F.interpolate(
                normalized, (size, size), mode="bilinear", align_corners=False, antialias=True
            )
        out[i] = normalized[0]
    return out
