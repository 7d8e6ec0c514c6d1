"""The inspect command describes a picture in crops as it is planned."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from step37_data.images.crops import plan_crops
from step37_data.images.decode import read_rgb
from step37_inspect import style
from step37_inspect.cli import main
from step37_inspect.crop_picture import draw_crops
from tests.inspect.test_inspect import check_lettering, drawn, rgb

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = EXAMPLES / "flickr8k_mini" / "train"
TOKENIZER = str(EXAMPLES / "tokenizer")


def saved(tmp_path: Path, width: int, height: int) -> str:
    path = tmp_path / f"{width}x{height}.jpg"
    Image.open(PHOTOS / "rocket.jpg").resize((width, height)).save(path)
    return str(path)


def inspect(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["inspect", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_picture_is_planned_and_drawn_as_viewed_on_request(capsys, tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (900, 600), "red").save(path, exif=exif)
    out = tmp_path / "drawn.png"
    options = ["--picture", str(path), "--out", str(out)]
    assert inspect(capsys, *options)[0].endswith("turned.jpg: 900×600 pixels")
    lying = read_rgb(str(out)).size
    assert inspect(capsys, *options, "--as-viewed")[0].endswith("turned.jpg: 600×900 pixels")
    upright = read_rgb(str(out)).size
    assert lying[0] > lying[1]
    assert upright[0] < upright[1]


def test_a_picture_is_shown_with_canvas_windows_and_token_layout(capsys, tmp_path):
    path = saved(tmp_path, 1100, 900)
    out = tmp_path / "drawn.png"
    lines = inspect(capsys, "--picture", path, "--out", str(out))
    crop = "<patch_start> 81×<im_patch> <patch_end>"
    assert lines == [
        f"picture   {path}: 1100×900 pixels",
        "full      1100×900, resized to 728×728",
        "canvas    1008×1008, 2 × 2 windows of 504×504, each resized to 504×504",
        "          crop 0 from x = 0, y = 0",
        "          crop 1 from x = 504, y = 0",
        "          crop 2 from x = 0, y = 504",
        "          crop 3 from x = 504, y = 504",
        f"tokens    {83 * 4 + 171 + 1}: 4 crops, 1 newlines, 1 full image",
        f"          {crop} {crop} <patch_newline>",
        f"          {crop} {crop}",
        "          <im_start> 169×<im_patch> <im_end>",
        f"drawing   {out}",
    ]
    with Image.open(out) as picture:
        assert min(picture.size) > 900


def test_a_picture_without_crops_and_a_padded_one_say_so(capsys, tmp_path):
    assert inspect(capsys, "--picture", saved(tmp_path, 500, 375))[2:] == [
        "canvas    none, no crops",
        "tokens    171: 0 crops, 0 newlines, 1 full image",
        "          <im_start> 169×<im_patch> <im_end>",
    ]
    lines = inspect(capsys, "--picture", saved(tmp_path, 800, 9))
    assert lines[1] == "padded    800×800, the picture at the top left"


def test_windows_are_drawn_where_they_are_and_beyond_the_canvas(tmp_path):
    sheet = draw_crops(saved(tmp_path, 1000, 300))
    check_lettering(sheet)
    pixels = drawn(sheet)
    plan = plan_crops(1000, 300)
    assert plan.canvas_size == (1008, 300)
    frame = rgb(style.BROKEN)

    def at(x, y):
        across, up = sheet.axes[0].transData.transform((x, y))
        row, column = round(sheet.bbox.height - up), round(across)
        return {tuple(p) for p in pixels[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)}

    for x, y, width, height in plan.windows:
        for corner in ((x + width, y + height), (x + width, y), (x, y + height)):
            assert frame in at(*corner)
        assert frame not in at(x + width / 2, y + height / 2)
    padding = rgb(style.PADDING)
    assert at(200, 400) == {padding}


@pytest.mark.parametrize("size", [(4000, 3000), (60, 50), (3000, 90), (90, 3000)])
def test_pictures_of_any_size_are_drawn_with_legible_labels(tmp_path, size):
    check_lettering(draw_crops(saved(tmp_path, *size)))


def test_what_cannot_be_shown_is_an_error_of_one_line(capsys, tmp_path):
    assert main(["inspect", "--picture", str(tmp_path / "missing.jpg")]) == 1
    assert "missing.jpg could not be read: " in capsys.readouterr().err
    assert main(["inspect"]) == 1
    assert "the folder of a data set and --tokenizer, or --picture FILE" in capsys.readouterr().err


def test_a_data_set_and_a_pack_can_be_looked_at_in_crops(capsys, tmp_path):
    shutil.copytree(PHOTOS, tmp_path / "data" / "train")
    saved(tmp_path / "data" / "train", 500, 333)
    shutil.move(tmp_path / "data/train/500x333.jpg", tmp_path / "data/train/astronaut.jpg")
    common = [str(tmp_path / "data"), "--tokenizer", TOKENIZER, "--quiet"]
    before = inspect(capsys, *common)
    lines = inspect(capsys, *common, "--multicrop")
    assert before[1].startswith("lengths   212 to 216 tokens")
    assert lines[1].startswith("lengths   212 to 381 tokens")
    out = tmp_path / "pack.png"
    pack = ["--pack", "0", "--sampling", "sequential", "--out", str(out)]
    table = inspect(capsys, *common, "--multicrop", *pack)
    # Two crops and the full image of the first sample.
    assert table[2].count("astronaut.jpg") == 3
    assert out.exists()
