"""Runs every tile of the table and the pixel kernels once; stops at the first wrong result.

Use it on a GPU that has never run them: with ``CUDA_LAUNCH_BLOCKING=1 PYTHONPATH=. python3 -m
tools.smoke`` it also stops at the first launch that fails.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from bench.oracle import Oracle
from bench.peers import Peer, step37
from bench.shapes import Shape, make_batch, make_case, shapes_named
from bench.subjects.insert import LAYOUTS, Inputs, check_results, insertion
from step37_kernels import RaggedImages, clip_normalize, resize_clip_normalize
from step37_kernels.dispatch import Impl

CUDA = torch.device("cuda")
SHAPES = ["one-image", "multicrop", *(f"images-{k}" for k in range(2, 17))]


def insert(shape: Shape, device: torch.device, impl: Impl) -> None:
    """Run the module forward and backward, and once more for the same bits.

    On Hopper its product starts beside the plan, by programmatic dependent launch.
    """
    batch = make_batch(shape, device)
    for layout in LAYOUTS:
        case = make_case(batch, dtype=torch.bfloat16, layout=layout, seed=0)
        inputs = Inputs(batch, [case])
        ours = Peer("step37", "ours", step37(impl, shape.hidden, shape.width))
        one = insertion(ours, "forward+backward", inputs)
        results, again = (one.run(one.prepare(0)) for _ in range(2))
        problem = check_results(Oracle(case, batch), one, results)
        if problem is None and not torch.equal(results["output"], again["output"]):
            problem = "two runs differ"
        tell(f"insert {shape.name}, {layout}", problem)


def pixels(device: torch.device, impl: Impl) -> None:
    """Normalise, and resize and normalise; compare with PyTorch on the host, bit for bit."""
    generator = torch.Generator().manual_seed(0)

    def picture(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)

    whole, several = picture(2, 56, 56), [picture(33, 50), picture(50, 16)]
    made = clip_normalize(whole.to(device), impl=impl).cpu()
    tell("normalize", _compare(made, clip_normalize(whole, impl="torch")))
    images = RaggedImages.gather([one.to(device) for one in several])
    made = resize_clip_normalize(images, 56, impl=impl).cpu()
    tell("resize", _compare(made, resize_clip_normalize(several, 56, impl="torch")))


def _compare(made: torch.Tensor, wanted: torch.Tensor) -> str | None:
    different = int((made != wanted).sum())
    return f"{different} values differ" if different else None


def tell(what: str, problem: str | None) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}: {problem or 'ok'}", flush=True)
    if problem is not None:
        sys.exit(1)


def main(names: Sequence[str] = SHAPES, device: torch.device = CUDA, impl: Impl = "triton") -> None:
    """Run everything."""
    for shape in shapes_named(names):
        insert(shape, device, impl)
    pixels(device, impl)


if __name__ == "__main__":
    main()
