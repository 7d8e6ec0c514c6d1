"""resize_clip_normalize against Pillow itself, bit for bit."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from step37_kernels.ops import resize_pass as resize_ops
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.normalize import DTYPES
from step37_kernels.pixels.ragged import Crop, RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize, resize_uint8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PHOTOS = Path(__file__).resolve().parents[3] / "examples" / "flickr8k_mini" / "train"
IMPLS = ("triton", "torch")
INSTALLED = resample.installed_pillow()
EVERY_ORDER = [(12, 1), (12, 3), (13, 0)]
# The interpreter takes seconds for what a GPU does in microseconds.
LARGEST = 4096 if DEVICE.type == "cuda" else 160


@contextlib.contextmanager
def interpreted_tiles(rows: int, columns: int, rows_at_once: int):
    """Tiles for the interpreter, whose time goes by programs: fewer and larger ones."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr("step37_kernels.ops.resize_pass.TILE", (rows, columns))
            patch.setattr(
                "step37_kernels.ops.resize_pass.ROWS_AT_ONCE", (rows_at_once, rows_at_once)
            )
        yield


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise: every rounding shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def photographs() -> list[torch.Tensor]:
    """Real JPEGs, and one of them magnified, which is then reduced."""
    names = ("astronaut", "camera", "rocket")
    photos = [Image.open(PHOTOS / f"{name}.jpg").convert("RGB") for name in names]
    photos.append(photos[-1].resize((610, 1000)))
    return [torch.from_numpy(np.array(photo)) for photo in photos]


def pillow_resize(image: torch.Tensor, size: int) -> torch.Tensor:
    resized = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


def pillow(images: list[torch.Tensor], size: int, dtype=torch.bfloat16) -> torch.Tensor:
    """What the stock path computes."""
    resized = torch.stack([pillow_resize(image, size) for image in images])
    return reference_pixels.clip_normalize(resized, dtype=dtype)


def differing(got: torch.Tensor, expected: torch.Tensor) -> int:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return int((got.cpu() != expected).sum())


def sides(largest: int) -> st.SearchStrategy[int]:
    """Small and large sides are equally likely."""
    exponents = st.floats(0, math.log(largest), allow_nan=False)
    return st.one_of(st.just(1), exponents.map(lambda e: min(largest, round(math.exp(e)))))


@given(height=sides(500), width=sides(500), size=sides(60), seed=st.integers(0, 99))
def test_the_reference_is_pillow(height, width, size, seed):
    image = random_image(height, width, seed)
    got = reference_pixels.resize_bilinear(image, (size, size), INSTALLED)
    assert torch.equal(got, pillow_resize(image, size))


@given(in_size=sides(4096), out_size=sides(1024))
def test_the_coefficient_table_is_the_reference(in_size, out_size):
    table = resample.axis_table(in_size, out_size)
    for x, (first, coefficients) in enumerate(
        reference_pixels.bilinear_coefficients(in_size, out_size)
    ):
        assert table[0, x] == first
        assert table[1 : 1 + len(coefficients), x].tolist() == coefficients
        assert not table[1 + len(coefficients) :, x].any()


@given(size=sides(2000))
def test_an_axis_that_keeps_its_size_has_the_identity_as_its_pass(size):
    table = resample.axis_table(size, size)
    assert table[0].tolist() == list(range(size))
    assert (table[1] == 1 << 22).all()
    assert not table[2:].any()


@pytest.mark.parametrize("impl", IMPLS)
@given(
    shapes=st.lists(st.tuples(sides(LARGEST), sides(LARGEST)), min_size=1, max_size=3),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@example(shapes=[(300, 2), (2, 300), (1, 1)], size=3, seed=0)
@example(shapes=[(40, 40), (40, 7), (7, 40)], size=40, seed=0)
@example(shapes=[(203, 2), (200, 2), (201, 2)], size=7, seed=0)
def test_no_value_differs_from_pillow_at_any_size(impl, shapes, size, seed):
    images = [random_image(*shape, seed + i) for i, shape in enumerate(shapes)]
    with interpreted_tiles(64, 64, 32):
        got = resize_clip_normalize([image.to(DEVICE) for image in images], size, impl=impl)
    assert got.is_contiguous()
    assert differing(got, pillow(images, size)) == 0


@pytest.mark.parametrize("size", [728, 504])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_value_differs_for_photographs_at_the_sizes_of_the_model(impl, size):
    photos = photographs()
    with interpreted_tiles(256, 1024, 256):
        got = resize_clip_normalize([photo.to(DEVICE) for photo in photos], size, impl=impl)
    assert differing(got, pillow(photos, size)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_dtype_is_exact(impl, dtype):
    images = [random_image(30, 21).to(DEVICE), random_image(9, 50).to(DEVICE)]
    got = resize_clip_normalize(images, 24, dtype=dtype, impl=impl)
    assert differing(got, pillow([image.cpu() for image in images], 24, dtype)) == 0


@pytest.mark.parametrize("order", EVERY_ORDER)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (60, 61), (203, 2), (2, 203), (12, 16)])
def test_the_order_of_every_pillow_is_followed(impl, order, shape):
    image = random_image(*shape)
    expected = reference_pixels.resize_clip_normalize([image], 16, pillow=order)
    got = resize_clip_normalize([image.to(DEVICE)], 16, pillow=order, impl=impl)
    assert differing(got, expected) == 0


def test_the_order_of_the_passes_shows_in_the_result():
    """So the tests above do tell one order from the other."""
    image = random_image(60, 20)
    old = reference_pixels.resize_bilinear(image, (16, 16), (12, 1))
    new = reference_pixels.resize_bilinear(image, (16, 16), (13, 0))
    share = float((old != new).float().mean())
    assert 0.01 < share < 0.5
    assert int((old.int() - new.int()).abs().max()) == 1


def test_the_rule_is_that_of_the_installed_pillow():
    """In shapes on either side of every rule's border, and both orders among them."""
    shapes = [(60, 20), (20, 60), (16, 16), (60, 61), (201, 2), (200, 2), (17, 16), (18, 17)]
    images = [random_image(*shape, i) for i, shape in enumerate(shapes)]
    got = resize_clip_normalize(images, 16, impl="torch")
    assert differing(got, pillow(images, 16)) == 0


@pytest.mark.parametrize("version", ["13.0.0", "9.5.0.post2", "12.3"])
def test_the_installed_version_is_read_from_the_metadata(monkeypatch, version):
    monkeypatch.setattr(resample.importlib.metadata, "version", lambda _: version)
    major, minor = version.split(".")[:2]
    assert resample.installed_pillow.__wrapped__() == (int(major), int(minor))


def test_without_pillow_the_newest_known_order_is_followed(monkeypatch):
    def missing(name):
        raise resample.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(resample.importlib.metadata, "version", missing)
    assert resample.installed_pillow.__wrapped__() == resample.NEWEST_KNOWN_PILLOW


@pytest.mark.parametrize("impl", IMPLS)
def test_crops_are_resized_as_if_cut_out_first(impl):
    photos = [random_image(40, 60, 1), random_image(90, 12, 2)]
    boxes = [(0, 5, 3, 33, 40), (0, 0, 0, 60, 40), (1, 2, 80, 12, 90), (0, 59, 39, 60, 40)]
    crops = [
        Crop(image=image, left=left, top=top, right=right, bottom=bottom)
        for image, left, top, right, bottom in boxes
    ]
    cut = [
        torch.from_numpy(np.array(Image.fromarray(photos[image].numpy()).crop(tuple(box))))
        for image, *box in boxes
    ]
    got = resize_clip_normalize([p.to(DEVICE) for p in photos], 18, crops=crops, impl=impl)
    assert differing(got, pillow(cut, 18)) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_one_buffer_may_hold_the_images_in_any_order_with_gaps(impl):
    photos = [random_image(7, 9, 1), random_image(20, 5, 2)]
    data = torch.full((1000,), 77, dtype=torch.uint8)
    data[501 : 501 + 189] = photos[0].reshape(-1)
    data[3:303] = photos[1].reshape(-1)
    ragged = RaggedImages(
        data=data.to(DEVICE), offsets=(501, 3), shapes=[tuple(p.shape[:2]) for p in photos]
    )
    got = resize_clip_normalize(ragged, 11, impl=impl)
    assert differing(got, pillow(photos, 11)) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_images_may_have_any_strides(impl):
    photo = random_image(30, 40)
    views = [photo[::2, 3:], photo.transpose(0, 1), photo.flip(-1)]
    got = resize_clip_normalize([view.to(DEVICE) for view in views], 10, impl=impl)
    assert differing(got, pillow([view.contiguous() for view in views], 10)) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_images_give_no_results(impl):
    assert resize_clip_normalize([], 14, impl="torch").shape == (0, 3, 14, 14)
    got = resize_clip_normalize([random_image(2, 2).to(DEVICE)], 14, crops=[], impl=impl)
    assert got.shape == (0, 3, 14, 14)


@given(in_size=sides(60_000), out_size=sides(8))
@example(in_size=16_000, out_size=1)
@example(in_size=4096, out_size=1)
def test_no_sum_passes_255_where_it_is_not_clamped(in_size, out_size):
    table = resample.axis_table(in_size, out_size)
    coefficients = table[1:].sum(axis=0, dtype=np.int64)
    clamped = resize_ops.needs_clamp([table])
    assert clamped == (len(table) > 16_000)
    assert clamped or (255 * coefficients.max() + 2**21) >> 22 <= 255


def test_clamping_changes_nothing_where_it_is_not_needed(monkeypatch):
    monkeypatch.setattr(resize_ops, "needs_clamp", lambda _: True)
    images = [random_image(40, 17), torch.full((9, 30, 3), 255, dtype=torch.uint8)]
    with interpreted_tiles(32, 32, 32):
        actual = resize_clip_normalize([image.to(DEVICE) for image in images], 20, impl="triton")
    assert torch.equal(actual.cpu(), pillow(images, 20))


@pytest.mark.parametrize("impl", IMPLS)
def test_white_and_black_stay_within_their_bounds(impl):
    images = [torch.full((150, 3, 3), value, dtype=torch.uint8) for value in (0, 255)]
    got = resize_clip_normalize([image.to(DEVICE) for image in images], 5, impl=impl)
    assert differing(got, pillow(images, 5)) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: resize_clip_normalize([p], 0), ValueError, "size: expected at least 1, got 0"),
        (lambda p: resize_clip_normalize([p, p.float()], 4), TypeError, r"images\[1\]: expected"),
        (lambda p: resize_clip_normalize([p[..., :2]], 4), ValueError, r"images\[0\]: .*\[5, 6, 2"),
        (lambda p: resize_clip_normalize([p[:0]], 4), ValueError, "image 0: .* got 0×6"),
        (lambda p: resize_clip_normalize([p], 4, dtype=torch.int8), TypeError, "dtype: expected"),
        (
            lambda p: resize_clip_normalize(
                [p], 4, crops=[Crop(image=0, left=0, top=0, right=7, bottom=5)]
            ),
            ValueError,
            r"crops\[0\]: expected a rectangle of at least one pixel within 5×6",
        ),
        (
            lambda p: resize_clip_normalize(
                [p], 4, crops=[Crop(image=1, left=0, top=0, right=1, bottom=1)]
            ),
            ValueError,
            r"crops\[0\]: image 1 of 1 images",
        ),
        (
            lambda p: resize_clip_normalize(
                [p], 4, crops=[Crop(image=0, left=0.5, top=0, right=1, bottom=1)]
            ),
            TypeError,
            r"crops\[0\]: expected integers, got Crop\(image=0, left=0.5",
        ),
        (
            lambda p: resize_clip_normalize([p], 4, crops=[(0, 0, 1, 1)]),
            TypeError,
            r"crops\[0\]: expected a Crop, got \(0, 0, 1, 1\)",
        ),
        (
            lambda p: RaggedImages(data=p.reshape(-1), offsets=(1,), shapes=[(5, 6)]),
            ValueError,
            r"image 0: 5×6 pixels from byte 1 do not lie within the buffer of 90 bytes",
        ),
        (lambda p: RaggedImages(data=p, offsets=(), shapes=[]), ValueError, "data: expected a fl"),
        (
            lambda p: RaggedImages(data=p.reshape(-1)[::2], offsets=(), shapes=[]),
            ValueError,
            r"data: expected a flat contiguous buffer, got shape \[45\] with strides \[2\]",
        ),
        (
            lambda p: RaggedImages(data=p.reshape(-1), offsets=(-3,), shapes=[(1, 1)]),
            ValueError,
            "image 0: 1×1 pixels from byte -3 do not lie within the buffer",
        ),
        (lambda p: resize_clip_normalize([p[0]], 4), ValueError, r"images\[0\]: .* got \[6, 3\]"),
        (
            lambda p: RaggedImages(data=p.reshape(-1), offsets=(), shapes=[(1, 1)]),
            ValueError,
            "offsets: expected 1, one for each shape, got 0",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(random_image(5, 6))


def as_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.cpu().numpy())


NO_TENSORS = {
    "a NumPy array": (lambda p: p.cpu().numpy(), r"images: expected a sequence .* NumPy array of"),
    "NumPy arrays": (lambda p: [p.cpu().numpy()], r"images\[0\]: expected a tensor .* NumPy array"),
    "a picture": (as_pillow, r"images: expected a sequence .* Pillow's Image: pass torch\.from_n"),
    "pictures": (
        lambda p: [p, as_pillow(p)],
        r"images\[1\]: .* Pillow's Image: pass torch\.from_n",
    ),
    "None": (lambda _: None, r"images: expected a sequence of .*, got NoneType"),
    "paths": (lambda _: ["a.jpg"], r"images\[0\]: expected a tensor of torch.uint8, got str"),
    "an iterator": (lambda p: iter([p]), r"images: expected a sequence of .*, got list_iterator"),
}


@pytest.mark.parametrize(("make", "message"), NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize(
    "take", [lambda images: resize_clip_normalize(images, 4), RaggedImages.gather]
)
def test_pictures_that_are_no_tensors_are_refused_with_the_way_to_one(make, message, take):
    with pytest.raises(TypeError, match=message):
        take(make(random_image(5, 6)))


def test_a_buffer_that_is_no_tensor_and_pictures_without_a_buffer_are_refused():
    with pytest.raises(TypeError, match=r"data: expected a tensor .* a NumPy array of uint8: pass"):
        RaggedImages(data=np.zeros(3, np.uint8), offsets=[0], shapes=[(1, 1)])
    with pytest.raises(TypeError, match=r"images: expected RaggedImages, got list; .*\.gather\("):
        resize_uint8([random_image(5, 6)], [(2, 2)])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: host synchronisation")
@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_never_waits(impl):
    images = [random_image(30 + i, 50 - i).to(DEVICE) for i in range(4)]
    resize_clip_normalize(images, 28, impl=impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        resize_clip_normalize(images, 28, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
