"""Subjects ``normalize`` and ``resize``: the pixel kernels by themselves, in bytes a second.

The pictures are on the device already; what decoding and the host add is measured by the subjects
``pixels`` and ``multicrop``. The gate is Pillow and the reference, bit for bit. PyTorch's own
resize computes other values than Pillow; it is held to be near it, and its rows say so.

Operations: ``normalize`` of pictures that have their size; ``resize+normalize``; and the stages of
a pack of large pictures in crops: ``canvas`` (8-bit, of which the crops are cut), ``crops``,
``full images``, and all of them (``multicrop``).
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

from bench.harness import (
    Implementation,
    Key,
    Kind,
    Row,
    Settings,
    Work,
    dtype_name,
    measure,
    rotation,
)
from bench.pixels import photo_paths, stock_decode
from step37_data.images.crop_pixels import canvas_image, cut, prepare_on_device
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, plan_crops
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD, clip_normalize
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize

SIZE = 728
BATCHES = (9, 64)
"""Pictures: those of a pack, and enough to fill the device."""
FLICKR8K = (500, 375)
"""(width, height) of most of its pictures."""
LARGE = (1920, 1080)
LARGE_PICTURES = 9
BILINEAR = Image.Resampling.BILINEAR
NEAR = 2
"""How many of the 256 levels a resize that is not Pillow's may be away from it."""
COPY = "copy of as many bytes"

Run = Callable[[Any], Any]


def photographs(count: int, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """The photographs of the example, in turn; resized to (width, height) if one is given."""
    paths = photo_paths(count)
    found = {path: stock_decode(path) for path in set(paths)}
    if size is not None:
        found = {path: picture.resize(size, BILINEAR) for path, picture in found.items()}
    return [found[path] for path in paths]


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
    x = F.interpolate(
        pixels.permute(0, 3, 1, 2).float(),
        (side, side),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    return plain_normalize(x.round().permute(0, 2, 3, 1), constants, dtype)


def constants_on(device: torch.device) -> Tensor:
    return torch.tensor([CLIP_MEAN, CLIP_STD], device=device).view(2, 3, 1, 1)


class Group:
    """What the rows of one operation on one set of pictures share."""

    def __init__(
        self, subject: str, operation: str, shape: str, settings: Settings, dtype: torch.dtype
    ) -> None:
        self.key = Key(
            subject=subject, operation=operation, shape=shape, variant="", dtype=dtype_name(dtype)
        )
        self.dtype = dtype
        self.settings = settings
        self._rows: list[Implementation] = []
        self._near: set[str] = set()

    def add(
        self, name: str, kind: Kind, prepare: Callable[[int], Any], run: Run, near: bool = False
    ) -> None:
        """One implementation; ``near``: whose values need not be the ones to get."""
        self._rows.append(Implementation(name=name, kind=kind, prepare=prepare, run=run))
        if near:
            self._near.add(name)

    def measure(self, wanted: Sequence[Tensor], read: int, written: int, images: int) -> list[Row]:
        """Gate and time the rows, and a copy that moves as many bytes.

        Args:
            wanted: the values to get, tensor by tensor of a result.
            read, written: bytes, at the least.
            images: pictures in all.
        """
        device = self.settings.device
        half = torch.empty((read + written) // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(half)
        self.add(COPY, "floor", int, lambda _: target.copy_(half))
        # On the device, once a row: not a transfer and a search on the host for each.
        references = [tensor.to(device) for tensor in wanted]
        level = 1 / (255 * min(CLIP_STD))

        def check(implementation: Implementation, result: Any) -> str | None:
            if implementation.kind == "floor":
                return None
            results = [result] if isinstance(result, Tensor) else list(result)
            for got, reference in zip(results, references, strict=True):
                if implementation.name in self._near:
                    farthest = float((got.float() - reference.float()).abs().max()) / level
                    if not farthest <= NEAR:
                        return f"up to {farthest:.1f} of 256 levels from Pillow"
                elif different := int((got != reference).sum()):
                    return f"{different} of {got.numel()} values differ from Pillow's"
            return None

        work = Work(flops=0, bytes=read + written, rows=images)
        return measure(self.key, work, self._rows, check, self.settings)


def rotated(first: Any, numbytes: int, copy: Callable[[Any], Any], settings: Settings) -> Any:
    """``prepare`` of an implementation: as many sets of inputs as pass the cache, in turn."""
    sets = [first] + [copy(first) for _ in range(rotation(settings.device, numbytes) - 1)]
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
        yield from multicrop(settings, dtype)


def normalize(count: int, settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Pictures that have their size."""
    group = Group("normalize", "normalize", f"{count} × {SIZE}×{SIZE}", settings, dtype)
    pictures = photographs(count, (SIZE, SIZE))
    pixels = torch.stack(pixels_of(pictures, settings.device))
    prepare = rotated(pixels, pixels.nbytes, Tensor.clone, settings)
    constants = constants_on(settings.device)
    plain = functools.partial(plain_normalize, constants=constants, dtype=dtype)
    group.add(
        "step37",
        "ours",
        prepare,
        functools.partial(clip_normalize, dtype=dtype, impl=settings.impl),
    )
    group.add(
        "step37, PyTorch operations",
        "peer",
        prepare,
        functools.partial(clip_normalize, dtype=dtype, impl="torch"),
    )
    # On CUDA both multiply by rounded reciprocals.
    group.add("PyTorch", "peer", prepare, plain, near=True)
    if settings.compile_backend is not None:
        compiled = torch.compile(plain, dynamic=False, backend=settings.compile_backend)
        group.add("torch.compile", "peer", prepare, compiled, near=True)
    written = pixels.numel() * dtype.itemsize
    return group.measure([by_pillow(pictures, SIZE, dtype)], pixels.nbytes, written, count)


def resize(pictures: Sequence[Image.Image], settings: Settings, dtype: torch.dtype) -> list[Row]:
    """Pictures to ``SIZE``, of one size or of several."""
    sizes = {picture.size for picture in pictures}
    width, height = pictures[0].size
    name = f"{width}×{height}" if len(sizes) == 1 else f"{len(sizes)} sizes"
    shape = f"{len(pictures)} × {name} → {SIZE}"
    group = Group("resize", "resize+normalize", shape, settings, dtype)
    images = RaggedImages.gather(pixels_of(pictures, settings.device))
    group.add(
        "step37",
        "ours",
        rotated(images, images.data.nbytes, copy_of, settings),
        lambda given: resize_clip_normalize(given, SIZE, dtype=dtype, impl=settings.impl),
    )
    constants = constants_on(settings.device)
    plain = functools.partial(plain_resize, constants=constants, side=SIZE, dtype=dtype)
    if len(sizes) == 1:
        batch = images.data.view(len(pictures), height, width, 3)
        prepare = rotated(batch, batch.nbytes, Tensor.clone, settings)
        group.add("PyTorch, not Pillow's values", "peer", prepare, plain, near=True)
        if settings.compile_backend is not None:
            compiled = torch.compile(plain, dynamic=False, backend=settings.compile_backend)
            group.add("torch.compile, not Pillow's values", "peer", prepare, compiled, near=True)
    else:

        def one_by_one(given: RaggedImages) -> Tensor:
            return torch.cat([plain(given.image(i).unsqueeze(0)) for i in range(len(given))])

        prepare = rotated(images, images.data.nbytes, copy_of, settings)
        group.add("PyTorch one by one, not Pillow's values", "peer", prepare, one_by_one, near=True)
    written = len(pictures) * SIZE * SIZE * 3 * dtype.itemsize
    wanted = by_pillow(pictures, SIZE, dtype)
    return group.measure([wanted], images.data.nbytes, written, len(pictures))


def multicrop(settings: Settings, dtype: torch.dtype) -> Iterator[list[Row]]:
    """A pack of large pictures in crops, stage by stage and whole."""
    plan = plan_crops(*LARGE)
    if plan.full_size != LARGE:
        raise AssertionError(f"written for pictures that are taken as they are, got {plan}")
    pictures = photographs(LARGE_PICTURES, LARGE)
    images = RaggedImages.gather(pixels_of(pictures, settings.device))
    plans = [plan] * len(pictures)
    prepare_pictures = functools.partial(prepare_on_device, plans=plans, impl=settings.impl)
    last_resize = functools.partial(resize_clip_normalize, dtype=dtype, impl=settings.impl)
    ready = prepare_pictures(images)
    crops = [
        ready.window_rectangle(i, window) for i in range(len(pictures)) for window in plan.windows
    ]
    full = [ready.full_rectangle(i) for i in range(len(pictures))]

    def cut_crops(canvases: RaggedImages) -> Tensor:
        return last_resize(canvases, CROP_SIZE, crops=crops)

    def shrink(given: RaggedImages) -> Tensor:
        return last_resize(given, IMAGE_SIZE, crops=full)

    def whole(given: RaggedImages) -> tuple[Tensor, Tensor]:
        made = prepare_pictures(given)
        return cut_crops(made.canvases), shrink(made.full)

    canvases = [canvas_image(picture, plan) for picture in pictures]
    rooms = [(0, 0, width, height) for height, width in ready.canvases.shapes]
    wanted_canvases = torch.cat(
        [
            torch.from_numpy(np.array(cut(canvas, room))).flatten()
            for canvas, room in zip(canvases, rooms, strict=True)
        ]
    )
    windows = [cut(canvas, window) for canvas in canvases for window in plan.windows]
    wanted_crops = by_pillow(windows, CROP_SIZE, dtype)
    wanted_full = by_pillow(pictures, IMAGE_SIZE, dtype)

    def rows(
        operation: str,
        given: RaggedImages,
        one: Run,
        wanted: Sequence[Tensor],
        read: int,
        written: int,
    ) -> list[Row]:
        shape = f"{len(pictures)} × {LARGE[0]}×{LARGE[1]}"
        group = Group("resize", operation, shape, settings, dtype)
        prepare = rotated(given, given.data.nbytes, copy_of, settings)
        group.add("step37", "ours", prepare, one)
        return group.measure(wanted, read, written, len(pictures))

    picture_bytes, canvas_bytes = images.data.nbytes, ready.canvases.data.nbytes
    crop_bytes, full_bytes = wanted_crops.nbytes, wanted_full.nbytes
    yield rows(
        "canvas",
        images,
        lambda given: prepare_pictures(given).canvases.data,
        [wanted_canvases],
        picture_bytes,
        canvas_bytes,
    )
    yield rows("crops", ready.canvases, cut_crops, [wanted_crops], canvas_bytes, crop_bytes)
    yield rows("full images", images, shrink, [wanted_full], picture_bytes, full_bytes)
    # What has to move: the canvas need not leave the chip.
    yield rows(
        "multicrop",
        images,
        whole,
        [wanted_crops, wanted_full],
        picture_bytes,
        crop_bytes + full_bytes,
    )
