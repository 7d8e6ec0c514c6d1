"""Subjects ``pixels`` and ``multicrop``: times the host's work from image files to pixels.

``pixels`` compares every stage of a photograph with stock, torchvision and a floor, and measures
how long a training step waits for its input. ``multicrop`` measures a pack of 1920×1080 pictures in
crops. Both first check that our results equal stock's bit for bit. All figures of a table come from
one run, in which all calls are timed in turn. The subjects ``normalize`` and ``resize`` measure the
kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import __version__ as pillow_version

from bench.harness import CpuClock, Implementation, Settings, sample_rounds, where
from bench.photographs import (
    BILINEAR,
    LARGE,
    large_plan,
    photo_paths,
    stock_decode,
    stock_normalize,
    stock_pixels,
    stock_resize,
    stock_windows,
)
from bench.report import Column, Table
from step37_data.common.image_entry import Entry, ImageEntry
from step37_data.common.threads import available_cores, default_threads, map_threads
from step37_data.images import decode, stacks
from step37_data.images.crop_pixels import PixelOrder, normalize_into
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, CropPlan
from step37_data.images.decode import decode_into, open_image, read_rgb
from step37_data.images.options import ImageOptions
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD

SIZE = IMAGE_SIZE
IMAGES_A_PACK = 8  # photographs of examples, each once: a second one is not decoded
LARGE_PICTURES = 9
STEP_S = 0.05
CPU = torch.device("cpu")
THREADS = (1, 2)
FOR_CUDA, FOR_CPU = "all, for CUDA: the host's part", "all, for the CPU"

Call = Callable[[], object]
Ways = dict[str, Callable[[str], object]]


class Took(NamedTuple):
    """Seconds of a call: median, and 20th percentile."""

    median_s: float
    quiet_s: float


def _itself(call: Call, _: int) -> Call:
    return call


def _run(call: Call) -> object:
    return call()


def interleaved(calls: Mapping[str, Call], each_s: float) -> dict[str, Took]:
    """Time calls in turn, so that other processes affect all of them equally."""
    ways = [
        Implementation(name=name, kind="ours", prepare=functools.partial(_itself, call), run=_run)
        for name, call in calls.items()
    ]
    for one in ways:
        one.run(one.prepare(0))
    return {
        name: Took(figures["median_us"] / 1e6, figures["p20_us"] / 1e6)
        for name, figures in sample_rounds(ways, CpuClock(), each_s * len(ways)).items()
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Make PyTorch use one thread inside the block, as in a data worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device) -> str:
    """Describe in one line the software of the measurement, and name missing packages."""
    versions = {name: getattr(peer(name), "__version__", "missing")
                for name in ("simplejpeg", "torchvision")}  # fmt: skip
    return where(device, cores=str(available_cores()), pillow=pillow_version, **versions)


def ours(
    items: Sequence[Entry], device: torch.device, threads: int, pixel_order: PixelOrder = "pillow"
) -> list[torch.Tensor]:
    """Load files as the data package does, to bf16 on the device, and wait for it."""
    loaded = load_images(
        items, image_size=IMAGE_SIZE, patch_image_size=CROP_SIZE, device=device,
        dtype=torch.bfloat16, threads=threads, pixel_order=pixel_order,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [image for image, _ in loaded]


def check(items: Sequence[Entry], wanted: Sequence[torch.Tensor], device: torch.device) -> None:
    """Raise ``AssertionError`` if our result for an item is not the wanted one, bit for bit."""
    for threads in THREADS:
        got = ours(items, device, threads)
        different = sum(int((a.cpu() != b).sum()) for a, b in zip(got, wanted, strict=True))
        if different:
            raise AssertionError(f"{different} values differ from stock with {threads} threads")


def peer(name: str) -> ModuleType | None:
    """Import a package; None if it is missing or, like torchvision, made for another PyTorch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


def stages(paths: Sequence[str]) -> dict[str, Ways]:
    """List what is done to one photograph, by stage and way.

    Packed is three bytes a pixel, in warm memory that NumPy reads, as for a device; Pillow's own
    memory has four. simplejpeg decodes into packed memory.
    """
    pictures = {path: stock_decode(path) for path in paths}
    memory = {path: np.array(picture) for path, picture in pictures.items()}
    resized = {path: stock_resize(picture, SIZE) for path, picture in pictures.items()}
    out = torch.empty((3, SIZE, SIZE), dtype=torch.bfloat16)
    spare = {path: pixels.copy() for path, pixels in memory.items()}
    small, large = np.array(resized[paths[0]]), np.empty((SIZE, SIZE, 3), np.uint8)

    def stock_image(path: str) -> torch.Tensor:
        return stock_pixels(stock_decode(path), SIZE)

    def into_memory(path: str) -> None:
        with open_image(path) as image:
            decode_into(memory[path], image)

    def by_pillow(path: str) -> None:
        with open_image(path) as image:
            decode._in_rgb(image)

    def by_pillow_into_memory(path: str) -> None:
        with open_image(path) as image:
            np.copyto(memory[path], np.asarray(decode._in_rgb(image)))

    found: dict[str, Ways] = {
        "read, decode (Pillow)": {
            "ours": by_pillow,
            "stock": stock_decode,
            "floor": lambda path: np.copyto(spare[path], memory[path]),
        },
        "read, decode (Pillow), packed": {
            "ours": by_pillow_into_memory,
            "stock": lambda path: np.copyto(memory[path], np.asarray(stock_decode(path))),
            "floor": lambda path: np.copyto(spare[path], memory[path]),
        },
        "read, decode (simplejpeg)": {"ours": into_memory},
        "resize": {
            "ours": lambda path: stock_resize(pictures[path], SIZE),
            "stock": lambda path: stock_resize(pictures[path], SIZE),
            "floor": lambda _: np.copyto(large, small),
        },
        "normalise": {
            "ours": lambda path: normalize_into(out, np.asarray(resized[path])),
            "stock": lambda path: stock_normalize(resized[path]).to(torch.bfloat16),
            "floor": lambda _: out.clone(),
        },
        FOR_CUDA: {"stock": stock_image},
        FOR_CPU: {"stock": stock_image},
    }
    if (simplejpeg := peer("simplejpeg")) is None:
        del found["read, decode (simplejpeg)"]["ours"]
    else:
        encoded = {path: Path(path).read_bytes() for path in paths}

        def bare(path: str) -> object:
            return simplejpeg.decode_jpeg(encoded[path], buffer=memory[path])

        for stage in "read, decode (simplejpeg)", FOR_CUDA, FOR_CPU:
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
            read,
            lambda path: resize(tensors[path]),
            lambda _: normalize(grown),
            read,
            lambda path: normalize(resize(read(path))),
        ]
        for ways, function in zip(found.values(), vision_ways, strict=True):
            ways["torchvision"] = function
    return found


def stage_times(each_s: float) -> dict[tuple[str, int, str], Took]:
    """Time every stage of a photograph; by stage, number of threads, and way."""
    paths = photo_paths(IMAGES_A_PACK)
    entries: list[Entry] = [(path, 0) for path in paths]
    wanted = [ImageEntry(*entry) for entry in entries]
    by_stage = stages(paths)
    keys = [(s, t, way) for s, ways in by_stage.items() for way in ways for t in THREADS]
    calls: dict[tuple[str, int, str], Call] = {
        (stage, threads, way): functools.partial(map_threads, by_stage[stage][way], paths, threads)
        for stage, threads, way in keys
    }
    # Memory that was used before, as that of PyTorch's pinned allocator mostly was.
    warm: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def staged(threads: int) -> None:
        """Do all that precedes the copy to the device."""
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

    for threads in THREADS:
        calls[FOR_CUDA, threads, "ours"] = functools.partial(staged, threads)
        calls[FOR_CPU, threads, "ours"] = functools.partial(ours, entries, CPU, threads)
    named = {str(key): call for key, call in calls.items()}
    with mock.patch.object(stacks, "host_memory", host_memory):
        times = interleaved(named, each_s)
    return {key: times[str(key)] for key in calls}


def stage_table(text: str, times: Mapping[tuple[str, int, str], Took]) -> Table:
    """Make the table of µs a photograph, by stage, threads and way."""
    names = ("ours", "stock", "torchvision", "floor")
    scale = 1e6 / IMAGES_A_PACK

    def figures(took: Took | None) -> tuple[float, float] | None:
        return (scale * took.quiet_s, scale * took.median_s) if took else None

    rows = dict.fromkeys((stage, threads) for stage, threads, _ in times)
    return Table(
        text=f"{text}\n\nµs a photograph of {IMAGES_A_PACK}, to {SIZE} × {SIZE} bf16: "
        "20th percentile (median) of calls by turns",
        columns=(Column(""), Column("threads"), *(Column(n, "{:.0f} ({:.0f})") for n in names)),
        lines=[
            (stage, threads, *(figures(times.get((stage, threads, name))) for name in names))
            for stage, threads in rows
        ],
    )


def wait_table(device: torch.device, steps: int) -> Table:
    """Make the table of how long a step waits for its input."""
    return Table(
        text=f"Wait for the input of a step of {STEP_S * 1e3:.0f} ms, {IMAGES_A_PACK} images a "
        f"pack, {available_cores()} cores: measured",
        columns=(Column(""), Column("ms a step", "{:.2f}")),
        lines=waits(device, steps),
    )


def waits(device: torch.device, steps: int) -> Iterator[tuple[str, float]]:
    """Measure how long steps of 50 ms wait for their input; yields the preparation, and ms."""
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
            # Stands for the training step, in which the host is idle.
            time.sleep(STEP_S)
        return 1e3 * statistics.median(times)

    yield "prepared within the step", waited(map(prepare, packs))
    for depth in (1, 2):
        with Prefetcher(packs, prepare, depth=depth, device=device) as prefetcher:
            yield f"prefetched, depth {depth}", waited(prefetcher)


def cores_table(times: Mapping[tuple[str, int, str], Took]) -> Table:
    """Make the table of how many cores hide the work behind a step, from µs a photograph."""
    packs = (8, 39, 150)

    def cores(stage: str, photographs: int) -> int:
        seconds = photographs * times[stage, 1, "ours"].quiet_s / IMAGES_A_PACK
        return math.ceil(seconds / (STEP_S + 1e-3))

    return Table(
        text=f"Cores at which a prefetched step of {STEP_S * 1e3:.0f} ms waits less than 1 ms: "
        "computed from the µs above, one thread",
        columns=(Column(""), *(Column(f"{count} a pack") for count in packs)),
        lines=[(s, *(cores(s, count) for count in packs)) for s in (FOR_CUDA, FOR_CPU)],
    )


def run_pixels(settings: Settings) -> Iterator[Table]:
    """Yield the tables of the stages of a photograph, of a step's wait, and of cores."""
    paths = photo_paths(4)
    wanted = [stock_pixels(stock_decode(path), SIZE) for path in paths]
    with one_thread():
        check([(path, 0) for path in paths], wanted, settings.device)
        times = stage_times(settings.row_seconds)
        yield stage_table(machine(settings.device), times)
        yield wait_table(settings.device, settings.options["steps"])
        yield cores_table(times)


def make_large_pictures(folder: Path, count: int) -> list[str]:
    """Write JPEGs of the size :data:`LARGE`: photographs, enlarged."""
    paths = []
    for i, source in enumerate(photo_paths(count)):
        path = folder / f"{i}.jpg"
        stock_decode(source).resize(LARGE, BILINEAR).save(path, quality=92)
        paths.append(str(path))
    return paths


def entries_in_crops(paths: Sequence[str], plan: CropPlan) -> list[Entry]:
    """Make entries of the data package: the crops of each picture, then its full image."""
    result: list[Entry] = []
    for path in paths:
        result += [(path, 1, window) for window in plan.windows]
        result.append((path, 0, plan.full_window))
    return result


def stock_in_crops(paths: Sequence[str], plan: CropPlan) -> list[torch.Tensor]:
    """Make the crops and the full image of each picture as stock does, bf16, with one thread.

    Every window is resized and normalised separately.
    """
    images = []
    for path in paths:
        picture = stock_decode(path)
        images += [stock_pixels(window, CROP_SIZE) for window in stock_windows(picture, plan)]
        images.append(stock_pixels(picture, IMAGE_SIZE))
    return images


def thread_counts() -> list[int]:
    """List numbers of threads to measure: powers of two, and the data package's default."""
    most = default_threads()
    return [2**k for k in range(most.bit_length()) if 2**k < most] + [most]


def multicrop_calls(paths: Sequence[str], plan: CropPlan, device: torch.device) -> dict[str, Call]:
    """List the ways from files to bf16 on the device, stock first."""
    items = entries_in_crops(paths, plan)

    def stock_on_device() -> None:
        images = stock_in_crops(paths, plan)
        for side in (CROP_SIZE, IMAGE_SIZE):
            torch.stack([image for image in images if image.shape[-1] == side]).to(device)

    calls: dict[str, Call] = {"stock, 1 thread": stock_on_device}
    for threads in thread_counts():
        plural = "s" if threads > 1 else ""
        one = functools.partial(ours, items, device, threads)
        calls[f"ours, {threads} thread{plural}"] = one
        calls[f"ours, {threads} thread{plural}, pixel_order='serving'"] = functools.partial(
            one, "serving"
        )
        calls[f"of which decoding, {threads} thread{plural}"] = functools.partial(
            map_threads, read_rgb, paths, threads
        )
    return calls


def run_multicrop(settings: Settings) -> Iterator[Table]:
    """Yield one table: a pack of large pictures in crops, by stock and by ours."""
    plan = large_plan(LARGE)
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        paths = make_large_pictures(Path(folder), LARGE_PICTURES)
        some = paths[:2]
        check(entries_in_crops(some, plan), stock_in_crops(some, plan), settings.device)
        times = interleaved(multicrop_calls(paths, plan, settings.device), settings.row_seconds)
    each = {name: took.median_s / len(paths) for name, took in times.items()}
    stock = next(iter(each.values()))
    yield Table(
        text=f"{machine(settings.device)}\n\n{len(paths)} pictures of {LARGE[0]} × {LARGE[1]}, "
        f"{len(plan.windows)} crops each, from files to bf16, wall time",
        columns=(
            Column(""), Column("µs a picture", "{:.0f}"), Column("pictures/s", "{:.0f}"),
            Column("speed", "{:.2f}×"),
        ),
        lines=[(name, 1e6 * s, 1 / s, stock / s) for name, s in each.items()],
    )  # fmt: skip
