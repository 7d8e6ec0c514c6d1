"""Decode, resize and normalise: µs an image against the stock way, and the wait of a step.

``python -m bench.pixels`` checks first that everything timed computes the same bits, then prints
Markdown tables. On a CUDA device it also times the kernels by themselves, in GB/s against a copy.
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
from step37_data.decode import decode, default_threads, map_threads
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_kernels import reference_pixels
from step37_kernels.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    RaggedImages,
    clip_normalize,
    resize_clip_normalize,
)

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "flickr8k_mini" / "train"
SIZE = 728
IMAGES_A_PACK = 9
KERNEL_BATCH = 64
KERNEL_SHAPE = (375, 500)
STEP_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        name: what was timed.
        seconds: median of one call.
        images: that one call works on.
        moved: bytes that a call must read and write at the least; 0 where nobody asks.
        note: peak memory, or how it differs.
    """

    name: str
    seconds: float
    images: int
    moved: int = 0
    note: str = ""

    def line(self, baseline: float, copy_bandwidth: float | None) -> str:
        each = self.seconds / self.images
        cells = [
            self.name,
            f"{each * 1e6:.0f}",
            f"{1 / each:.0f}",
            f"{baseline / each:.2f}×",
        ]
        if copy_bandwidth is not None:
            rate = self.moved / self.seconds
            cells.append(f"{rate / 1e9:.0f} ({rate / copy_bandwidth:.0%})" if self.moved else "")
        return "| " + " | ".join([*cells, self.note]) + " |"


def median_seconds(call: Callable[[], object], budget_s: float) -> float:
    """Median wall time of a call on the host: at least three, at most as many as fit the budget."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def median_device_seconds(call: Callable[[], object], repeats: int = 50) -> float:
    """Median time of a call on the current CUDA stream, with the L2 cache overwritten before."""
    flush = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        call()
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


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


def plain_normalize(pixels: torch.Tensor) -> torch.Tensor:
    """What ``torch.compile`` gets: the expression, in fp32, on the pixels' device."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(torch.bfloat16)


def plain_resize_normalize(pixels: torch.Tensor) -> torch.Tensor:
    """PyTorch's antialiased resize, of one size in and in fp32: near Pillow, not equal to it."""
    x = pixels.permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(
        x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
    )
    return plain_normalize(x.round().permute(0, 2, 3, 1))


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


def device_rows() -> Iterator[Row]:
    """The kernels by themselves: 64 images of 500 × 375 to 728, pixels already on the device."""
    photos = [Image.open(path).convert("RGB") for path in photo_paths(KERNEL_BATCH)]
    same = [np.array(photo.resize((KERNEL_SHAPE[1], KERNEL_SHAPE[0]))) for photo in photos]
    flat = RaggedImages.gather([torch.from_numpy(image).cuda() for image in same])
    batch = flat.data.view(KERNEL_BATCH, *KERNEL_SHAPE, 3)
    large = torch.from_numpy(np.stack([np.asarray(stock_resize(photo)) for photo in photos])).cuda()
    out_bytes = large.numel() * 2
    if not torch.equal(clip_normalize(large), reference_pixels.clip_normalize(large)):
        raise AssertionError("clip_normalize differs from the reference")

    def timed(name: str, call: Callable[[], torch.Tensor], read: int, note: str = "") -> Row:
        seconds = median_device_seconds(call)
        peak = peak_above_result(call)
        return Row(
            name=name,
            seconds=seconds,
            images=KERNEL_BATCH,
            moved=read + out_bytes,
            note=f"{peak / 2**20:.0f} MiB above the result{note}",
        )

    normalize_compiled = torch.compile(plain_normalize, dynamic=False)
    resize_compiled = torch.compile(plain_resize_normalize, dynamic=False)
    yield timed("normalise: eager PyTorch", lambda: plain_normalize(large), large.numel())
    yield timed("normalise: torch.compile", lambda: normalize_compiled(large), large.numel())
    yield timed(
        "normalise: ours, impl='torch'", lambda: clip_normalize(large, impl="torch"), large.numel()
    )
    yield timed("normalise: ours", lambda: clip_normalize(large), large.numel())
    inexact = "; not Pillow's values"
    yield timed(
        "resize + normalise: eager PyTorch",
        lambda: plain_resize_normalize(batch),
        batch.numel(),
        inexact,
    )
    yield timed(
        "resize + normalise: torch.compile", lambda: resize_compiled(batch), batch.numel(), inexact
    )
    yield timed(
        "resize + normalise: ours", lambda: resize_clip_normalize(flat, SIZE), batch.numel()
    )


def peak_above_result(call: Callable[[], torch.Tensor]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()


def copy_bandwidth() -> float:
    """Bytes read plus written a second by a device copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_device_seconds(lambda: target.copy_(source))


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


def print_rows(rows: Iterator[Row], bandwidth: float | None) -> None:
    extra = " GB/s (of a copy) |" if bandwidth is not None else ""
    print(f"| | µs an image | images/s | speed |{extra} remarks |")
    print("|---|---|---|---|---|" + ("---|" if extra else ""))
    baseline = None
    for row in rows:
        baseline = baseline or row.seconds / row.images
        print(row.line(baseline, bandwidth), flush=True)
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
    print_rows(host_rows(device, options.budget), None)
    print(f"Wait for the input of a step of {STEP_S * 1e3:.0f} ms, {IMAGES_A_PACK} images a pack\n")
    print("| | ms a step |\n|---|---|")
    for name, seconds in waits(device, options.steps):
        print(f"| {name} | {seconds * 1e3:.2f} |", flush=True)
    print()
    if device.type == "cuda":
        bandwidth = copy_bandwidth()
        print(f"{KERNEL_BATCH} images {KERNEL_SHAPE[1]} × {KERNEL_SHAPE[0]} to {SIZE}, on the GPU")
        print(f"(a copy: {bandwidth / 1e9:.0f} GB/s, read plus written)\n")
        print_rows(device_rows(), bandwidth)


if __name__ == "__main__":
    main()
