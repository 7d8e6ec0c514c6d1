"""Holds pictures of any sizes in one buffer, and rectangles of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from step37_kernels.pixels.normalize import check_uint8


@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedImages:
    """Pictures of any sizes in one buffer.

    Attributes:
        data: uint8, flat, contiguous.
        offsets: where in ``data`` each picture begins, in bytes.
        shapes: ``(height, width)`` of each, at least 1; a picture is ``[height, width, 3]``,
            contiguous.
    """

    data: torch.Tensor
    offsets: Sequence[int]
    shapes: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        check_uint8("data", self.data)
        if self.data.dim() != 1 or not self.data.is_contiguous():
            raise ValueError(
                f"data: expected a flat contiguous buffer, got shape {list(self.data.shape)} "
                f"with strides {list(self.data.stride())}"
            )
        if len(self.offsets) != len(self.shapes):
            raise ValueError(
                f"offsets: expected {len(self.shapes)}, one for each shape, got {len(self.offsets)}"
            )
        for i, (offset, (height, width)) in enumerate(zip(self.offsets, self.shapes, strict=True)):
            if height < 1 or width < 1:
                raise ValueError(f"image {i}: expected at least 1×1 pixels, got {height}×{width}")
            if offset < 0 or offset + height * width * 3 > self.data.numel():
                raise ValueError(
                    f"image {i}: {height}×{width} pixels from byte {offset} do not lie within the "
                    f"buffer of {self.data.numel()} bytes"
                )

    def __len__(self) -> int:
        return len(self.shapes)

    @classmethod
    def gather(cls, images: Sequence[torch.Tensor]) -> RaggedImages:
        """Copy uint8 ``[h_i, w_i, 3]`` tensors into one buffer on their device (none: the CPU).

        Raises:
            TypeError: ``images`` is no sequence, or one of them no uint8 tensor.
            ValueError: one has another shape, or is on another device than the first.
        """
        if not isinstance(images, (Sequence, torch.Tensor)):
            check_uint8("images", images, "a sequence of tensors of torch.uint8")
        for i, image in enumerate(images):
            check_uint8(f"images[{i}]", image)
            if image.dim() != 3 or image.shape[-1] != 3:
                raise ValueError(f"images[{i}]: expected [h, w, 3], got {list(image.shape)}")
            if image.device != images[0].device:
                raise ValueError(
                    f"images[{i}]: expected all on {images[0].device}, got {image.device}"
                )
        flat = [image.reshape(-1) for image in images]
        return cls(
            data=torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8),
            offsets=list(itertools.accumulate(map(len, flat), initial=0))[: len(flat)],
            shapes=[(image.shape[0], image.shape[1]) for image in images],
        )

    def image(self, i: int) -> torch.Tensor:
        """Return picture ``i`` as ``[height, width, 3]``, a view."""
        height, width = self.shapes[i]
        start = self.offsets[i]
        return self.data[start : start + height * width * 3].view(height, width, 3)

    def cut(self, crop: Crop) -> torch.Tensor:
        """Return the pixels of a crop, a view."""
        return self.image(crop.image)[crop.top : crop.bottom, crop.left : crop.right]

    def whole(self) -> list[Crop]:
        """Return one crop for each picture, which covers all of it."""
        return [
            Crop(image=i, left=0, top=0, right=width, bottom=height)
            for i, (height, width) in enumerate(self.shapes)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A rectangle of a picture, in pixels: ``left <= x < right``, ``top <= y < bottom``."""

    image: int
    left: int
    top: int
    right: int
    bottom: int


def check_crop(i: int, crop: Crop, images: RaggedImages) -> None:
    if not isinstance(crop, Crop):
        raise TypeError(f"crops[{i}]: expected a Crop, got {crop!r}")
    try:
        operator.index(crop.image + crop.left + crop.top + crop.right + crop.bottom)
    except TypeError as error:
        raise TypeError(f"crops[{i}]: expected integers, got {crop}") from error
    if not 0 <= crop.image < len(images):
        raise ValueError(f"crops[{i}]: image {crop.image} of {len(images)} images")
    height, width = images.shapes[crop.image]
    if not (0 <= crop.left < crop.right <= width and 0 <= crop.top < crop.bottom <= height):
        raise ValueError(
            f"crops[{i}]: expected a rectangle of at least one pixel within {height}×{width} "
            f"pixels (height × width), got {crop}"
        )
