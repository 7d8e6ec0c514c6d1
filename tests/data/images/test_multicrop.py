"""Where crops lie and how long their text is, against the rule written out with Pillow."""

from __future__ import annotations

import dataclasses
import math
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from step37_data.images.crops import CropPlan, picture_size, plan_crops
from step37_data.text.tokens import ImageTokens
from tests.data.images.multicrop_oracle import see, starts

PHOTOS = sorted((Path(__file__).parents[3] / "examples/flickr8k_mini/train").glob("*.jpg"))


def token_layout(plan: CropPlan) -> list[str]:
    """The names of the tokens that stand for a picture, one after the other."""
    runs = ImageTokens().token_runs(plan.newline_mask)
    return [token for token, count in runs for _ in range(count)]


def sides(largest: int) -> st.SearchStrategy[int]:
    """Small and large sides are equally likely, and so are those where the rule turns."""
    exponents = st.floats(0, math.log(largest), allow_nan=False)
    turns = [t for t in (31, 32, 33, 504, 505, 728, 729, 1008, 3024, 3025, 4096) if t <= largest]
    return st.one_of(
        exponents.map(lambda e: min(largest, round(math.exp(e)))),
        st.sampled_from([1, *turns]),
        st.integers(1, largest),
    )


class NoPixels(Image.Image):
    """An image of a size alone, so that sizes of many megapixels cost nothing."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size

    def resize(self, size, *_):
        return NoPixels(tuple(size))

    def crop(self, box):
        return NoPixels((box[2] - box[0], box[3] - box[1]))


@given(width=sides(4096), height=sides(4096))
@example(width=1, height=1)
@example(width=4096, height=4096)
@example(width=330, height=150)
@example(width=150, height=330)
@example(width=4096, height=33)
@example(width=3089, height=3025)
def test_the_plan_is_what_the_rule_says_at_every_size(width, height):
    plan = plan_crops(width, height)
    if min(width, height) < 32 and max(width, height) > 4 * min(width, height):
        # Thin and tiny: the oracle makes a square, and needs a real picture to paste.
        side = max(width, height)
        assert plan.padded_size == (side, side)
        seen = see(NoPixels((side, side)))
    else:
        assert plan.padded_size == (width, height)
        seen = see(NoPixels((width, height)))
    assert plan.size == (width, height)
    assert plan.full_size == seen.full.size
    assert plan.full_window == (0, 0, *seen.full.size)
    assert plan.canvas_size == (seen.canvas_size or plan.full_size)
    assert list(plan.windows) == seen.windows
    assert list(plan.newline_mask) == seen.newline_mask
    assert plan.num_tokens == len(seen.tokens)
    assert token_layout(plan) == seen.tokens


@pytest.mark.parametrize(
    ("size", "crops", "newlines", "tokens"),
    [
        ((500, 333), 2, 0, 337),
        ((500, 375), 0, 0, 171),
        ((1920, 1080), 8, 1, 836),
        ((4032, 3024), 30, 4, 2665),
    ],
)
def test_four_pictures_have_the_tokens_that_serving_gives_them(size, crops, newlines, tokens):
    plan = plan_crops(*size)
    assert (len(plan.windows), sum(plan.newline_mask)) == (crops, newlines)
    assert plan.num_tokens == tokens == 83 * crops + 171 + newlines


def test_a_remainder_of_a_fifth_is_judged_in_floating_point():
    assert 330 / 150 - 2 > 0.2
    assert not 330 - 300 > 0.2 * 150
    assert plan_crops(330, 150).canvas_size == (450, 150)
    assert plan_crops(150, 330).canvas_size == (150, 450)


@given(width=sides(4096), height=sides(4096))
def test_whole_windows_cover_the_canvas_or_one_reaches_beyond_it(width, height):
    plan = plan_crops(width, height)
    if not plan.windows:
        assert plan.canvas_size == plan.canvas_reach == plan.full_size
        return
    corners = [(x + across, y + down) for x, y, across, down in plan.windows]
    assert plan.canvas_reach == tuple(map(max, plan.canvas_size, *corners))
    side = plan.windows[0][2]
    for dim, of_axis in zip(plan.canvas_size, zip(*plan.windows, strict=True), strict=False):
        assert dim < side or dim % side == 0
        # So the last window never has to be moved back to fit.
        assert starts(dim, side) == sorted(set(of_axis)) == list(range(0, dim, side))


def test_newlines_follow_every_row_but_the_last():
    plan = plan_crops(1100, 1500)
    assert [window[:2] for window in plan.windows] == [
        (x, y) for y in (0, 504, 1008) for x in (0, 504)
    ]
    assert plan.newline_mask == (False, True, False, True, False, False)
    names = [t for t in token_layout(plan) if t not in ("<im_patch>", "<patch_end>", "<im_end>")]
    crop, newline = "<patch_start>", "<patch_newline>"
    assert names == [crop, crop, newline, crop, crop, newline, crop, crop, "<im_start>"]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_picture_has_at_least_one_pixel(size):
    with pytest.raises(ValueError, match=rf"at least 1×1 pixels, got {size[0]}×{size[1]}"):
        plan_crops(*size)


@pytest.mark.parametrize("size", [(100_000, 32), (32, 100_000)])
def test_a_picture_that_vanishes_at_the_cap_is_refused(size):
    with pytest.raises(ValueError, match=rf"{size[0]}×{size[1]} pixels are too thin: at 3024"):
        plan_crops(*size)


@pytest.mark.parametrize("size", [(65_535, 20), (20, 65_535)])
def test_a_square_of_gigabytes_is_refused(size):
    with pytest.raises(ValueError, match=r"too thin: the square .* 65535 pixels a side"):
        plan_crops(*size)
    assert plan_crops(65_535, 65_535).full_size == (3024, 3024)


def test_a_plan_cannot_be_changed_and_travels_to_workers():
    plan = plan_crops(500, 333)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.windows = ()
    assert not hasattr(plan, "__dict__")
    assert pickle.loads(pickle.dumps(plan)) == plan == plan_crops(500, 333)
    with pytest.raises(TypeError, match="positional"):
        CropPlan((1, 1), (1, 1), (1, 1), None, (), ())


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_the_size_of_a_photograph_is_read_from_its_header(path):
    with Image.open(path) as image:
        image.load()
        assert picture_size(str(path)) == image.size


def test_the_size_is_read_where_there_are_no_pixels_to_decode(tmp_path):
    whole = PHOTOS[0].read_bytes()
    scan = whole.index(b"\xff\xda")
    (tmp_path / "header.jpg").write_bytes(whole[: scan + 14])
    assert picture_size(str(tmp_path / "header.jpg")) == picture_size(str(PHOTOS[0]))

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 4000, 3000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    (tmp_path / "header.png").write_bytes(png)
    assert picture_size(str(tmp_path / "header.png")) == (4000, 3000)


def test_planning_loads_neither_pillow_nor_torch():
    script = "import sys, step37_data.images.crops as m; m.plan_crops(9, 9); "
    script += "print([n for n in ('PIL', 'torch', 'numpy') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
