"""Declares the options of reading image files, in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from step37_data.common.checks import checked_choice, checked_int
from step37_data.common.image_entry import (
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    ImageEntry,
    checked_entries,
)
from step37_data.images.crop_pixels import PixelOrder
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE
from step37_data.images.decode import BrokenImages, OnBroken
from step37_data.images.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """The options of turning image files into pixels.

    ``load_images``, ``preprocess_packed_batch`` and ``ForwardStep`` take the attributes as keywords
    of the same names; ``ForwardStep`` takes the sizes from the data set.

    Attributes:
        image_size, patch_image_size: side in pixels of full images and of crops.
        device: where the pixels go; None is the CUDA device, or the CPU without one.
        dtype: of the pixels: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        on_broken: what happens to an unreadable file. ``"zero"``: a black picture of 224×224 takes
            its place, with a warning. ``"skip-loss"``: the same, and ``preprocess_packed_batch``
            takes the sample out of the loss. ``"raise"``: raises
            :class:`~step37_data.images.decode.BrokenImageError`. None: the ``on_broken`` of the
            pack, or ``"zero"`` if there is no pack or it has none.
        broken: counts every image, for the report at the end of the epoch.
        threads: number of decoding threads; None is the number of available cores, at most 8.
        pixel_order: ``"pillow"``: resized in 8 bits, then normalised, as the stock loader does.
            ``"serving"``: the last resize as the model's own processor makes it, normalised first
            and then resized with antialiasing in fp32, one image at a time. Pillow rounds to 8
            bits after each of its two passes, serving never: on photographs resized to 728 the two
            were at most 1.01 of 255 levels apart in fp32, 0.23 on average, and 55 % of the bf16
            values differed. A window that has 504 pixels already is the same in both.
        max_pixels: a picture of more pixels counts as unreadable, before it is decoded: decoding
            takes seven bytes a pixel in each thread. None is Pillow's own limit, twice
            ``Image.MAX_IMAGE_PIXELS``: 179 million pixels, 1.3 GB.
        multicrop: whether pictures are read in crops. None: if the template has made windows for
            them in ``image_paths``. True refuses pictures without a window, False those with one.
        as_viewed: show pictures as image viewers do: turned by their EXIF orientation and with
            transparent parts on white, both as vLLM does when it serves the model, and with the
            upper 8 of 16 bits. False is how stock trains: pictures of phones are not turned,
            transparent parts show the colours stored in them, and 16-bit grey is mostly white. With
            crops, the windows have to be planned with the same value (``as_viewed`` of the
            template, ``plan_file(path, as_viewed=...)``). By default ``preprocess_packed_batch``
            and ``ForwardStep`` use the value in the pack.

    Raises:
        ValueError: a size, ``threads`` or ``max_pixels`` is no integer of at least 1, or
            ``on_broken`` or ``pixel_order`` is none of the names above.
    """

    image_size: int = IMAGE_SIZE
    patch_image_size: int = CROP_SIZE
    device: Device = None
    dtype: torch.dtype = torch.bfloat16
    on_broken: OnBroken | None = None
    broken: BrokenImages | None = None
    threads: int | None = None
    pixel_order: PixelOrder = "pillow"
    max_pixels: int | None = None
    multicrop: bool | None = None
    as_viewed: bool = False

    def __post_init__(self) -> None:
        checked_int("image_size", self.image_size)
        checked_int("patch_image_size", self.patch_image_size)
        if self.on_broken is not None:
            checked_choice("on_broken", self.on_broken, OnBroken)
        if self.threads is not None:
            checked_int("threads", self.threads)
        checked_choice("pixel_order", self.pixel_order, PixelOrder)
        if self.max_pixels is not None:
            checked_int("max_pixels", self.max_pixels)

    @property
    def sides(self) -> dict[int, int]:
        """The side in pixels for each item type, in the order of insertion groups: crops first."""
        return {PATCH_ITEM_TYPE: self.patch_image_size, IMAGE_ITEM_TYPE: self.image_size}

    def checked_entries(self, image_paths: Any) -> list[ImageEntry]:
        """Check the entries of ``image_paths`` and return them.

        Raises:
            ValueError: an entry has another form, or does not fit ``multicrop``.
        """
        entries = checked_entries("image_paths", image_paths)
        for entry in entries:
            if self.multicrop is not None and (entry.window is not None) != self.multicrop:
                told = f"{entry.path} in image_paths carries {entry.window or 'no window'}"
                raise ValueError(
                    f"multicrop: {self.multicrop}, but {told}; give the template the same"
                )
        return entries


class ImageKeywords(TypedDict, total=False):
    """The keywords of functions that take :class:`ImageOptions` in ``**options``: all but sizes."""

    device: Device
    dtype: torch.dtype
    on_broken: OnBroken | None
    broken: BrokenImages | None
    threads: int | None
    pixel_order: PixelOrder
    max_pixels: int | None
    multicrop: bool | None
    as_viewed: bool
