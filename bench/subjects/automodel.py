"""Subject ``automodel``: times NeMo Automodel's merge of images and crops, and ours; B = 1.

Automodel's code after the vision tower is repeated here, so that it need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Implementation, Key, Kind, Row, Settings, Work, measure
from bench.shapes import AUTOMODEL, AUTOMODEL_CROPS
from step37_kernels import plan_placeholders, project_and_insert
from step37_kernels.automodel import places_of_rows, with_rows_moved
from step37_kernels.testing import gamma

IMAGE = 128001


def stock(words: Tensor, ids: Tensor, crops: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
    """Merge as NeMo Automodel does; ``rest`` is the weight and the crops of each image."""
    weight, counts = rest
    crop_rows, image_rows = F.linear(crops, weight), F.linear(images, weight)
    merged, first = [], 0
    for i, count in enumerate(counts.cpu().tolist()):
        merged += [crop_rows[first : first + count].flatten(0, 1), image_rows[i]]
        first += count
    rows, mask = torch.cat(merged), ids == IMAGE
    assert int(mask.sum().item()) == len(rows)
    words = words.clone()
    words[mask] = rows.to(words.dtype)
    return words


def ours(words: Tensor, ids: Tensor, crops: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
    """Merge as our patch of NeMo Automodel does; the arguments are those of :func:`stock`."""
    weight, counts = rest
    num_rows = crops.shape[:2].numel() + images.shape[:2].numel()
    plan = plan_placeholders(ids, IMAGE, num_rows, batch_first=True)
    plan = with_rows_moved(plan, places_of_rows(counts, crops, images))
    return project_and_insert(words, [crops, images], weight, None, plan)


def run(
    settings: Settings, hidden: int = AUTOMODEL.hidden, width: int = AUTOMODEL.width
) -> Iterator[list[Row]]:
    """Yield two groups: forward, and forward with backward to words, features and weight."""

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=settings.device, dtype=torch.bfloat16)
        return values.requires_grad_()

    num_rows, seq_len = AUTOMODEL.num_rows, AUTOMODEL.seq_len
    ids = torch.full((1, seq_len), 5, device=settings.device)
    ids[0, 16 : 16 + num_rows] = IMAGE
    words, weight = leaf(1, seq_len, hidden), leaf(hidden, width)
    crops = leaf(AUTOMODEL.crops, AUTOMODEL.crop_rows, width)
    images = leaf(AUTOMODEL.images, AUTOMODEL.image_rows, width)
    inputs = (
        words,
        ids,
        crops,
        images,
        weight,
        torch.tensor(AUTOMODEL_CROPS, device=settings.device),
    )
    leaves, grad = (words, crops, images, weight), torch.randn_like(words)
    terms = max(width, num_rows)
    slack = gamma(terms) * terms  # of sums in any order; then each rounds once to bf16
    for operation, products in (("forward", 1), ("forward+backward", 3)):

        def merged(merge: Callable[..., Tensor], back: bool = products > 1) -> tuple[Tensor, ...]:
            output = merge(*inputs)
            return (output, *torch.autograd.grad(output, leaves, grad)) if back else (output,)

        wanted = merged(stock)

        def check(
            _: Implementation, result: Any, wanted: tuple[Tensor, ...] = wanted
        ) -> str | None:
            near = all(
                torch.allclose(*pair, rtol=2**-7, atol=slack)
                for pair in zip(result, wanted, strict=True)
            )
            return None if near else "differs from Automodel's merge"

        def way(name: str, kind: Kind, merge: Callable[..., Tensor]) -> Implementation:
            return Implementation(name=name, kind=kind, prepare=lambda _: merge, run=merged)

        compared = [way("step37", "ours", ours), way("Automodel", "stock", stock)]
        key = Key(subject="automodel", operation=operation, shape=AUTOMODEL.name, dtype="bf16")
        moved = products * sum(tensor.nbytes for tensor in leaves)
        work = Work(flops=2 * products * num_rows * hidden * width, bytes=moved, rows=num_rows)
        yield measure(key, work, compared, check=check, settings=settings)
