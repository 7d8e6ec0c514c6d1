"""``step37-data shard`` gives the same bytes for the same folder and goes on where it stopped."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from step37_data.images.decode import picture_formats, read_rgb
from step37_energon.shards import PICTURE_SUFFIXES, one_writer, write_shards
from step37_inspect.cli import main
from tests.energon.conftest import SAMPLES, TOKENIZER
from tests.limits import HANGS_AFTER_S

energon = pytest.importorskip("megatron.energon", reason="the extra energon is not installed")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("**/*.tar"))}


def test_a_shard_holds_every_picture_as_it_is_and_its_caption(folder: Path, shards: Path) -> None:
    rows = (folder / "train" / "metadata.csv").read_text().splitlines()[1:]
    members: dict[str, bytes] = {}
    for path in sorted((shards / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    assert len(members) == 2 * SAMPLES
    for number, row in enumerate(rows):
        name, caption = row.split(",")
        suffix = name.rpartition(".")[2]
        assert members[f"{number:09d}.{suffix}"] == (folder / "train" / name).read_bytes()
        assert members[f"{number:09d}.txt"].decode() == caption


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes
    calls = []

    def failing(path: Path) -> bytes:
        calls.append(path)
        if len(calls) == 17:
            raise OSError("the disk is gone")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        write_shards(folder, tmp_path, samples_per_shard=7, progress=False)
    finished = sorted(path.name for path in (tmp_path / "train").glob("*.tar"))
    assert finished == ["000000.tar", "000001.tar"]
    write_shards(folder, tmp_path, samples_per_shard=7, progress=False)
    assert len(calls) == 17 + SAMPLES - 14
    assert contents(tmp_path) == contents(shards)
    assert not list(tmp_path.glob("**/*.part"))


def test_shards_of_other_samples_are_not_mixed_in(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(folder, tmp_path, sample_count=9, progress=False)
    for change in ({"sample_count": 8}, {"sample_count": 9, "samples_per_shard": 3}):
        with pytest.raises(ValueError, match="holds shards of other samples"):
            write_shards(folder, tmp_path, progress=False, **change)
    assert main(["shard", str(folder), str(tmp_path), "--quiet"]) == 1
    assert "holds shards of other samples" in capsys.readouterr().err


def test_every_split_keeps_its_name_and_an_odd_picture_or_an_empty_folder_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        shutil.copy(folder / "train" / "noise.png", tmp_path / "data" / split)
        text = f"file_name,caption_0\nnoise.png,Noise of {split}.\n"
        (tmp_path / "data" / split / "metadata.csv").write_text(text)
    made = write_shards(tmp_path / "data", tmp_path / "out", progress=False)
    assert made == {"train": {"train/000000.tar": 1}, "val": {"val/000000.tar": 1}}
    (tmp_path / "data" / "val" / "metadata.csv").write_text("file_name,caption_0\na.svg,A.\n")
    with pytest.raises(ValueError, match=r"a\.svg: expected a picture named \.jpg"):
        write_shards(tmp_path / "data", tmp_path / "other", progress=False)
    told = (
        r"no caption_9 \(caption_key\) and file_name .*"
        "train/metadata.csv has the columns file_name, caption_0;"
    )
    with pytest.raises(ValueError, match=told):
        write_shards(tmp_path / "data", tmp_path / "none", caption_key="caption_9")


def test_two_splits_become_the_two_splits_of_one_data_set(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "v.2 a"):
        shutil.copytree(folder / "train", tmp_path / "data" / split)
    out = tmp_path / "out"
    assert main(["shard", str(tmp_path / "data"), str(out), "--quiet"]) == 0
    counts = json.loads((out / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    assert counts == {"train/000000.tar": SAMPLES, "v.2 a/000000.tar": SAMPLES}
    with tarfile.open(out / "train" / "000000.tar") as tar:
        assert tar.getnames()[0] == "000000000.jpg"
    with tarfile.open(out / "v.2 a" / "000000.tar") as tar:
        assert tar.getnames()[0] == "v%2E2%20a-000000000.jpg"


def test_a_key_that_is_in_two_shards_is_an_error_and_no_exit(shards: Path, tmp_path: Path) -> None:
    from step37_energon.task_encoder import prepare_shards

    shutil.copytree(shards / "train", tmp_path / "train")
    shutil.copy(tmp_path / "train" / "000000.tar", tmp_path / "train" / "again.tar")
    with pytest.raises(ValueError, match="samples of one key in several of them"):
        prepare_shards(tmp_path, {"train": ["train/000000.tar", "train/again.tar"]})


def make_folder(root: Path, pictures: dict[str, bytes]) -> Path:
    (root / "train").mkdir(parents=True)
    rows = ["file_name,caption_0", *(f"{name},Caption of {name}." for name in pictures)]
    (root / "train" / "metadata.csv").write_text("\n".join(rows) + "\n")
    for name, data in pictures.items():
        (root / "train" / name).write_bytes(data)
    return root


def small(kind: str, shade: int = 9) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def test_suffixes_are_those_of_the_formats_that_are_read_and_no_others() -> None:
    formats = Image.registered_extensions()
    # A format may be known to us before it is to the installed Pillow.
    known = {formats[f".{suffix}"] for suffix in PICTURE_SUFFIXES if f".{suffix}" in formats}
    # Pillow opens MPO by way of JPEG.
    assert known == {*picture_formats(), "MPO"}
    assert {suffix for suffix in PICTURE_SUFFIXES if f".{suffix}" not in formats} <= {"avif"}


def test_every_picture_that_is_read_is_taken_and_found_again(
    tmp_path: Path, in_order: Callable[..., Any]
) -> None:
    from step37_energon.task_encoder import Step37TaskEncoder

    kinds = {"a.BMP": "BMP", "b.gif": "GIF", "c.tiff": "TIFF", "d.jp2": "JPEG2000", "e.ppm": "PPM"}
    folder = make_folder(tmp_path / "data", {name: small(kind) for name, kind in kinds.items()})
    assert main(["shard", str(folder), str(tmp_path / "out"), "--quiet"]) == 0
    encoder = Step37TaskEncoder(TOKENIZER)
    packs = list(energon.get_loader(in_order(tmp_path / "out", encoder)))
    pictures = [path for pack in packs for path, _ in pack["image_paths"]]
    assert [picture.name.partition(".")[2] for picture in pictures] == [
        *("bmp", "gif", "tiff", "jp2", "ppm")
    ]
    assert all(read_rgb(picture).size == (8, 6) for picture in pictures)


def test_a_wrong_folder_is_told_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: there is no such folder"):
        write_shards(tmp_path / "none", tmp_path / "out")
    folder = make_folder(tmp_path / "data", {"a.png": small("PNG")})
    with pytest.raises(ValueError, match=f"train is a split; give the folder above it: {folder}"):
        write_shards(folder / "train", tmp_path / "out")


def test_shards_are_not_written_among_the_pictures(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", {"a.png": small("PNG")})
    with pytest.raises(ValueError, match=f"{folder}: holds the pictures; use another folder"):
        write_shards(folder, folder, progress=False)
    assert not list(folder.glob("**/*.tar"))


def test_what_cannot_be_taken_is_told_all_at_once_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {f"{number}.png": small("PNG") for number in range(30)}
    folder = make_folder(
        tmp_path / "data", {**pictures, "a.svg": b"", "b": b"", "c.png": b"", "d.mp4": b""}
    )
    (folder / "train" / "0.png").unlink()
    (folder / "train" / "1.png").unlink()
    os.mkfifo(folder / "train" / "1.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "train" / "2.png").unlink()
    (folder / "train" / "2.png").symlink_to(tmp_path / "secret.png")
    (folder / "train" / "c.png").unlink()
    (folder / "train" / "c.png").symlink_to("3.png")  # inside
    assert main(["shard", str(folder), str(tmp_path / "out"), "--quiet"]) == 1
    told = capsys.readouterr().err
    for message in (
        "0.png: No such file or directory",
        "1.png: expected a regular file",
        f"2.png leads by a link to {tmp_path}/secret.png, outside of {folder}/train",
        "a.svg: expected a picture named .jpg",
        "/b: expected a picture named",
        "d.mp4: expected a picture named",
    ):
        assert message in told
    assert "c.png" not in told
    assert not list((tmp_path / "out").glob("**/*.tar"))


def test_a_pipe_for_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train" / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv: expected a regular file"):
        write_shards(tmp_path, tmp_path / "out", progress=False)


def test_a_second_run_is_refused_while_the_first_writes_and_leftovers_are_removed(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shard", str(folder), str(tmp_path), "--samples-per-shard", "7", "--quiet"]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / ".000001.tar.0123.part").write_bytes(b"of a run that was killed")
    with one_writer(tmp_path):
        assert main(command) == 1
        assert "another run writes shards into it" in capsys.readouterr().err
    assert main(command) == 0
    assert contents(tmp_path) == contents(shards)
    assert not list(tmp_path.glob("**/*.part"))


def test_writers_that_know_nothing_of_each_other_leave_whole_shards(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    write = functools.partial(write_shards, folder, tmp_path, samples_per_shard=7, progress=False)
    with ThreadPoolExecutor(4) as pool:
        for written in [pool.submit(write) for _ in range(4)]:
            assert sum(written.result()["train"].values()) == SAMPLES
    assert contents(tmp_path) == contents(shards)


@pytest.mark.parametrize("keep", [0, 700, 0.5])
def test_shards_in_which_energon_finds_other_samples_are_refused_by_name(
    shards: Path, tmp_path: Path, keep: float
) -> None:
    from step37_energon.task_encoder import prepare_shards

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    names = sorted(path.relative_to(copy).as_posix() for path in copy.glob("**/*.tar"))
    with pytest.raises(ValueError, match=r"000000\.tar: 8 samples were written, Energon finds 7"):
        prepare_shards(copy, {"train": dict.fromkeys(names, 8)})
    whole = (copy / names[1]).read_bytes()
    (copy / names[1]).write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=r"train/000001\.tar"):
        prepare_shards(copy, {"train": dict.fromkeys(names[:2], 7)})


def test_a_picture_that_was_replaced_is_written_anew_and_other_shards_stay(tmp_path: Path) -> None:
    pictures = {f"{number}.png": small("PNG", number) for number in range(6)}
    folder, out = make_folder(tmp_path / "data", pictures), tmp_path / "out"
    command = ["shard", str(folder), str(out), "--samples-per-shard", "2", "--quiet"]
    assert main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/*.tar")}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("**/*.tar")}
    replaced = folder / "train" / "2.png"
    times = replaced.stat().st_atime_ns, replaced.stat().st_mtime_ns
    for data, change in (
        (small("PNG", 200), (times[0], times[1] - 10**9)),  # as long, and of another time
        (small("PNG", 99) + b"\0", (times[0], times[1] - 10**9)),
    ):
        replaced.write_bytes(data)
        os.utime(replaced, ns=change)
        assert main(command) == 0
        with tarfile.open(out / "train" / "000001.tar") as tar:
            file = tar.extractfile("000000002.png")
            assert file is not None
            assert file.read() == data
    after = {path: path.stat().st_mtime_ns for path in out.glob("**/*.tar")}
    assert [path.name for path in sorted(after) if after[path] != before[path]] == ["000001.tar"]


def test_a_cut_shard_and_a_damaged_journal_are_healed_and_a_damaged_origin_is_refused(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    command = ["shard", str(folder), str(out), "--samples-per-shard", "7", "--quiet"]
    for number, size in (("0", 0), ("1", 700), ("2", -10240), ("3", -20000)):
        shard = out / "train" / f"00000{number}.tar"
        shard.write_bytes(shard.read_bytes()[:size])
    (out / "train" / "000004.tar").unlink()
    journal = out / "train" / ".step37_written.jsonl"
    for damage in (b"", b"{", b"\xff\n[]\n5\n{}\nnull", journal.read_bytes()[:-30]):
        journal.write_bytes(damage)
        assert main(command) == 0
        assert contents(out) == contents(shards)
    (out / "train" / ".step37_origin.json").write_text('{"samples": ')
    assert main(command) == 1
    told = capsys.readouterr().err
    assert f"{out}/train/.step37_origin.json is damaged" in told
    assert f"delete {out}/train or use another folder" in told


@pytest.mark.parametrize(
    "link", ["train", "train/.step37_written.jsonl", ".nv-meta", ".step37_lock"]
)
def test_a_link_in_the_folder_of_the_shards_leads_no_writing_outside(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str
) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(outside / "file" if "." in link[1:] or "lock" in link else outside)
    assert main(["shard", str(folder), str(out), "--quiet"]) == 1
    assert f"{link} leads by a link to {outside}" in capsys.readouterr().err
    assert not list(outside.iterdir())


def test_energon_prepare_accepts_the_shards_without_questions(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns(".nv-meta", "*.idx"))
    options = "--non-interactive --split-parts train:train/ --num-workers 1"
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(copy)]
    done = subprocess.run(
        [*command, *options.split(), "--sample-type", "CrudeWebdataset"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=HANGS_AFTER_S,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("split.yaml", ".info.json"):
        assert (copy / ".nv-meta" / name).read_text() == (shards / ".nv-meta" / name).read_text()
