"""Decode, resize and normalise: µs an image against the stock way, and the wait of a step.

``python -m bench.pixels`` checks first that everything timed computes the same bits, then prints
Markdown tables. The kernels by themselves are the subjects ``normalize`` and ``resize``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from bench.harness import environment
from step37_data.images.decode import decode
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_data.threads import default_threads, map_threads
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD, clip_normalize
from step37_kernels.pixels.resize import resize_clip_normalize

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "flickr8k_mini" / "train"
SIZE = 728
IMAGES_A_PACK = 9
STEP_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        name: what was timed.
        seconds: median of one call.
        images: that one call works on.
        note: how it differs.
    """

    name: str
    seconds: float
    images: int
    note: str = ""

    def line(self, baseline: float) -> str:
        each = self.seconds / self.images
        speed = f"{baseline / each:.2f}×"
        cells = [self.name, f"{each * 1e6:.0f}", f"{1 / each:.0f}", speed, self.note]
        return "| " + " | ".join(cells) + " |"


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
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    return (tensor - mean) / std


def stock_resize(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), resample=Image.Resampling.BILINEAR)


def stock(paths: Sequence[str], device: torch.device) -> torch.Tensor:
    """One thread, one image after the other: ``[N, 3, SIZE, SIZE]`` bf16 on ``device``."""
    images = [stock_normalize(stock_resize(stock_decode(path))) for path in paths]
    return torch.stack(images).to(torch.bfloat16).to(device)


def ours(paths: Sequence[str], device: torch.device, threads: int) -> list[torch.Tensor]:
    loaded = load_images(
        [(path, 0) for path in paths],
        image_size=SIZE,
        patch_image_size=SIZE,
        device=device,
        dtype=torch.bfloat16,
        threads=threads,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [image for image, _ in loaded]


def check(paths: Sequence[str], device: torch.device) -> None:
    """What is timed computes the same bits, or there is nothing to time."""
    expected = stock(paths, torch.device("cpu"))
    for threads in (1, 2):
        got = torch.stack(ours(paths, device, threads)).cpu()
        different = int((got != expected).sum())
        if different:
            raise AssertionError(f"{different} values differ from stock with {threads} threads")
    if device.type == "cuda":
        photos = [torch.from_numpy(decode(path, "raise").pixels.copy()) for path in paths]
        for impl in ("triton", "torch"):
            got = resize_clip_normalize([p.to(device) for p in photos], SIZE, impl=impl).cpu()
            different = int((got != expected).sum())
            if different:
                raise AssertionError(f"{different} values differ from stock with impl={impl}")


def thread_counts() -> list[int]:
    counts, count = [], 1
    while count < default_threads():
        counts.append(count)
        count *= 2
    return [*counts, default_threads()]


def host_rows(device: torch.device, budget_s: float) -> Iterator[Row]:
    """A pack of images from files to bf16 on the device, and its parts on the host."""
    paths = photo_paths(IMAGES_A_PACK)
    n = len(paths)
    seconds = functools.partial(median_seconds, budget_s=budget_s)
    yield Row(name="stock, 1 thread: all", seconds=seconds(lambda: stock(paths, device)), images=n)
    for threads in thread_counts():
        yield Row(
            name=f"ours, {threads} thread{'s' if threads > 1 else ''}: all",
            seconds=seconds(lambda threads=threads: ours(paths, device, threads)),  # type: ignore[misc]
            images=n,
        )
    pictures = [stock_decode(path) for path in paths]
    resized = [stock_resize(picture) for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
    yield Row(
        name="stock: decode", seconds=seconds(lambda: [stock_decode(p) for p in paths]), images=n
    )
    for threads in thread_counts():
        yield Row(
            name=f"ours, {threads} thread{'s' if threads > 1 else ''}: decode",
            seconds=seconds(
                lambda threads=threads: list(  # type: ignore[misc]
                    map_threads(lambda path: decode(path, "raise"), paths, threads)
                )
            ),
            images=n,
        )
    yield Row(
        name="stock: resize", seconds=seconds(lambda: [stock_resize(p) for p in pictures]), images=n
    )
    flat = [torch.from_numpy(np.array(picture)) for picture in pictures]
    yield Row(
        name="ours, PyTorch on the host: resize and normalise",
        seconds=seconds(lambda: resize_clip_normalize(flat, SIZE, impl="torch")),
        images=n,
        note="for tensors that are on the host; files take Pillow's resize there",
    )
    yield Row(
        name="stock: normalise and bf16",
        seconds=seconds(
            lambda: torch.stack([stock_normalize(p) for p in resized]).to(torch.bfloat16)
        ),
        images=n,
    )
    yield Row(
        name="ours, PyTorch on the host: normalise",
        seconds=seconds(lambda: clip_normalize(pixels, impl="torch")),
        images=n,
    )
    if importlib.util.find_spec("torchvision") is not None:
        yield from torchvision_rows(paths, seconds)


def torchvision_rows(paths: Sequence[str], seconds: Callable[..., float]) -> Iterator[Row]:
    io = importlib.import_module("torchvision.io")
    tv = importlib.import_module("torchvision.transforms.v2.functional")

    def run() -> torch.Tensor:
        images = [io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB) for path in paths]
        resized = torch.stack([tv.resize(image, [SIZE, SIZE], antialias=True) for image in images])
        scaled = tv.to_dtype(resized, torch.float32, scale=True)
        normalized: torch.Tensor = tv.normalize(scaled, list(CLIP_MEAN), list(CLIP_STD))
        return normalized.to(torch.bfloat16)

    different = float((run() != stock(paths, torch.device("cpu"))).float().mean())
    yield Row(
        name="torchvision on the host: all",
        seconds=seconds(run),
        images=len(paths),
        note=f"{different:.1%} of the values differ",
    )


def waits(device: torch.device, steps: int) -> Iterator[tuple[str, float]]:
    """Seconds a step waits for its input while steps of 50 ms run."""
    tokens = torch.tensor([7, 1] * IMAGES_A_PACK)
    pack = {
        "tokens": tokens,
        "labels": tokens,
        "loss_masks": torch.ones(len(tokens)),
        "cu_seqlens": torch.tensor([0, len(tokens)], dtype=torch.int32),
        "position_id": torch.arange(len(tokens)),
        "image_paths": [(path, 0) for path in photo_paths(IMAGES_A_PACK)],
    }
    prepare = functools.partial(
        preprocess_packed_batch,
        img_start_token_id=7,
        patch_start_token_id=8,
        image_size=SIZE,
        patch_image_size=504,
        encoder_patch_size=14,
        device=device,
    )
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
    print("| | µs an image | images/s | speed | remarks |")
    print("|---|---|---|---|---|")
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
