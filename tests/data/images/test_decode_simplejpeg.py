"""simplejpeg gives Pillow's pixels, picture by picture, or leaves the file to Pillow."""

from __future__ import annotations

import contextlib
import io
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from step37_data.common.image_entry import EncodedImage
from step37_data.images import decode as module
from step37_data.images.decode import BrokenImageError, decode_into, open_image, read_rgb

simplejpeg = pytest.importorskip("simplejpeg", reason="the extra jpeg is not installed")

PHOTOGRAPHS = sorted((Path(__file__).parents[3] / "examples" / "flickr8k_mini").rglob("*.jpg"))


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def saved(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what simplejpeg has decoded."""
    shapes: list[tuple[int, ...]] = []
    original = simplejpeg.decode_jpeg

    def counting(*args: Any, **options: Any) -> np.ndarray:
        pixels = original(*args, **options)
        shapes.append(pixels.shape)
        return pixels

    assert module._simplejpeg() is simplejpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", counting)
    return shapes


def test_photographs_in_every_way_to_save_them_are_the_same_bit_for_bit(
    decoded: list[tuple[int, ...]],
) -> None:
    ways = list(itertools.product((30, 75, 95), (0, 1, 2), (False, True)))
    for number, path in enumerate(PHOTOGRAPHS):
        data = path.read_bytes()
        assert np.array_equal(read_rgb(str(path)), by_pillow(data))
        with Image.open(path) as photograph:
            small = photograph.convert("RGB").resize((200 + number, 133 - number))
        for quality, subsampling, progressive in ways:
            data = saved(small, quality=quality, subsampling=subsampling, progressive=progressive)
            assert np.array_equal(read_rgb(EncodedImage("a", data)), by_pillow(data))
    assert len(decoded) >= len(PHOTOGRAPHS) * len(ways) > 100


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 999),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    keep_rgb=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "quality": st.integers(1, 100),
            "subsampling": st.integers(0, 2),
            "progressive": st.booleans(),
            "restart_marker_blocks": st.integers(0, 3),
        }
    ),
)
def test_generated_pictures_of_any_size_and_mode_are_the_same_bit_for_bit(
    *, size: tuple[int, int], seed: int, mode: str, keep_rgb: bool, options: dict[str, Any]
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    options = dict(options)
    if mode != "RGB":
        del options["subsampling"]
    elif keep_rgb:
        options |= {"subsampling": 0, "keep_rgb": True}
    if not options["restart_marker_blocks"]:
        del options["restart_marker_blocks"]
    data = saved(Image.fromarray(noise).convert(mode), **options)
    assert np.array_equal(read_rgb(EncodedImage("a", data)), by_pillow(data))


@given(place=st.integers(20, 3000), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_what_pillow_makes_of_it(place: int, value: int, cut: bool) -> None:
    data = bytearray(PHOTOGRAPHS[0].read_bytes())
    if cut:
        data = data[: place * 4]
    else:
        data[place] = value
    try:
        expected = by_pillow(bytes(data))
    except Exception:
        with pytest.raises(BrokenImageError):
            read_rgb(EncodedImage("a", bytes(data)))
    else:
        assert np.array_equal(read_rgb(EncodedImage("a", bytes(data))), expected)


def test_a_simplejpeg_that_decodes_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data, **_: original(data) ^ 1)
    module._simplejpeg.cache_clear()
    try:
        data = PHOTOGRAPHS[0].read_bytes()
        assert np.array_equal(read_rgb(EncodedImage("a", data)), by_pillow(data))
        assert "simplejpeg's pixels are not Pillow's" in caplog.text
    finally:
        module._simplejpeg.cache_clear()


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_photograph_is_decoded_into_the_memory_it_travels_from(path: Path, kind: str) -> None:
    data = path.read_bytes()
    expected = by_pillow(data)
    if kind == "png":
        file = io.BytesIO()
        Image.fromarray(expected).save(file, "PNG")
        data = file.getvalue()
    memory = np.full_like(expected, 77)
    assert module._simplejpeg() is simplejpeg
    with open_image(EncodedImage("a", data)) as image:
        tracemalloc.start()
        try:
            decode_into(memory, image)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert np.array_equal(memory, expected)
    # Beside the memory: nothing; or what Pillow reads out in pieces, which are joined.
    assert peak < (50_000 if kind == "jpg" else 2.2 * memory.nbytes + 50_000)


@given(place=st.integers(20, 3000), value=st.integers(0, 255))
def test_what_a_damaged_file_left_in_the_memory_is_overwritten_or_not_used(
    place: int, value: int
) -> None:
    data = bytearray(PHOTOGRAPHS[0].read_bytes())
    data[place] = value
    file = EncodedImage("a", bytes(data))
    try:
        expected = by_pillow(bytes(data))
    except Exception:
        expected = None
    with contextlib.suppress(BrokenImageError), open_image(file) as image:
        memory = np.full((image.height, image.width, 3), 77, np.uint8)
        decode_into(memory, image)
        assert expected is not None
        assert np.array_equal(memory, expected)
        expected = None
    assert expected is None
