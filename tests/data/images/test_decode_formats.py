"""Which file formats are read as pictures, and that Pillow's plugins are loaded once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import EpsImagePlugin, Image

from step37_data.common.image_entry import EncodedImage
from step37_data.images import decode
from step37_data.images.crops import plan_file
from step37_inspect.crop_picture import describe_picture
from step37_inspect.data_set import find_broken_images
from step37_inspect.viewer_difference import find_viewer_differences

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("as_bytes", [False, True])
def test_postscript_named_jpg_is_broken_and_starts_no_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_bytes: bool
) -> None:
    marker = tmp_path / "marker"
    stub = tmp_path / "gs"
    stub.write_text(f"#!/bin/sh\ntouch {marker}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow has not looked for it yet.
    path = tmp_path / "dog.jpg"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(decode.BrokenImageError) as caught:
        decode.read_rgb(EncodedImage("dog.jpg", POSTSCRIPT) if as_bytes else str(path))
    assert not marker.exists()
    assert "EPS: not a picture format that is read" in caught.value.reason


# Beginnings of files that Pillow, left to itself, would hand to a plugin that we do not read with.
OTHERS = {
    "EPS with a preview": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + POSTSCRIPT,
    "PostScript": b"%!PS-Adobe-3.0\n" + POSTSCRIPT,
    "PDF": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
    "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(60),
    "EMF": b"\x01\x00\x00\x00" + bytes(36) + b" EMF" + bytes(60),
    "PSD": b"8BPS\x00\x01" + bytes(60),
    "GRIB": b"GRIB" + bytes(3) + b"\x01" + bytes(60),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "BUFR": b"BUFR" + bytes(60),
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    "OLE": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "MP4": b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(200),
    "HEIC": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "script": b"#!/bin/sh\nexit 1\n",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_picture_format_is_broken_everywhere_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def start(*command: Any, **_: Any) -> NoReturn:
        pytest.fail(f"a program was started: {command}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, start)
    monkeypatch.setattr(os, "system", start)
    path = tmp_path / "dog.jpg"
    path.write_bytes(OTHERS[kind])
    for file in (str(path), EncodedImage("dog.jpg", OTHERS[kind])):
        assert decode.why_broken(file) is not None
        with pytest.raises(decode.BrokenImageError):
            decode.read_rgb(file, as_viewed=True)
        assert plan_file(file).size == decode.BROKEN_SIZE
    assert list(find_broken_images([str(path)], quiet=True)) == [str(path)]
    assert find_viewer_differences([str(path)], quiet=True) == {}
    with pytest.raises(decode.BrokenImageError):
        list(describe_picture(str(path)))


FRESH = """
import sys
from concurrent.futures import ThreadPoolExecutor
from step37_data.images.decode import read_rgb
sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(8) as pool:
    print([picture.size for picture in pool.map(read_rgb, sys.argv[1:])])
"""


@pytest.mark.parametrize("order", ["TGA before ICO", "many at a time"])
def test_a_fresh_process_reads_every_format_whatever_came_before(
    tmp_path: Path, order: str
) -> None:
    kinds = (
        ["tga", "ico"] if order == "TGA before ICO" else ["gif", "webp", "tga", "ico", "qoi"] * 8
    )
    paths = []
    for number, suffix in enumerate(kinds):
        path = tmp_path / f"{number}.{suffix}"
        options = {"sizes": [(24, 18)]} if suffix == "ico" else {}
        Image.new("RGB", (24, 18), (200, 9, 9)).save(path, **options)
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([(24, 18)] * len(paths))


def test_plugins_are_loaded_once_before_any_thread_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = Image.init
    done = threading.Event()

    def slow_init() -> bool:
        calls.append(1)
        time.sleep(0.1)
        done.set()
        return bool(real())

    monkeypatch.setattr(decode, "_formats", ())
    monkeypatch.setattr(Image, "init", slow_init)

    def formats_and_done(_: int) -> tuple[tuple[str, ...], bool]:
        return decode.picture_formats(), done.is_set()

    with ThreadPoolExecutor(max_workers=4) as pool:
        answers = list(pool.map(formats_and_done, range(4)))
    assert len(calls) == 1
    assert all(formats and ready for formats, ready in answers)
    assert "JPEG" in answers[0][0]
    assert "EPS" not in answers[0][0]
