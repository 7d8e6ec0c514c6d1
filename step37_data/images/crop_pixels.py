"""Makes the full image and the crops of a picture in multicrop.

There are two implementations, which give the same 8-bit pixels bit for bit: with Pillow, one
picture at a time, for the decoding threads; and with our kernels, all pictures of a pack at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from step37_data.common.image_entry import Window
from step37_data.images.crops import CropPlan
from step37_kernels.dispatch import Impl
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.ragged import Crop, RaggedImages
from step37_kernels.pixels.resize import resize_uint8

PixelOrder = Literal["pillow", "serving"]

_BILINEAR = Image.Resampling.BILINEAR


def padded_image(picture: Image.Image, plan: CropPlan) -> Image.Image:
    """Pad the picture with black at the right and below to ``plan.padded_size``."""
    if plan.padded_size == plan.size:
        return picture
    square = Image.new("RGB", plan.padded_size)
    square.paste(picture, (0, 0))
    return square


def full_image(picture: Image.Image, plan: CropPlan) -> Image.Image:
    """Pad or shrink the picture to ``plan.full_size``; RGB."""
    picture = padded_image(picture, plan)
    # Pillow copies the picture even if the size does not change.
    return picture if picture.size == plan.full_size else picture.resize(plan.full_size, _BILINEAR)


def canvas_image(full: Image.Image, plan: CropPlan) -> Image.Image:
    """Resize the full image to the canvas that ``plan.windows`` are cut from."""
    return full if full.size == plan.canvas_size else full.resize(plan.canvas_size, _BILINEAR)


def cut(canvas: Image.Image, window: Window) -> Image.Image:
    """Cut a window from a canvas; the part outside the canvas is black."""
    x, y, width, height = window
    if window == (0, 0, *canvas.size):
        return canvas
    return canvas.crop((x, y, x + width, y + height))


def prepare_on_device(
    pictures: RaggedImages, plans: Sequence[CropPlan], *, impl: Impl = "auto"
) -> tuple[RaggedImages, RaggedImages, dict[int, int]]:
    """Make the full images and canvases of all pictures, with at most four kernel launches.

    Args:
        pictures: each of its plan's ``padded_size``.
        plans: one for each picture.
        impl: implementation of the resize.

    Returns:
        The full images; the canvases of pictures with crops, padded for windows that reach beyond
        them; and the number of each picture's canvas.
    """
    full, shapes = pictures, [plan.full_size[::-1] for plan in plans]
    if shapes != list(pictures.shapes):
        full = resize_uint8(pictures, shapes, impl=impl)
    cropped = [i for i, plan in enumerate(plans) if plan.windows]
    offsets, shapes = [full.offsets[i] for i in cropped], [shapes[i] for i in cropped]
    canvases = RaggedImages(data=full.data, offsets=offsets, shapes=shapes)
    sizes = [plans[i].canvas_size[::-1] for i in cropped]
    padded_sizes = [plans[i].canvas_reach[::-1] for i in cropped]
    # A file without crops needs no canvas.
    if not sizes == padded_sizes == shapes:
        canvases = resize_uint8(canvases, sizes, padded_sizes=padded_sizes, impl=impl)
    return full, canvases, {i: number for number, i in enumerate(cropped)}


def rectangle(picture: int, window: Window) -> Crop:
    """Make the :class:`Crop` of a window, as the kernels take it."""
    x, y, width, height = window
    return Crop(image=picture, left=x, top=y, right=x + width, bottom=y + height)


def normalize_into(place: torch.Tensor, pixels: npt.NDArray[np.uint8]) -> None:
    """Normalise a ``[h, w, 3]`` picture into ``place``, ``[3, h, w]``, like :func:`clip_normalize`.

    The values are looked up in a table, in the calling thread. PyTorch's operations would each use
    as many threads as there are cores, in addition to the decoding threads.
    """
    levels = _levels(place.dtype)  # first, because it raises for other dtypes
    bits = place.view(_BITS[place.element_size()]).numpy()
    for channel, table in enumerate(levels):
        # Every uint8 is a valid index. Mode "raise" would make a copy of the indices to check them.
        table.take(pixels[..., channel], out=bits[channel], mode="wrap")


_BITS = {2: torch.int16, 4: torch.int32}


@functools.cache
def _levels(dtype: torch.dtype) -> npt.NDArray[np.generic]:
    """Normalise all 256 levels of each channel; returns their bits as integers, ``[3, 256]``."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(-1, -1, -1, 3)
    normalized = clip_normalize(levels, dtype=dtype, impl="torch")[0, :, 0]
    bits: npt.NDArray[np.generic] = normalized.view(_BITS[normalized.element_size()]).numpy()
    return bits


def normalize_then_resize(picture: torch.Tensor, size: int) -> torch.Tensor:
    """Normalise in fp32, then resize with antialiasing, as the model's own processor does.

    The values are those of ``ToTensor``, ``Normalize`` and ``Resize(BILINEAR, antialias=True)`` of
    torchvision, on the device of ``picture``.

    Args:
        picture: uint8 ``[h, w, 3]``.
        size: side of the result.

    Returns:
        fp32 ``[3, size, size]``.
    """
    normalized = clip_normalize(picture[None], dtype=torch.float32)
    if normalized.shape[-2:] != (size, size):
        normalized = F.interpolate(
            normalized, (size, size), mode="bilinear", align_corners=False, antialias=True
        )
    return normalized[0]
