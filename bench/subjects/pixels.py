"""Photographs from files to pixels on the host: µs by stage, the ways beside, the wait of a step.

``python -m bench pixels`` checks first that everything of ours computes stock's bits, then prints
Markdown tables. All figures of a table come from one run, in which everything takes turns. The
kernels by themselves are the subjects ``normalize`` and ``resize``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from bench.harness import CpuClock, Implementation, environment, sample_rounds
from step37_data.common.image_entry import Entry, ImageEntry
from step37_data.common.threads import available_cores, default_threads, map_threads
from step37_data.images import decode, stacks
from step37_data.images.crop_pixels import PixelOrder, normalize_into
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE
from step37_data.images.decode import decode_into, open_image
from step37_data.images.options import ImageOptions
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "examples" / "flickr8k_mini" / "train"
SIZE = IMAGE_SIZE
BILINEAR = Image.Resampling.BILINEAR
IMAGES_A_PACK = 8  # photographs of examples, each once: a file met twice is decoded once
STEP_S = 0.05
CPU = torch.device("cpu")

Call = Callable[[], object]
Memory = Mapping[str, "np.ndarray[Any, Any]"]


class Row(NamedTuple):
    """What one call took, which works on so many images: median, and 20th percentile."""

    name: str
    seconds: float
    quiet_s: float
    images: int

    def line(self, baseline: float) -> str:
        each = self.seconds / self.images
        return f"| {self.name} | {each * 1e6:.0f} | {1 / each:.0f} | {baseline / each:.2f}× |"


def way(name: str, call: Call) -> Implementation:
    return Implementation(name=name, kind="ours", prepare=lambda _: None, run=lambda _: call())


def interleaved(calls: Mapping[str, Call], images: int, budget_s: float) -> Iterator[Row]:
    """Time calls by turns, so that a neighbour that wakes up meets all of them alike."""
    ways = [way(name, call) for name, call in calls.items()]
    for one in ways:
        one.run(None)
    for name, figures in sample_rounds(ways, CpuClock(), budget_s * len(ways)).items():
        yield Row(name, figures["median_us"] / 1e6, figures["p20_us"] / 1e6, images)


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


def stock_image(path: str) -> torch.Tensor:
    return stock_normalize(stock_decode(path).resize((SIZE, SIZE), BILINEAR)).to(torch.bfloat16)


def ours(
    items: Sequence[Entry], device: torch.device, threads: int, pixel_order: PixelOrder = "pillow"
) -> list[torch.Tensor]:
    """From files to bf16 on the device, and waited for."""
    loaded = load_images(
        items, image_size=IMAGE_SIZE, patch_image_size=CROP_SIZE, device=device,
        dtype=torch.bfloat16, threads=threads, pixel_order=pixel_order,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [image for image, _ in loaded]


def check(paths: Sequence[str], device: torch.device) -> None:
    """What is timed computes the same bits, or there is nothing to time."""
    expected = torch.stack([stock_image(path) for path in paths])
    for threads in (1, 2):
        got = torch.stack(ours([(path, 0) for path in paths], device, threads)).cpu()
        if different := int((got != expected).sum()):
            raise AssertionError(f"{different} values differ from stock with {threads} threads")


def thread_counts() -> list[int]:
    most = default_threads()
    return [2**k for k in range(most.bit_length()) if 2**k < most] + [most]


def peer(name: str) -> ModuleType | None:
    """A package that may be missing, or of another PyTorch, which torchvision finds out late."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


Ways = dict[str, Callable[[str], object]]


def stages(paths: Sequence[str]) -> dict[str, Ways]:
    """What is done to one photograph, by stage and by way; simplejpeg decodes into warm memory."""
    pictures = {path: stock_decode(path) for path in paths}
    memory = {path: np.array(picture) for path, picture in pictures.items()}
    resized = {path: picture.resize((SIZE, SIZE), BILINEAR) for path, picture in pictures.items()}
    out = torch.empty((3, SIZE, SIZE), dtype=torch.bfloat16)
    spare = {path: pixels.copy() for path, pixels in memory.items()}
    small, large = np.array(resized[paths[0]]), np.empty((SIZE, SIZE, 3), np.uint8)

    def into_memory(path: str) -> None:
        with open_image(path) as image:
            decode_into(memory[path], image)

    def by_pillow(path: str) -> None:
        with open_image(path) as image:
            decode._in_rgb(image)

    found: dict[str, Ways] = {
        "read, decode (Pillow)": {
            "ours": by_pillow,
            "stock": stock_decode,
            "floor": lambda path: np.copyto(spare[path], memory[path]),
        },
        "read, decode (simplejpeg)": {"ours": into_memory},
        "resize": {
            "ours": lambda path: pictures[path].resize((SIZE, SIZE), BILINEAR),
            "stock": lambda path: pictures[path].resize((SIZE, SIZE), BILINEAR),
            "floor": lambda _: np.copyto(large, small),
        },
        "normalise": {
            "ours": lambda path: normalize_into(out, np.asarray(resized[path])),
            "stock": lambda path: stock_normalize(resized[path]).to(torch.bfloat16),
            "floor": lambda _: out.clone(),
        },
        "all, for CUDA: the host's part": {"stock": stock_image},
        "all, for the CPU": {"stock": stock_image},
    }
    if (simplejpeg := peer("simplejpeg")) is None:
        del found["read, decode (simplejpeg)"]["ours"]
    else:
        encoded = {path: Path(path).read_bytes() for path in paths}

        def bare(path: str) -> object:
            return simplejpeg.decode_jpeg(encoded[path], buffer=memory[path])

        for stage in list(found)[1], *list(found)[-2:]:
            found[stage]["floor"] = bare
    if (vision := peer("torchvision")) is not None and peer("torchvision.transforms.v2"):
        transforms = vision.transforms.v2.functional
        tensors = {path: torch.from_numpy(spare[path]).permute(2, 0, 1) for path in paths}
        grown = torch.from_numpy(small).permute(2, 0, 1)

        def read(path: str) -> torch.Tensor:
            mode = vision.io.ImageReadMode.RGB
            image: torch.Tensor = vision.io.decode_image(vision.io.read_file(path), mode)
            return image

        def resize(image: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = transforms.resize(image, [SIZE, SIZE], antialias=True)
            return made

        def normalize(image: torch.Tensor) -> torch.Tensor:
            scaled = transforms.to_dtype(image, torch.float32, scale=True)
            done: torch.Tensor = transforms.normalize(scaled, list(CLIP_MEAN), list(CLIP_STD))
            return done.to(torch.bfloat16)

        vision_ways: list[Callable[[str], object]] = [
            read,
            read,
            lambda path: resize(tensors[path]),
            lambda _: normalize(grown),
            read,
            lambda path: normalize(resize(read(path))),
        ]
        for ways, function in zip(found.values(), vision_ways, strict=True):
            ways["torchvision"] = function
    return found


def host_table(budget_s: float) -> dict[tuple[str, int], float]:
    """Print µs a photograph by stage, threads and way; those of ours come back."""
    paths = photo_paths(IMAGES_A_PACK)
    entries: list[Entry] = [(path, 0) for path in paths]
    wanted = [ImageEntry(*entry) for entry in entries]
    calls: dict[str, Call] = {}
    by_stage = stages(paths)
    for stage, ways in by_stage.items():
        for way, function in ways.items():
            for threads in (1, 2):
                calls[f"{stage}|{threads}|{way}"] = functools.partial(
                    map_threads, function, paths, threads
                )
    # Memory as PyTorch's pinned allocator hands it out: used before.
    warm: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def staged(threads: int) -> None:
        """Everything that is done before the copy to the device."""
        options = ImageOptions(image_size=SIZE, patch_image_size=SIZE, threads=threads)
        to_pixels = functools.partial(stacks._staged, device=CPU, as_viewed=False)
        read = stacks._read(wanted, options, to_pixels=to_pixels, use=lambda one: one)
        for picture in read[0]:
            warm.setdefault(tuple(picture.pixels.shape), []).append(picture.pixels)

    def host_memory(
        shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        kept = warm.get(tuple(shape))
        return kept.pop() if kept else torch.empty(tuple(shape), dtype=dtype, device=device)

    for threads in (1, 2):
        stage, last = list(by_stage)[-2:]
        calls[f"{stage}|{threads}|ours"] = functools.partial(staged, threads)
        calls[f"{last}|{threads}|ours"] = functools.partial(ours, entries, CPU, threads)
    with mock.patch.object(stacks, "host_memory", host_memory):
        rows = {row.name: row for row in interleaved(calls, len(paths), budget_s)}
    columns = ("ours", "stock", "torchvision", "floor")
    print(f"| | threads | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for stage in by_stage:
        for threads in (1, 2):
            cells = []
            for way in columns:
                row = rows.get(f"{stage}|{threads}|{way}")
                us = [1e6 / len(paths) * s for s in (row.quiet_s, row.seconds)] if row else []
                cells.append(f"{us[0]:.0f} ({us[1]:.0f})" if us else "–")
            print(f"| {stage} | {threads} | {' | '.join(cells)} |")
    print(flush=True)
    return {
        (stage, threads): rows[f"{stage}|{threads}|ours"].quiet_s / len(paths)
        for stage in list(by_stage)[-2:]
        for threads in (1, 2)
    }


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


def cores_table(measured: Mapping[tuple[str, int], float]) -> None:
    """From µs a photograph with one thread, when its work hides behind a step: arithmetic."""
    packs = (8, 39, 150)
    print(f"| | {' | '.join(f'{n} a pack' for n in packs)} |\n|---|{'---|' * len(packs)}")
    for (stage, threads), seconds in measured.items():
        if threads == 1:
            cores = (str(math.ceil(n * seconds / (STEP_S + 1e-3))) for n in packs)
            print(f"| {stage} | {' | '.join(cores)} |")
    print()


def print_rows(rows: Iterator[Row]) -> None:
    print("| | µs an image | images/s | speed |\n|---|---|---|---|")
    baseline = None
    for row in rows:
        baseline = baseline or row.seconds / row.images
        print(row.line(baseline), flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a figure may take")
    parser.add_argument("--steps", type=int, default=20, help="steps to measure the wait over")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    here = environment(device)
    versions = [f"PyTorch {torch.__version__}", f"Pillow {pillow_version}"]
    for name in ("simplejpeg", "torchvision"):
        version = getattr(peer(name), "__version__", "missing")
        versions.append(f"{name} {version}")
    print(
        f"{where or here['device']}, {available_cores()} cores, Python "
        f"{platform.python_version()}, {', '.join(versions)}, commit {here['commit'] or 'unknown'},"
        f" {here['date']}\n"
    )
    check(photo_paths(4), device)
    print(
        f"µs a photograph of {IMAGES_A_PACK}, to {SIZE} × {SIZE} bf16: 20th percentile (median) of "
        "calls by turns\n"
    )
    measured = host_table(options.budget)
    print(
        f"Wait for the input of a step of {STEP_S * 1e3:.0f} ms, {IMAGES_A_PACK} images a pack, "
        f"{available_cores()} cores: measured\n\n| | ms a step |\n|---|---|"
    )
    for name, seconds in waits(device, options.steps):
        print(f"| {name} | {seconds * 1e3:.2f} |", flush=True)
    print(
        f"\nCores at which a prefetched step of {STEP_S * 1e3:.0f} ms waits less than 1 ms: "
        "computed from the µs above, one thread\n"
    )
    cores_table(measured)


if __name__ == "__main__":
    main()
