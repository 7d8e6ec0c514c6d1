"""NeMo Automodel's own merge beside ours: B = 1, S = 4096, images with their crops.

    python -m bench.automodel            # on a CUDA device; --device cpu for a small check

Stock's merge after the tower is written out here, so that Automodel need not be installed.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from step37_kernels import plan_placeholders, project_and_insert
from step37_kernels.automodel import places_of_rows, with_rows_moved

IMAGE, IMAGE_ROWS, CROP_ROWS = 128001, 169, 81
CROPS = (6, 4, 9, 6)  # of each image: 2,701 rows in 4,096 tokens


def stock(words, ids, crops, images, weight, counts):  # type: ignore[no-untyped-def]
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


def ours(words, ids, crops, images, weight, counts):  # type: ignore[no-untyped-def]
    num_rows = crops.shape[:2].numel() + images.shape[:2].numel()
    plan = plan_placeholders(ids, IMAGE, num_rows, batch_first=True)
    plan = with_rows_moved(plan, places_of_rows(counts, crops, images))
    return project_and_insert(words, [crops, images], weight, None, plan)


def median_us(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times: list[float] = []
    for _ in range(23):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return 1e6 * sorted(times[3:])[10]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("--device", "cuda"), ("--hidden", 4096), ("--width", 6144)):
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    rows = len(CROPS) * IMAGE_ROWS + sum(CROPS) * CROP_ROWS
    ids = torch.full((1, 4096), 5, device=device)
    ids[0, 16 : 16 + rows] = IMAGE
    words, weight = leaf(1, 4096, args.hidden), leaf(args.hidden, args.width)
    crops, images = leaf(sum(CROPS), CROP_ROWS, args.width), leaf(4, IMAGE_ROWS, args.width)
    counts = torch.tensor(CROPS, device=device)
    inputs = (words, ids, crops, images, weight, counts)
    grad = torch.randn_like(words)
    torch.testing.assert_close(ours(*inputs), stock(*inputs))
    leaves = (words, crops, images, weight)
    for name, merge in (("Automodel", stock), ("ours", ours)):

        def backward(merge: Callable[..., Tensor] = merge) -> object:
            return torch.autograd.grad(merge(*inputs), leaves, grad)

        forward = median_us(functools.partial(merge, *inputs), device)
        both = median_us(backward, device)
        print(f"{name:10s} S 4096, {rows} rows: forward {forward:.1f} µs, with backward {both:.1f}")


if __name__ == "__main__":
    main()
