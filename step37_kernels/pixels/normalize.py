"""The CLIP normalisation: 8-bit pixels to what the vision tower takes, bit for bit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from step37_kernels.dispatch import Impl, use_triton

if TYPE_CHECKING:
    from step37_kernels.ops.normalize import ScaleAndOffset

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_RGB = tuple[float, float, float]


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
    device and for every ``impl``: the 256 results per channel are known before the pixels are.

    Args:
        pixels: uint8 ``[N, H, W, 3]``, any strides; sizes of zero are fine.
        mean, std: three numbers each, for red, green, blue, in units of the 0…1 range.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[N, 3, H, W]``, contiguous, on the device of ``pixels``.

    Raises:
        TypeError: ``pixels`` is not uint8, or ``dtype`` is none of the three.
        ValueError: the shape is not ``[N, H, W, 3]``, ``mean`` or ``std`` does not hold three
            finite numbers, ``std`` holds a zero, or ``impl`` cannot run on this device.
        RuntimeError: first use of these constants on a device while a CUDA graph is captured.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels: expected torch.uint8, got {pixels.dtype}")
    if pixels.dim() != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels: expected [N, H, W, 3], got {list(pixels.shape)}")
    if use_triton(impl, pixels.device):
        from step37_kernels.ops import normalize as ops

        return ops.normalize(pixels, kernel_constants(mean, std, dtype, pixels.device), dtype)
    return look_up(pixels, normalize_table(mean, std, dtype, pixels.device))


def look_up(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``out[n, c, y, x] = table[c, pixels[n, y, x, c]]`` in PyTorch.

    Args:
        pixels: uint8 ``[N, H, W, 3]``.
        table: ``[3, 256]``.

    Returns:
        ``[N, 3, H, W]`` in the table's dtype.
    """
    n, height, width, _ = pixels.shape
    out = torch.empty((n, 3, height, width), dtype=table.dtype, device=pixels.device)
    # Plane by plane: a plane and its indices stay in a processor's cache. Indices must not be
    # uint8, which would be taken for a mask.
    for image in range(n):
        for channel in range(3):
            levels = pixels[image, :, :, channel].reshape(-1).to(torch.int32)
            torch.index_select(table[channel], 0, levels, out=out[image, channel].view(-1))
    return out


@functools.lru_cache(maxsize=64)
def _three(name: str, values: tuple[float, ...]) -> _RGB:
    with np.errstate(over="ignore"):
        rounded = np.array(values, dtype=np.float32)
    if len(values) != 3 or not np.isfinite(rounded).all():
        raise ValueError(f"{name}: expected three finite numbers, got {list(values)}")
    if name == "std" and not rounded.all():
        raise ValueError(f"std: expected numbers other than zero in float32, got {list(values)}")
    red, green, blue = values
    return red, green, blue


def kernel_constants(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | ScaleAndOffset:
    """The normalisation as the kernels take it: arithmetic where it is exact, else the table."""
    mean_rgb, std_rgb = check_constants(mean, std, dtype)
    line = _scale_and_offset(mean_rgb, std_rgb, dtype)
    return normalize_table(mean, std, dtype, device) if line is None else line


@functools.lru_cache(maxsize=64)
def _scale_and_offset(mean: _RGB, std: _RGB, dtype: torch.dtype) -> ScaleAndOffset | None:
    """Scale and offset of each channel, if ``value * scale + offset`` in fp32, rounded to
    ``dtype``, is the reference's result for all 256 values, fused or not; else None."""
    cpu = torch.device("cpu")
    table = _table_on(mean, std, dtype, cpu)
    value = torch.arange(256, dtype=torch.float64, device=cpu)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    line: list[float] = []
    for channel in range(3):
        exact = (1 / (255 * std[channel]), -mean[channel] / std[channel])
        scale, offset = torch.tensor(exact, dtype=torch.float32, device=cpu)
        # In fp64 the product and the sum are exact: one rounding, as in a fused instruction.
        fused = (value * scale.double() + offset.double()).float()
        separate = value.float() * scale + offset
        for result in (fused, separate):
            if not torch.equal(result.to(dtype).view(bits), table[channel].view(bits)):
                return None
        line += [scale.item(), offset.item()]
    red_scale, red_offset, green_scale, green_offset, blue_scale, blue_offset = line
    return red_scale, red_offset, green_scale, green_offset, blue_scale, blue_offset


def check_constants(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[_RGB, _RGB]:
    if dtype not in DTYPES:
        names = ", ".join(str(allowed) for allowed in DTYPES)
        raise TypeError(f"dtype: expected one of {names}, got {dtype}")
    return _three("mean", _numbers("mean", mean)), _three("std", _numbers("std", std))


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except TypeError as error:
        raise TypeError(f"{name}: expected three numbers, got {values!r}") from error


def normalize_table(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The ``[3, 256]`` results of the normalisation, cached per constants, dtype and device.

    On CUDA the copy is queued, never waited for by the host: every stream that uses the table is
    made to wait for the copy, once.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`clip_normalize`.
    """
    mean_rgb, std_rgb = check_constants(mean, std, dtype)
    if device.type != "cuda":
        return _table_on(mean_rgb, std_rgb, dtype, device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (mean_rgb, std_rgb, dtype, index)
    with _cuda_tables_lock:
        entry = _cuda_tables.get(key)
        if entry is None:
            entry = _cuda_tables[key] = _CudaTable.queue_copy(mean_rgb, std_rgb, dtype, index)
        return entry.on_current_stream()


@functools.lru_cache(maxsize=64)
def _table_on(mean: _RGB, std: _RGB, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # What is kept must not belong to a mode that somebody happens to be in.
    with unset_fake_temporarily():
        # On the CPU, where PyTorch divides by a scalar; CUDA multiplies by its reciprocal.
        level = torch.arange(256, dtype=torch.float32, device="cpu") / 255
        means, stds = (torch.tensor(rgb, device="cpu").view(3, 1) for rgb in (mean, std))
        return ((level - means) / stds).to(dtype).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CudaTable:
    """A table on a CUDA device, with what orders the streams behind its copy."""

    table: torch.Tensor
    copied: torch.cuda.Event
    ordered_streams: set[int]
    index: int

    @classmethod
    def queue_copy(cls, mean: _RGB, std: _RGB, dtype: torch.dtype, index: int) -> _CudaTable:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "clip_normalize: first use of these constants on this device falls into a CUDA "
                "graph capture; call it once before capturing"
            )
        stream = torch.cuda.current_stream(index)
        host = _table_on(mean, std, dtype, torch.device("cpu")).pin_memory()
        with torch.cuda.device(index):
            table = host.to(f"cuda:{index}", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return cls(table=table, copied=copied, ordered_streams={stream.cuda_stream}, index=index)

    def on_current_stream(self) -> torch.Tensor:
        stream = torch.cuda.current_stream(self.index)
        # A capture begins with a device synchronisation, so the copy is long done; an event from
        # outside it must not be waited for in it.
        if stream.cuda_stream not in self.ordered_streams and not (
            torch.cuda.is_current_stream_capturing()
        ):
            stream.wait_event(self.copied)
            self.ordered_streams.add(stream.cuda_stream)
        return self.table


_cuda_tables: dict[tuple[_RGB, _RGB, torch.dtype, int], _CudaTable] = {}
_cuda_tables_lock = threading.Lock()
