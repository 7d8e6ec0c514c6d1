"""``step37-data shard``: the same folder, the same bytes; it goes on where it stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from step37_energon.shards import write_shards
from step37_inspect.cli import main
from tests.energon.conftest import SAMPLES
from tests.limits import HANGS_AFTER_S

pytest.importorskip("megatron.energon", reason="the extra energon is not installed")


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
    assert made == {"train": ["train/000000.tar"], "val": ["val/000000.tar"]}
    (tmp_path / "data" / "val" / "metadata.csv").write_text("file_name,caption_0\na.tif,A.\n")
    with pytest.raises(ValueError, match=r"a\.tif: expected a picture named \.jpg"):
        write_shards(tmp_path / "data", tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="no caption_9 and file_name"):
        write_shards(tmp_path / "data", tmp_path / "none", caption_key="caption_9")


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
