"""Loads the photographs of the pixel benchmarks, and processes them as stock does.

Stock works with Pillow, NumPy and PyTorch on the host, one picture after the other. The subjects
``pixels`` and ``multicrop`` (files to pixels, on the host), ``normalize`` and ``resize`` (the
kernels) and ``step`` use these.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from step37_data.images.crops import CropPlan, plan_crops
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD

PHOTOS = Path(__file__).resolve().parents[1] / "examples" / "flickr8k_mini" / "train"
BILINEAR = Image.Resampling.BILINEAR
LARGE = (1920, 1080)
"""(width, height) of a picture that is cut into crops."""


def photo_paths(count: int) -> list[str]:
    """List the paths of ``count`` JPEGs of the example, again from the first after the last."""
    files = sorted(str(path) for path in PHOTOS.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(f"no photographs in {PHOTOS}")
    return [files[i % len(files)] for i in range(count)]


def photographs(count: int, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """Load ``count`` photographs of the example, resized to (width, height) if given."""
    pictures = map(stock_decode, photo_paths(count))
    return [picture.resize(size, BILINEAR) if size else picture for picture in pictures]


def stock_decode(path: str) -> Image.Image:
    """Read and decode a file."""
    return Image.open(path).convert("RGB")


def stock_resize(picture: Image.Image, side: int) -> Image.Image:
    """Resize to a square."""
    return picture.resize((side, side), BILINEAR)


def stock_normalize(image: Image.Image) -> torch.Tensor:
    """Normalise to ``[3, h, w]`` fp32, in three passes."""
    array = np.asarray(image, dtype=np.float32) / 255.0
    tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (tensor - mean) / std


def stock_pixels(picture: Image.Image, side: int) -> torch.Tensor:
    """Resize and normalise, to ``[3, side, side]`` bf16."""
    return stock_normalize(stock_resize(picture, side)).to(torch.bfloat16)


def stock_windows(picture: Image.Image, plan: CropPlan) -> list[Image.Image]:
    """Cut the crops of a picture out of its canvas; they are not resized yet."""
    canvas = picture.resize(plan.canvas_size, BILINEAR)
    return [canvas.crop((x, y, x + w, y + h)) for x, y, w, h in plan.windows]


def large_plan(size: tuple[int, int]) -> CropPlan:
    """Plan the crops of a picture of this size, which must not need padding or shrinking."""
    plan = plan_crops(*size)
    if not plan.windows or plan.full_size != size:
        raise AssertionError(f"written for pictures that are cut as they are, got {plan}")
    return plan
