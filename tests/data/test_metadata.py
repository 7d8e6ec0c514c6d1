"""What is read from ``metadata.csv``, and what is made of its rows; no hub is asked."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from step37_data.caches.hub_cache import HubFolder
from step37_data.flickr8k_loader import (
    Flickr8kSample,
    Step37Flickr8kDataset,
    prepare_flickr8k_samples,
    read_flickr8k_metadata,
)
from step37_data.text.messages import caption_dialogue
from tests.limits import HANGS_AFTER_S

MINI = Path(__file__).parents[2] / "examples" / "flickr8k_mini"


def test_rows_without_a_caption_or_file_name_and_short_rows_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "d.jpg", "f.jpg"):
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train" / "metadata.csv").write_text(
        "\ufefffile_name,caption_0,caption_1\n"
        "a.jpg, first ,x\n"
        "b.jpg,,x\n"
        " ,no file,x\n"
        "c.jpg\n"
        "\n"
        "d.jpg,second\n"
        'f.jpg,"third, with ""quotes"" and é",x\n',
        encoding="utf-8",
    )
    with caplog.at_level(logging.WARNING):
        samples = prepare_flickr8k_samples(cache_dir=tmp_path)
    assert [(Path(sample.image_path).name, sample.caption) for sample in samples] == [
        ("a.jpg", "first"),
        ("d.jpg", "second"),
        ("f.jpg", 'third, with "quotes" and é'),
    ]
    said = f"{tmp_path}/train/metadata.csv: 3 rows without file_name or caption_0 are skipped"
    assert caplog.messages == [said]


METADATA_ERRORS = {
    "surplus": (
        b"file_name,caption_0\na.jpg,A dog\nb.jpg,A cat, black, asleep\n",
        r"line 3: expected the 2 cells .* got \['b.jpg', 'A cat', ' black', .*; quote a text",
    ),
    "quote": (
        b'file_name,caption_0\na.jpg,A dog\nb.jpg,"A cat\nc.jpg,A bird\nd.jpg,A fish\n',
        "line 3: unexpected end of data, in a row read up to line 5; is a quote not closed",
    ),
    "quotes": (
        b'file_name,caption_0\na.jpg,A dog\nb.jpg,"A cat\nc.jpg,"A bird"\n',
        r"line 3: .* in a row read up to line 4; is a quote not closed\?",
    ),
    "latin-1": ("file_name,caption_0\na.jpg,café\n".encode("latin-1"), "expected text in UTF-8: "),
    "long": (b"file_name,caption_0\na.jpg," + b"x" * 200_000, "line 2: field larger than"),
    "header": (b'file_name,"caption_0\na.jpg,A dog\n', "line 1: unexpected end of data"),
}


@pytest.mark.parametrize("case", METADATA_ERRORS)
def test_metadata_that_would_lose_text_is_refused_with_file_and_line(
    tmp_path: Path, case: str
) -> None:
    content, message = METADATA_ERRORS[case]
    (tmp_path / "train").mkdir()
    metadata = tmp_path / "train" / "metadata.csv"
    metadata.write_bytes(content)
    for read in (
        lambda: read_flickr8k_metadata(metadata),
        lambda: prepare_flickr8k_samples(cache_dir=tmp_path),
    ):
        with pytest.raises(ValueError, match=rf"\A{metadata}[,:] [^\n]*\Z") as info:
            read()
        assert re.search(message, str(info.value))


def test_nothing_prepared_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    shutil.copytree(MINI / "train", tmp_path / "train")
    with pytest.raises(RuntimeError, match=r"no sample prepared.*'caption_9'|caption_9.*caption_0"):
        prepare_flickr8k_samples(cache_dir=tmp_path, caption_key="caption_9")


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "at least 1, got 0"), (-3, "at least 1, got -3"), (2.5, "an integer"), ("2", "an int")],
)
def test_a_sample_count_is_none_or_an_integer_of_at_least_1(
    tmp_path: Path, count: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"sample_count: expected {message}"):
        prepare_flickr8k_samples(cache_dir=tmp_path / "none", sample_count=count)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=f"sample_count: expected {message}"):
        read_flickr8k_metadata(MINI / "train" / "metadata.csv", sample_count=count)


def test_a_data_set_needs_samples_and_names_the_one_that_fails() -> None:
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        Step37Flickr8kDataset([], None, "?")  # type: ignore[arg-type]

    def refuse(_: Any) -> Any:
        raise ValueError("no good")

    dataset = Step37Flickr8kDataset([Flickr8kSample("a.jpg", "c")], refuse, "?")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sample 0 \(a\.jpg\): no good"):
        dataset[0]


@pytest.mark.parametrize("caption", [float("nan"), None, 3, b"A cat", "A cat \ud83d"])
def test_a_caption_that_is_no_text_makes_no_sample_and_its_file_is_named(caption: Any) -> None:
    with pytest.raises(ValueError, match=r"caption of b\.jpg: expected text .*, got "):
        Flickr8kSample("b.jpg", caption)


def test_the_keys_of_samples_follow_prompt_and_caption_not_the_path() -> None:
    def keys(prompt: str, *samples: tuple[str, str]) -> list[list[int]]:
        made = [Flickr8kSample(*sample) for sample in samples]
        return Step37Flickr8kDataset(made, None, prompt).sample_keys().tolist()  # type: ignore[arg-type]

    one, two, three = keys("p", ("a.jpg", "x"), ("b.jpg", "x"), ("a.jpg", "y"))
    assert one == two != three
    assert keys("q", ("a.jpg", "x"))[0] not in (one, three)


def test_prompt_and_caption_are_kept_apart_in_a_samples_key() -> None:
    def key(prompt: str, caption: str) -> list[list[int]]:
        samples = [Flickr8kSample("a.jpg", caption)]
        return Step37Flickr8kDataset(samples, None, prompt).sample_keys().tolist()

    assert key("ab", "c") != key("a", "bc")


def test_after_a_failure_nothing_more_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(_: HubFolder, name: str) -> None:
        asked.append(name)
        if name.endswith(".jpg"):
            time.sleep(0.02)
            raise OSError(f"{name}: no such file")

    monkeypatch.setattr(HubFolder, "fetch", fetch)
    (tmp_path / "train").mkdir()
    rows = "".join(f"{n}.jpg,A dog\n" for n in range(50))
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,caption_0\n{rows}")
    options: dict[str, Any] = {
        "repo_id": "a/b", "sample_count": None, "max_workers": 1, "progress": False,
    }  # fmt: skip
    with pytest.raises(OSError, match="no such file"):
        prepare_flickr8k_samples(cache_dir=tmp_path, **options)
    assert asked[0] == "train/metadata.csv"
    assert 1 < len(asked) < 10


def test_after_a_failure_nothing_more_is_fetched_while_an_earlier_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[str] = []
    failed = threading.Event()

    def fetch(_: HubFolder, name: str) -> None:
        if name == "0.jpg":
            failed.wait(HANGS_AFTER_S)
            time.sleep(0.3)  # for whatever is begun in spite of the failure
        elif name == "1.jpg":
            failed.set()
            raise OSError(f"{name}: no such file")
        else:
            others.append(name)

    monkeypatch.setattr(HubFolder, "fetch", fetch)
    folder = HubFolder(repo_id="a/b", cache_dir=tmp_path, max_workers=2, progress=False)
    with pytest.raises(OSError, match=r"1\.jpg: no such file"):
        folder.fetch_all([f"{n}.jpg" for n in range(50)], "a/b")
    assert others == []


def test_a_folder_is_listed_without_work_on_its_own_path_for_every_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.jpg" for number in range(200)]
    (tmp_path / "train").mkdir()
    for name in names:
        (tmp_path / "train" / name).write_bytes(b"x")
    rows = "".join(f"{name},A dog\n" for name in names)
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,caption_0\n{rows}")
    expanded: list[Path] = []
    looked: list[str] = []
    expand, look = Path.expanduser, os.stat
    monkeypatch.setattr(Path, "expanduser", lambda path: expanded.append(path) or expand(path))
    monkeypatch.setattr(
        os, "stat", lambda path, **how: looked.append(str(path)) or look(path, **how)
    )
    samples = prepare_flickr8k_samples(cache_dir=tmp_path, sample_count=None, progress=False)
    assert [Path(sample.image_path).name for sample in samples] == names
    assert len(expanded) < 10
    assert all(looked.count(sample.image_path) == 1 for sample in samples)


def test_all_bad_lines_of_the_metadata_are_told_at_once(tmp_path: Path) -> None:
    rows = [f"{n}.jpg,A dog\n" for n in range(1000)]
    rows[99] = "a.jpg,A cat, black\n"
    rows[500] = "../b.jpg,A cat\n"
    for n in range(600, 620):
        rows[n] = "c.jpg,A cat, black\n"
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,caption_0\n" + "".join(rows))
    with pytest.raises(ValueError, match=r"metadata\.csv, line 101: expected the 2") as caught:
        read_flickr8k_metadata(metadata)
    told = str(caught.value)
    assert re.findall(r"line (\d+)", told) == ["101", "502", *map(str, range(602, 610))]
    assert "'../b.jpg' leaves the folder" in told
    assert told.endswith("; and 12 more")
    assert len(read_flickr8k_metadata(metadata, sample_count=50)) == 50


def own_folder(folder: Path, there: list[str], named: list[str]) -> Path:
    for name in there:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    rows = "".join(f'"{name}",a dog\n' for name in named)
    (folder / "train" / "metadata.csv").write_text(f"file_name,caption_0\n{rows}", encoding="utf-8")
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)


@pytest.mark.usefixtures("no_hub")
def test_all_pictures_that_an_own_folder_lacks_are_told_at_once_and_none_is_downloaded(
    tmp_path: Path,
) -> None:
    named = [f"{n}.jpg" for n in range(30)]
    own_folder(tmp_path, named[:5], named)
    (tmp_path / "train" / "2.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv names 26 pictures that") as caught:
        prepare_flickr8k_samples(cache_dir=tmp_path, sample_count=None)
    told = str(caught.value)
    assert f"empty: {tmp_path}/train/2.jpg is empty; {tmp_path}/train/5.jpg is missing; " in told
    assert re.findall(r"(\d+)\.jpg is", told) == ["2", *map(str, range(5, 14))]
    assert "; and 16 more. This metadata.csv did not come from the hub, so nothing is" in told
    assert len(prepare_flickr8k_samples(cache_dir=tmp_path, sample_count=2)) == 2


@pytest.mark.usefixtures("no_hub")
def test_a_picture_whose_name_is_spelt_a_little_differently_is_named(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9.jpg", "cafe\u0301.jpg"
    there = ["Beach.JPG", "More/Cat.png", decomposed]
    own_folder(tmp_path, there, ["beach.jpg", "more/cat.png", composed, "dog.jpg"])
    with pytest.raises(FileNotFoundError, match="names 4 pictures") as caught:
        prepare_flickr8k_samples(cache_dir=tmp_path)
    told = str(caught.value)
    assert "beach.jpg is missing (there is 'Beach.JPG': the same name in upper or lower" in told
    assert "more/cat.png is missing (there is 'More/Cat.png': the same name in upper or" in told
    assert f"(there is '{decomposed}': the same name in another Unicode form" in told
    assert f"{tmp_path}/train/dog.jpg is missing. This" in told


def test_missing_pictures_of_an_own_folder_come_from_the_data_set_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, name: str, **_: Any) -> None:
        asked.append((repo_id, name))
        (tmp_path / name).write_bytes(b"x")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    own_folder(tmp_path, ["a.jpg"], ["a.jpg", "b.jpg"])
    assert len(prepare_flickr8k_samples(cache_dir=tmp_path, repo_id="me/mine", progress=False)) == 2
    assert asked == [("me/mine", "train/b.jpg")]


def test_the_last_of_two_columns_of_one_name_counts_and_short_rows_have_empty_cells(
    tmp_path: Path,
) -> None:
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("caption_0,file_name,caption_0\nx,a.jpg,first\ny,b.jpg\nz,c.jpg,third,\n")
    samples = read_flickr8k_metadata(metadata)
    assert [sample.caption for sample in samples] == ["first", "third"]


def test_a_caption_is_asked_for_after_its_picture_and_answered_by_the_assistant() -> None:
    dataset = Step37Flickr8kDataset(
        [Flickr8kSample("a.jpg", "A dog .")], lambda data: data, "What?"
    )  # type: ignore[arg-type]
    asked = {"role": "user", "content": "<image>\nWhat?"}
    answered = {"role": "assistant", "content": "A dog ."}
    assert dataset[0] == {"images": ["a.jpg"], "conversations": [asked, answered]}
    assert caption_dialogue("A dog .", "What?") == [asked, answered]
