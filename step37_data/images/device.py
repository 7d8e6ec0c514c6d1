"""Where tensors go, and how pixels get there without the host waiting."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch

from step37_kernels.pixels.ragged import RaggedImages

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


def pinned(height: int, width: int) -> torch.Tensor:
    """Memory for one picture, uint8 ``[height, width, 3]``, that a CUDA device copies from.

    PyTorch's pinned allocator hands it out again once the copy is done.

    Raises:
        MemoryError: in place of CUDA's error, which no picture is at fault for.
    """
    try:
        return torch.empty((height, width, 3), dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise MemoryError(f"pinned memory for {width}×{height} pixels: {error}") from error


def upload(pictures: Sequence[torch.Tensor], device: torch.device) -> RaggedImages:
    """Copy :func:`pinned` pictures into one buffer on a CUDA device, on a stream for copies."""
    sizes = [picture.numel() for picture in pictures]
    stream = _copy_stream(device.index)
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        data = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for part, picture in zip(data.split(sizes), pictures, strict=True):
            part.copy_(picture.view(-1), non_blocking=True)
    current.wait_stream(stream)
    # Allocated on the copy stream, used on this one: not to be handed out before this one is done.
    data.record_stream(current)
    offsets = [0, *itertools.accumulate(sizes)][:-1]
    shapes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    return RaggedImages(data=data, offsets=offsets, shapes=shapes)


@functools.cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
