"""Subjects ``normalize`` and ``resize``: the pixel kernels by themselves, in bytes a second.

The pictures are on the device already; what decoding and the host add is measured by the subjects
``pixels`` and ``multicrop``. The gate is Pillow and the reference, bit for bit. PyTorch's own
resize computes other values than Pillow; it is held to be near it, and its rows say so.

Operations: ``normalize`` of pictures that have their size; ``resize+normalize``; and ``multicrop``,
a pack of large pictures resized to canvases, of which crops are cut, and to full images.
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
from bench.subjects.pixels import photo_paths, stock_decode
from step37_data.images.crop_pixels import canvas_image, cut, prepare_on_device, rectangle
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, plan_crops
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD, clip_normalize
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize

SIZE = 728
BATCHES = (9, 64)  # pictures: those of a pack, and enough to fill the device
FLICKR8K = (500, 375)
"""(width, height) of most of its pictures."""
LARGE = (1920, 1080)
LARGE_PICTURES = 9
BILINEAR = Image.Resampling.BILINEAR
NEAR = 2  # how many of the 256 levels a resize that is not Pillow's may be away from it
COPY = "copy of as many bytes"

Way = tuple[str, Kind, Callable[[int], Any], Callable[[Any], Any]]
"""Name, kind, ``prepare`` and ``run`` of an implementation; peers need not have Pillow's values."""


def photographs(count: int, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """The photographs of the example, in turn; resized to (width, height) if one is given."""
    pictures = map(stock_decode, photo_paths(count))
    return [picture.resize(size, BILINEAR) if size else picture for picture in pictures]


def pixels_of(pictures: Sequence[Image.Image], device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(np.array(picture)).to(device) for picture in pictures]


def by_pillow(pictures: Sequence[Image.Image], side: int, dtype: torch.dtype) -> Tensor:
    """The values to get: Pillow's resize and the reference's normalisation, on the host."""
    resized = [np.asarray(picture.resize((side, side), BILINEAR)) for picture in pictures]
    return reference_pixels.clip_normalize(torch.from_numpy(np.stack(resized)), dtype=dtype)


def plain_normalize(pixels: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """The expression as one writes it in PyTorch; ``constants`` are mean and std, ``[2, 3, 1, 1]``
    on the device."""
    mean, std = constants
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


def plain_resize(pixels: Tensor, constants: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """PyTorch's antialiased resize of ``[N, h, w, 3]``, in fp32."""
    x = pixels.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return plain_normalize(x.round().permute(0, 2, 3, 1), constants, dtype)


def constants_on(device: torch.device) -> Tensor:
    return torch.tensor([CLIP_MEAN, CLIP_STD], device=device).view(2, 3, 1, 1)


def measured(
    names: tuple[str, str, str], ways: list[Way], wanted: Sequence[Tensor], read: int,
    dtype: torch.dtype, settings: Settings,
) -> list[Row]:  # fmt: skip
    """Gate and time ways to make the wanted tensors, and a copy that moves as many bytes.

    ``names``: subject, operation, and a shape that begins with the number of pictures; ``read``:
    bytes of these.
    """
    moved = read + sum(tensor.nbytes for tensor in wanted)
    half = torch.empty(moved // 2, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(half)
    ways = [*ways, (COPY, "floor", int, lambda _: target.copy_(half))]
    # On the device, once a row: not a transfer and a search on the host for each.
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

    subject, operation, shape = names
    short = harness.dtype_name(dtype)
    return harness.measure(
        Key(subject=subject, operation=operation, shape=shape, dtype=short),
        Work(flops=0, bytes=moved, rows=int(shape.split()[0])),
        [Implementation(name=n, kind=k, prepare=p, run=r) for n, k, p, r in ways],
        check,
        settings,
    )


def peers(name: str, prepare: Callable[[int], Any], plain: Any, settings: Settings) -> list[Way]:
    """PyTorch's way, eager and compiled. On CUDA it multiplies by rounded reciprocals."""
    found: list[Way] = [(f"PyTorch{name}", "peer", prepare, plain)]
    if settings.compile_backend is not None:
        compiled = torch.compile(plain, dynamic=False, backend=settings.compile_backend)
        found.append((f"torch.compile{name}", "peer", prepare, compiled))
    return found


def rotated(first: Any, numbytes: int, copy: Callable[[Any], Any], settings: Settings) -> Any:
    """``prepare`` of an implementation: as many sets of inputs as pass the cache, in turn."""
    sets = [first] + [copy(first) for _ in range(harness.rotation(settings.device, numbytes) - 1)]
    return lambda i: sets[i % len(sets)]


def copy_of(images: RaggedImages) -> RaggedImages:
    return RaggedImages(data=images.data.clone(), offsets=images.offsets, shapes=images.shapes)


def run(settings: Settings) -> Iterator[list[Row]]:
    """The groups of both subjects."""
    for dtype in settings.dtypes:
        for count in BATCHES:
            yield normalize(count, settings, dtype)
        for count in BATCHES:
            yield resize(photographs(count, FLICKR8K), settings, dtype)
        # Of eight sizes, as they are.
        yield resize(photographs(BATCHES[-1]), settings, dtype)
        yield multicrop(settings, dtype)


def normalize(count: int, settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Pictures that have their size."""
    pictures = photographs(count, (SIZE, SIZE))
    pixels = torch.stack(pixels_of(pictures, settings.device))
    prepare = rotated(pixels, pixels.nbytes, Tensor.clone, settings)
    ours = functools.partial(clip_normalize, dtype=dtype, impl=settings.impl)
    constants = constants_on(settings.device)
    plain = functools.partial(plain_normalize, constants=constants, dtype=dtype)
    ways: list[Way] = [("step37", "ours", prepare, ours)]
    ways += peers("", prepare, plain, settings)
    names = ("normalize", "normalize", f"{count} × {SIZE}×{SIZE}")
    wanted = [by_pillow(pictures, SIZE, dtype)]
    return measured(names, ways, wanted, pixels.nbytes, dtype, settings)


def resize(pictures: Sequence[Image.Image], settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Pictures to ``SIZE``, of one size or of several."""
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
    names = ("resize", "resize+normalize", f"{len(pictures)} × {name} → {SIZE}")
    wanted = [by_pillow(pictures, SIZE, dtype)]
    return measured(names, ways, wanted, images.data.nbytes, dtype, settings)


def multicrop(settings: Settings, dtype: torch.dtype) -> list[Row]:
    """A pack of large pictures in crops. The canvas need not leave the chip."""
    plan = plan_crops(*LARGE)
    if plan.full_size != LARGE:
        raise AssertionError(f"written for pictures that are taken as they are, got {plan}")
    pictures = photographs(LARGE_PICTURES, LARGE)
    images = RaggedImages.gather(pixels_of(pictures, settings.device))
    last_resize = functools.partial(resize_clip_normalize, dtype=dtype, impl=settings.impl)

    def whole(given: RaggedImages) -> tuple[Tensor, Tensor]:
        plans = [plan] * len(pictures)
        full, canvases, _ = prepare_on_device(given, plans, impl=settings.impl)
        crops = [rectangle(i, window) for i in range(len(plans)) for window in plan.windows]
        return last_resize(canvases, CROP_SIZE, crops=crops), last_resize(full, IMAGE_SIZE)

    canvases = [canvas_image(picture, plan) for picture in pictures]
    windows = [cut(canvas, window) for canvas in canvases for window in plan.windows]
    wanted = [by_pillow(windows, CROP_SIZE, dtype), by_pillow(pictures, IMAGE_SIZE, dtype)]
    names = ("resize", "multicrop", f"{len(pictures)} × {LARGE[0]}×{LARGE[1]}")
    prepare = rotated(images, images.data.nbytes, copy_of, settings)
    ways: list[Way] = [("step37", "ours", prepare, whole)]
    return measured(names, ways, wanted, images.data.nbytes, dtype, settings)
