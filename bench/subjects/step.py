"""Subject ``step``: times a training step up to the fused embedding, from decoded pictures.

Decoded uint8 pictures in host memory → upload → resize, CLIP normalise → (the vision tower is not
run: its features are given, as the channels-first view that it returns) → word embedding → plan,
project, insert. Stock computes pixels with Pillow and NumPy on the host, within the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench import peers
from bench.harness import Implementation, Key, Row, Settings, Work, dtype_name, measure, rotation
from bench.oracle import Oracle
from bench.photographs import stock_normalize, stock_resize
from bench.shapes import PATCH_END, Batch, Shape, make_batch, make_case, shapes_named
from bench.subjects.insert import work_of
from step37_data.images.device import upload
from step37_kernels import ImageForInsert, ImageInsertEmbedding, RaggedImages, resize_clip_normalize
from step37_kernels.testing import InsertCase

PIXELS_PER_ROW_SIDE = 56  # 13 rows a side of a 728-pixel image, 9 of a 504-pixel crop
PICTURE = (333, 500)  # height and width of a decoded picture, the most frequent in Flickr8k

Pictures = Sequence[Tensor]  # uint8 [h, w, 3] in host memory, pinned for CUDA


class Inputs(NamedTuple):
    """Pictures of each group, with the side to which they are resized, and the tower's features."""

    pictures: Sequence[tuple[Pictures, int]]
    case: InsertCase


def pillow_pixels(pictures: Pictures, side: int, like: Tensor) -> Tensor:
    """Make ``[N, 3, side, side]`` as stock's data code does, picture after picture."""
    images = [Image.fromarray(one.numpy()) for one in pictures]
    normalized = torch.stack([stock_normalize(stock_resize(image, side)) for image in images])
    return normalized.to(device=like.device, dtype=like.dtype)


def implementations(
    sets: list[Inputs], words: Tensor, batch: Batch, settings: Settings
) -> list[Implementation]:
    """List the implementations: ours, through the module that users have, and stock."""
    weight = sets[0].case.weight

    def lookup(input_ids: Tensor, **_: object) -> Tensor:
        return F.embedding(input_ids, words).transpose(0, 1)

    with torch.device("meta"):
        module = ImageInsertEmbedding(lookup, *weight.shape[::-1], impl=settings.impl)
    module.align_projector.weight = nn.Parameter(weight)

    def prepare(i: int) -> Inputs:
        return sets[i % len(sets)]

    def on_device(pictures: Pictures) -> RaggedImages:
        if settings.device.type == "cuda":
            return upload(pictures, settings.device)
        return RaggedImages.gather(pictures)

    def ours(inputs: Inputs) -> dict[str, Any]:
        resize = functools.partial(resize_clip_normalize, dtype=weight.dtype, impl=settings.impl)
        pixels = [resize(on_device(pictures), side) for pictures, side in inputs.pictures]
        images = [
            ImageForInsert(token, images=one, image_features=features[0])
            for (token, features), one in zip(inputs.case.groups, pixels, strict=True)
        ]
        return {"pixels": pixels, "output": module(batch.input_ids, images)}

    def stock(inputs: Inputs) -> dict[str, Any]:
        pixels = [pillow_pixels(pictures, side, weight) for pictures, side in inputs.pictures]
        groups = [(token, features[0]) for token, features in inputs.case.groups]
        projector = module.align_projector.weight
        output = peers.stock(lookup(batch.input_ids), batch.input_ids, groups, projector)
        return {"pixels": pixels, "output": output}

    return [
        Implementation(name="step37", kind="ours", prepare=prepare, run=ours),
        Implementation(name="stock", kind="stock", prepare=prepare, run=stock),
    ]


def run(settings: Settings) -> Iterator[list[Row]]:
    """Yield one group for each shape and dtype."""
    for shape in shapes_named(settings.shapes):
        for dtype in settings.dtypes:
            yield run_shape(shape, dtype, settings)


def run_shape(shape: Shape, dtype: torch.dtype, settings: Settings) -> list[Row]:
    """Measure the group of one shape."""
    device = settings.device
    batch = make_batch(shape, device)
    sides = [PIXELS_PER_ROW_SIDE * round(rows**0.5) for _, _, rows in batch.groups]
    generator = np.random.default_rng(0)

    def picture() -> Tensor:
        pixels = torch.from_numpy(generator.integers(0, 256, (*PICTURE, 3), dtype=np.uint8))
        return pixels.pin_memory() if device.type == "cuda" else pixels

    elements = shape.num_rows * shape.width + shape.hidden * shape.width
    sets = []
    for i in range(rotation(device, elements * dtype.itemsize)):
        pictures = [
            ([picture() for _ in range(n)], side)
            for (_, n, _), side in zip(batch.groups, sides, strict=True)
        ]
        case = make_case(batch, dtype=dtype, layout="channels-first", seed=i)
        sets.append(Inputs(pictures, case))
    words = torch.randn(PATCH_END + 1, shape.hidden, device=device, dtype=dtype)
    compared = implementations(sets, words, batch, settings)

    embeddings = F.embedding(batch.input_ids, words).transpose(0, 1)
    # All input sets share the first one's weight, since the module has only one.
    oracle = Oracle(dataclasses.replace(sets[0].case, embeddings=embeddings), batch)
    wanted = [pillow_pixels(pictures, side, embeddings) for pictures, side in sets[0].pictures]

    def check(implementation: Implementation, results: dict[str, Any]) -> str | None:
        for actual, exact in zip(results["pixels"], wanted, strict=True):
            if not torch.equal(actual, exact):
                return "pixels differ from Pillow's"
        ours = implementation.kind == "ours"
        return oracle.check({"output": results["output"]}, narrow_partial_sums=not ours)

    insert = work_of("forward", shape, dtype.itemsize)
    pixels = sum(
        n * (PICTURE[0] * PICTURE[1] * 3 + 3 * side * side * dtype.itemsize)
        for (_, n, _), side in zip(batch.groups, sides, strict=True)
    )
    key = Key(
        subject="step", operation="pixels to fused embedding", shape=shape.name,
        variant="channels-first", dtype=dtype_name(dtype),
    )  # fmt: skip
    work = Work(flops=insert.flops, bytes=insert.bytes + pixels, rows=shape.num_rows)
    return measure(key, work, compared, check=check, settings=settings)
