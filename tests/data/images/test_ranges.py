"""The ranges of a profiler around decoding, copying and resizing, from all threads that do it."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

from step37_data.common.image_entry import IMAGE_ITEM_TYPE, ImageEntry
from step37_data.images import stacks
from step37_data.images.options import ImageOptions
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import load_images

SIZES = {"image_size": 28, "patch_image_size": 14}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> list[tuple[str, int]]:
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [(str(tmp_path / f"{number}.png"), IMAGE_ITEM_TYPE) for number in range(6)]


def all_threads() -> profile:
    """The recipe of the pages: without the option a profiler sees the thread that started it."""
    return profile(
        activities=[ProfilerActivity.CPU],
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    )


def recorded(prof: profile) -> Counter[str]:
    return Counter(e.name for e in prof.events() if e.name.startswith("step37/"))


def test_the_decoding_threads_have_ranges_of_their_own(pictures):
    with all_threads() as prof:
        load_images(pictures, threads=3, **SIZES)
    found = recorded(prof)
    assert found["step37/decode"] == found["step37/pixels"] == len(pictures)
    assert found["step37/upload"] >= 1
    assert found.keys() == {"step37/decode", "step37/pixels", "step37/upload"}


def test_so_has_the_thread_that_reads_ahead(pictures):
    prepare = functools.partial(load_images, threads=1, **SIZES)
    with all_threads() as prof, Prefetcher([pictures] * 2, prepare, device="cpu") as packs:
        assert len(list(packs)) == 2
    assert recorded(prof)["step37/decode"] == 2 * len(pictures)


def test_on_a_device_all_pictures_are_copied_once_and_resized_once(pictures):
    options = ImageOptions(**SIZES, device=DEVICE, threads=2)
    entries = [ImageEntry(path, kind) for path, kind in pictures]
    with all_threads() as prof:
        stacks._on_device(entries, options, DEVICE)
    found = recorded(prof)
    assert found == {"step37/decode": len(pictures), "step37/upload": 1, "step37/pixels": 1}


def test_a_picture_that_cannot_be_read_ends_its_range(pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with all_threads() as prof:
        load_images([(str(broken), IMAGE_ITEM_TYPE), *pictures], threads=1, **SIZES)
    assert recorded(prof)["step37/decode"] == len(pictures) + 1


def test_without_a_profiler_nothing_of_it_is_called(pictures, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(profiler, "record_function", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range", calls.append)
    load_images(pictures, threads=2, **SIZES)
    assert calls == []
