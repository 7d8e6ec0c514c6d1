"""Pictures that a viewer shows otherwise than their pixels are used are found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from step37_data.images.decode import read_rgb
from step37_inspect.viewer_difference import find_viewer_differences

GREY = Image.new("RGB", (20, 10), (90, 90, 90))
RED = Image.new("RGB", (20, 10), (200, 9, 9))
CLEAR = Image.new("RGBA", (20, 10))


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
        (Image.new("I;16", (20, 10)), "png", {}, "16 bits"),
        (Image.new("F", (20, 10)), "tiff", {}, "more than 16 bits"),
        (Image.new("I", (20, 10)), "tiff", {}, "more than 16 bits"),
        (CLEAR, "png", {}, "transparent"),
        (CLEAR.convert("LA"), "png", {}, "transparent"),
        (CLEAR, "webp", {}, "transparent"),
        (Image.new("P", (20, 10)), "gif", {"transparency": 0}, "transparent"),
        (GREY.convert("L"), "png", {"transparency": 90}, "transparent"),
        (GREY, "jpg", turned(6), "turned by EXIF"),
        (GREY, "png", turned(3), "turned by EXIF"),
        (GREY, "webp", turned(8), "turned by EXIF"),
        (GREY, "gif", ANIMATED, "animated"),
        (GREY, "webp", ANIMATED, "animated"),
        (GREY, "png", ANIMATED, "animated"),
        (GREY, "tiff", ANIMATED, "animated"),
        (CLEAR, "png", turned(6), "turned by EXIF; transparent"),
    ],
)
def test_a_picture_that_a_viewer_shows_otherwise_is_named_by_what_differs(
    *, tmp_path: Path, image: Image.Image, suffix: str, options: dict[str, Any], told: str
) -> None:
    path = saved(tmp_path, image, suffix, **options)
    assert find_viewer_differences([path], quiet=True) == {path: told}


@pytest.mark.parametrize(
    ("image", "suffix", "options"),
    [
        (GREY, "png", {}),
        (GREY.convert("RGBA"), "png", {}),  # it could hide something, and hides nothing
        (GREY.convert("LA"), "png", {}),
        (GREY.convert("L"), "png", {"transparency": 3}),
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
    path = saved(tmp_path, image, suffix, **options)
    assert find_viewer_differences([path], quiet=True) == {}


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
        told = find_viewer_differences([path], quiet=True)
        assert (read_rgb(path).size == shown) == (told == {})


def test_only_headers_are_read_of_opaque_pictures_and_broken_files_are_left_to_the_other_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["deep.png", "upright.jpg", "turned.jpg"]
    Image.new("I;16", (20, 10)).save(tmp_path / names[0])
    GREY.save(tmp_path / names[1])
    GREY.save(tmp_path / names[2], **turned(6))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    paths = [str(tmp_path / name) for name in (*names, "broken.jpg", "missing.jpg")]

    decoded: list[Image.Image] = []

    def load(image: Image.Image) -> None:
        decoded.append(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert list(find_viewer_differences(paths, quiet=True)) == [paths[0], paths[2]]
    assert decoded == []
