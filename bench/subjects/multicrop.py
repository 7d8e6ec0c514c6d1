"""A pack of 1920×1080 pictures in crops: the serving processor's way on the host against ours.

``python -m bench multicrop`` checks first that everything timed computes the same bits, then prints
a Markdown table. The stages on a GPU by themselves are rows of ``python -m bench resize``; what the
insertion of such a pack's rows takes is shown by ``python -m bench insert --shapes multicrop``.
"""

from __future__ import annotations

import argparse
import functools
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL import __version__ as pillow_version

from bench.harness import environment
from bench.subjects.pixels import (
    Call,
    Row,
    interleaved,
    ours,
    photo_paths,
    print_rows,
    stock_decode,
    stock_normalize,
    thread_counts,
)
from step37_data.common.image_entry import Entry
from step37_data.common.threads import map_threads
from step37_data.images.crops import CROP_SIZE, IMAGE_SIZE, CropPlan, plan_crops
from step37_data.images.decode import read_rgb

SIZE = (1920, 1080)
PICTURES = 9
BILINEAR = Image.Resampling.BILINEAR


def make_pictures(folder: Path, count: int) -> list[str]:
    """JPEGs of 1920×1080: photographs, enlarged."""
    paths = []
    for i, source in enumerate(photo_paths(count)):
        path = folder / f"{i}.jpg"
        stock_decode(source).resize(SIZE, BILINEAR).save(path, quality=92)
        paths.append(str(path))
    return paths


def entries(paths: Sequence[str], plan: CropPlan) -> list[Entry]:
    result: list[Entry] = []
    for path in paths:
        result += [(path, 1, window) for window in plan.windows]
        result.append((path, 0, plan.full_window))
    return result


def stock(paths: Sequence[str], plan: CropPlan) -> list[torch.Tensor]:
    """One thread, one picture after the other, every window resized and normalised by itself.

    Crops and full image of each picture in turn, bf16.
    """
    if not plan.windows or plan.full_size != SIZE:
        raise AssertionError(f"the benchmark is written for pictures of {SIZE}, got {plan}")
    images = []
    for path in paths:
        picture = Image.open(path).convert("RGB")
        canvas = picture.resize(plan.canvas_size, BILINEAR)
        for x, y, width, height in plan.windows:
            crop = canvas.crop((x, y, x + width, y + height))
            images.append(stock_normalize(crop.resize((CROP_SIZE, CROP_SIZE), BILINEAR)))
        images.append(stock_normalize(picture.resize((IMAGE_SIZE, IMAGE_SIZE), BILINEAR)))
    return [image.to(torch.bfloat16) for image in images]


def check(paths: Sequence[str], plan: CropPlan, device: torch.device) -> None:
    """What is timed computes the same bits, or there is nothing to time."""
    wanted = stock(paths, plan)
    for threads in (1, 2):
        got = ours(entries(paths, plan), device, threads)
        different = sum(int((a.cpu() != b).sum()) for a, b in zip(got, wanted, strict=True))
        if different:
            raise AssertionError(f"{different} values differ from stock with {threads} threads")


def host_rows(
    paths: Sequence[str], plan: CropPlan, device: torch.device, budget_s: float
) -> Iterator[Row]:
    """From files to bf16 on the device."""
    items = entries(paths, plan)

    def stock_on_device() -> None:
        images = stock(paths, plan)
        for side in (CROP_SIZE, IMAGE_SIZE):
            torch.stack([image for image in images if image.shape[-1] == side]).to(device)

    calls: dict[str, Call] = {"stock, 1 thread": stock_on_device}
    for threads in thread_counts():
        plural = "s" if threads > 1 else ""
        one = functools.partial(ours, items, device, threads)
        calls[f"ours, {threads} thread{plural}"] = one
        serving = functools.partial(one, "serving")
        calls[f"ours, {threads} thread{plural}, pixel_order='serving'"] = serving
        decoding = functools.partial(decode_all, paths, threads)
        calls[f"of which decoding, {threads} thread{plural}"] = decoding
    yield from interleaved(calls, len(paths), budget_s)


def decode_all(paths: Sequence[str], threads: int) -> None:
    list(map_threads(read_rgb, paths, threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a host row may take")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    commit = environment(device)["commit"]
    plan = plan_crops(*SIZE)
    print(
        f"{where}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Pillow {pillow_version}, commit {commit or 'unknown'}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder), PICTURES)
        check(paths[:2], plan, device)
        print(
            f"{PICTURES} pictures of {SIZE[0]} × {SIZE[1]}, {len(plan.windows)} crops each, from "
            "files to bf16, wall time\n"
        )
        print_rows(host_rows(paths, plan, device, options.budget))


if __name__ == "__main__":
    main()
