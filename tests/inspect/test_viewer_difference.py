"""Pictures that a viewer shows otherwise than their pixels are used are found by their headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from step37_data.images.decode import read_rgb
from step37_inspect.viewer_difference import find_viewer_differences, viewer_difference

GREY = Image.new("RGB", (20, 10), (90, 90, 90))
RED = Image.new("RGB", (20, 10), (200, 9, 9))


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


ANIMATED = {"save_all": True, "append_images": [RED]}


def saved(folder: Path, image: Image.Image, suffix: str, **options: Any) -> str:
    path = folder / f"picture.{suffix}"
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("image", "suffix", "options", "told"),
    [
        (Image.new("I;16", (20, 10)), "png", {}, "more than 8 bits a pixel (I;16): values above"),
        (Image.new("F", (20, 10)), "tiff", {}, "more than 8 bits a pixel (F)"),
        (GREY.convert("RGBA"), "png", {}, "transparency (RGBA)"),
        (GREY.convert("LA"), "png", {}, "transparency (LA)"),
        (Image.new("RGBA", (20, 10)), "webp", {}, "transparency (RGBA)"),
        (Image.new("P", (20, 10)), "gif", {"transparency": 0}, "transparency (P)"),
        (GREY.convert("L"), "png", {"transparency": 3}, "transparency (L)"),
        (GREY, "jpg", turned(6), "EXIF orientation 6: the picture is not turned"),
        (GREY, "png", turned(3), "EXIF orientation 3"),
        (GREY, "webp", turned(8), "EXIF orientation 8"),
        (GREY, "gif", ANIMATED, "2 frames or pages: only the first is used"),
        (GREY, "webp", ANIMATED, "2 frames"),
        (GREY, "png", ANIMATED, "2 frames"),
        (GREY, "tiff", ANIMATED, "2 frames or pages"),
    ],
)
def test_a_picture_that_a_viewer_shows_otherwise_is_told_with_the_reason(
    *, tmp_path: Path, image: Image.Image, suffix: str, options: dict[str, Any], told: str
) -> None:
    assert told in (viewer_difference(saved(tmp_path, image, suffix, **options)) or "")


@pytest.mark.parametrize(
    ("image", "suffix", "options"),
    [
        (GREY, "png", {}),
        (GREY, "jpg", {}),
        (GREY, "jpg", turned(1)),
        (GREY, "jpg", turned(0)),  # no orientation: viewers ignore it
        (GREY.convert("P"), "gif", {}),
        (GREY.convert("1"), "png", {}),
        (GREY.convert("CMYK"), "jpg", {}),
        (GREY.convert("LAB"), "tiff", {}),
        (GREY, "tiff", turned(6)),  # Pillow turns it
        (GREY, "mpo", ANIMATED),  # a viewer shows the first picture, too
    ],
)
def test_a_picture_that_a_viewer_shows_as_it_is_used_is_not_told(
    tmp_path: Path, image: Image.Image, suffix: str, options: dict[str, Any]
) -> None:
    assert viewer_difference(saved(tmp_path, image, suffix, **options)) is None


def test_what_is_told_is_so(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 100, 256, 40000]], dtype=np.uint16))
    assert np.asarray(read_rgb(saved(tmp_path, deep, "png")))[0, :, 0].tolist() == [
        0,
        100,
        255,
        255,
    ]
    for suffix in ("jpg", "png", "tiff"):
        path = saved(tmp_path, RED, suffix, **turned(6))
        with Image.open(path) as image:
            shown = ImageOps.exif_transpose(image).size
        assert (read_rgb(path).size == shown) == (viewer_difference(path) is None)


def test_only_headers_are_read_and_broken_files_are_left_to_the_other_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["deep.png", "upright.jpg", "turned.jpg"]
    Image.new("I;16", (20, 10)).save(tmp_path / names[0])
    GREY.save(tmp_path / names[1])
    GREY.save(tmp_path / names[2], **turned(6))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    paths = [str(tmp_path / name) for name in (*names, "broken.jpg", "missing.jpg")]

    def decoded(_image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert list(find_viewer_differences(paths, quiet=True)) == [paths[0], paths[2]]
