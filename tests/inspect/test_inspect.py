"""The inspect command describes packs and data sets as they are."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import step37_kernels
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_data.template import Step37MultimodalTemplate
from step37_inspect import style
from step37_inspect.cli import _parser, main
from step37_inspect.data_set import (
    DataSetDescription,
    data_set_lines,
    draw_data_set,
    find_broken_images,
)
from step37_inspect.histogram import Histogram
from step37_inspect.pack_picture import TOKENS_A_LINE, describe_pack, draw_pack

pytest.importorskip("matplotlib", reason="pictures need the extra plots")

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")
CROPS = "<im_start><@image@><im_end><patch_start><#image#><patch_end>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLES / "flickr8k_mini" / "train", tmp_path / "data" / "train")
    return tmp_path / "data"


def rgb(name: str) -> tuple[int, ...]:
    red, green, blue = (int(name[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue


def drawn(sheet: Any) -> np.ndarray:
    """Pixels ``[h, w, 3]`` of a sheet, at 100 an inch."""
    with Image.open(io.BytesIO(style.png_of(sheet))) as picture:
        return np.asarray(picture.convert("RGB"))


def low_in(sheet: Any, token: int) -> tuple[int, int]:
    """Row and column of a pixel in the lower half of a token, where no label is written."""
    line, column = divmod(token, TOKENS_A_LINE)
    x, y = sheet.axes[1].transData.transform((column + 0.5, line + 0.68))
    return round(sheet.bbox.height - y), round(x)


def check_lettering(sheet: Any) -> None:
    """Check that no label is cut by the edge and that no two overlap."""
    from matplotlib.text import Text

    drawn(sheet)
    # Matplotlib keeps labels of ticks beyond the ends of an axis, and does not draw them.
    beyond = set()
    for axes in sheet.axes:
        for axis in (axes.xaxis, axes.yaxis):
            shown = set(axis._update_ticks()) if axes.axison else set()
            for tick in set(axis.get_major_ticks()) - shown:
                beyond |= {tick.label1, tick.label2}
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in sheet.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in beyond
    ]
    assert boxes
    for number, (name, box) in enumerate(boxes):
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= sheet.bbox.width + 0.5, name
        assert box.y1 <= sheet.bbox.height + 0.5, name
        for other, behind in boxes[number + 1 :]:
            apart = (
                min(box.x1, behind.x1) - max(box.x0, behind.x0) < 1
                or min(box.y1, behind.y1) - max(box.y0, behind.y0) < 1
            )
            assert apart, (name, other)


def inspect(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> list[str]:
    assert main(["inspect", str(folder), "--tokenizer", TOKENIZER, *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_data_set_is_described_with_lengths_fill_and_drops(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    lines = inspect(capsys, folder, "--max-length", "650")
    assert lines[0].endswith("train, caption_0: 8 samples, 8 image files")
    assert lines[1].startswith("lengths   212 to 216 tokens, median 214")
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines if re.match(r" +\d+ – \d+ ", line)]
    assert sum(counts) == 8
    told = "          next_fit: 8 samples in 3 packs of 650 tokens, 87.8 % filled, 0 dropped"
    assert told in lines
    assert lines[-1] == "images    0 of 8 files cannot be read"
    dropping = inspect(capsys, folder, "--max-length", "214")
    told = "          best_fit: 4 samples in 4 packs of 214 tokens, 99.5 % filled, 4 dropped"
    assert told in dropping


def test_broken_images_are_named_and_nothing_is_downloaded(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "train" / "coffee.jpg").write_bytes(b"not a jpeg")
    (folder / "train" / "retina.jpg").unlink()
    whole = (folder / "train" / "rocket.jpg").read_bytes()
    (folder / "train" / "rocket.jpg").write_bytes(whole[: len(whole) // 2])
    lines = inspect(capsys, folder)
    first = lines.index("images    3 of 8 files cannot be read")
    names = [re.search(r"(\w+)\.jpg: (\w+)", line) for line in lines[first + 1 :]]
    assert [match.groups() for match in names if match] == [
        ("coffee", "UnidentifiedImageError"),
        ("retina", "FileNotFoundError"),
        ("rocket", "OSError"),
    ]
    assert inspect(capsys, folder, "--skip-images")[-1] == "images    not read (--skip-images)"


def test_long_work_shows_its_progress_unless_it_is_to_be_quiet(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    page = ["--html", str(tmp_path / "page.html"), "--html-packs", "1"]
    command = ["inspect", str(folder), "--tokenizer", TOKENIZER, *page]
    main(command)
    shown = capsys.readouterr().err
    assert "Probing data set 0: 100%" in shown
    assert "Reading images: 100%" in shown
    assert "Drawing packs: 100%" in shown
    main([*command, "--quiet"])
    assert capsys.readouterr().err == ""


def test_a_pack_is_shown_as_a_table_and_a_picture(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pack.png"
    lines = inspect(
        capsys, folder, "--pack", "1", "--max-length", "450", "--sampling", "sequential",
        "--out", str(out),
    )  # fmt: skip
    assert lines[0].startswith("pack 1 of 4: 430 of 450 tokens (95.6%), 448 with padding")
    cells = [re.split(r"  +", line) for line in lines[1:-1]]
    assert cells[0] == ["segment", "sample", "tokens", "trained", "images", "text trained"]
    assert [row[1] for row in cells[1:]] == ["2", "3", "padding"]
    assert [row[2] for row in cells[1:]] == ["0–215", "215–430", "430–448"]
    assert cells[1][4] == "chelsea.jpg 6–175"
    assert "A tabby cat with green eyes" in cells[1][5]
    with Image.open(out) as picture:
        assert picture.size[0] > 1000


def test_a_pack_that_is_not_there_or_a_folder_without_metadata_is_an_error(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    command = ["--tokenizer", TOKENIZER, "--quiet"]
    assert main(["inspect", str(folder), *command, "--pack", "7"]) == 1
    assert "step37-data: --pack: expected 0 to 0, got 7" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none"), *command]) == 1
    assert "metadata.csv" in capsys.readouterr().err
    assert main(["inspect", str(folder), *command, "--caption-key", "caption_7"]) == 1
    told = capsys.readouterr().err
    assert "no row has a file_name and a caption_7 (--caption-key)" in told
    assert "its columns: file_name, caption_0, caption_1" in told


def test_a_folder_of_another_layout_is_told_the_layout_that_is_expected(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    def error_of(at: Path, *options: str) -> str:
        assert main(["inspect", str(at), "--tokenizer", TOKENIZER, "--quiet", *options]) == 1
        return capsys.readouterr().err

    told = error_of(folder / "train")
    assert f"{folder}/train is a split; give the folder above it: {folder} --split train" in told
    told = error_of(folder, "--split", "val")
    assert "there are the splits train (--split)" in told
    assert f"{folder}/val/metadata.csv    with the columns file_name and caption_0" in told
    told = error_of(folder.parent / "empty", "--caption-key", "text")
    assert f"{folder.parent}/empty/train/metadata.csv: there is no such file\n" in told
    assert "with the columns file_name and text" in told
    (folder / "train" / "metadata.csv").unlink()
    os.mkfifo(folder / "train" / "metadata.csv")
    assert "there is no such file" in error_of(folder)


@pytest.mark.parametrize("option", ["--max-length", "--divisible-by", "--html-packs"])
def test_a_number_that_cannot_be_is_refused_by_the_name_of_its_option(
    capsys: pytest.CaptureFixture[str], folder: Path, option: str
) -> None:
    command = ["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet", option, "-1"]
    assert main(command) == 1
    least = 0 if option == "--html-packs" else 1
    assert capsys.readouterr().err == f"step37-data: {option}: expected at least {least}, got -1\n"
    command = ["shard", str(folder), str(folder), "--samples-per-shard", "0"]
    assert main(command) == 1
    told = "step37-data: --samples-per-shard: expected at least 1, got 0\n"
    assert capsys.readouterr().err == told


def test_dropped_samples_skipped_rows_and_odd_pictures_are_named(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    Image.new("RGBA", (9, 9)).save(folder / "train" / "alpha.png")
    with (folder / "train" / "metadata.csv").open("a") as file:
        file.write(f"alpha.png,A {'long ' * 90} one\ncoffee.jpg, \n,No file.\n")
    lines = inspect(capsys, folder, "--max-length", "300")
    assert lines[1] == "skipped   2 rows without a file name or a caption"
    first = lines.index("too long  1 of 9 samples have more than 300 tokens: dropped")
    assert re.fullmatch(rf" +{folder}/train/alpha.png: \d+ tokens", lines[first + 1])
    told = r" +far from the other lengths: alpha\.png \(\d+\)"
    assert any(re.fullmatch(told, line) for line in lines)
    at = lines.index("pixels    1 of 9 files are not used as a viewer shows them")
    assert lines[at + 1].endswith("alpha.png: transparent")
    lines = inspect(capsys, folder, "--max-length", "300", "--oversize", "extend")
    assert "too long  1 of 9 samples have more than 300 tokens: each alone in a pack" in lines
    assert not any(
        line.startswith(("skipped", "too long", "pixels"))
        for line in inspect(capsys, folder, "--sample-count", "8")
    )
    lines = inspect(capsys, folder, "--max-length", "30", "--packing", "balanced")
    assert "          balanced: no packs, 9 dropped" in lines


def test_many_dropped_samples_are_named_in_part() -> None:
    data = DataSetDescription(
        name="", sizes=np.arange(60, 90), images=30, capacity=64, oversize="drop", broken=None,
        files=[f"{number}.jpg" for number in range(60, 90)],
    )  # fmt: skip
    lines = list(data_set_lines(data))
    first = lines.index("too long  25 of 30 samples have more than 64 tokens: dropped")
    named = [f"          {number}.jpg: {number} tokens" for number in range(65, 85)]
    assert lines[first + 1 : first + 22] == [*named, "          and 5 more; --html lists all"]


def test_balanced_packs_can_be_looked_at(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drawn.png"
    options = ["--packing", "balanced", "--max-length", "650"]
    lines = inspect(capsys, folder, *options, "--out", str(out))
    assert any(line.startswith("          balanced: 8 samples in 3 packs") for line in lines)
    assert out.exists()
    assert inspect(capsys, folder, *options, "--pack", "2")[0].startswith("pack 2 of 3:")


def test_lengths_are_measured_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    call = Step37MultimodalTemplate.__call__

    def counted(template: Step37MultimodalTemplate, data: Any) -> Any:
        calls.append(data)
        return call(template, data)

    monkeypatch.setattr(Step37MultimodalTemplate, "__call__", counted)
    command = ["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet", "--packing", "best_fit"]
    assert main([*command, "--html", str(tmp_path / "p.html"), "--html-packs", "0"]) == 0
    assert len(calls) == 8


def test_help_and_version_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--help"], ["inspect", "--help"], ["shard", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
        told = capsys.readouterr().out
        assert "`" not in told
        assert "None" not in told
    assert told == f"step37-data {step37_kernels.__version__}\n"


def test_what_cannot_be_read_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    def error_of(*options: str) -> str:
        assert main(["inspect", str(folder), "--quiet", *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("step37-data: ")
        assert error.count("\n") == 1
        return error

    broken = tmp_path / "broken"
    shutil.copytree(TOKENIZER, broken)
    (broken / "chat_template.jinja").write_text("{% for m in %}")
    assert "TemplateSyntaxError" in error_of("--tokenizer", str(broken))
    told = error_of("--tokenizer", str(tmp_path / "none"))
    assert told.startswith("step37-data: --tokenizer")
    assert "there is no folder" in told
    told = error_of("--tokenizer", "a_name_that_the_hub_may_have")
    assert "there is no folder 'a_name_that_the_hub_may_have'; expected the folder of" in told
    assert "--tokenizer is missing: the folder of the model's tokenizer, with " in error_of()
    good = ("--tokenizer", TOKENIZER)
    for count in ("0", "-3"):
        message = f"--sample-count: expected at least 1, got {count}"
        assert message in error_of(*good, "--sample-count", count)
    metadata = folder / "train" / "metadata.csv"
    metadata.write_bytes("file_name,caption_0\na.jpg,café\n".encode("latin-1"))
    assert f"{metadata}: expected text in UTF-8" in error_of(*good)
    metadata.write_bytes(b"file_name,caption_0\na.jpg," + b"x" * 200_000)
    assert f"{metadata}, line 2: field larger than" in error_of(*good)


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_matplotlib_is_missed_before_anything_is_read(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    option: str,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet"]
    assert main([*command, option, str(tmp_path / "file")]) == 1
    told = capsys.readouterr()
    assert told.err == "step37-data: inspect needs matplotlib: pip install 'step37[plots]'\n"
    assert not told.out


@pytest.mark.parametrize(
    "steering", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "\r", "\u202e", "\u2066"]
)
def test_characters_that_steer_a_terminal_are_shown_as_text(
    capsys: pytest.CaptureFixture[str], folder: Path, steering: str
) -> None:
    metadata = folder / "train" / "metadata.csv"
    header, first, *rest = metadata.read_text().splitlines()
    name, _, captions = first.partition(",")
    metadata.write_text("\n".join([header, f'{name},"A{steering}{captions}"', *rest]) + "\n")
    command = ["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet"]
    assert main([*command, "--pack", "0", "--sampling", "sequential"]) == 0
    shown = capsys.readouterr().out
    assert steering[0] not in shown
    assert repr(steering)[1:-1] in shown
    # A list names what cannot be read, and so does an error.
    with metadata.open("a") as file:
        file.write(f'"no{steering}picture.jpg",A cat.\n')
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"no{repr(steering)[1:-1]}picture.jpg: " in shown
    assert steering[0] not in shown
    assert main(["inspect", "--picture", str(folder / f"no{steering}picture.jpg")]) == 1
    message = capsys.readouterr().err
    assert f"no{repr(steering)[1:-1]}picture.jpg" in message
    assert steering[0] not in message


def test_a_terminal_that_is_not_utf8_gets_escapes_and_no_error(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "step37_inspect.cli", str(folder), "--tokenizer", TOKENIZER,
         "--quiet"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii")


@pytest.mark.parametrize("subject", ["--pack", "--picture", "--html", "shard"])
def test_whatever_is_asked_for_a_terminal_that_is_not_utf8_gets_escapes(
    folder: Path, tmp_path: Path, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subject == "shard":
        pytest.importorskip("megatron.energon", reason="the extra energon is not installed")
    (folder / "train").rename(folder / "trän")
    command = {
        "--pack": ["inspect", str(folder), "--pack", "0"],
        "--picture": ["inspect", "--picture", str(folder / "trän" / "coffee.jpg")],
        "--html": ["inspect", str(folder), "--html", str(tmp_path / "a.html"), "--skip-images"],
        "shard": ["shard", str(folder), str(tmp_path / "out")],
    }[subject]
    if subject in ("--pack", "--html"):
        command += ["--split", "trän", "--tokenizer", TOKENIZER]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main([*command, "--quiet"]) == 0
    sys.stdout.flush()
    assert written.getvalue().decode("ascii")


def test_options_that_choose_the_packs_are_fields_of_the_provider_with_its_defaults() -> None:
    options = vars(_parser().parse_args(["inspect"]))
    defaults = {field.name: field.default for field in fields(Step37Flickr8kSFTDataProvider)}
    own = ["command", "run", "quiet", "picture", "pack", "html", "html_packs", "out", "skip_images"]
    assert options.keys() - defaults.keys() == set(own)
    told = options.keys() & defaults.keys() - {"cache_dir", "tokenizer_path", "sample_count"}
    assert len(told) == 11
    for name in told:
        assert options[name] == defaults[name], name


def test_the_options_decide_about_the_packs(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    common = ["--pack", "0", "--sampling", "sequential", "--max-length", "225"]
    lines = inspect(capsys, folder, *common, "--divisible-by", "100")
    assert lines[0].startswith("pack 0 of 8: 214 of 225 tokens (95.1%), 300 with padding")
    lengths = ["--lengths-cache", str(tmp_path / "l")]
    options = ["--oversize", "extend", "--max-length", "100", "--prompt", "What is this? " * 9]
    asked = inspect(capsys, folder, *common, *lengths, *options)
    match = re.match(r"pack 0 of 8: (\d+) of 100 tokens", asked[0])
    assert match is not None
    assert int(match[1]) > 225
    assert list((tmp_path / "l").iterdir())


def test_the_module_runs_as_a_command(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "step37_inspect.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: step37-data inspect" in run.stdout
    assert str(folder) not in run.stdout


class Samples(list[Any]):
    """A data set of these images and their crops, each with a question and two answers."""

    def __init__(self, template: Step37MultimodalTemplate, paths: list[str]) -> None:
        self.template = template
        for path in paths:
            conversations = [
                {"role": "user", "content": f"{CROPS} what?"},
                {"role": "assistant", "content": "one"},
                {"role": "tool", "content": "result"},
                {"role": "assistant", "content": "two"},
            ]
            images = [(path, 0), (path, 1)]
            self.append(template({"conversations": conversations, "images": images}))


def packs_of(
    template: Step37MultimodalTemplate, paths: list[str], capacity: int = 1024
) -> MixedPackedDataloader:
    return MixedPackedDataloader(
        [Samples(template, paths)], [1.0], capacity, "extend", pack_samples, "sequential",
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def template() -> Step37MultimodalTemplate:
    return Step37MultimodalTemplate(tokenizer_path=TOKENIZER)


def test_a_description_has_every_segment_loss_span_and_image_where_the_tokens_are(
    template: Step37MultimodalTemplate,
) -> None:
    packs = packs_of(template, ["c.jpg", "d.jpg", "a.jpg", "b.jpg"], 700)
    packed, pack = packs[1], describe_pack(packs, 1)
    assert [(s.start, s.end) for s in pack.segments] == list(
        zip(packed["cu_seqlens"][:-1].tolist(), packed["cu_seqlens"][1:].tolist(), strict=True)
    )
    assert [segment.source for segment in pack.segments] == [(0, 2), (0, 3), None]
    assert pack.used == pack.segments[1].end
    trained = np.zeros(len(packed["tokens"]), dtype=bool)
    for segment in pack.segments:
        assert len(segment.loss) == (2 if segment.source else 0)
        for start, end in segment.loss:
            trained[start:end] = True
        labels = packed["labels"][segment.start : segment.end]
        within = labels[torch.from_numpy(trained[segment.start : segment.end])]
        assert segment.text == template.tokenizer.decode(within)
    assert torch.equal(torch.from_numpy(trained), packed["loss_masks"] > 0)
    told = f"pack 1 of 2: {pack.used} of 700 tokens ({pack.used / 7:.1f}%)"
    assert pack.title == f"{told}, {len(trained)} with padding, {trained.sum()} trained"
    is_row = packed["tokens"] == template.tokenizer.convert_tokens_to_ids("<im_patch>")
    for segment, path in zip(pack.segments, ["a.jpg", "b.jpg"], strict=False):
        assert [image.entry for image in segment.images] == [(path, 0, None), (path, 1, None)]
        for image in segment.images:
            assert is_row[image.start : image.end].all()
            assert not is_row[image.start - 1]
            assert not is_row[image.end]


def test_a_description_needs_as_many_images_as_start_tokens(
    template: Step37MultimodalTemplate,
) -> None:
    packs = packs_of(template, ["a.jpg", "b.jpg"])
    packs.datasets[0][1]["image_paths"].pop()
    with pytest.raises(ValueError, match="pack 0: 2 start tokens 6 for 1 image paths"):
        describe_pack(packs, 0)


def test_a_picture_shows_what_every_token_is(template: Step37MultimodalTemplate) -> None:
    good = str(EXAMPLES / "flickr8k_mini/train/coffee.jpg")
    pack = describe_pack(packs_of(template, [good, "missing.jpg"]), 0)
    sheet = draw_pack(pack)
    check_lettering(sheet)
    pixels = drawn(sheet)

    def colour(token: int) -> tuple[int, ...]:
        return tuple(pixels[low_in(sheet, token)].tolist())

    first, second, padding = pack.segments
    image, crop = first.images
    assert colour(image.start) == colour(image.end - 1) == rgb(style.IMAGE)
    assert colour(crop.start) == colour(crop.end - 1) == rgb(style.CROP)
    assert colour(image.end) == colour(first.start + 1) == rgb(style.TEXT)
    for start, end in first.loss:
        assert colour(start) == colour(end - 2) == rgb(style.TRAINED)
    broken = [colour(t) for t in range(second.images[0].start, second.images[0].end)]
    assert {rgb(style.BROKEN)} < set(broken)
    assert not {rgb(style.IMAGE), rgb(style.TEXT)} & set(broken)
    room = [colour(token) for token in (padding.start + 1, *range(padding.end, 1024))]
    assert rgb(style.PADDING) in room
    assert rgb(style.TEXT) not in room


def test_a_fuller_pack_than_its_capacity_is_drawn_whole(
    template: Step37MultimodalTemplate,
) -> None:
    oversize = describe_pack(packs_of(template, ["a.jpg"], 100), 0)
    assert oversize.used > oversize.capacity
    sheet = draw_pack(oversize)
    shown = drawn(sheet)[low_in(sheet, oversize.segments[0].end - 2)]
    assert tuple(shown.tolist()) == rgb(style.TRAINED)


@pytest.mark.parametrize(
    "names", [["a.jpg"], ["long_" * 20 + ".jpg", "猫$x_1$.jpg"], ["i.jpg"] * 9]
)
def test_labels_of_packs_neither_overlap_nor_are_cut(
    template: Step37MultimodalTemplate, names: list[str]
) -> None:
    for capacity in (256, 2048, 8192):
        pack = describe_pack(packs_of(template, names, capacity), 0)
        for narrow in (False, True):
            sheet = draw_pack(pack, narrow=narrow)
            check_lettering(sheet)
            assert (sheet.bbox.width < 390) == narrow


@pytest.mark.parametrize("longest", [220, 100_000])
@pytest.mark.parametrize("broken", [None, {}, {"a.jpg": "OSError: cut"}])
def test_a_data_set_is_drawn_with_legible_labels(
    longest: int, broken: dict[str, str] | None
) -> None:
    sizes = np.random.default_rng(0).integers(200, longest, 5000)
    data = DataSetDescription(
        name="a/very/long/folder/" * 10, sizes=sizes, images=5000, capacity=2048, oversize="drop",
        broken=broken,
    )  # fmt: skip
    narrow = draw_data_set(data, narrow=True)
    check_lettering(narrow)
    assert narrow.bbox.width < 390
    sheet = draw_data_set(data)
    check_lettering(sheet)
    lengths, filled = sheet.axes
    assert sum(bar.get_height() for bar in lengths.patches) == 5000
    packs = sum(len(fill.tokens) for fill in data.fills.values())
    assert sum(bar.get_height() for bar in filled.patches) == packs


@pytest.mark.parametrize("low", [[], [5]])
@pytest.mark.parametrize("high", [[], [98_000, 64_000]])
@pytest.mark.parametrize("capacity", [2048, 280, 100_000, 3])
def test_an_outlier_is_named_and_leaves_the_others_their_room(
    low: list[int], high: list[int], capacity: int
) -> None:
    sizes = np.concatenate([np.random.default_rng(0).integers(200, 300, 5000), low, high])
    sizes = sizes.astype(np.int64)
    data = DataSetDescription(
        name="set", sizes=sizes, images=5000, capacity=capacity, oversize="drop", broken={},
        loads=np.full(len(sizes), 169), files=[f"{number}.jpg" for number in range(len(sizes))],
    )  # fmt: skip
    histogram = data.histogram
    assert sum(histogram.counts(sizes)) == len(sizes)
    assert histogram.bins[0].start == min(sizes)
    assert max(sizes) in histogram.bins[-1]
    assert len(histogram.bins) == 15 + len(low) + bool(high)
    assert sum(count > 100 for count in histogram.counts(sizes)) == 15
    assert [size for _, size in data.far_off] == high + low
    lines = "\n".join(data_set_lines(data))
    for _, size in data.far_off:
        assert f".jpg ({size})" in lines
    check_lettering(draw_data_set(data, narrow=True))
    sheet = draw_data_set(data)
    check_lettering(sheet)
    lengths = sheet.axes[0]
    assert sum(bar.get_height() for bar in lengths.patches) == len(sizes)
    left, right = lengths.get_xlim()
    assert right - left < 160


def test_a_picture_for_the_page_has_no_title_and_all_below_it() -> None:
    sheet = style.sheet_of(3, 2, "A title")
    whole = drawn(sheet)
    with Image.open(io.BytesIO(style.png_of(sheet, titled=False))) as picture:
        below = np.asarray(picture.convert("RGB"))
    assert below.shape == (155, 300, 3)
    assert (whole[:45] < 128).any()
    assert (below == 255).all()


def test_fills_hold_the_tokens_of_every_pack() -> None:
    fills = DataSetDescription(
        name="", sizes=np.array([4, 3, 9, 2, 6]), images=5, capacity=8, oversize="drop", broken=None
    ).fills
    assert fills["next_fit"].tokens.tolist() == [7, 8]
    assert sorted(fills["best_fit"].tokens.tolist()) == [7, 8]
    assert [fill.dropped for fill in fills.values()] == [1, 1]
    assert fills["next_fit"].share == 15 / 16


def test_broken_images_are_found_in_order(folder: Path) -> None:
    broken = folder / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    paths = [str(folder / "train" / "coffee.jpg"), str(broken), str(folder / "none.jpg")]
    found = find_broken_images(paths, quiet=True)
    assert list(found) == paths[1:]
    assert found[paths[2]].startswith("FileNotFoundError")


def test_lengths_near_the_end_of_their_narrow_type_are_counted_as_they_are() -> None:
    sizes = [180, 200, 254, 171, 190]
    narrow, wide = np.array(sizes, dtype=np.uint8), np.array(sizes)
    assert Histogram.of(narrow) == Histogram.of(wide)
    assert Histogram.of(narrow).counts(narrow) == Histogram.of(wide).counts(wide)
