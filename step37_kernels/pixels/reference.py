"""Defines normalising and resizing of pixels in plain PyTorch; tests compare the kernels with it.

``clip_normalize`` is the definition of the normalisation. ``resize_bilinear`` is Pillow's
``Image.resize(size, BILINEAR)`` for 8-bit RGB, spelled out: coefficients in float64, rounded to
fixed point with 22 fractional bits, two passes in int32 arithmetic with an 8-bit picture between
them (``src/libImaging/Resample.c`` in Pillow).
"""

from __future__ import annotations

import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PRECISION_BITS = 22


def clip_normalize(
    pixels: torch.Tensor,
    *,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``((pixels / 255 - mean) / std)`` in fp32, in this order, then rounded to ``dtype``.

    It is computed on the CPU, whatever the device of ``pixels``, because PyTorch divides there. On
    CUDA it multiplies by the rounded reciprocal of a scalar, which gives other results.

    Args:
        pixels: uint8 ``[N, H, W, 3]``.
        mean, std: per channel.
        dtype: of the result.

    Returns:
        ``[N, 3, H, W]`` in ``dtype``, on the device of ``pixels``.
    """
    x = pixels.cpu().to(torch.float32).permute(0, 3, 1, 2)
    mean_3 = torch.tensor(mean, dtype=torch.float32, device="cpu").view(3, 1, 1)
    std_3 = torch.tensor(std, dtype=torch.float32, device="cpu").view(3, 1, 1)
    normalized = (x / 255 - mean_3) / std_3
    return normalized.to(dtype).contiguous().to(pixels.device)


def bilinear_coefficients(in_size: int, out_size: int) -> list[tuple[int, list[int]]]:
    """Compute the coefficients of Pillow's fixed-point triangle filter along one axis.

    Returns:
        For each of the ``out_size`` positions ``(first, coefficients)``: the first input position
        that counts, and the coefficients of it and those after it, scaled by ``2 ** 22``.
    """
    scale = in_size / out_size
    filter_scale = max(scale, 1.0)
    support = filter_scale
    result = []
    for x in range(out_size):
        center = (x + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        end = min(in_size, int(center + support + 0.5))
        weights = []
        for i in range(first, end):
            distance = abs((i - center + 0.5) * (1.0 / filter_scale))
            weights.append(1.0 - distance if distance < 1.0 else 0.0)
        total = 0.0
        for weight in weights:
            total += weight
        fixed = [int(0.5 + weight / total * (1 << PRECISION_BITS)) for weight in weights]
        result.append((first, fixed))
    return result


def resize_axis(pixels: torch.Tensor, out_size: int, dim: int) -> torch.Tensor:
    """Do one pass: filter uint8 ``pixels`` along ``dim`` to ``out_size``; returns uint8."""
    if pixels.shape[dim] == out_size:
        return pixels
    lines = pixels.movedim(dim, 0).to(torch.int32)
    out = []
    for first, coefficients in bilinear_coefficients(pixels.shape[dim], out_size):
        line = torch.full_like(lines[0], 1 << (PRECISION_BITS - 1))
        for tap, coefficient in enumerate(coefficients):
            line += lines[first + tap] * coefficient
        out.append((line >> PRECISION_BITS).clamp(0, 255).to(torch.uint8))
    return torch.stack(out).movedim(0, dim)


def passes_of(
    old: tuple[int, int], new: tuple[int, int], pillow: tuple[int, int]
) -> tuple[int, int]:
    """Return the dimensions in the order in which Pillow ``pillow`` (major, minor) filters them.

    0 is the height, 1 the width; sizes are (height, width). Pillow rounds to 8 bits between the
    passes, so their order changes the result. Versions up to 12.1 filter along the width first.
    12.2 filters along the height first if the height shrinks and the picture is more than 100 times
    as tall as wide; 13.0 if the height shrinks by more than twice as many pixels as the width.
    """
    width_first, height_first = (1, 0), (0, 1)
    lost_height, lost_width = old[0] - new[0], old[1] - new[1]
    if lost_height <= 0 or pillow < (12, 2):
        return width_first
    if pillow < (13, 0):
        return height_first if old[0] > 100 * old[1] else width_first
    return height_first if lost_height > 2 * lost_width else width_first


def resize_bilinear(
    image: torch.Tensor, size: tuple[int, int], pillow: tuple[int, int]
) -> torch.Tensor:
    """Resize as ``Image.resize(size, BILINEAR)`` of Pillow version ``pillow`` (major, minor) does.

    Args:
        image: uint8 ``[h, w, 3]`` on the CPU.
        size: (height, width) of the result; Pillow's own argument is (width, height).
        pillow: the version whose order of passes to follow.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    old = (image.shape[0], image.shape[1])
    for dim in passes_of(old, size, pillow):
        image = resize_axis(image, size[dim], dim)
    return image


def resize_clip_normalize(
    images: list[torch.Tensor],
    size: int,
    *,
    pillow: tuple[int, int],
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Resize every uint8 ``[h_i, w_i, 3]`` to ``size`` × ``size`` as Pillow does, and normalise.

    Returns:
        ``[N, 3, size, size]`` in ``dtype``.
    """
    if not images:
        return torch.empty(0, 3, size, size, dtype=dtype)
    resized = torch.stack([resize_bilinear(image, (size, size), pillow) for image in images])
    return clip_normalize(resized, mean=mean, std=std, dtype=dtype)
