"""Pixels: uint8 pictures to what the vision tower takes, bit for bit what the stock path gives."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.reference import CLIP_MEAN, CLIP_STD, vertical_pass_first

if TYPE_CHECKING:
    from step37_kernels.ops.normalize import Line

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

        return ops.normalize(pixels, _results(mean, std, dtype, pixels.device), dtype)
    return look_up(pixels, normalize_table(mean, std, dtype, pixels.device))


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
        if self.data.dtype != torch.uint8:
            raise TypeError(f"data: expected torch.uint8, got {self.data.dtype}")
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
        """Copy uint8 ``[h_i, w_i, 3]`` tensors, at least one, into one buffer on their device."""
        for i, image in enumerate(images):
            if image.dtype != torch.uint8:
                raise TypeError(f"images[{i}]: expected torch.uint8, got {image.dtype}")
            if image.dim() != 3 or image.shape[-1] != 3:
                raise ValueError(f"images[{i}]: expected [h, w, 3], got {list(image.shape)}")
            if image.device != images[0].device:
                raise ValueError(
                    f"images[{i}]: expected all on {images[0].device}, got {image.device}"
                )
        data = torch.cat([image.reshape(-1) for image in images])
        offsets, end = [], 0
        for image in images:
            offsets.append(end)
            end += image.numel()
        return cls(
            data=data,
            offsets=offsets,
            shapes=[(image.shape[0], image.shape[1]) for image in images],
        )

    def image(self, i: int) -> torch.Tensor:
        """Picture ``i`` as ``[height, width, 3]``, a view."""
        height, width = self.shapes[i]
        start = self.offsets[i]
        return self.data[start : start + height * width * 3].view(height, width, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A rectangle of a picture, in pixels: ``left <= x < right``, ``top <= y < bottom``."""

    image: int
    left: int
    top: int
    right: int
    bottom: int


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
        _check_crop(i, crop, images)
    device = images.data.device
    triton = use_triton(impl, device)
    _check_constants(mean, std, dtype)
    order = resample.installed_pillow() if pillow is None else pillow
    if not crops:
        return torch.empty((0, 3, size, size), dtype=dtype, device=device)
    if triton:
        results = _results(mean, std, dtype, device)
        return _resize_triton(images, crops, size, results, dtype, order)
    resized = torch.empty((len(crops), size, size, 3), dtype=torch.uint8, device=device)
    for i, crop in enumerate(crops):
        source = images.image(crop.image)[crop.top : crop.bottom, crop.left : crop.right]
        resized[i] = resample.resize(source, size, order)
    return look_up(resized, normalize_table(mean, std, dtype, device))


def _check_crop(i: int, crop: Crop, images: RaggedImages) -> None:
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


def _resize_triton(
    images: RaggedImages,
    crops: Sequence[Crop],
    size: int,
    results: torch.Tensor | Line,
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


def _results(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | Line:
    """The normalisation as the kernels take it: arithmetic where it is exact, else the table."""
    mean_rgb, std_rgb = _check_constants(mean, std, dtype)
    line = _line(mean_rgb, std_rgb, dtype)
    return normalize_table(mean, std, dtype, device) if line is None else line


@functools.lru_cache(maxsize=64)
def _line(mean: _RGB, std: _RGB, dtype: torch.dtype) -> Line | None:
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


def _check_constants(
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
    mean_rgb, std_rgb = _check_constants(mean, std, dtype)
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
        levels = torch.arange(256, dtype=torch.uint8, device="cpu").view(1, 1, 256, 1)
        table = reference_pixels.clip_normalize(
            levels.expand(1, 1, 256, 3), mean=mean, std=std, dtype=dtype
        )
        return table.view(3, 256).to(device)


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
