"""Image files of every kind, whole and broken: what Pillow says of them, or black."""

from __future__ import annotations

import logging
import os
import struct
import sys
import threading
import types
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from step37_data.common.threads import default_threads, map_threads
from step37_data.images.crops import picture_size, plan_file
from step37_data.images.decode import (
    BROKEN_SIZE,
    BrokenImageError,
    BrokenImages,
    read_rgb,
    why_broken,
)
from step37_data.preprocess import _load_image, load_images, preprocess_packed_batch
from step37_kernels.pixels.normalize import clip_normalize


def noise(mode: str, size: tuple[int, int] = (23, 17), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), dtype=np.uint16))
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "RGBA":
        rgb.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return rgb
    return rgb.convert(mode)


def exif_rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    return exif


READABLE = {
    "colour.jpg": lambda path: noise("RGB").save(path),
    "progressive.jpg": lambda path: noise("RGB").save(path, progressive=True, subsampling=0),
    "cmyk.jpg": lambda path: noise("CMYK").save(path),
    "grey.jpg": lambda path: noise("L").save(path),
    "rotated.jpg": lambda path: noise("RGB").save(path, exif=exif_rotated()),
    "palette.png": lambda path: noise("P").save(path),
    "palette_with_transparency.png": lambda path: noise("P").save(path, transparency=3),
    "one_bit.png": lambda path: noise("1").save(path),
    "alpha.png": lambda path: noise("RGBA").save(path),
    "grey_alpha.png": lambda path: noise("RGBA").convert("LA").save(path),
    "sixteen_bit.png": lambda path: noise("I;16").save(path),
    "one_pixel.png": lambda path: noise("RGB", (1, 1)).save(path),
    "frames.gif": lambda path: noise("RGB").save(
        path, save_all=True, append_images=[noise("RGB", seed=1)]
    ),
    "jpeg_named.png": lambda path: noise("RGB").save(path, format="JPEG"),
}


def truncated(path):
    noise("RGB", (90, 90)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damaged_png(path):
    noise("RGB", (90, 90)).save(path)
    data = bytearray(path.read_bytes())
    data[60:200] = bytes(140)
    path.write_bytes(bytes(data))


def bomb(path):
    """A PNG whose header promises 20000 × 20000 pixels: more than twice Pillow's limit."""
    noise("RGB", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(data))


BROKEN = {
    "truncated.jpg": (truncated, "OSError: image file is truncated"),
    "damaged.png": (damaged_png, "(OSError|SyntaxError|ValueError|error): "),
    "empty.jpg": (lambda path: path.write_bytes(b""), "UnidentifiedImageError"),
    "text.jpg": (lambda path: path.write_text("not an image"), "UnidentifiedImageError"),
    "html.png": (lambda path: path.write_text("<html>404</html>"), "UnidentifiedImageError"),
    "bomb.png": (bomb, "DecompressionBombError: Image size"),
    "folder.jpg": (lambda path: path.mkdir(), "OSError: expected a regular file"),
    "missing.jpg": (lambda _: None, "FileNotFoundError"),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_readable_file_gives_what_pillow_gives(tmp_path, name):
    path = tmp_path / name
    READABLE[name](path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_rgb(str(path))), expected)
    ((loaded, _),) = load_images([(str(path), 0)], image_size=20, patch_image_size=20)
    with Image.open(path) as image:
        whole = image.convert("RGB").resize((20, 20), Image.Resampling.BILINEAR)
    wanted = clip_normalize(torch.tensor(np.asarray(whole))[None], dtype=torch.float32)
    assert torch.equal(loaded, wanted[0])


def test_an_exif_turn_is_not_made(tmp_path):
    path = tmp_path / "rotated.jpg"
    READABLE["rotated.jpg"](path)
    assert read_rgb(str(path)).size == (23, 17)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("on_broken", ["zero", "skip-loss"])
def test_a_broken_file_becomes_black_with_a_warning(tmp_path, caplog, name, on_broken):
    path = tmp_path / name
    BROKEN[name][0](path)
    with caplog.at_level(logging.WARNING, logger="step37_data.images.decode"):
        ((loaded, _),) = load_images(
            [(str(path), 0)], image_size=20, patch_image_size=20, on_broken=on_broken
        )
    black = torch.zeros(1, 20, 20, 3, dtype=torch.uint8)
    assert torch.equal(loaded, clip_normalize(black, dtype=torch.float32)[0])
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert str(why_broken(str(path))) in record.getMessage()
    stocks = _load_image(str(path))
    assert (stocks.mode, stocks.size, stocks.getbbox()) == ("RGB", BROKEN_SIZE, None)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_raises_with_its_path_and_reason(tmp_path, name):
    path = tmp_path / name
    BROKEN[name][0](path)
    with pytest.raises(BrokenImageError, match=BROKEN[name][1]) as info:
        read_rgb(str(path))
    assert str(path) in str(info.value)
    assert info.value.__cause__ is not None


def test_a_large_picture_below_the_bomb_limit_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    noise("RGB", (40, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert read_rgb(str(path)).size == (40, 40)


def test_files_are_closed(tmp_path):
    path = tmp_path / "colour.jpg"
    READABLE["colour.jpg"](path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read_rgb(str(path))
    os.unlink(path)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that megfile would read as ``s3://pictures``: a stand-in for megfile, as there is no
    object store to test with."""

    def smart_open(path: str, mode: str) -> Any:
        assert path.startswith("s3://pictures/")
        return open(tmp_path / path.removeprefix("s3://pictures/"), mode)

    megfile = types.ModuleType("megfile")
    megfile.smart_open = smart_open  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megfile", megfile)
    return tmp_path


def test_an_object_store_is_read_through_megfile(bucket, tmp_path):
    READABLE["colour.jpg"](bucket / "colour.jpg")
    got = np.asarray(read_rgb("s3://pictures/colour.jpg"))
    np.testing.assert_array_equal(got, np.asarray(Image.open(tmp_path / "colour.jpg")))
    assert picture_size("s3://pictures/colour.jpg") == (23, 17)
    assert str(why_broken("s3://pictures/missing.jpg")).startswith("FileNotFoundError")


@pytest.mark.parametrize("read", [_load_image, plan_file])
def test_without_megfile_an_object_store_is_an_error_and_not_a_black_picture(monkeypatch, read):
    monkeypatch.setitem(sys.modules, "megfile", None)
    with pytest.raises(ImportError, match=r"image s3://pictures/a\.jpg: .* megfile: pip install"):
        read("s3://pictures/a.jpg")


def test_a_black_picture_is_normalised_black(tmp_path):
    ((got, _),) = load_images([(str(tmp_path / "no.jpg"), 0)], image_size=9, patch_image_size=1)
    black = torch.zeros((1, 9, 9, 3), dtype=torch.uint8)
    assert torch.equal(got, clip_normalize(black, dtype=torch.float32)[0])


def test_the_report_counts_names_ten_files_and_begins_anew(tmp_path, caplog):
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    READABLE["colour.jpg"](good)
    truncated(bad)
    items = [(str(good), 0), (str(bad), 0), (str(bad), 1), (str(tmp_path / "missing.jpg"), 0)]
    broken = BrokenImages()
    load_images(items, image_size=8, patch_image_size=4, broken=broken, threads=2)
    assert (broken.seen, broken.occurrences, len(broken.reasons)) == (4, 3, 2)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="step37_data.images.decode"):
        message = broken.report(shown=1)
    assert message.splitlines()[0] == "3 of 4 images could not be read (2 files)"
    assert "bad.jpg: OSError" in message
    assert message.endswith("and 1 more")
    assert caplog.messages == [message]
    assert broken.report() is None
    assert (broken.seen, broken.occurrences, broken.reasons) == (0, 0, {})
    items = [(str(tmp_path / f"missing_{number}.jpg"), 0) for number in range(13)]
    load_images(items, image_size=8, patch_image_size=4, broken=broken, threads=2)
    message = broken.report()
    assert len(message.splitlines()) == 1 + 10 + 1
    assert message.endswith("and 3 more")


def test_unknown_modes_are_named():
    with pytest.raises(ValueError, match="on_broken: expected one of zero, raise, skip-loss, got"):
        load_images([], image_size=8, patch_image_size=4, on_broken="ignore")


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_threads_keep_the_order_and_raise_the_first_error(threads):
    assert list(map_threads(lambda x: x * x, range(20), threads)) == [x * x for x in range(20)]

    def fail_at_three(x):
        if x >= 3:
            raise ValueError(f"item {x}")
        return x

    with pytest.raises(ValueError, match="item 3"):
        list(map_threads(fail_at_three, range(9), threads))


def test_the_number_of_threads_is_checked():
    assert 1 <= default_threads() <= 8
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        map_threads(str, [], 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_has_threads_of_its_own(tmp_path):
    path = tmp_path / "colour.jpg"
    READABLE["colour.jpg"](path)
    items = [str(path)] * 3
    map_threads(read_rgb, items, 2)
    with warnings.catch_warnings():
        # Python warns of forks beside threads: that is what this test is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        sizes = [picture.size for picture in map_threads(read_rgb, items, 2)]
        os._exit(0 if sizes == [(23, 17)] * 3 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# RuntimeError is what a damaged AVIF file gives, AttributeError a SPIDER file.
PILLOWS_ERRORS = [OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
                  OverflowError, NotImplementedError, struct.error, zlib.error, RuntimeError,
                  AttributeError, AssertionError, Image.DecompressionBombError]  # fmt: skip


@pytest.mark.parametrize("step", ["open", "load"])
@pytest.mark.parametrize("error", PILLOWS_ERRORS, ids=lambda error: error.__name__)
def test_whatever_a_decoder_raises_is_a_broken_file(monkeypatch, tmp_path, error, step):
    path = tmp_path / "cmyk.jpg"  # no other decoder than Pillow takes it
    READABLE["cmyk.jpg"](path)
    fail_in_pillow(monkeypatch, step, error("damaged"))
    assert str(why_broken(str(path))).startswith(error.__name__)
    assert _load_image(str(path)).size == BROKEN_SIZE
    assert step == "load" or plan_file(str(path)).size == BROKEN_SIZE


@pytest.mark.parametrize("step", ["open", "load"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_not_the_files_fault_is_no_broken_file(monkeypatch, tmp_path, error, step):
    path = tmp_path / "cmyk.jpg"  # no other decoder than Pillow takes it
    READABLE["cmyk.jpg"](path)
    fail_in_pillow(monkeypatch, step, error("not of the file"))
    with pytest.raises(error, match="not of the file"):
        _load_image(str(path))


def fail_in_pillow(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image if step == "open" else ImageFile.ImageFile, step, fail)


def test_a_damaged_avif_or_spider_file_does_not_end_the_run(tmp_path):
    broken = []
    Image.init()
    for kind, mode in (("avif", "RGB"), ("spider", "F")):
        if kind.upper() not in Image.SAVE:
            continue
        path = tmp_path / f"whole.{kind}"
        noise("RGB", (40, 40)).convert(mode).save(path, format=kind.upper())
        whole = path.read_bytes()
        for cut in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:cut] + bytes(20) + whole[cut + 20 :])
            broken.append(why_broken(str(path)))
            plan_file(str(path))
    assert any(broken)


def within_seconds(seconds: float, function: Any) -> Any:
    """The result of a function that might wait for ever."""
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"
    return got[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
@pytest.mark.parametrize("where", ["pipe", "/dev/zero"])
def test_a_pipe_or_device_is_a_broken_image_and_nobody_waits_for_it(tmp_path, where):
    path = where
    if where == "pipe":
        path = str(tmp_path / "pipe.jpg")
        os.mkfifo(path)
    reason = within_seconds(10, lambda: why_broken(path))
    assert reason == "OSError: expected a regular file"
    assert within_seconds(10, lambda: plan_file(path)).size == BROKEN_SIZE


def test_a_picture_of_more_than_max_pixels_is_broken_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    noise("RGB", (40, 30)).save(path)
    assert read_rgb(str(path), 1200).size == (40, 30)
    fail_in_pillow(monkeypatch, "load", MemoryError("decoded all the same"))
    with pytest.raises(BrokenImageError, match="40×30 pixels are more than max_pixels = 1199"):
        read_rgb(str(path), 1199)
    options = {"image_size": 28, "patch_image_size": 14, "on_broken": "raise", "max_pixels": 1199}
    with pytest.raises(BrokenImageError, match="max_pixels"):
        load_images([(str(path), 0)], **options)
    batch = {
        "tokens": torch.tensor([7, 1]),
        "labels": torch.tensor([1, 1]),
        "loss_masks": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 2], dtype=torch.int32),
        "position_id": torch.arange(2),
        "image_paths": [(str(path), 0)],
    }
    starts = {"img_start_token_id": 7, "patch_start_token_id": 8, "encoder_patch_size": 14}
    with pytest.raises(BrokenImageError, match="max_pixels"):
        preprocess_packed_batch(batch, device="cpu", **starts, **options)


def test_the_reasons_given_out_do_not_change_any_more():
    broken = BrokenImages()
    broken.record("a.jpg", "bad")
    reasons = broken.reasons
    broken.record("b.jpg", "worse")
    assert reasons == {"a.jpg": "bad"}
