"""Decode, resize and normalise: µs an image against the stock way, and the wait of a step.

``python -m bench pixels`` checks first that everything timed computes the same bits, then prints
Markdown tables. The kernels by themselves are the subjects ``normalize`` and ``resize``.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from bench.harness import environment
from step37_data.common.threads import default_threads, map_threads
from step37_data.images.decode import decode
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "examples" / "flickr8k_mini" / "train"
SIZE = 728
BILINEAR = Image.Resampling.BILINEAR
IMAGES_A_PACK = 9
STEP_S = 0.05


class Row(NamedTuple):
    """One line of a table: the median of one call, which works on so many images."""

    name: str
    seconds: float
    images: int

    def line(self, baseline: float) -> str:
        each = self.seconds / self.images
        return f"| {self.name} | {each * 1e6:.0f} | {1 / each:.0f} | {baseline / each:.2f}× |"


def median_seconds(call: Callable[[], object], budget_s: float) -> float:
    """Median wall time of a call on the host: at least three, at most as many as fit the budget."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def photo_paths(count: int) -> list[str]:
    files = sorted(str(path) for path in PHOTOS.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(f"no photographs in {PHOTOS}")
    return [files[i % len(files)] for i in range(count)]


def stock_decode(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def stock_normalize(image: Image.Image) -> torch.Tensor:
    """NumPy and PyTorch, three passes over fp32."""
    array = np.asarray(image, dtype=np.float32) / 255.0
    tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (tensor - mean) / std


def stock(paths: Sequence[str], device: torch.device) -> torch.Tensor:
    """One thread, one image after the other: ``[N, 3, SIZE, SIZE]`` bf16 on ``device``."""
    resized = [stock_decode(path).resize((SIZE, SIZE), BILINEAR) for path in paths]
    return torch.stack(list(map(stock_normalize, resized))).to(torch.bfloat16).to(device)


def ours(paths: Sequence[str], device: torch.device, threads: int) -> list[torch.Tensor]:
    loaded = load_images(
        [(path, 0) for path in paths], image_size=SIZE, patch_image_size=SIZE, device=device,
        dtype=torch.bfloat16, threads=threads,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [image for image, _ in loaded]


def check(paths: Sequence[str], device: torch.device) -> None:
    """What is timed computes the same bits, or there is nothing to time."""
    expected = stock(paths, torch.device("cpu"))
    for threads in (1, 2):
        got = torch.stack(ours(paths, device, threads)).cpu()
        if different := int((got != expected).sum()):
            raise AssertionError(f"{different} values differ from stock with {threads} threads")


def thread_counts() -> list[int]:
    most = default_threads()
    return [2**k for k in range(most.bit_length()) if 2**k < most] + [most]


def host_rows(device: torch.device, budget_s: float) -> Iterator[Row]:
    """A pack of images from files to bf16 on the device; what decoding takes of that."""
    paths = photo_paths(IMAGES_A_PACK)

    def decode_all(threads: int) -> object:
        return list(map_threads(lambda path: decode(path, "raise"), paths, threads))

    calls: dict[str, Callable[[], object]] = {"stock, 1 thread": lambda: stock(paths, device)}
    for threads in thread_counts():
        calls[f"ours, threads {threads}"] = functools.partial(ours, paths, device, threads)
        calls[f"of which decoding, threads {threads}"] = functools.partial(decode_all, threads)
    for name, call in calls.items():
        yield Row(name=name, seconds=median_seconds(call, budget_s), images=len(paths))


def waits(device: torch.device, steps: int) -> Iterator[tuple[str, float]]:
    """Seconds a step waits for its input while steps of 50 ms run."""
    tokens = torch.tensor([7, 1] * IMAGES_A_PACK)
    pack = {
        "tokens": tokens, "labels": tokens, "loss_masks": torch.ones(len(tokens)),
        "cu_seqlens": torch.tensor([0, len(tokens)], dtype=torch.int32),
        "position_id": torch.arange(len(tokens)),
        "image_paths": [(path, 0) for path in photo_paths(IMAGES_A_PACK)],
    }  # fmt: skip
    prepare = functools.partial(
        preprocess_packed_batch, img_start_token_id=7, patch_start_token_id=8, image_size=SIZE,
        patch_image_size=504, encoder_patch_size=14, device=device,
    )  # fmt: skip
    packs = [pack] * steps

    def waited(inputs: Iterator[object]) -> float:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            next(inputs)
            times.append(time.perf_counter() - began)
            # The training step, which leaves the host idle.
            time.sleep(STEP_S)
        return statistics.median(times)

    yield "prepared within the step", waited(map(prepare, packs))
    for depth in (1, 2):
        with Prefetcher(packs, prepare, depth=depth, device=device) as prefetcher:
            yield f"prefetched, depth {depth}", waited(prefetcher)


def print_rows(rows: Iterator[Row]) -> None:
    print("| | µs an image | images/s | speed |\n|---|---|---|---|")
    baseline = None
    for row in rows:
        baseline = baseline or row.seconds / row.images
        print(row.line(baseline), flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a host row may take")
    parser.add_argument("--steps", type=int, default=20, help="steps to measure the wait over")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    commit = environment(device)["commit"]
    print(
        f"{where}, {default_threads()} decoding threads, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, Pillow {pillow_version}, commit {commit or 'unknown'}\n"
    )
    check(photo_paths(4), device)
    print(f"{IMAGES_A_PACK} photographs to {SIZE} × {SIZE} bf16, wall time\n")
    print_rows(host_rows(device, options.budget))
    print(f"Wait for the input of a step of {STEP_S * 1e3:.0f} ms, {IMAGES_A_PACK} images a pack\n")
    print("| | ms a step |\n|---|---|")
    for name, seconds in waits(device, options.steps):
        print(f"| {name} | {seconds * 1e3:.2f} |", flush=True)
    print()


if __name__ == "__main__":
    main()
