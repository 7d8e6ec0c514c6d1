"""Defines the batches that are measured, by name, and makes random inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.testing import FeatureLayout, InsertCase

IM_START, IM_PATCH, IM_END = 128000, 128001, 128002
PATCH_START, PATCH_END = 128003, 128005


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One packed sequence: pictures and crops spread evenly among text. Batch size 1."""

    name: str
    seq_len: int
    images: int
    crops: int = 0
    image_rows: int = 169
    crop_rows: int = 81
    hidden: int = 4096
    width: int = 6144

    @property
    def num_rows(self) -> int:
        """R, the feature rows of images and crops together."""
        return self.images * self.image_rows + self.crops * self.crop_rows


def _images(count: int) -> Shape:
    # With as many text tokens for each image as a Flickr8k caption with its turn markers has.
    return Shape(name=f"images-{count}", seq_len=-(-count * 224 // 64) * 64, images=count)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="one-image", seq_len=256, images=1),
        Shape(name="flickr8k", seq_len=2048, images=9),
        Shape(name="long", seq_len=8192, images=39),
        Shape(name="huge", seq_len=32768, images=150),
        Shape(name="multicrop", seq_len=8192, images=11, crops=66),
    )
}


AUTOMODEL_CROPS = (6, 4, 9, 6)
"""Crops of each image of :data:`AUTOMODEL`."""
AUTOMODEL = Shape(
    name="automodel", seq_len=4096, images=len(AUTOMODEL_CROPS), crops=sum(AUTOMODEL_CROPS)
)
"""The one shape of the subject ``automodel``: 2701 rows, the crops of each image before it."""


def shapes_named(names: Sequence[str]) -> list[Shape]:
    """Look shapes up: those of :data:`SHAPES`, ``automodel``, and ``images-N``.

    Any other name raises ``ValueError``.
    """
    found: list[Shape] = []
    known = {**SHAPES, AUTOMODEL.name: AUTOMODEL}
    for name in names:
        prefix, _, count = name.partition("-")
        if name in known:
            found.append(known[name])
        elif prefix == "images" and count.isdecimal() and int(count) > 0:
            found.append(_images(int(count)))
        else:
            raise ValueError(f"shape {name!r}: expected one of {', '.join(known)}, or images-N")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids of a shape, and the positions of its feature rows, known by construction."""

    shape: Shape
    input_ids: Tensor  # ``[1, S]`` int64
    groups: tuple[tuple[int, int, int], ...]
    """``(start_token, N, L)`` in insertion order: crops first, as the data pipeline has them."""
    destinations: Tensor
    """``[R]`` int64: position of each feature row, in group order. All rows survive."""


def make_batch(shape: Shape, device: torch.device) -> Batch:
    """Make the token ids of a shape; ``ValueError`` if the pictures do not fit in the sequence."""
    spans: list[tuple[int, int, int]] = []  # start token, end token, rows
    for i in range(max(shape.images, 1)):
        share = shape.crops * (i + 1) // max(shape.images, 1)
        share -= shape.crops * i // max(shape.images, 1)
        spans += [(PATCH_START, PATCH_END, shape.crop_rows)] * share
        if shape.images:
            spans.append((IM_START, IM_END, shape.image_rows))
    text = shape.seq_len - sum(rows + 2 for _, _, rows in spans)
    if text < 0:
        raise ValueError(f"shape {shape.name}: the pictures take {-text} tokens too many")
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, IM_START, (1, shape.seq_len), generator=generator)
    destinations: dict[int, list[Tensor]] = {PATCH_START: [], IM_START: []}
    place = 0
    for i, (start, end, rows) in enumerate(spans):
        place += text * (i + 1) // (len(spans) + 1) - text * i // (len(spans) + 1)
        input_ids[0, place] = start
        input_ids[0, place + 1 : place + 1 + rows] = IM_PATCH
        input_ids[0, place + 1 + rows] = end
        destinations[start].append(torch.arange(place + 1, place + 1 + rows))
        place += rows + 2
    counts = (
        (PATCH_START, shape.crops, shape.crop_rows),
        (IM_START, shape.images, shape.image_rows),
    )
    flat = [rows for start, _, _ in counts for rows in destinations[start]]
    return Batch(
        shape=shape,
        input_ids=input_ids.to(device),
        groups=tuple(group for group in counts if group[1]),
        destinations=torch.cat(flat or [torch.empty(0, dtype=torch.int64)]).to(device),
    )


def make_case(batch: Batch, *, dtype: torch.dtype, layout: FeatureLayout, seed: int) -> InsertCase:
    """Draw random tensors for a batch, on its device (the host would take seconds).

    No tensor requires a gradient; callers that time a backward pass set that.
    """
    device = batch.input_ids.device
    generator = torch.Generator(device).manual_seed(seed)
    shape = batch.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    groups = []
    for token, n, rows in batch.groups:
        if layout == "channels-first":
            features = normal(n, shape.width, rows).transpose(1, 2)
        else:
            features = normal(n, rows, shape.width)
        groups.append((token, [features]))
    return InsertCase(
        input_ids=batch.input_ids,
        embeddings=normal(shape.seq_len, 1, shape.hidden),
        groups=groups,
        weight=normal(shape.hidden, shape.width) / shape.width**0.5,
        bias=None,
        grad_output=normal(shape.seq_len, 1, shape.hidden),
    )
