"""Which file formats are read as pictures, and that Pillow's plugins are loaded once."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from step37_data.common.image_entry import EncodedImage
from step37_data.images import decode

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
