"""resize_uint8 against Pillow itself, bit for bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from step37_kernels.ops.common import INTERPRETED
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_uint8

IMPLS = ("triton", "torch")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter takes seconds for what a GPU does in microseconds.
LARGEST = 2048 if DEVICE.type == "cuda" else 130


@contextlib.contextmanager
def interpreted_tiles():
    """Tiles for the interpreter, whose time goes by programs: fewer and larger ones."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr("step37_kernels.ops.resize_pass.TILE", (64, 64))
            patch.setattr("step37_kernels.ops.resize_pass.ROWS_AT_ONCE", (32, 32))
        yield


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def gather(images: list[torch.Tensor]) -> RaggedImages:
    return RaggedImages.gather([image.to(DEVICE) for image in images])


def pillow(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    resized = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


SHAPE = st.tuples(st.integers(1, LARGEST), st.integers(1, LARGEST))


@pytest.mark.parametrize("impl", IMPLS)
@given(
    shapes=st.lists(st.tuples(SHAPE, SHAPE), min_size=1, max_size=3),
    beside=st.integers(0, 9),
    below=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@example(
    shapes=[((90, 3), (7, 40)), ((3, 90), (40, 7)), ((1, 1), (1, 1))], beside=0, below=3, seed=0
)
@example(shapes=[((20, 30), (20, 30)), ((20, 30), (20, 41))], beside=5, below=0, seed=0)
@settings(max_examples=15)
def test_no_value_differs_from_pillow_and_the_room_is_black(impl, shapes, beside, below, seed):
    images = [random_image(*shape, seed + i) for i, (shape, _) in enumerate(shapes)]
    sizes = [size for _, size in shapes]
    padded = [(height + below, width + beside) for height, width in sizes]
    with interpreted_tiles():
        got = resize_uint8(gather(images), sizes, padded_sizes=padded, impl=impl)
    assert got.shapes == padded
    for i, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        picture = got.image(i).cpu()
        assert torch.equal(picture[:height, :width], pillow(image, (height, width)))
        assert not picture[height:].any()
        assert not picture[:, width:].any()


@pytest.mark.parametrize("order", [(12, 1), (12, 3), (13, 0)])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "size"), [((60, 20), (16, 30)), ((203, 2), (40, 5))])
def test_the_order_of_every_pillow_is_followed(impl, order, shape, size):
    image = random_image(*shape)
    with interpreted_tiles():
        got = resize_uint8(gather([image]), [size], pillow=order, impl=impl)
    expected = reference_pixels.resize_bilinear(image, size, order)
    assert torch.equal(got.image(0).cpu(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_picture_is_read_where_its_offset_says(impl):
    image = random_image(9, 14)
    data = torch.cat([torch.full((7,), 255, dtype=torch.uint8), image.reshape(-1)]).to(DEVICE)
    images = RaggedImages(data=data, offsets=[7], shapes=[(9, 14)])
    got = resize_uint8(images, [(20, 5)], impl=impl)
    assert torch.equal(got.image(0).cpu(), pillow(image, (20, 5)))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_gives_nothing(impl):
    empty = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    got = resize_uint8(RaggedImages(data=empty, offsets=[], shapes=[]), [], impl=impl)
    assert len(got) == 0


def test_arguments_that_do_not_fit_are_named():
    images = gather([random_image(4, 5)])
    with pytest.raises(ValueError, match="sizes: expected 1, one for each picture, got 2"):
        resize_uint8(images, [(1, 1), (1, 1)])
    with pytest.raises(ValueError, match="padded_sizes: expected 1, one for each picture, got 0"):
        resize_uint8(images, [(1, 1)], padded_sizes=[])
    with pytest.raises(ValueError, match=r"sizes\[0\]: expected at least 1×1 pixels, got 0×3"):
        resize_uint8(images, [(0, 3)])
    with pytest.raises(
        ValueError, match=r"padded_sizes\[0\]: expected at least 6×3 pixels, got 6×2"
    ):
        resize_uint8(images, [(6, 3)], padded_sizes=[(6, 2)])
