"""Every pixel of full images and crops, against the rule written out with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from step37_data.images.crop_pixels import (
    canvas_image,
    cut,
    full_image,
    normalize_then_resize,
    padded_image,
    prepare_on_device,
    rectangle,
)
from step37_data.images.crops import plan_crops
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize
from tests.data.images.multicrop_oracle import BILINEAR, Seen, see
from tests.data.images.test_multicrop import PHOTOS, sides

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Every rounding shows."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photograph(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def normalized(image: Image.Image, side: int) -> torch.Tensor:
    resized = pixels(image.resize((side, side), BILINEAR))
    return reference_pixels.clip_normalize(resized[None])[0]


def assert_as_pillow_chain(picture: Image.Image) -> None:
    seen = see(picture)
    plan = plan_crops(*picture.size)
    full = full_image(picture, plan)
    assert torch.equal(pixels(full), pixels(seen.full))
    assert len(plan.windows) == len(seen.crops)
    if plan.windows:
        canvas = canvas_image(full, plan)
        for window, crop in zip(plan.windows, seen.crops, strict=True):
            assert torch.equal(pixels(cut(canvas, window)), pixels(crop))


@given(width=sides(4096), height=sides(4096), seed=st.integers(0, 99))
@example(width=1, height=1, seed=0)
@example(width=200, height=7, seed=0)
@example(width=7, height=200, seed=0)
@example(width=900, height=60, seed=0)
def test_the_chain_with_pillow_is_the_rule_at_every_size(width, height, seed):
    assert_as_pillow_chain(noise(width, height, seed))


@pytest.mark.parametrize("size", [(4096, 4096), (4032, 3024), (31, 4000), (4096, 33), (3025, 700)])
def test_the_chain_with_pillow_is_the_rule_at_sizes_beyond_the_cap(size):
    assert_as_pillow_chain(noise(*size))


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_the_chain_with_pillow_is_the_rule_for_photographs(path):
    assert_as_pillow_chain(photograph(path))


def assert_device_chain(pictures: list[Image.Image], impl: str, sides_: tuple[int, int]) -> None:
    """The device chain of several pictures at once, up to the normalised results."""
    image_side, crop_side = sides_
    plans = [plan_crops(*picture.size) for picture in pictures]
    padded = [
        pixels(padded_image(picture, plan)).to(DEVICE)
        for picture, plan in zip(pictures, plans, strict=True)
    ]
    full, canvases, canvas_of = prepare_on_device(RaggedImages.gather(padded), plans, impl=impl)
    assert list(canvas_of) == [i for i, plan in enumerate(plans) if plan.windows]
    seen: list[Seen] = [see(picture) for picture in pictures]
    for i, each in enumerate(seen):
        assert torch.equal(full.image(i).cpu(), pixels(each.full))
    got = resize_clip_normalize(full, image_side, crops=full.whole(), impl=impl)
    expected = torch.stack([normalized(each.full, image_side) for each in seen])
    assert torch.equal(got.cpu(), expected)
    rectangles = [rectangle(k, window) for i, k in canvas_of.items() for window in plans[i].windows]
    got = resize_clip_normalize(canvases, crop_side, crops=rectangles, impl=impl)
    crops = [crop for each in seen for crop in each.crops]
    for place, crop in zip(rectangles, crops, strict=True):
        canvas = canvases.image(place.image).cpu()
        window = canvas[place.top : place.bottom, place.left : place.right]
        assert torch.equal(window, pixels(crop))
    if crops:
        assert torch.equal(got.cpu(), torch.stack([normalized(c, crop_side) for c in crops]))


SIZES = st.tuples(sides(900), sides(900))


@given(sizes=st.lists(SIZES, min_size=1, max_size=2), seed=st.integers(0, 99))
@example(sizes=[(500, 333), (500, 375), (40, 5)], seed=0)
@example(sizes=[(740, 300)], seed=0)
@settings(max_examples=10)
def test_the_chain_on_a_device_is_the_rule(sizes, seed):
    assert_device_chain([noise(*size, seed) for size in sizes], "torch", (28, 14))


def test_the_chain_on_a_device_is_the_rule_beyond_the_cap():
    assert_device_chain([noise(3100, 800), noise(200, 150)], "torch", (28, 14))


@pytest.mark.parametrize("path", PHOTOS[:3], ids=lambda path: path.stem)
def test_the_chain_on_a_device_is_the_rule_for_photographs_at_the_sizes_of_the_model(path):
    picture = photograph(path)
    assert_device_chain([picture, picture.resize((800, 350))], "torch", (728, 504))


@pytest.mark.parametrize("sizes", [[(50, 20), (30, 25)], [(20, 50), (33, 6), (1, 3)]])
def test_the_kernels_chain_is_the_rule(sizes, monkeypatch):
    if INTERPRETED:  # its time goes by programs: fewer and larger ones
        monkeypatch.setattr("step37_kernels.ops.resize_pass.TILE", (64, 128))
        monkeypatch.setattr("step37_kernels.ops.resize_pass.ROWS_AT_ONCE", (64, 64))
    assert_device_chain([noise(*size) for size in sizes], "triton", (28, 14))


def test_a_picture_without_crops_has_no_windows_and_is_not_resized_for_them():
    plan, picture = plan_crops(500, 375), noise(500, 375)
    assert plan.windows == ()
    assert canvas_image(picture, plan) is full_image(picture, plan) is picture
    gathered = RaggedImages.gather([pixels(picture)])
    full, canvases, canvas_of = prepare_on_device(gathered, [plan])
    assert full is gathered
    assert (len(canvases), canvas_of) == (0, {})


def antialiased(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """A triangle filter as wide as the reduction along one axis, in float64."""
    values = np.moveaxis(values, axis, 0)
    scale = len(values) / size
    support = max(scale, 1.0)
    out = []
    for x in range(size):
        center = (x + 0.5) * scale
        distance = np.abs((np.arange(len(values)) + 0.5 - center) / support)
        weights = np.clip(1 - distance, 0, None)
        out.append(np.tensordot(weights / weights.sum(), values, axes=1))
    return np.moveaxis(np.stack(out), 0, axis)


@pytest.mark.parametrize("size", [(60, 41), (20, 90), (32, 32), (300, 20)])
def test_the_order_of_serving_normalises_and_then_resizes(size):
    picture = pixels(noise(*size))
    got = normalize_then_resize(picture.to(DEVICE), 32)
    exact = reference_pixels.clip_normalize(picture[None], dtype=torch.float32)[0].double().numpy()
    exact = antialiased(antialiased(exact, 32, 1), 32, 2)
    # Two fp32 sums of at most 22 terms of magnitude 2.7, whose weights carry rounding of their own.
    bound = 2 * 3 * 22 * 2.0**-24 * 2.7
    assert np.abs(got.cpu().double().numpy() - exact).max() <= bound


def test_the_two_orders_differ_by_the_roundings_to_8_bits():
    """Pillow rounds to 8 bits after each pass, serving never: at most 1 of 255 apart."""
    photos = [pixels(photograph(path)) for path in PHOTOS[:4]]
    pillow = resize_clip_normalize(photos, 504, dtype=torch.float32)
    serving = torch.stack([normalize_then_resize(photo, 504) for photo in photos])
    std = torch.tensor(reference_pixels.CLIP_STD).view(3, 1, 1)
    levels = (pillow - serving).abs() * std * 255
    assert 0.3 < levels.max() <= 1.01
    assert 0.1 < levels.mean() < 0.4
