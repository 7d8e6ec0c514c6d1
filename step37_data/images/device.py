"""Chooses the device, and copies tensors to it without making the host wait."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch

from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.ranges import profiled

Device = torch.device | str | None


def resolve_device(device: Device) -> torch.device:
    """Return ``device`` with its index; None is the current CUDA device, or the CPU without one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def host_memory(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate uninitialised memory on the host, for data that is then copied to ``device``.

    For a CUDA device it is pinned, so that the host need not wait for the copy. PyTorch's allocator
    of pinned memory reuses it when the copy is done.

    Raises:
        MemoryError: CUDA cannot allocate; the type shows that no image file is at fault.
    """
    pin = device.type == "cuda"
    try:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=pin)
    except RuntimeError as error:
        raise MemoryError(f"host memory of shape {tuple(shape)}: {error}") from error


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to ``device``; the host does not wait for a CUDA device."""
    with profiled("upload"):
        if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = host_memory(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)
        return tensor.to(device, non_blocking=True)


def upload(pictures: Sequence[torch.Tensor], device: torch.device) -> RaggedImages:
    """Copy pictures in :func:`host_memory` into one buffer on ``device``.

    On a CUDA device the copies run on a stream for copies, and the current stream waits for them.

    Args:
        pictures: uint8 ``[height, width, 3]`` each.
        device: where the buffer is.
    """
    sizes = [picture.numel() for picture in pictures]
    with profiled("upload"):
        if device.type == "cuda":
            stream = _copy_stream(device.index)
            current = torch.cuda.current_stream(device)
            with torch.cuda.stream(stream):
                data = _gathered(pictures, sizes, device)
            current.wait_stream(stream)
            # Allocated on the copy stream, used on this one: it must not be handed out again before
            # this one is done with it.
            data.record_stream(current)
        else:
            data = _gathered(pictures, sizes, device)
    offsets = [0, *itertools.accumulate(sizes)][:-1]
    shapes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    return RaggedImages(data=data, offsets=offsets, shapes=shapes)


def _gathered(
    pictures: Sequence[torch.Tensor], sizes: Sequence[int], device: torch.device
) -> torch.Tensor:
    data = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    for part, picture in zip(data.split(list(sizes)), pictures, strict=True):
        part.copy_(picture.view(-1), non_blocking=True)
    return data


@functools.cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
