"""Pillow's BILINEAR resize in fixed point: coefficients, order of the passes, and PyTorch code.

Per axis Pillow filters with a triangle as wide as the reduction, in int32 with 22 fractional bits,
and rounds to 8 bits after each of the two passes (``src/libImaging/Resample.c``). The same
coefficients, rounding and order of passes give the same pixels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re

import numpy as np
import numpy.typing as npt
import torch

PRECISION_BITS = 22
"""Fractional bits of the coefficients."""
NEWEST_KNOWN_PILLOW = (13, 0)


@functools.cache
def installed_pillow() -> tuple[int, int]:
    """Return ``(major, minor)`` of the installed Pillow; if there is none, of the newest known.

    It is read from the package's metadata, so Pillow is not imported.
    """
    try:
        version = importlib.metadata.version("pillow")
    except importlib.metadata.PackageNotFoundError:
        return NEWEST_KNOWN_PILLOW
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        raise RuntimeError(f"Pillow's version {version!r} does not begin with two numbers")
    return int(numbers[1]), int(numbers[2])


@functools.lru_cache(maxsize=2048)
def axis_table(in_size: int, out_size: int) -> npt.NDArray[np.int32]:
    """Return the fixed-point coefficients of one axis, read-only and cached.

    Returns:
        int32 ``[1 + taps, out_size]``, taps even. Row 0 holds the first input position that counts
        for each output position; row ``1 + j`` the coefficient of the j-th position from there,
        zero beyond the last. If the size does not change, the first coefficient is 2**22 and the
        others are zero, so that the pass changes nothing. Pillow has no pass then.
    """
    scale = in_size / out_size
    support = max(scale, 1.0)
    center = (np.arange(out_size) + 0.5) * scale
    # Conversion to integers truncates, as in C.
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support + 0.5).astype(np.int64), in_size)
    taps = int((end - first).max())
    taps += taps % 2
    position = first[:, None] + np.arange(taps)
    # The operations are in Pillow's order, because it can change the last bit of a weight.
    weight = 1.0 - np.abs((position - center[:, None] + 0.5) * (1.0 / support))
    weight[(weight < 0) | (position >= end[:, None])] = 0.0
    # Added one after the other, as Pillow does; np.sum adds pairwise.
    total = np.add.accumulate(weight, axis=1)[:, -1:]
    fixed = (0.5 + weight / total * (1 << PRECISION_BITS)).astype(np.int32)
    table = np.concatenate([first.astype(np.int32)[None], fixed.T])
    table.setflags(write=False)
    return table


def vertical_pass_first(
    in_size: tuple[int, int], out_size: tuple[int, int], pillow: tuple[int, int]
) -> bool:
    """Whether Pillow of version ``pillow`` (major, minor) filters the columns before the rows.

    Sizes are ``(height, width)``.

    The picture is rounded to 8 bits between the passes, so their order changes the result. Since
    12.2 very tall pictures have the columns first, since 13.0 all for which that is less work.
    """
    (in_height, in_width), (out_height, out_width) = in_size, out_size
    if pillow >= (13, 0):
        fewer_rows = in_height - out_height
        return fewer_rows > 0 and fewer_rows > 2 * (in_width - out_width)
    if pillow >= (12, 2):
        return in_height > 100 * in_width and out_height < in_height
    return False


def resize(image: torch.Tensor, height: int, width: int, pillow: tuple[int, int]) -> torch.Tensor:
    """Pillow's ``Image.resize((width, height), BILINEAR)`` in PyTorch, on any device.

    Args:
        image: uint8 ``[h, w, 3]``, any strides.
        height, width: of the result.
        pillow: (major, minor) of the Pillow whose order of passes to follow.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    in_height, in_width, _ = image.shape
    if vertical_pass_first((in_height, in_width), (height, width), pillow):
        return _filter_axis(_filter_axis(image, height, dim=0), width, dim=1)
    return _filter_axis(_filter_axis(image, width, dim=1), height, dim=0)


def _filter_axis(pixels: torch.Tensor, out_size: int, dim: int) -> torch.Tensor:
    in_size = pixels.shape[dim]
    if in_size == out_size:
        return pixels
    host = torch.tensor(axis_table(in_size, out_size), device="cpu")
    if pixels.is_cuda:
        host = host.pin_memory()
    table = host.to(pixels.device, non_blocking=True)
    first, coefficients = table[0], table[1:].view(-1, out_size, 1)
    # The filtered axis comes first: whole rows are fast to copy and multiply.
    lines = pixels.movedim(dim, 0)
    flat = lines.reshape(in_size, -1).to(torch.int32)
    total = torch.full(
        (out_size, flat.shape[1]),
        1 << (PRECISION_BITS - 1),
        dtype=torch.int32,
        device=pixels.device,
    )
    tapped = torch.empty_like(total)
    for tap, coefficient in enumerate(coefficients):
        # Past the last position the coefficient is zero; the index only has to be valid.
        position = (first + tap).clamp_(max=in_size - 1)
        total.addcmul_(torch.index_select(flat, 0, position, out=tapped), coefficient)
    result = total.bitwise_right_shift_(PRECISION_BITS).clamp_(0, 255).to(torch.uint8)
    return result.view(out_size, *lines.shape[1:]).movedim(0, dim)
