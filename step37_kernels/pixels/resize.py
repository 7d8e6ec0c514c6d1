"""Pillow's BILINEAR: to 8-bit pictures of any sizes, or to a square and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels.normalize import (
    CLIP_MEAN,
    CLIP_STD,
    check_constants,
    kernel_constants,
    look_up,
    normalize_table,
)
from step37_kernels.pixels.pillow import vertical_pass_first
from step37_kernels.pixels.ragged import Crop, RaggedImages, check_crop

if TYPE_CHECKING:
    from step37_kernels.ops.normalize import ScaleAndOffset


def resize_clip_normalize(
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

    Bit for bit ``Image.resize((size, size), BILINEAR)``, pixels outside a crop never looked at
    (``image.crop(box).resize(...)``). The order of Pillow's two passes, which shows in the
    result, differs between its versions: the installed one's is taken.

    Args:
        images: uint8 ``[h_i, w_i, 3]`` each, on one device; or one buffer that holds them all,
            which saves the copy into one.
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
        if len(images) == 0:
            images = RaggedImages(data=torch.empty(0, dtype=torch.uint8), offsets=(), shapes=())
        else:
            images = RaggedImages.gather(images)
    if crops is None:
        crops = [
            Crop(image=i, left=0, top=0, right=width, bottom=height)
            for i, (height, width) in enumerate(images.shapes)
        ]
    for i, crop in enumerate(crops):
        check_crop(i, crop, images)
    device = images.data.device
    triton = use_triton(impl, device)
    check_constants(mean, std, dtype)
    order = resample.installed_pillow() if pillow is None else pillow
    if not crops:
        return torch.empty((0, 3, size, size), dtype=dtype, device=device)
    if triton:
        results = kernel_constants(mean, std, dtype, device)
        return _resize_normalize_triton(images, crops, size, results, dtype, order)
    resized = torch.empty((len(crops), size, size, 3), dtype=torch.uint8, device=device)
    for i, crop in enumerate(crops):
        source = images.image(crop.image)[crop.top : crop.bottom, crop.left : crop.right]
        resized[i] = resample.resize(source, size, order)
    return look_up(resized, normalize_table(mean, std, dtype, device))


def _resize_normalize_triton(
    images: RaggedImages,
    crops: Sequence[Crop],
    size: int,
    results: torch.Tensor | ScaleAndOffset,
    dtype: torch.dtype,
    order: tuple[int, int],
) -> torch.Tensor:
    from step37_kernels.ops import resize as ops

    jobs, tables = [], []
    for crop in crops:
        pitch = images.shapes[crop.image][1] * 3
        height, width = crop.bottom - crop.top, crop.right - crop.left
        jobs.append(
            ops.ResizeJob(
                source=images.offsets[crop.image] + crop.top * pitch + crop.left * 3,
                pitch=pitch,
                height=height,
                width=width,
                vertical_first=vertical_pass_first(height, width, size, size, order),
            )
        )
        tables.append((resample.axis_table(height, size), resample.axis_table(width, size)))
    return ops.resize(images.data, jobs, tables, results, dtype, size)


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
        sizes: ``(height, width)`` of each result; the present one copies the picture.
        padded_sizes: ``(height, width)`` of each picture that is returned: the result in the top
            left corner, black beside and below it. None pads nothing.
        pillow: (major, minor) of the Pillow to agree with; None is the installed one, and where
            there is none, the newest whose order of passes is known.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        As many pictures, in a buffer of their own on the device of ``images``.

    Raises:
        ValueError: a number of sizes other than that of the pictures, a size below 1×1, a padded
            size smaller than its result, or ``impl`` cannot run on this device.
    """
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
    order = resample.installed_pillow() if pillow is None else pillow
    make = torch.empty if padded_sizes == sizes else torch.zeros
    result = RaggedImages(
        data=make(end, dtype=torch.uint8, device=device), offsets=offsets, shapes=list(padded_sizes)
    )
    if triton and len(images):
        _resize_uint8_triton(images, sizes, result, order)
        return result
    for i, (height, width) in enumerate(sizes):
        resized = resample.resize_to(images.image(i), height, width, order)
        result.image(i)[:height, :width] = resized
    return result


def _resize_uint8_triton(
    images: RaggedImages,
    sizes: Sequence[tuple[int, int]],
    result: RaggedImages,
    order: tuple[int, int],
) -> None:
    from step37_kernels.ops import resize_uint8 as ops

    jobs, tables = [], []
    for i, ((height, width), (out_height, out_width)) in enumerate(
        zip(images.shapes, sizes, strict=True)
    ):
        jobs.append(
            ops.Uint8Job(
                source=images.offsets[i],
                source_pitch=width * 3,
                height=height,
                width=width,
                target=result.offsets[i],
                target_pitch=result.shapes[i][1] * 3,
                out_height=out_height,
                out_width=out_width,
                vertical_first=vertical_pass_first(height, width, out_height, out_width, order),
            )
        )
        tables.append(
            (resample.axis_table(height, out_height), resample.axis_table(width, out_width))
        )
    ops.resize(images.data, jobs, tables, result.data)
