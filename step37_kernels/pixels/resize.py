"""Resizes pictures as Pillow's BILINEAR does: to 8-bit pictures, or to normalised squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.pixels import pillow as pillow_arithmetic
from step37_kernels.pixels.normalize import (
    CLIP_MEAN,
    CLIP_STD,
    check_constants,
    kernel_constants,
    normalize_torch,
)
from step37_kernels.pixels.ragged import Crop, RaggedImages, check_crop

if TYPE_CHECKING:
    from step37_kernels.ops.resize_pass import ResizeJob


def resize_clip_normalize(  # noqa: PLR0913 - the public signature
    images: Sequence[torch.Tensor] | RaggedImages,
    size: int,
    *,
    crops: Sequence[Crop] | None = None,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.bfloat16,
    pillow: tuple[int, int] | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Resize 8-bit pictures to a square as Pillow does, then :func:`clip_normalize`.

    The resized pixels equal ``Image.resize((size, size), BILINEAR)`` bit for bit; for a crop,
    ``image.crop(box).resize(...)``. The order of Pillow's two passes changes the result, and
    differs between its versions: by default that of the installed version is used.

    Args:
        images: uint8 ``[h_i, w_i, 3]`` each, on one device; or :class:`RaggedImages`, one buffer
            that holds them all, which saves the copy into one.
        size: side of the results in pixels.
        crops: one result for each of these rectangles instead of one for each picture.
        mean, std, dtype, impl: as :func:`clip_normalize`.
        pillow: (major, minor) of the Pillow to agree with; None is the installed one, and where
            there is none, the newest whose order is known.

    Returns:
        ``[N, 3, size, size]``, contiguous, on the device of ``images`` (of no images: the CPU).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if not isinstance(images, RaggedImages):
        images = RaggedImages.gather(images)
    if crops is None:
        crops = images.whole()
    for i, crop in enumerate(crops):
        check_crop(i, crop, images)
    device = images.data.device
    triton = use_triton(impl, device)
    mean, std = check_constants(mean, std, dtype)
    version = pillow_arithmetic.installed_pillow() if pillow is None else pillow
    if triton and crops:
        from step37_kernels.ops import resize_pass as ops

        out = torch.empty((len(crops), 3, size, size), dtype=dtype, device=device)
        jobs = [
            _job(
                images,
                crop,
                size=(size, size),
                target=(i * 3 * size * size, size, size * size),
                version=version,
            )
            for i, crop in enumerate(crops)
        ]
        ops.resize(images.data, jobs, out, kernel_constants(mean, std, dtype))
        return out
    resized = torch.empty((len(crops), size, size, 3), dtype=torch.uint8, device=device)
    for i, crop in enumerate(crops):
        resized[i] = pillow_arithmetic.resize(images.cut(crop), size, size, version)
    return normalize_torch(resized, mean, std, dtype)


def _job(
    images: RaggedImages,
    crop: Crop,
    *,
    size: tuple[int, int],
    target: tuple[int, int, int],
    version: tuple[int, int],
) -> ResizeJob:
    from step37_kernels.ops.resize_pass import ResizeJob

    height, width = crop.bottom - crop.top, crop.right - crop.left
    pitch = images.shapes[crop.image][1] * 3
    rows = True, pillow_arithmetic.axis_table(height, size[0])
    columns = False, pillow_arithmetic.axis_table(width, size[1])
    vertical_first = pillow_arithmetic.vertical_pass_first((height, width), size, version)
    return ResizeJob(
        source=(images.offsets[crop.image] + crop.top * pitch + crop.left * 3, pitch),
        height=height,
        width=width,
        target=target,
        passes=(rows, columns) if vertical_first else (columns, rows),
    )


def resize_uint8(
    images: RaggedImages,
    sizes: Sequence[tuple[int, int]],
    *,
    padded_sizes: Sequence[tuple[int, int]] | None = None,
    pillow: tuple[int, int] | None = None,
    impl: Impl = "auto",
) -> RaggedImages:
    """Resize every picture to a size of its own, bit for bit as Pillow's BILINEAR does.

    Args:
        images: what to resize.
        sizes: ``(height, width)`` of each result. A picture that has this size is copied.
        padded_sizes: ``(height, width)`` of each returned picture: the result is in its top left
            corner, and the rest is black. None: no padding.
        pillow: (major, minor) of the Pillow to agree with; None is the installed one, and where
            there is none, the newest whose order of passes is known.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The resized pictures, in a new buffer on the device of ``images``.

    Raises:
        TypeError: ``images`` are no :class:`RaggedImages`.
        ValueError: the numbers of sizes and pictures differ, a size is below 1×1, a padded size is
            smaller than its result, or ``impl`` cannot run on this device.
    """
    if not isinstance(images, RaggedImages):
        raise TypeError(
            f"images: expected RaggedImages, got {type(images).__name__}; "
            "RaggedImages.gather(tensors) makes them"
        )
    if padded_sizes is None:
        padded_sizes = sizes
    for name, values in (("sizes", sizes), ("padded_sizes", padded_sizes)):
        if len(values) != len(images):
            raise ValueError(
                f"{name}: expected {len(images)}, one for each picture, got {len(values)}"
            )
    offsets, end = [], 0
    for i, ((height, width), (all_height, all_width)) in enumerate(
        zip(sizes, padded_sizes, strict=True)
    ):
        if height < 1 or width < 1:
            raise ValueError(f"sizes[{i}]: expected at least 1×1 pixels, got {height}×{width}")
        if all_height < height or all_width < width:
            raise ValueError(
                f"padded_sizes[{i}]: expected at least {height}×{width} pixels, "
                f"got {all_height}×{all_width}"
            )
        offsets.append(end)
        end += all_height * all_width * 3
    device = images.data.device
    triton = use_triton(impl, device)
    version = pillow_arithmetic.installed_pillow() if pillow is None else pillow
    make = torch.empty if padded_sizes == sizes else torch.zeros
    result = RaggedImages(
        data=make(end, dtype=torch.uint8, device=device), offsets=offsets, shapes=list(padded_sizes)
    )
    if triton and len(images):
        from step37_kernels.ops import resize_pass as ops

        targets = [
            (offset, width * 3, 1) for offset, (_, width) in zip(offsets, padded_sizes, strict=True)
        ]
        jobs = [
            _job(images, crop, size=size, target=target, version=version)
            for crop, size, target in zip(images.whole(), sizes, targets, strict=True)
        ]
        ops.resize(images.data, jobs, result.data)
        return result
    for i, (height, width) in enumerate(sizes):
        result.image(i)[:height, :width] = pillow_arithmetic.resize(
            images.image(i), height, width, version
        )
    return result
