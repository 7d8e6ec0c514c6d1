"""Simulates how long ranks wait for the slowest one in a step, for each way of packing.

``python -m tools.balance`` needs no GPU. It draws a mix of samples (a third without a picture,
photographs of log-normal size in crops, texts of log-normal length), packs it in each way, and
distributes the packs to ranks as Megatron's sampler does. The time of a pack is taken to be
proportional to its vision tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from step37_data.common.image_entry import IMAGE_TOKEN_COUNT, PATCH_TOKEN_COUNT
from step37_data.images.crops import plan_crops
from step37_data.packing import PackingResult, pack, pack_balanced, pack_best_fit

CAPACITY = 4096
Packed = tuple[np.ndarray, PackingResult]


def draw_mix(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw lengths and vision tokens of ``count`` samples, all at most ``CAPACITY`` long."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(np.log(180), 0.9, count)).clip(20, 1500).astype(np.int64)
    loads = np.zeros(count, dtype=np.int64)
    for i, has_picture in enumerate(rng.random(count) < 2 / 3):
        if not has_picture:
            sizes[i] = np.exp(rng.normal(np.log(700), 0.8)).clip(20, CAPACITY)
            continue
        width = np.exp(rng.normal(np.log(900), 0.6)).clip(60, 2500)
        plan = plan_crops(int(width), int(width * np.exp(rng.normal(0, 0.35)).clip(0.5, 2)))
        loads[i] = IMAGE_TOKEN_COUNT + PATCH_TOKEN_COUNT * len(plan.windows)
        sizes[i] = min(CAPACITY, sizes[i] + plan.num_tokens)
    return sizes, loads


def packings(window: int, group: int) -> dict[str, Callable[[np.ndarray, np.ndarray], Packed]]:
    """List the ways to pack sizes and loads, by name."""
    return {
        "next_fit": lambda sizes, _: (np.arange(len(sizes)), pack(sizes, CAPACITY, "drop")),
        "best_fit": lambda sizes, _: pack_best_fit(sizes, CAPACITY, "drop", window),
        "balanced": lambda sizes, loads: pack_balanced(
            sizes, loads, CAPACITY, "drop", window=window, group=group
        ),
    }


def pack_loads(packed: Packed, loads: np.ndarray) -> np.ndarray:
    """Compute the vision tokens of every pack."""
    order, result = packed
    return np.add.reduceat(loads[order], result.starts)


def wait(loads_of_packs: np.ndarray, ranks: int) -> float:
    """Compute the time that ranks wait for the slowest, as a share of the time they work."""
    steps = len(loads_of_packs) // ranks
    by_step = loads_of_packs[: steps * ranks].reshape(steps, ranks)
    return float((by_step.max(1) - by_step.mean(1)).sum() / by_step.mean(1).sum())


def main() -> None:
    sizes, loads = draw_mix(40_000)
    ranks = (8, 64, 256)
    print("packing  window  packs  fill  " + "  ".join(f"wait on {n:>3} ranks" for n in ranks))
    for window in (256, 4096):
        for name, packing in packings(window, max(ranks)).items():
            packed = packing(sizes, loads)
            fill = sizes.sum() / CAPACITY / packed[1].num_packed_samples
            waits = (f"{wait(pack_loads(packed, loads), n):17.1%}" for n in ranks)
            print(f"{name}  {window:>5}  {packed[1].num_packed_samples}  {fill:.1%}", *waits)


if __name__ == "__main__":
    main()
