"""Turns image files into stacks of normalised pixels on a device.

Every picture of a pack is decoded once, however many windows of it are needed. Without multicrop a
file has one window, which covers all of it.

On the CPU the decoding threads do everything: Pillow cuts and resizes, and a table of 256 levels
normalises into the picture's place in the stacks. For CUDA the threads only decode, into pinned
memory. The pictures are then copied into one buffer on the device. There two launches for each
image type build the stacks; two to four more make the canvases for crops. The values are the same
in both cases.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from step37_data.common.image_entry import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE, ImageEntry, Window
from step37_data.common.threads import map_threads
from step37_data.images import crop_pixels, decode
from step37_data.images.crops import CropPlan, plan_crops, plan_whole
from step37_data.images.device import host_memory, resolve_device, to_device, upload
from step37_data.images.options import ImageOptions
from step37_kernels.pixels import pillow
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize
from step37_kernels.ranges import profiled

logger = logging.getLogger(__name__)


@functools.cache
def kernels_match_pillow() -> bool:
    """Whether our kernels resize as the installed Pillow does; compared once, at the first call.

    A Pillow newer than this package may do its two passes in another order. If so, Pillow resizes
    on the host, so that the values are still Pillow's.
    """
    rng = np.random.default_rng(0)
    for height, width in ((60, 20), (20, 60), (203, 2), (2, 203), (40, 37)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
        ours = pillow.resize(torch.from_numpy(pixels), 16, 16, pillow.installed_pillow())
        if not np.array_equal(ours.numpy(), np.asarray(picture)):
            logger.warning(
                f"the order of passes of Pillow {pillow_version} is unknown: Pillow resizes, slower"
            )
            return False
    return True


_Stacks = tuple[dict[int, torch.Tensor], list[str | None]]


class _Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        pixels: RGB, a Pillow image on the host or a tensor for a device; one black pixel if the
            file is unreadable.
        plan: the plan of the picture's crops.
        windows: the window of each entry, by the number of the entry.
    """

    pixels: Any
    plan: CropPlan
    windows: dict[int, Window]


def load_stacks(entries: Sequence[ImageEntry], options: ImageOptions) -> _Stacks:
    """Read the files of all entries and stack their pixels, one stack for each kind.

    Returns:
        For each kind ``[N, 3, side, side]``, in the order of its entries; and for each entry None,
        or what is wrong with its file.

    Raises:
        BrokenImageError: with ``options.on_broken="raise"``, a file is unreadable, or its windows
            were planned for another size.
    """
    device = resolve_device(options.device)
    if device.type == "cuda" and kernels_match_pillow():
        return _on_device(entries, options, device)
    return _on_host(entries, options, device)


def find_broken(entries: Sequence[ImageEntry], options: ImageOptions) -> list[str | None]:
    """Decode the files of all entries; return for each what is wrong with its file, or None."""
    to_pixels = functools.partial(_as_picture, as_viewed=options.as_viewed)
    return _read(entries, options, to_pixels=to_pixels, use=lambda _: None)[1]


def _read(
    entries: Sequence[ImageEntry],
    options: ImageOptions,
    *,
    to_pixels: Callable[[Image.Image, CropPlan], Any],
    use: Callable[[_Picture], Any],
) -> tuple[list[Any], list[str | None]]:
    """Decode every picture once and call ``use`` with it, both in the decoding threads.

    Args:
        entries: the entries that are read.
        options: how they are read.
        to_pixels: makes ``_Picture.pixels`` of an opened file: :func:`_as_picture` on the host,
            :func:`_staged` for a device.
        use: called with each picture.

    Returns:
        The result of ``use`` for each picture; and for each entry None, or what is wrong with its
        file.
    """
    numbers_of: dict[tuple[decode.ImageFile, bool], list[int]] = {}
    for number, entry in enumerate(entries):
        numbers_of.setdefault(entry.file, []).append(number)

    def read(numbers: list[int]) -> tuple[Any, str | None]:
        path, in_crops = entries[numbers[0]].file
        reason = None
        try:
            with profiled("decode"), decode.open_image(path, options.max_pixels) as image:
                shown = [entries[i] for i in numbers]
                size = decode.shown_size(image, as_viewed=options.as_viewed)
                plan = _plan_of(shown, *size) if in_crops else plan_whole(*size)
                pixels = to_pixels(image, plan)
            windows = {i: entries[i].window or plan.full_window for i in numbers}
        except decode.BrokenImageError as error:
            reason = decode.pass_over(error, options.on_broken)
            plan = plan_whole(1, 1)
            pixels = to_pixels(Image.new("RGB", plan.size), plan)
            windows = dict.fromkeys(numbers, plan.full_window)
        return use(_Picture(pixels, plan, windows)), reason

    done = map_threads(read, numbers_of.values(), options.threads)
    reasons: list[str | None] = [None] * len(entries)
    for ((path, in_crops), numbers), (_, reason) in zip(numbers_of.items(), done, strict=True):
        for number in numbers:
            reasons[number] = reason
            # A picture in crops is counted once, a file without crops each time it occurs.
            if options.broken is not None and not (in_crops and number > numbers[0]):
                options.broken.record(str(path), reason)
    return [used for used, _ in done], reasons


def _on_host(entries: Sequence[ImageEntry], options: ImageOptions, device: torch.device) -> _Stacks:
    """Do all the work in the decoding threads, then copy the stacks to ``device``."""
    kinds = [entry.kind for entry in entries]
    sides = options.sides
    stacks = {
        kind: host_memory((kinds.count(kind), 3, side, side), dtype=options.dtype, device=device)
        for kind, side in sides.items()
    }
    rows = {kind: iter(stack) for kind, stack in stacks.items()}
    places = [next(rows[kind]) for kind in kinds]

    def show(picture: _Picture) -> None:
        """Cut, resize and normalise every window, each to its place in the stacks."""
        with profiled("pixels"):
            sources = {IMAGE_ITEM_TYPE: crop_pixels.full_image(picture.pixels, picture.plan)}
            for number, window in picture.windows.items():
                kind, side = kinds[number], sides[kinds[number]]
                if kind not in sources:
                    sources[kind] = crop_pixels.canvas_image(sources[IMAGE_ITEM_TYPE], picture.plan)
                image = crop_pixels.cut(sources[kind], window)
                if options.pixel_order == "pillow":
                    image = image.resize((side, side), Image.Resampling.BILINEAR)
                    crop_pixels.normalize_into(places[number], np.asarray(image))
                else:
                    pixels = torch.tensor(np.asarray(image))
                    places[number][:] = crop_pixels.normalize_then_resize(pixels, side)

    to_pixels = functools.partial(_as_picture, as_viewed=options.as_viewed)
    _, reasons = _read(entries, options, to_pixels=to_pixels, use=show)
    return {kind: to_device(stack, device) for kind, stack in stacks.items()}, reasons


def _on_device(
    entries: Sequence[ImageEntry], options: ImageOptions, device: torch.device
) -> _Stacks:
    """Decode in the threads; the kernels do the rest on ``device``."""
    to_pixels = functools.partial(_staged, device=device, as_viewed=options.as_viewed)
    pictures, reasons = _read(entries, options, to_pixels=to_pixels, use=lambda picture: picture)
    uploaded = upload([picture.pixels for picture in pictures], device)
    with profiled("pixels"):
        return _stacks_of(pictures, uploaded, entries, options), reasons


def _stacks_of(
    pictures: Sequence[_Picture],
    uploaded: RaggedImages,
    entries: Sequence[ImageEntry],
    options: ImageOptions,
) -> dict[int, torch.Tensor]:
    """Cut, resize and normalise the windows of pictures that are on the device already."""
    full, canvases, canvas_of = crop_pixels.prepare_on_device(
        uploaded, [picture.plan for picture in pictures]
    )
    rectangles = {}
    for i, picture in enumerate(pictures):
        for number, window in picture.windows.items():
            image = canvas_of[i] if entries[number].kind == PATCH_ITEM_TYPE else i
            rectangles[number] = crop_pixels.rectangle(image, window)
    stacks = {}
    for kind, side in options.sides.items():
        source = canvases if kind == PATCH_ITEM_TYPE else full
        crops = [rectangles[i] for i, entry in enumerate(entries) if entry.kind == kind]
        if options.pixel_order == "pillow":
            stacks[kind] = resize_clip_normalize(source, side, crops=crops, dtype=options.dtype)
        else:
            shape = (len(crops), 3, side, side)
            stacks[kind] = torch.empty(shape, dtype=options.dtype, device=uploaded.data.device)
            for place, crop in zip(stacks[kind], crops, strict=True):
                place[:] = crop_pixels.normalize_then_resize(source.cut(crop), side)
    return stacks


def _plan_of(entries: Sequence[ImageEntry], width: int, height: int) -> CropPlan:
    """Plan the crops of a picture; check that the windows of its ``entries`` are in that plan."""
    try:
        plan = plan_crops(width, height)
        own = {PATCH_ITEM_TYPE: plan.windows, IMAGE_ITEM_TYPE: (plan.full_window,)}
        for entry in entries:
            if entry.window not in own[entry.kind]:
                raise ValueError(
                    f"it has {width}×{height} pixels, of which {entry.window} is no window: it was "
                    "planned from another size, with another as_viewed, or was unreadable then"
                )
    except ValueError as error:
        shown = f"image {entries[0].path} could not be shown: {error}"
        raise decode.BrokenImageError(shown, str(error)) from error
    return plan


def _as_picture(image: Image.Image, plan: CropPlan, *, as_viewed: bool) -> Image.Image:
    """Decode into a Pillow image, for the host."""
    del plan  # the host pads later, with the other resizes
    return decode.rgb_image(image, as_viewed=as_viewed)


def _staged(
    image: Image.Image, plan: CropPlan, *, device: torch.device, as_viewed: bool
) -> torch.Tensor:
    """Decode into memory from which pixels are copied to ``device``.

    The result has ``plan.padded_size``: thin and tiny pictures are already padded with black.
    """
    width, height = plan.padded_size
    memory = host_memory((height, width, 3), dtype=torch.uint8, device=device)
    if plan.size == plan.padded_size:
        decode.decode_into(memory.numpy(), image, as_viewed=as_viewed)
    else:
        picture = decode.rgb_image(image, as_viewed=as_viewed)
        memory.numpy()[:] = np.asarray(crop_pixels.padded_image(picture, plan))
    return memory
