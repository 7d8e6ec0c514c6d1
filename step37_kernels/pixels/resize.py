"""Pillow's BILINEAR from 8-bit pictures to 8-bit pictures, as one stage of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels.normalize import RaggedImages
from step37_kernels.pixels.reference import vertical_pass_first


def resize_uint8(
    images: RaggedImages,
    sizes: Sequence[tuple[int, int]],
    *,
    room: Sequence[tuple[int, int]] | None = None,
    pillow: tuple[int, int] | None = None,
    impl: Impl = "auto",
) -> RaggedImages:
    """Resize every picture to a size of its own, bit for bit as Pillow's BILINEAR does.

    Args:
        images: what to resize.
        sizes: ``(height, width)`` of each result; the present one copies the picture.
        room: ``(height, width)`` of each picture that is returned: the result in the top left
            corner, black beside and below it. None leaves no room.
        pillow: (major, minor) of the Pillow to agree with; None is the installed one, and where
            there is none, the newest whose order of passes is known.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        As many pictures, in a buffer of their own on the device of ``images``.

    Raises:
        ValueError: a number of sizes or rooms other than that of the pictures, a size below 1×1, a
            room smaller than its result, or ``impl`` cannot run on this device.
    """
    if room is None:
        room = sizes
    for name, values in (("sizes", sizes), ("room", room)):
        if len(values) != len(images):
            raise ValueError(
                f"{name}: expected {len(images)}, one for each picture, got {len(values)}"
            )
    offsets, end = [], 0
    for i, ((height, width), (all_height, all_width)) in enumerate(zip(sizes, room, strict=True)):
        if height < 1 or width < 1:
            raise ValueError(f"sizes[{i}]: expected at least 1×1 pixels, got {height}×{width}")
        if all_height < height or all_width < width:
            raise ValueError(
                f"room[{i}]: expected at least {height}×{width} pixels, "
                f"got {all_height}×{all_width}"
            )
        offsets.append(end)
        end += all_height * all_width * 3
    device = images.data.device
    triton = use_triton(impl, device)
    order = resample.installed_pillow() if pillow is None else pillow
    make = torch.empty if room == sizes else torch.zeros
    result = RaggedImages(
        data=make(end, dtype=torch.uint8, device=device), offsets=offsets, shapes=list(room)
    )
    if triton and len(images):
        _resize_triton(images, sizes, result, order)
        return result
    for i, (height, width) in enumerate(sizes):
        resized = resample.resize_to(images.image(i), height, width, order)
        result.image(i)[:height, :width] = resized
    return result


def _resize_triton(
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
