"""Subjects ``normalize`` and ``resize``: times the pixel kernels without decoding and upload.

The pictures are on the device already; the subjects ``pixels`` and ``multicrop`` measure decoding
and the host. Our results have to equal Pillow and the reference bit for bit. PyTorch's own resize
gives other values than Pillow; it only has to be near, and the names of its rows say so.

Operations: ``normalize`` without resizing; ``resize+normalize``; and ``multicrop``, which resizes a
pack of large pictures to full images and to canvases from which crops are cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench import harness
from bench.harness import Implementation, Key, Kind, Row, Settings, Work
from bench.photographs import LARGE, large_plan, photographs, stock_resize, stock_windows
from step37_data.images.crop_pixels import prepare_on_device, rectangle
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD, clip_normalize
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize

SIZE = 728
BATCHES = (9, 64)  # numbers of pictures: as in a pack, and enough to fill the device
FLICKR8K = (500, 375)
"""(width, height) of most Flickr8k pictures."""
LARGE_PICTURES = 9
NEAR = 2  # levels of 256 by which a resize other than Pillow's may differ from it
COPY = "copy of as many bytes"

Way = tuple[str, Kind, Callable[[int], Any], Callable[[Any], Any]]
"""Name, kind, ``prepare`` and ``run`` of an implementation."""


def pixels_of(pictures: Sequence[Image.Image], device: torch.device) -> list[Tensor]:
    """Put pictures on a device: ``[h, w, 3]`` uint8 each."""
    return [torch.from_numpy(np.array(picture)).to(device) for picture in pictures]


def by_pillow(pictures: Sequence[Image.Image], side: int, dtype: torch.dtype) -> Tensor:
    """Compute the expected values on the host: Pillow's resize, the reference's normalisation."""
    resized = [np.asarray(stock_resize(picture, side)) for picture in pictures]
    return reference_pixels.clip_normalize(torch.from_numpy(np.stack(resized)), dtype=dtype)


def plain_normalize(pixels: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise in plain PyTorch.

    ``constants`` are mean and std, ``[2, 3, 1, 1]`` on the device.
    """
    mean, std = constants
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


def plain_resize(pixels: Tensor, constants: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Resize ``[N, h, w, 3]`` with PyTorch's antialiased filter, in fp32, and normalise."""
    x = pixels.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return plain_normalize(x.round().permute(0, 2, 3, 1), constants, dtype)


def constants_on(device: torch.device) -> Tensor:
    """Put mean and std on a device, ``[2, 3, 1, 1]``."""
    return torch.tensor([CLIP_MEAN, CLIP_STD], device=device).view(2, 3, 1, 1)


def measured(
    key: Key, ways: list[Way], *, wanted: Sequence[Tensor], read: int, settings: Settings
) -> list[Row]:
    """Check and time several ways to make the wanted tensors, and a copy of as many bytes.

    The key's shape begins with the number of pictures; ``read`` is how many bytes these have.
    """
    moved = read + sum(tensor.nbytes for tensor in wanted)
    half = torch.empty(moved // 2, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(half)
    ways = [*ways, (COPY, "floor", int, lambda _: target.copy_(half))]
    # On the device: comparing on the host would need a transfer for each implementation.
    references = [tensor.to(settings.device) for tensor in wanted]
    level = 1 / (255 * min(CLIP_STD))

    def check(implementation: Implementation, result: Any) -> str | None:
        if implementation.kind == "floor":
            return None
        results = [result] if isinstance(result, Tensor) else list(result)
        for got, reference in zip(results, references, strict=True):
            if implementation.kind == "peer":
                farthest = float((got.float() - reference.float()).abs().max()) / level
                if not farthest <= NEAR:
                    return f"up to {farthest:.1f} of 256 levels from Pillow"
            elif different := int((got != reference).sum()):
                return f"{different} of {got.numel()} values differ from Pillow's"
        return None

    return harness.measure(
        key,
        Work(flops=0, bytes=moved, rows=int(key.shape.split()[0])),
        [Implementation(name=n, kind=k, prepare=p, run=r) for n, k, p, r in ways],
        check=check,
        settings=settings,
    )


def peers(name: str, prepare: Callable[[int], Any], plain: Any, settings: Settings) -> list[Way]:
    """List PyTorch, eager and compiled. On CUDA it multiplies by rounded reciprocals."""
    found: list[Way] = [(f"PyTorch{name}", "peer", prepare, plain)]
    if settings.compile_backend is not None:
        compiled = torch.compile(plain, dynamic=False, backend=settings.compile_backend)
        found.append((f"torch.compile{name}", "peer", prepare, compiled))
    return found


def rotated(first: Any, numbytes: int, copy: Callable[[Any], Any], settings: Settings) -> Any:
    """Make a ``prepare`` that rotates among as many input sets as exceed the cache."""
    sets = [first] + [copy(first) for _ in range(harness.rotation(settings.device, numbytes) - 1)]
    return lambda i: sets[i % len(sets)]


def copy_of(images: RaggedImages) -> RaggedImages:
    """Copy pictures to new memory."""
    return RaggedImages(data=images.data.clone(), offsets=images.offsets, shapes=images.shapes)


def run_normalize(settings: Settings) -> Iterator[list[Row]]:
    """Yield one group for each dtype and number of pictures."""
    for dtype in settings.dtypes:
        for count in BATCHES:
            yield normalize(count, settings, dtype)


def run_resize(settings: Settings) -> Iterator[list[Row]]:
    """Yield groups for each dtype: pictures of one size, of eight sizes, and in crops."""
    for dtype in settings.dtypes:
        for count in BATCHES:
            yield resize(photographs(count, FLICKR8K), settings, dtype)
        # The eight photographs, each with its own size.
        yield resize(photographs(BATCHES[-1]), settings, dtype)
        yield multicrop(settings, dtype)


def normalize(count: int, settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Measure normalising pictures that are not resized."""
    pictures = photographs(count, (SIZE, SIZE))
    pixels = torch.stack(pixels_of(pictures, settings.device))
    prepare = rotated(pixels, pixels.nbytes, Tensor.clone, settings)
    ours = functools.partial(clip_normalize, dtype=dtype, impl=settings.impl)
    constants = constants_on(settings.device)
    plain = functools.partial(plain_normalize, constants=constants, dtype=dtype)
    ways: list[Way] = [("step37", "ours", prepare, ours)]
    ways += peers("", prepare, plain, settings)
    key = Key(
        subject="normalize", operation="normalize", shape=f"{count} × {SIZE}×{SIZE}",
        dtype=harness.dtype_name(dtype),
    )  # fmt: skip
    wanted = [by_pillow(pictures, SIZE, dtype)]
    return measured(key, ways, wanted=wanted, read=pixels.nbytes, settings=settings)


def resize(pictures: Sequence[Image.Image], settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Measure pictures of one size or of several, resized to ``SIZE``."""
    sizes = {picture.size for picture in pictures}
    width, height = pictures[0].size
    images = RaggedImages.gather(pixels_of(pictures, settings.device))
    prepare = rotated(images, images.data.nbytes, copy_of, settings)
    ours = functools.partial(resize_clip_normalize, size=SIZE, dtype=dtype, impl=settings.impl)
    ways: list[Way] = [("step37", "ours", prepare, ours)]
    constants = constants_on(settings.device)
    plain = functools.partial(plain_resize, constants=constants, side=SIZE, dtype=dtype)
    if len(sizes) == 1:
        batch = images.data.view(len(pictures), height, width, 3)
        in_turn = rotated(batch, batch.nbytes, Tensor.clone, settings)
        ways += peers(", not Pillow's values", in_turn, plain, settings)
    name = f"{width}×{height}" if len(sizes) == 1 else f"{len(sizes)} sizes"
    key = Key(
        subject="resize", operation="resize+normalize",
        shape=f"{len(pictures)} × {name} → {SIZE}", dtype=harness.dtype_name(dtype),
    )  # fmt: skip
    wanted = [by_pillow(pictures, SIZE, dtype)]
    return measured(key, ways, wanted=wanted, read=images.data.nbytes, settings=settings)


def multicrop(settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Measure a pack of large pictures in crops; the least work does not count the canvas."""
    plan = large_plan(LARGE)
    pictures = photographs(LARGE_PICTURES, LARGE)
    images = RaggedImages.gather(pixels_of(pictures, settings.device))
    last_resize = functools.partial(resize_clip_normalize, dtype=dtype, impl=settings.impl)

    def whole(given: RaggedImages) -> tuple[Tensor, Tensor]:
        plans = [plan] * len(pictures)
        full, canvases, _ = prepare_on_device(given, plans, impl=settings.impl)
        crops = [rectangle(i, window) for i in range(len(plans)) for window in plan.windows]
        return last_resize(canvases, CROP_SIZE, crops=crops), last_resize(full, IMAGE_SIZE)

    windows = [window for picture in pictures for window in stock_windows(picture, plan)]
    wanted = [by_pillow(windows, CROP_SIZE, dtype), by_pillow(pictures, IMAGE_SIZE, dtype)]
    key = Key(
        subject="resize", operation="multicrop",
        shape=f"{len(pictures)} × {LARGE[0]}×{LARGE[1]}", dtype=harness.dtype_name(dtype),
    )  # fmt: skip
    prepare = rotated(images, images.data.nbytes, copy_of, settings)
    ways: list[Way] = [("step37", "ours", prepare, whole)]
    return measured(key, ways, wanted=wanted, read=images.data.nbytes, settings=settings)
