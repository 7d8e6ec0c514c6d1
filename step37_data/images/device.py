"""Where tensors go, and how pixels get there without the host waiting."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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


def upload(pictures: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> RaggedImages:
    """Copy ``[h, w, 3]`` pictures into one buffer on a CUDA device, on a stream for copies.

    PyTorch's pinned allocator hands the staging buffer out again once its copy is done.
    """
    offsets = [0, *itertools.accumulate(picture.size for picture in pictures)]
    staging = torch.empty(offsets.pop(), dtype=torch.uint8, device="cpu", pin_memory=True)
    nothing = np.empty(0, dtype=np.uint8)
    np.concatenate([nothing, *(picture.reshape(-1) for picture in pictures)], out=staging.numpy())
    stream = _copy_stream(device.index)
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        data = staging.to(device, non_blocking=True)
    current.wait_stream(stream)
    # Allocated on the copy stream, used on this one: not to be handed out before this one is done.
    data.record_stream(current)
    shapes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    return RaggedImages(data=data, offsets=offsets, shapes=shapes)


@functools.cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
