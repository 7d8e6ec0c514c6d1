"""Normalises 8-bit pixels with CLIP's constants for the vision tower, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from step37_kernels.dispatch import Impl, use_triton

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

RGB = tuple[float, ...]
"""Red, green and blue."""


def clip_normalize(
    pixels: torch.Tensor,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.bfloat16,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Normalise 8-bit pictures: ``((pixels / 255 - mean) / std)`` in fp32, rounded to ``dtype``.

    Bit for bit the result of that expression, evaluated in this order with IEEE division, on every
    device and for every ``impl``.

    Args:
        pixels: uint8 ``[N, H, W, 3]``, any strides; sizes of zero are fine.
        mean, std: three numbers each, for red, green, blue, in units of the 0…1 range.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[N, 3, H, W]``, contiguous, on the device of ``pixels``.

    Raises:
        TypeError: ``pixels`` is not a uint8 tensor, or ``dtype`` is none of the three.
        ValueError: the shape is not ``[N, H, W, 3]``, ``mean`` or ``std`` does not hold three
            finite numbers, ``std`` holds a zero, or ``impl`` cannot run on this device.
    """
    check_uint8("pixels", pixels)
    if pixels.dim() != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels: expected [N, H, W, 3], got {list(pixels.shape)}")
    mean, std = check_constants(mean, std, dtype)
    if use_triton(impl, pixels.device):
        from step37_kernels.ops import normalize_pixels as ops

        return ops.normalize(pixels, kernel_constants(mean, std, dtype), dtype)
    return normalize_torch(pixels, mean, std, dtype)


def check_uint8(name: str, pixels: object, expected: str = "a tensor of torch.uint8") -> None:
    """Raise ``TypeError`` unless ``pixels`` is a uint8 tensor.

    For other kinds of pictures the message says how to make one.
    """
    if isinstance(pixels, torch.Tensor):
        if pixels.dtype != torch.uint8:
            raise TypeError(f"{name}: expected torch.uint8, got {pixels.dtype}")
        return
    kind = type(pixels)
    if isinstance(pixels, np.ndarray):
        got = f"a NumPy array of {pixels.dtype}: pass torch.from_numpy(array)"
    elif hasattr(pixels, "convert") and hasattr(pixels, "getbands"):
        got = f"Pillow's {kind.__name__}: pass torch.from_numpy(np.array(image.convert('RGB')))"
    else:
        got = kind.__name__
    raise TypeError(f"{name}: expected {expected}, got {got}")


def check_constants(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[RGB, RGB]:
    """Check the arguments of :func:`clip_normalize`; return mean and std as floats."""
    if dtype not in DTYPES:
        names = ", ".join(str(allowed) for allowed in DTYPES)
        raise TypeError(f"dtype: expected one of {names}, got {dtype}")
    return _three("mean", mean), _three("std", std)


def _three(name: str, values: Sequence[float]) -> RGB:
    try:
        numbers = tuple(map(float, values))
    except TypeError as error:
        raise TypeError(f"{name}: expected three numbers, got {values!r}") from error
    largest = torch.finfo(torch.float32).max
    if len(numbers) != 3 or not all(abs(number) <= largest for number in numbers):
        raise ValueError(f"{name}: expected three finite numbers, got {list(values)}")
    if name == "std" and min(map(abs, numbers)) <= 2**-150:
        raise ValueError(f"std: expected numbers other than zero in float32, got {list(values)}")
    return numbers


def normalize_torch(pixels: torch.Tensor, mean: RGB, std: RGB, dtype: torch.dtype) -> torch.Tensor:
    """Do :func:`clip_normalize` in PyTorch, one plane at a time: a plane fits into the cache."""
    n, height, width, _ = pixels.shape
    out = torch.empty((n, 3, height, width), dtype=dtype, device=pixels.device)

    def constant(number: float) -> torch.Tensor:
        # A tensor on the device: by a number or a CPU tensor CUDA would multiply by its reciprocal.
        return torch.full((), number, dtype=torch.float32, device=pixels.device)

    levels = constant(255)
    for channel in range(3):
        offset, scale = constant(mean[channel]), constant(std[channel])
        for image, planes in zip(pixels, out, strict=True):
            values = image[..., channel].to(torch.float32)
            planes[channel] = values.div_(levels).sub_(offset).div_(scale)
    return out


def kernel_constants(mean: RGB, std: RGB, dtype: torch.dtype) -> tuple[bool, RGB]:
    """Return the constants for the kernels: of one product and one sum if that is exact."""
    numbers = multiply_add_constants(mean, std, dtype)
    if numbers is not None:
        return True, numbers
    return False, tuple(number for pair in zip(std, mean, strict=True) for number in pair)


@functools.lru_cache(maxsize=64)
def multiply_add_constants(mean: RGB, std: RGB, dtype: torch.dtype) -> tuple[float, ...] | None:
    """Return scale and offset of each channel if one product and one sum are exact, else None.

    Exact: ``value * scale + offset`` in fp32, fused or not, rounded to ``dtype``, equals the
    reference for all 256 values.
    """
    levels = torch.arange(256, dtype=torch.uint8, device="cpu")
    wanted = normalize_torch(levels.view(1, 1, 256, 1).expand(-1, -1, -1, 3), mean, std, dtype)
    value = levels.double()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    numbers: list[float] = []
    for channel in range(3):
        exact = (1 / (255 * std[channel]), -mean[channel] / std[channel])
        scale, offset = torch.tensor(exact, dtype=torch.float32, device="cpu")
        # In fp64 product and sum are exact, so this rounds once, as a fused instruction does.
        fused = (value * scale.double() + offset.double()).float()
        separate = value.float() * scale + offset
        for result in (fused, separate):
            if not torch.equal(result.to(dtype).view(bits), wanted[0, channel, 0].view(bits)):
                return None
        numbers += [scale.item(), offset.item()]
    return tuple(numbers)
