"""Image files to stacks of normalised pixels on a device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from step37_data.images.decode import (
    ON_BROKEN,
    BrokenImages,
    Decoded,
    OnBroken,
    decode,
    map_threads,
)
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize

logger = logging.getLogger(__name__)

Device = torch.device | str | None


def resolve_device(device: Device) -> torch.device:
    """``device``; for None the current CUDA device, or the CPU where there is none."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to ``device`` without waiting: through pinned memory where the device is CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Images of one size.

    Attributes:
        images: ``[N, 3, side, side]``.
        broken: per image None, or what was wrong with its file.
    """

    images: torch.Tensor
    broken: list[str | None]


def load_stacks(
    stacks: Sequence[tuple[Sequence[str], int]],
    device: torch.device,
    dtype: torch.dtype,
    on_broken: OnBroken,
    broken: BrokenImages | None,
    threads: int | None,
) -> list[Stack]:
    """Read the files of several ``(paths, side)`` at once.

    For the CPU, Pillow resizes in the decoding threads. For CUDA, the pixels travel as they are
    and are resized there, to the same values.
    """
    on_host = device.type != "cuda" or not kernels_match_pillow()
    decoded = decode_all(
        [(path, side if on_host else None) for paths, side in stacks for path in paths],
        on_broken,
        broken,
        threads,
    )
    pixels = [each.pixels for each in decoded]
    if not on_host:
        uploaded = upload(pixels, device)
    result, start = [], 0
    for paths, side in stacks:
        end = start + len(paths)
        if start == end:
            images = torch.empty((0, 3, side, side), dtype=dtype, device=device)
        elif on_host:
            resized = torch.from_numpy(np.stack(pixels[start:end]))
            images = clip_normalize(to_device(resized, device), dtype=dtype)
        else:
            part = RaggedImages(
                data=uploaded.data,
                offsets=uploaded.offsets[start:end],
                shapes=uploaded.shapes[start:end],
            )
            images = resize_clip_normalize(part, side, dtype=dtype)
        result.append(Stack(images=images, broken=[each.broken for each in decoded[start:end]]))
        start = end
    return result


@functools.cache
def kernels_match_pillow() -> bool:
    """Whether the installed Pillow resizes as ours does, tried out once in both orders of passes.

    A Pillow newer than this package may have changed that order. Then Pillow itself resizes, on
    the host, so that the values stay its own.
    """
    rng = np.random.default_rng(0)
    for height, width in ((60, 20), (20, 60), (203, 2), (2, 203), (40, 37)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
        ours = resample.resize(torch.from_numpy(pixels), 16, resample.installed_pillow())
        if not np.array_equal(ours.numpy(), np.asarray(picture)):
            logger.warning(
                "Pillow %s resizes in an order of passes that is not known here: images are "
                "resized by Pillow on the host, which is slower",
                pillow_version,
            )
            return False
    return True


def decode_all(
    items: Sequence[tuple[str, int | None]],
    on_broken: OnBroken,
    broken: BrokenImages | None,
    threads: int | None,
) -> list[Decoded]:
    """Read ``(path, side to resize to or None)`` each, in order."""
    if on_broken not in ON_BROKEN:
        raise ValueError(f"on_broken: expected one of {', '.join(ON_BROKEN)}, got {on_broken!r}")
    decoded = list(map_threads(lambda item: decode(item[0], on_broken, item[1]), items, threads))
    if broken is not None:
        for (path, _), each in zip(items, decoded, strict=True):
            broken.record(path, each.broken)
    return decoded


def upload(pictures: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> RaggedImages:
    """Copy ``[h, w, 3]`` pictures into one buffer on a CUDA device, on a stream for copies.

    PyTorch's pinned allocator hands the staging buffer out again once its copy is done.
    """
    offsets, end = [], 0
    for picture in pictures:
        offsets.append(end)
        end += picture.size
    staging = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=True)
    view = staging.numpy()
    for offset, picture in zip(offsets, pictures, strict=True):
        view[offset : offset + picture.size] = picture.reshape(-1)
    stream = _copy_stream(device)
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        data = staging.to(device, non_blocking=True)
    current.wait_stream(stream)
    # Allocated on the copy stream, used on this one: not to be handed out before this one is done.
    data.record_stream(current)
    return RaggedImages(
        data=data,
        offsets=offsets,
        shapes=[(picture.shape[0], picture.shape[1]) for picture in pictures],
    )


_copy_streams: dict[int, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device.index not in _copy_streams:
        _copy_streams[device.index] = torch.cuda.Stream(device)
    return _copy_streams[device.index]
