"""Pictures as viewers show them: turned by EXIF, on white, 8 of 16 bits; and as stock trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from step37_data.common.image_entry import (
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    EncodedImage,
    Entry,
    ImageEntry,
)
from step37_data.images import stacks
from step37_data.images.crops import picture_size, plan_crops, plan_file
from step37_data.images.decode import (
    BrokenImageError,
    open_image,
    read_rgb,
    rgb_image,
    viewed_otherwise,
)
from step37_data.images.options import ImageOptions
from step37_data.preprocess import load_images

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORIENTATION = 0x0112


def noise(mode: str, size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    shape = (*size[::-1], len(Image.new(mode, (1, 1)).getbands()))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if shape[-1] == 1 else pixels)


def turned(path: Path, orientation: int, size: tuple[int, int] = (40, 30)) -> str:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise("RGB", size).save(path, exif=exif)
    return str(path)


def on_white(rgba: Image.Image) -> np.ndarray:
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.split()[3])
    return np.asarray(white)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_lies_as_stock_has_it_or_as_viewers_turn_it(tmp_path, suffix, orientation):
    path = turned(tmp_path / f"phone.{suffix}", orientation)
    stock = Image.open(path).convert("RGB")
    assert np.array_equal(read_rgb(path), stock)
    viewed = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(read_rgb(path, as_viewed=True), viewed)
    assert picture_size(path, as_viewed=True) == viewed.size
    if suffix != "tiff":  # Pillow turns these by itself, in the header or later
        assert picture_size(path) == stock.size
        assert viewed.size == ((30, 40) if orientation >= 5 else (40, 30))
        with open_image(path) as image:
            assert viewed_otherwise(image) == ["turned by EXIF"] * (orientation != 1)


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, orientation):
    path = turned(tmp_path / "phone.jpg", orientation)
    assert np.array_equal(read_rgb(path, as_viewed=True), read_rgb(path))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damaged", [b"MM\0*\0\0\xff\xff\xff\xff", b"no EXIF"])
def test_damaged_exif_turns_nothing_and_breaks_no_picture(tmp_path, damaged):
    path = tmp_path / "phone.jpg"
    noise("RGB").save(path, exif=b"Exif\0\0" + damaged)
    assert np.array_equal(read_rgb(str(path), as_viewed=True), read_rgb(str(path)))
    with open_image(str(path)) as image:
        assert viewed_otherwise(image) == []


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_grey_of_16_bits_keeps_its_upper_byte_where_stock_makes_it_white(tmp_path, suffix):
    path = str(tmp_path / f"scan.{suffix}")
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(path)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    assert np.array_equal(read_rgb(path, as_viewed=True), expected)
    assert np.array_equal(read_rgb(path), Image.open(path).convert("RGB"))
    assert np.asarray(read_rgb(path)).mean() > 250
    with open_image(path) as image:
        assert viewed_otherwise(image) == ["16 bits"]


def chunks_of(data: bytes) -> list[bytes]:
    """The chunks of a PNG, whole."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big") + 12
        chunks.append(data[at : at + size])
        at += size
    return chunks


def has_exif(chunk: bytes) -> bool:
    return chunk[4:8] == b"eXIf" or b"exif" in chunk or b"xmp" in chunk


@pytest.mark.parametrize("kept_in", ["eXIf", "tEXt", "iTXt"])
@pytest.mark.parametrize("late", [False, True])
def test_a_png_is_turned_wherever_its_exif_stands_and_planned_without_decoding(
    tmp_path, monkeypatch, kept_in, late
):
    path = tmp_path / "phone.png"
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ORIENTATION] = 6
    options: dict[str, Any] = {"pnginfo": text}
    if kept_in == "eXIf":
        options["exif"] = exif
    elif kept_in == "tEXt":  # as ImageMagick writes it: a number of bytes, then these in hex
        raw = exif.tobytes()
        text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n")
    else:
        text.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="6"/>')
    text.add(b"tEXt", b"date:create\0002026", after_idat=True)
    noise("RGB").save(path, **options)
    data = path.read_bytes()
    if late:
        chunks = chunks_of(data)
        moved = [each for each in chunks if has_exif(each)]
        assert len(moved) == 1
        kept = [each for each in chunks if each not in moved]
        data = data[:8] + b"".join([*kept[:-1], *moved, kept[-1]])
        path.write_bytes(data)
    viewed = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert viewed.size == (30, 40)
    for file in (str(path), EncodedImage("phone", data)):
        assert np.array_equal(read_rgb(file, as_viewed=True), viewed)
        assert picture_size(file, as_viewed=True) == viewed.size
    if not late:
        decoded: list[Image.Image] = []

        def load(image: Image.Image) -> None:
            decoded.append(image)

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        assert picture_size(str(path), as_viewed=True) == viewed.size
        assert decoded == []


def transparent(kind: str) -> tuple[Image.Image, dict[str, Any]]:
    if kind in ("RGBA", "LA"):
        return noise(kind), {}
    if kind == "P":
        return noise("RGB").quantize(16), {"transparency": 3}
    if kind == "RGB":
        return noise("RGB"), {"transparency": noise("RGB").getpixel((5, 5))}
    return noise("L"), {"transparency": noise("L").getpixel((5, 5))}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_parts_are_white_where_stock_shows_what_is_hidden(tmp_path, kind):
    path = str(tmp_path / "logo.png")
    picture, options = transparent(kind)
    picture.save(path, **options)
    assert np.array_equal(read_rgb(path), Image.open(path).convert("RGB"))
    expected = on_white(Image.open(path).convert("RGBA"))
    got = np.asarray(read_rgb(path, as_viewed=True))
    assert np.array_equal(got, expected)
    assert not np.array_equal(got, read_rgb(path))
    with open_image(path) as image:
        assert viewed_otherwise(image) == ["transparent"]


def test_a_picture_that_is_nowhere_transparent_is_not_called_so(tmp_path):
    path = str(tmp_path / "opaque.png")
    picture = noise("RGB")
    picture.putalpha(255)
    picture.save(path)
    with open_image(path) as image:
        assert viewed_otherwise(image) == []
    assert np.array_equal(read_rgb(path, as_viewed=True), read_rgb(path))


def test_an_animation_gives_its_first_frame_and_is_named(tmp_path):
    path = str(tmp_path / "moving.gif")
    frames = [Image.new("RGB", (9, 9), (80 * i, 0, 0)) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for as_viewed in (False, True):
        assert np.asarray(read_rgb(path, as_viewed=as_viewed)).max() == 0
    with open_image(path) as image:
        assert viewed_otherwise(image) == ["animated"]


def test_everything_at_once_is_named_and_shown(tmp_path):
    path = str(tmp_path / "all.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise("RGBA").save(path, exif=exif)
    with open_image(path) as image:
        assert viewed_otherwise(image) == ["turned by EXIF", "transparent"]
        shown = rgb_image(image, as_viewed=True)
    assert np.array_equal(shown, on_white(ImageOps.exif_transpose(Image.open(path))))


def entries_of(path: str, *, as_viewed: bool) -> list[Entry]:
    plan = plan_file(path, as_viewed=as_viewed)
    crops: list[Entry] = [(path, PATCH_ITEM_TYPE, window) for window in plan.windows]
    return [*crops, (path, IMAGE_ITEM_TYPE, plan.full_window)]


@pytest.mark.parametrize("multicrop", [False, True])
@pytest.mark.parametrize("way", ["host", "device"])
def test_pixels_are_those_of_the_picture_that_a_viewer_shows(tmp_path, multicrop, way):
    path = turned(tmp_path / "phone.jpg", 6, (500, 333))
    plain = str(tmp_path / "turned already.png")
    ImageOps.exif_transpose(Image.open(path)).save(plain)
    options = ImageOptions(image_size=28, patch_image_size=14, as_viewed=True, on_broken="raise")

    def load(path: str) -> dict[int, torch.Tensor]:
        wanted = entries_of(path, as_viewed=True) if multicrop else [(path, IMAGE_ITEM_TYPE)]
        entries = [ImageEntry(*entry) for entry in wanted]
        made = stacks._on_host if way == "host" else stacks._on_device
        return made(entries, options, DEVICE)[0]

    for got, expected in zip(load(path).values(), load(plain).values(), strict=True):
        assert torch.equal(got, expected)


def test_windows_that_were_planned_otherwise_are_not_shown_of_a_turned_picture(tmp_path):
    path = turned(tmp_path / "phone.jpg", 6, (500, 333))
    sizes = {"image_size": 28, "patch_image_size": 14}
    assert plan_file(path) == plan_crops(500, 333)
    assert plan_file(path, as_viewed=True) == plan_crops(333, 500)
    for planned in (False, True):
        entries = entries_of(path, as_viewed=planned)
        assert len(load_images(entries, **sizes, as_viewed=planned, on_broken="raise")) == 3
        with pytest.raises(BrokenImageError, match="with another as_viewed"):
            load_images(entries, **sizes, as_viewed=not planned, on_broken="raise")


def test_a_thin_and_tiny_picture_is_turned_before_it_is_padded(tmp_path):
    path = turned(tmp_path / "thin.png", 6, (40, 9))
    entries = [ImageEntry(*entry) for entry in entries_of(path, as_viewed=True)]
    options = ImageOptions(image_size=28, patch_image_size=14, as_viewed=True)
    by_host, _ = stacks._on_host(entries, options, torch.device("cpu"))
    by_device, _ = stacks._on_device(entries, options, DEVICE)
    assert torch.equal(by_host[IMAGE_ITEM_TYPE], by_device[IMAGE_ITEM_TYPE].cpu())


def test_the_content_of_a_file_is_shown_as_the_file_is(tmp_path):
    path = turned(tmp_path / "phone.jpg", 8)
    encoded = EncodedImage("phone", Path(path).read_bytes())
    for as_viewed in (False, True):
        assert np.array_equal(
            read_rgb(encoded, as_viewed=as_viewed), read_rgb(path, as_viewed=as_viewed)
        )
