"""Download, cache and ranks: the real huggingface_hub client against a hub on loopback.

The hub is a stand-in because the tests must work offline; it speaks the part of the protocol that
``hf_hub_download`` needs, and can fail in the ways a hub and a network fail.
"""

from __future__ import annotations

import hashlib
import http.server
import inspect
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from step37_data.caches import rank_order
from step37_data.caches.hub_cache import HubFolder
from step37_data.flickr8k_loader import (
    Flickr8kSample,
    get_flickr8k_dataset_file,
    prepare_flickr8k_samples,
)
from tests.data.ranks import in_ranks
from tests.limits import HANGS_AFTER_S

MINI = Path(__file__).parents[2] / "examples" / "flickr8k_mini"
REPO = "intro/flickr8k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Files of one data set behind the hub's URLs, with failures to order."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.revisions = {"main", COMMIT}
        self.gets: Counter[str] = Counter()
        self.failures: dict[str, list[str]] = {}  # of GETs, used up one by one
        self.head_failures: dict[str, list[str]] = {}
        self.headers_of_a_limit = {"Retry-After": "120"}
        self.slow = 0.0
        self.heads: Counter[str] = Counter()
        self.hash_of = lambda body: hashlib.sha256(body).hexdigest()
        self.lists = "the tree"  # or what is answered in its place
        self.page = 1000
        self.listings: list[str] = []  # paths of what the API was asked for
        self.allowed: float = float("inf")  # requests for files until somebody waits
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: Any, *, with_body: bool) -> None:
        path, _, query = request.path.partition("?")
        if path.startswith("/api/"):
            return self.answer_api(request, path, urllib.parse.parse_qs(query))
        match = re.fullmatch(rf"/datasets/{REPO}/resolve/([^/]+)/(.+)", path)
        if match is None or match[1] not in self.revisions:
            known = match is not None
            return self.refuse(request, 404, "RevisionNotFound" if known else "RepoNotFound")
        name = urllib.parse.unquote(match[2])
        if name not in self.files:
            return self.refuse(request, 404, "EntryNotFound")
        body = self.files[name]
        failure = ""
        with self.lock:
            self.allowed -= 1
            if self.allowed < 0:
                return self.refuse(request, 429, "", self.headers_of_a_limit)
        if not with_body:
            with self.lock:
                self.heads[name] += 1
                failure = self.head_failures[name].pop(0) if self.head_failures.get(name) else ""
        else:
            with self.lock:
                self.gets[name] += 1
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                failure = self.failures.get(name, [""]).pop(0) if self.failures.get(name) else ""
        try:
            threading.Event().wait(self.slow if with_body else 0)
            if failure.isdecimal():
                limit = self.headers_of_a_limit if failure == "429" else {}
                return self.refuse(request, int(failure), "", limit)
            etag = self.hash_of(body)
            resumed = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
            request.send_response(206 if resumed and with_body else 200)
            if resumed and with_body:
                first, last = int(resumed[1]), len(body) - 1
                request.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
                body = body[first:]
            request.send_header("ETag", f'"{etag}"')
            request.send_header("X-Repo-Commit", COMMIT)
            sent = body[: len(body) // 2] if failure in ("cut", "wrong length") else body
            sent = b"" if failure == "empty" else sent
            # A wrong length is a whole answer with half of the bytes; a cut one breaks off.
            promised = len(sent) if failure in ("wrong length", "empty") else len(body)
            request.send_header("Content-Length", str(promised))
            request.end_headers()
            if with_body:
                request.wfile.write(sent)
            if failure == "cut":
                request.close_connection = True
        finally:
            if with_body:
                with self.lock:
                    self.at_once -= 1
        return None

    def answer_api(self, request: Any, path: str, query: dict[str, list[str]]) -> None:
        """The commit of a revision, or a page of the files of a folder, as the hub tells them."""
        with self.lock:
            self.listings.append(path)
        if self.lists != "the tree":
            status, told = (404, "") if self.lists == "404" else (200, self.lists)
            return self.send_json(request, status, told.encode())
        _, of_revision, revision = path.partition(f"/api/datasets/{REPO}/revision/")
        if of_revision or path == f"/api/datasets/{REPO}":
            if of_revision and revision not in self.revisions:
                return self.refuse(request, 404, "RevisionNotFound")
            told = {"id": REPO, "sha": COMMIT, "siblings": [], "tags": []}
            return self.send_json(request, 200, json.dumps(told).encode())
        folder = path.partition(f"/tree/{COMMIT}/")[2]
        names = sorted(name for name in self.files if name.startswith(f"{folder}/"))
        start = int(query.get("cursor", ["0"])[0])
        more = start + self.page < len(names)
        follows = f"{self.url}{path}?recursive=True&cursor={start + self.page}"
        link = {"Link": f'<{follows}>; rel="next"'} if more else {}
        entries = [self.entry(name) for name in names[start : start + self.page]]
        return self.send_json(request, 200, json.dumps(entries).encode(), link)

    def entry(self, name: str) -> dict[str, Any]:
        """As the hub tells of a file: of a large one also the hash of its content."""
        body = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        told: dict[str, Any] = {"type": "file", "path": name, "oid": blob, "size": len(body)}
        if len(body) > 1000:
            told["lfs"] = {"oid": self.hash_of(body), "size": len(body), "pointerSize": 129}
        return told

    def send_json(
        self, request: Any, status: int, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def refuse(
        self, request: Any, status: int, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def mini_files() -> dict[str, bytes]:
    return {
        path.relative_to(MINI).as_posix(): path.read_bytes() for path in (MINI / "train").iterdir()
    }


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")


def let_the_client_ask_loopback() -> None:
    """What the fixture ``hub`` does for this process, for good: in a rank."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    for variable in PROXIES:
        os.environ.pop(variable, None)
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.file_download.time.sleep = lambda _: None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for variable in PROXIES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # The client waits a second and more before it resumes a broken download by itself. This is
    # time.sleep for everyone: whatever must take time here waits for an event instead.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    served = Hub(mini_files())
    before = set(threading.enumerate())
    yield served
    # After a failure nobody has waited for the other downloads.
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("step37"):
            thread.join(HANGS_AFTER_S)
    served.server.shutdown()
    served.server.server_close()


def prepare(hub: Hub, cache: Path, **options: Any) -> list[Flickr8kSample]:
    return prepare_flickr8k_samples(
        **{"cache_dir": cache, "endpoint": hub.url, "progress": False} | options
    )


def data_files(cache: Path) -> dict[str, bytes]:
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(cache).parts
    }


def test_the_first_samples_are_downloaded_in_the_order_of_the_metadata(
    hub: Hub, tmp_path: Path
) -> None:
    samples = prepare(hub, tmp_path, sample_count=3)
    assert [Path(sample.image_path).name for sample in samples] == [
        "astronaut.jpg", "camera.jpg", "chelsea.jpg",
    ]  # fmt: skip
    assert samples[2].caption == "A tabby cat with green eyes looks past the camera ."
    names = {"train/metadata.csv", *(f"train/{Path(s.image_path).name}" for s in samples)}
    assert data_files(tmp_path) == {name: hub.files[name] for name in names}


def test_eight_samples_are_the_default_and_none_takes_all(hub: Hub, tmp_path: Path) -> None:
    lines = hub.files["train/metadata.csv"].decode().splitlines()
    hub.files["train/metadata.csv"] = "\n".join([*lines, lines[1]]).encode()
    assert len(prepare(hub, tmp_path)) == 8
    assert len(prepare(hub, tmp_path, sample_count=None)) == 9


def test_the_caption_column_can_be_chosen(hub: Hub, tmp_path: Path) -> None:
    (sample,) = prepare(hub, tmp_path, sample_count=1, caption_key="caption_3")
    assert sample.caption == "A person with short hair wears a pressure suit with blue patches ."


def test_a_filled_cache_is_used_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    first = prepare(hub, tmp_path)
    hub.gets.clear()
    hub.files.clear()
    assert prepare(hub, tmp_path) == first
    assert not hub.gets


def test_a_folder_copied_from_elsewhere_works_offline_and_is_not_written_to(
    tmp_path: Path,
) -> None:
    shutil.copytree(MINI / "train", tmp_path / "train")
    before = sorted(tmp_path.rglob("*"))
    samples = prepare_flickr8k_samples(cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    assert len(samples) == 8
    assert sorted(tmp_path.rglob("*")) == before


def test_several_files_are_downloaded_at_a_time(hub: Hub, tmp_path: Path) -> None:
    hub.slow = 0.3
    prepare(hub, tmp_path, max_workers=4)
    assert hub.most_at_once == 4


def test_a_progress_bar_counts_the_files_unless_it_is_switched_off(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(hub, tmp_path / "quiet", progress=False)
    assert "Downloading" not in capsys.readouterr().err
    prepare_flickr8k_samples(cache_dir=tmp_path / "told", endpoint=hub.url)
    shown = capsys.readouterr().err
    assert "Downloading intro/flickr8k/train: 100%" in shown
    assert "8/8" in shown
    assert "astronaut" not in shown


@pytest.mark.parametrize("failure", ["500", "503", "cut", "wrong length", "empty"])
def test_a_failure_in_passing_is_overcome(hub: Hub, tmp_path: Path, failure: str) -> None:
    hub.failures = {"train/coffee.jpg": [failure], "train/metadata.csv": [failure]}
    prepare(hub, tmp_path)
    assert data_files(tmp_path) == hub.files
    assert hub.gets["train/coffee.jpg"] >= 2


@pytest.mark.parametrize("failure", ["500", "cut", "wrong length", "empty"])
def test_a_lasting_failure_names_the_file_and_leaves_no_half_file(
    hub: Hub, tmp_path: Path, failure: str
) -> None:
    hub.failures = {"train/coffee.jpg": [failure] * 999}
    with pytest.raises(OSError, match=r"intro/flickr8k/train/coffee\.jpg could not be downloaded"):
        prepare(hub, tmp_path)
    assert "train/coffee.jpg" not in data_files(tmp_path)
    assert all(content == hub.files[name] for name, content in data_files(tmp_path).items())


def test_a_missing_file_is_not_tried_again(hub: Hub, tmp_path: Path) -> None:
    del hub.files["train/coffee.jpg"]
    with pytest.raises(FileNotFoundError, match=r"train/coffee\.jpg could not be downloaded: "):
        prepare(hub, tmp_path)


def test_an_interrupted_download_continues(hub: Hub, tmp_path: Path) -> None:
    hub.failures = {"train/retina.jpg": ["500"] * 999}
    with pytest.raises(OSError, match=r"retina\.jpg"):
        prepare(hub, tmp_path, max_workers=1)
    there = set(data_files(tmp_path))
    assert there
    hub.failures.clear()
    hub.gets.clear()
    prepare(hub, tmp_path)
    assert set(hub.gets) == set(hub.files) - there


def test_an_empty_file_is_not_taken_for_a_whole_one(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "coffee.jpg").touch()
    prepare(hub, tmp_path)
    assert data_files(tmp_path) == hub.files


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "link to nothing":
        path.unlink()
        path.symlink_to(path.parent / "nothing")
    else:
        garbled = bytes(byte ^ 1 for byte in whole[:50]) + whole[50:]
        path.write_bytes({"empty": b"", "cut": whole[:-9], "garbled": garbled}[how])


@pytest.mark.parametrize("name", ["train/coffee.jpg", "train/metadata.csv"])
@pytest.mark.parametrize("how", ["empty", "cut", "garbled", "link to nothing"])
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(
    *,
    hub: Hub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    how: str,
    revision: Any,
) -> None:
    prepare(hub, tmp_path, revision=revision)
    damage(tmp_path / name, how)
    hub.gets.clear()
    prepare(hub, tmp_path, revision=revision)
    assert data_files(tmp_path) == hub.files
    assert hub.gets == {name: 1}
    assert how == "link to nothing" or f"{tmp_path / name} is damaged: expected" in caplog.text


def test_git_hashes_of_small_files_are_compared_too(hub: Hub, tmp_path: Path) -> None:
    def git(body: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    hub.hash_of = git
    prepare(hub, tmp_path)
    damage(tmp_path / "train" / "metadata.csv", "garbled")
    hub.gets.clear()
    prepare(hub, tmp_path)
    assert data_files(tmp_path) == hub.files
    assert hub.gets == {"train/metadata.csv": 1}


def test_what_does_not_fit_its_hash_after_a_second_download_is_an_error_with_both_hashes(
    hub: Hub, tmp_path: Path
) -> None:
    found = hashlib.sha256(hub.files["train/coffee.jpg"]).hexdigest()
    hub.hash_of = lambda body: hashlib.sha256(body + b"?").hexdigest()
    with pytest.raises(
        OSError,
        match=rf"coffee\.jpg is damaged: expected the hash \w+, found {found} of \d+ bytes, also",
    ):
        fetch_one(hub, tmp_path, "train/coffee.jpg")
    assert hub.gets["train/coffee.jpg"] == 2


def test_a_damaged_file_is_an_error_where_the_hub_is_out_of_reach(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(hub, tmp_path)
    damage(tmp_path / "train" / "coffee.jpg", "cut")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"coffee\.jpg is damaged: .* could not be downl"):
        prepare(hub, tmp_path)


def test_a_folder_in_the_place_of_an_image_is_an_error(hub: Hub, tmp_path: Path) -> None:
    prepare(hub, tmp_path)
    damage(tmp_path / "train" / "coffee.jpg", "folder")
    with pytest.raises(OSError, match=r"coffee\.jpg is not a regular file"):
        prepare(hub, tmp_path)


def test_ranks_whose_cache_was_damaged_mend_it_together(hub: Hub, tmp_path: Path) -> None:
    prepare(hub, tmp_path)
    for number, name in enumerate(sorted(set(hub.files) - {"train/metadata.csv"})[:3]):
        damage(tmp_path / name, ("empty", "cut", "garbled")[number])
    hub.gets.clear()
    results = in_ranks(2, prepare_in_rank, hub.url, [tmp_path] * 2, {})
    assert data_files(tmp_path) == hub.files
    assert sum(hub.gets.values()) == 3
    assert len(results) == 2


@pytest.mark.parametrize("link", ["train", ".cache/huggingface", ".cache"])
def test_nothing_is_written_where_a_link_leads_out_of_the_cache(
    hub: Hub, tmp_path: Path, link: str
) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    (cache / link).parent.mkdir(parents=True)
    (cache / link).symlink_to(outside)
    with pytest.raises(ValueError, match=r"leads by a link to .*outside"):
        prepare(hub, cache)
    assert not [path for path in outside.rglob("*") if path.is_file()]
    assert not hub.gets


def test_a_folder_of_links_to_a_copy_elsewhere_is_read_as_it_is(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(MINI / "train")
    assert len(prepare(hub, tmp_path)) == 8
    assert not hub.gets


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_answers_500_for_good_is_given_up_and_no_file_is_called_missing(
    hub: Hub, tmp_path: Path, method: str
) -> None:
    failing = hub.head_failures if method == "HEAD" else hub.failures
    failing["train/metadata.csv"] = ["500"] * 999
    with pytest.raises(OSError, match=r"metadata\.csv could not be downloaded: .*500") as caught:
        prepare(hub, tmp_path)
    assert not isinstance(caught.value, FileNotFoundError)
    # How often the client asks for the header depends on its version.
    assert hub.heads["train/metadata.csv"] <= 8
    assert hub.gets["train/metadata.csv"] == (0 if method == "HEAD" else 2)


def the_client_waits() -> bool:
    """Whether the installed client knows both headers by which a hub says how long to wait."""
    asks = inspect.signature(huggingface_hub.get_hf_file_metadata).parameters
    known = hasattr(huggingface_hub.utils._http, "_parse_retry_after")
    return known and "retry_on_errors" in asks


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept, in seconds, in place of sleeping."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.mark.skipif(not the_client_waits(), reason="this huggingface_hub does not wait for a limit")
@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "headers", [{"Retry-After": "300"}, {"RateLimit": '"resolvers";r=0;t=300'}]
)
def test_a_limit_of_the_hub_is_waited_for_as_long_as_the_hub_asks_and_told(
    *,
    hub: Hub,
    tmp_path: Path,
    method: str,
    headers: dict[str, str],
    pauses: list[float],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    hub.headers_of_a_limit = headers
    failing = hub.head_failures if method == "HEAD" else hub.failures
    # The first HEAD is asked without waiting; see the client's fallback to a local file.
    failing["train/coffee.jpg"] = ["429"] * 3
    prepare(hub, tmp_path)
    assert data_files(tmp_path) == hub.files
    assert max(pauses) == 301.0
    assert "Rate limited. Waiting 301.0s" in caplog.text
    asked = hub.heads if method == "HEAD" else hub.gets
    assert asked["train/coffee.jpg"] == 4
    assert sum(hub.heads.values()) + sum(hub.gets.values()) == 2 * len(hub.files) + 3


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_limit_that_lasts_is_told_as_a_limit_and_not_as_a_missing_file(
    hub: Hub, tmp_path: Path, method: str, pauses: list[float]
) -> None:
    failing = hub.head_failures if method == "HEAD" else hub.failures
    failing["train/coffee.jpg"] = ["429"] * 999
    with pytest.raises(
        OSError, match=r"coffee\.jpg could not be downloaded: the hub limits requests, for longer"
    ) as caught:
        prepare(hub, tmp_path, max_workers=1)
    assert not isinstance(caught.value, FileNotFoundError)
    assert "what is there is kept" in str(caught.value)
    failing.clear()
    kept = set(data_files(tmp_path))
    hub.gets.clear()
    prepare(hub, tmp_path)
    assert set(hub.gets) == set(hub.files) - kept
    assert not the_client_waits() or 121.0 in pauses


def test_a_failure_is_told_while_other_files_still_wait_for_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep, woken, slept = threading.Event(), threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        asleep.set()
        woken.wait(HANGS_AFTER_S)
        slept.set()

    real = HubFolder.fetch

    def fetch(folder: HubFolder, name: str) -> str:
        if name == "train/astronaut.jpg":
            asleep.wait(HANGS_AFTER_S)
            raise FileNotFoundError(name)
        return real(folder, name)

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(HubFolder, "fetch", fetch)
    hub.failures["train/camera.jpg"] = ["503", "429"]
    hub.head_failures["train/camera.jpg"] = ["429"] * 2
    with pytest.raises(FileNotFoundError, match=r"astronaut\.jpg"):
        prepare(hub, tmp_path, max_workers=2)
    assert not slept.is_set()
    woken.set()


@pytest.mark.parametrize("count", [0, 1.5])
def test_the_number_of_downloads_at_a_time_is_an_integer_of_at_least_1(
    tmp_path: Path, count: Any
) -> None:
    with pytest.raises(ValueError, match="max_workers: expected a"):
        prepare_flickr8k_samples(cache_dir=tmp_path, max_workers=count)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_worker'"):
        prepare_flickr8k_samples(cache_dir=tmp_path, max_worker=2)


def test_a_small_download_asks_twice_for_every_file(hub: Hub, tmp_path: Path) -> None:
    prepare(hub, tmp_path)
    assert hub.heads == hub.gets == dict.fromkeys(hub.files, 1)
    assert not hub.listings


MANY = 100


@pytest.fixture
def large_hub(hub: Hub) -> Hub:
    """The hub with a hundred pictures, some of which the hub stores apart; they hold anything."""
    names = [f"more/{number}.jpg" if number % 3 else f"{number}.jpg" for number in range(MANY)]
    listing = "file_name,caption_0\n" + "".join(f"{name},A picture.\n" for name in names)
    bodies = [b"%d" % number * (700 + number % 9 * 100) for number in range(MANY)]
    hub.files = {f"train/{name}": body for name, body in zip(names, bodies, strict=True)}
    hub.files["train/metadata.csv"] = listing.encode()
    return hub


def prepare_all(hub: Hub, cache: Path, **options: Any) -> None:
    assert len(prepare(hub, cache, sample_count=None, **options)) == MANY


def test_a_large_download_asks_once_for_every_picture_and_lists_them_before(
    large_hub: Hub, tmp_path: Path
) -> None:
    large_hub.page = 40
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.heads == {"train/metadata.csv": 1}
    assert large_hub.gets == dict.fromkeys(large_hub.files, 1)
    # The commit, and 101 files in pages of 40.
    of_tree = f"/api/datasets/{REPO}/tree/{COMMIT}/train"
    assert large_hub.listings == [f"/api/datasets/{REPO}", of_tree, of_tree, of_tree]


@pytest.mark.parametrize("name", ["train/0.jpg", "train/more/8.jpg"])
@pytest.mark.parametrize("how", ["cut", "garbled", "empty"])
def test_what_a_large_download_brought_is_compared_with_the_hashes_of_the_listing(
    large_hub: Hub, tmp_path: Path, name: str, how: str
) -> None:
    prepare_all(large_hub, tmp_path)
    large_hub.gets.clear()
    large_hub.lists = "404"  # nothing is listed for one file
    damage(tmp_path / name, how)
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.gets == {name: 1}


@pytest.mark.parametrize("answer", ["404", "", "<html>Hello</html>", "[]", "{}", '{"sha": 1}'])
def test_a_mirror_that_lists_nothing_is_asked_twice_for_every_file(
    large_hub: Hub, tmp_path: Path, answer: str
) -> None:
    large_hub.lists = answer
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.heads == large_hub.gets == dict.fromkeys(large_hub.files, 1)


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("failure", ["cut", "wrong length", "empty", "500", "503", "429"])
def test_a_failure_in_passing_of_a_large_download_is_overcome(
    large_hub: Hub, tmp_path: Path, failure: str
) -> None:
    if failure == "429" and not the_client_waits():
        pytest.skip("this huggingface_hub does not wait for a limit")
    large_hub.failures = {"train/0.jpg": [failure], "train/more/8.jpg": [failure]}
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.gets["train/0.jpg"] == large_hub.gets["train/more/8.jpg"] == 2


def test_a_file_that_is_no_longer_as_listed_is_asked_for_with_its_header(
    large_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = large_hub.entry

    def entry(name: str) -> dict[str, Any]:
        return real(name) | ({"oid": "0" * 40, "lfs": None} if name == "train/0.jpg" else {})

    monkeypatch.setattr(large_hub, "entry", entry)
    del large_hub.files["train/3.jpg"]
    with pytest.raises(FileNotFoundError, match=r"train/3\.jpg could not be downloaded"):
        prepare_all(large_hub, tmp_path)
    large_hub.files["train/3.jpg"] = b"new"
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.heads["train/0.jpg"] == 1


@pytest.mark.parametrize("kind", ["sha1", "md5", "nothing"])
def test_a_mirror_may_list_other_hashes(large_hub: Hub, tmp_path: Path, kind: str) -> None:
    large_hub.hash_of = {
        "sha1": lambda body: hashlib.sha1(body).hexdigest(),
        "md5": lambda body: hashlib.md5(body).hexdigest(),
        "nothing": lambda _: "x" * 64,
    }[kind]
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.gets == dict.fromkeys(large_hub.files, 1)
    large_hub.gets.clear()
    damage(tmp_path / "train" / "more" / "8.jpg", "garbled")  # one with such a hash
    prepare_all(large_hub, tmp_path)
    # A hash of an unknown kind proves nothing and refuses nothing.
    assert large_hub.gets == ({"train/more/8.jpg": 1} if kind == "sha1" else {})


def test_names_with_characters_that_an_address_writes_otherwise_are_asked_for(
    large_hub: Hub, tmp_path: Path
) -> None:
    odd = "more/a b#1%20?é猫+&.jpg"
    large_hub.files[f"train/{odd}"] = large_hub.files.pop("train/more/8.jpg")
    listing = large_hub.files["train/metadata.csv"].decode()
    large_hub.files["train/metadata.csv"] = listing.replace("more/8.jpg", odd).encode()
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    assert large_hub.gets[f"train/{odd}"] == 1


def test_a_large_file_is_streamed_by_the_client(
    large_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step37_data.caches.hub_listing._LARGEST", 1500)
    prepare_all(large_hub, tmp_path)
    assert data_files(tmp_path) == large_hub.files
    large = {name for name, body in large_hub.files.items() if len(body) > 1500}
    assert set(large_hub.heads) == large | {"train/metadata.csv"}
    assert len(large) in range(10, 90)


def test_a_large_download_is_of_the_pinned_revision(large_hub: Hub, tmp_path: Path) -> None:
    large_hub.revisions = {COMMIT, "v1"}
    prepare_all(large_hub, tmp_path, revision="v1")
    assert large_hub.listings[0] == f"/api/datasets/{REPO}/revision/v1"
    assert sum(large_hub.heads.values()) == 1


@pytest.mark.skipif(not the_client_waits(), reason="this huggingface_hub does not wait for a limit")
@pytest.mark.parametrize(("lists", "asked", "waits"), [("the tree", 102, 2), ("404", 202, 5)])
def test_a_listing_halves_how_often_a_limited_hub_is_waited_for(
    large_hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lists: str,
    asked: int,
    waits: int,
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        large_hub.allowed = 40

    monkeypatch.setattr(time, "sleep", sleep)
    large_hub.lists, large_hub.allowed = lists, 40
    large_hub.headers_of_a_limit = {"Retry-After": "300"}
    prepare_all(large_hub, tmp_path, max_workers=1)
    assert data_files(tmp_path) == large_hub.files
    assert sum(large_hub.heads.values()) + sum(large_hub.gets.values()) == asked
    assert slept == [301.0] * waits


def test_a_damaged_file_is_kept_where_nothing_better_can_be_had(hub: Hub, tmp_path: Path) -> None:
    prepare(hub, tmp_path)
    damage(tmp_path / "train" / "coffee.jpg", "cut")
    cut = data_files(tmp_path)
    hub.failures["train/coffee.jpg"] = ["500"] * 999
    with pytest.raises(OSError, match=r"coffee\.jpg is damaged: .* could not be downloaded"):
        prepare(hub, tmp_path)
    assert data_files(tmp_path) == cut


def test_a_mirror_may_give_the_sha_1_of_the_content(hub: Hub, tmp_path: Path) -> None:
    hub.hash_of = lambda body: hashlib.sha1(body).hexdigest()
    prepare(hub, tmp_path)
    damage(tmp_path / "train" / "coffee.jpg", "garbled")
    hub.gets.clear()
    prepare(hub, tmp_path)
    assert data_files(tmp_path) == hub.files
    assert hub.gets == {"train/coffee.jpg": 1}


@pytest.mark.parametrize("etag", ["5d41402abc4b2a76b9719d911017c592", "x" * 40, "y" * 64, "1f-6"])
def test_a_hash_of_an_unknown_kind_proves_nothing_and_refuses_nothing(
    hub: Hub, tmp_path: Path, etag: str
) -> None:
    hub.hash_of = lambda _: etag
    prepare(hub, tmp_path)
    hub.gets.clear()
    damage(tmp_path / "train" / "coffee.jpg", "garbled")
    damage(tmp_path / "train" / "clock.jpg", "empty")
    prepare(hub, tmp_path)
    assert hub.gets == {"train/clock.jpg": 1}


def test_a_broken_note_of_the_caches_origin_is_named(hub: Hub, tmp_path: Path) -> None:
    prepare(hub, tmp_path)
    note = tmp_path / ".cache" / "step37_origin.json"
    for content in (b"{", b"\xff", b""):
        note.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"step37_origin\.json says .*, not .*; use another folder"
        ):
            prepare(hub, tmp_path)


def fetch_one(hub: Hub, cache: Path, name: str) -> Path:
    return get_flickr8k_dataset_file(name, repo_id=REPO, cache_dir=cache, endpoint=hub.url)


def test_a_hub_out_of_reach_is_an_error_that_says_so(tmp_path: Path, hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv could not be downloaded: "):
        prepare(hub, tmp_path)


def test_offline_mode_is_not_tried_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv could not be downloaded: "):
        prepare(hub, tmp_path)
    assert not hub.gets


def test_a_misspelt_split_of_an_own_folder_names_the_file_that_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(MINI / "train", tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/trian/metadata.csv is missing, and"):
        prepare_flickr8k_samples(cache_dir=tmp_path, split="trian")


def test_a_revision_can_be_pinned(hub: Hub, tmp_path: Path) -> None:
    hub.revisions = {COMMIT}
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv could not be downloaded"):
        prepare(hub, tmp_path / "a")
    assert len(prepare(hub, tmp_path / "b", revision=COMMIT)) == 8


def test_a_cache_of_another_revision_or_data_set_is_refused(hub: Hub, tmp_path: Path) -> None:
    prepare(hub, tmp_path, revision=COMMIT)
    for other in ({"revision": "main"}, {}, {"revision": COMMIT, "repo_id": "a/b"}):
        with pytest.raises(ValueError, match=f"says .*{COMMIT}.*, not "):
            prepare(hub, tmp_path, **other)


def test_a_revision_of_a_copied_folder_is_said_to_be_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(MINI / "train", tmp_path / "train")
    with caplog.at_level(logging.WARNING):
        prepare_flickr8k_samples(cache_dir=tmp_path, revision=COMMIT)
    assert f"not filled by this loader, revision {COMMIT} is not checked" in caplog.text


OUTSIDE = ["../evil.jpg", "/etc/passwd", "a/../../evil.jpg", "..", "a/../.."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_name_in_the_metadata_that_leaves_the_cache_is_refused(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    hub.files["train/metadata.csv"] += f'"{name}",a,b,c,d,e\n'.encode()
    with pytest.raises(ValueError, match=r"metadata\.csv, line 10: file name .* leaves the folder"):
        prepare(hub, tmp_path / "cache", sample_count=None)
    assert set(hub.gets) == {"train/metadata.csv"}
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_single_file_outside_the_cache_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leaves the folder"):
        get_flickr8k_dataset_file(repo_id=REPO, filename=name, cache_dir=tmp_path)


def test_a_name_that_no_file_can_have_is_refused_with_its_reason(tmp_path: Path) -> None:
    for name, reason in (
        ("a\0b", "holds a NUL character"), (".", "is that of the folder"),
        ("a/..", "is that of the folder"), ("", "is that of the folder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            get_flickr8k_dataset_file(repo_id=REPO, filename=name, cache_dir=tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows takes these characters for parts of a path")
@pytest.mark.parametrize(
    ("name", "place"),
    [("12:30.jpg", "12:30.jpg"), ("a\\b.jpg", "a\\b.jpg"), ("..\\c.jpg", "..\\c.jpg"),
     ("more/../d.jpg", "d.jpg"), ("./more//e.jpg", "more/e.jpg"), ("..f.jpg", "..f.jpg")],
)  # fmt: skip
def test_a_name_that_stays_inside_is_accepted(tmp_path: Path, name: str, place: str) -> None:
    path = tmp_path / "train" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    metadata = tmp_path / "train" / "metadata.csv"
    metadata.write_text(f'file_name,caption_0\n"{name}",a dog\n')
    (sample,) = prepare_flickr8k_samples(cache_dir=tmp_path)
    assert sample.image_path == str(path)


def test_a_name_with_a_way_up_that_stays_inside_is_asked_for_by_its_short_form(
    hub: Hub, tmp_path: Path
) -> None:
    path = fetch_one(hub, tmp_path, "train/../train/./coffee.jpg")
    assert path == tmp_path / "train" / "coffee.jpg"
    assert hub.gets == {"train/coffee.jpg": 1}


def test_a_single_file_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        path = get_flickr8k_dataset_file(
            repo_id=REPO, filename="train/coffee.jpg", cache_dir=tmp_path, endpoint=hub.url
        )
    assert path == tmp_path / "train" / "coffee.jpg"
    assert hub.gets == {"train/coffee.jpg": 1}


def prepare_in_rank(rank: int, url: str, caches: list[Path], options: dict[str, Any]) -> list[str]:
    let_the_client_ask_loopback()
    samples = prepare_flickr8k_samples(
        cache_dir=caches[rank], endpoint=url, progress=False, **options
    )
    return [Path(sample.image_path).name for sample in samples]


def test_rank_0_downloads_every_file_once_and_all_ranks_read_them(hub: Hub, tmp_path: Path) -> None:
    outcomes = in_ranks(3, prepare_in_rank, hub.url, [tmp_path] * 3, {})
    assert (
        outcomes
        == [
            [
                f"{name}.jpg"
                for name in (
                    "astronaut",
                    "camera",
                    "chelsea",
                    "clock",
                    "coffee",
                    "hubble",
                    "retina",
                    "rocket",
                )
            ]
        ]
        * 3
    )
    assert set(hub.gets.values()) == {1}


def prepare_as_node(rank: int, *arguments: Any) -> list[str]:
    # Ranks 0 and 1 share a disk, 2 and 3 another. One machine: their host names are made up.
    rank_order.socket.gethostname = lambda: f"n{rank // 2}"  # type: ignore[assignment]
    return prepare_in_rank(rank, *arguments)


def test_a_cache_on_each_nodes_own_disk_is_filled_on_that_node(hub: Hub, tmp_path: Path) -> None:
    caches = [tmp_path / "n0", tmp_path / "n0", tmp_path / "n1", tmp_path / "n1"]
    outcomes = in_ranks(4, prepare_as_node, hub.url, caches, {"sample_count": 2})
    assert outcomes == [["astronaut.jpg", "camera.jpg"]] * 4
    assert set(hub.gets.values()) == {2}
    assert data_files(tmp_path / "n0") == data_files(tmp_path / "n1")


def test_the_failure_of_rank_0_reaches_every_rank_as_that_error(hub: Hub, tmp_path: Path) -> None:
    del hub.files["train/coffee.jpg"]
    outcomes = in_ranks(3, prepare_in_rank, hub.url, [tmp_path] * 3, {})
    assert [name for name, _ in outcomes] == ["FileNotFoundError"] * 3
    assert all("train/coffee.jpg could not be downloaded" in text for _, text in outcomes)
    assert all("failed on rank 0" in text for _, text in outcomes[1:])


def test_a_refused_file_name_is_a_value_error_on_every_rank(hub: Hub, tmp_path: Path) -> None:
    hub.files["train/metadata.csv"] += b"../x.jpg,a,b,c,d,e\n"
    outcomes = in_ranks(2, prepare_in_rank, hub.url, [tmp_path] * 2, {"sample_count": None})
    assert [name for name, _ in outcomes] == ["ValueError"] * 2


def die_on_rank_0(rank: int, *arguments: Any) -> list[str]:
    if rank == 0:
        HubFolder.fetch_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    return prepare_in_rank(rank, *arguments)


def test_a_rank_0_that_dies_leaves_no_rank_waiting(hub: Hub, tmp_path: Path) -> None:
    outcomes = in_ranks(3, die_on_rank_0, hub.url, [tmp_path] * 3, {})
    assert outcomes[0] is None
    for name, text in outcomes[1:]:
        assert name == "RuntimeError"
        assert "preparing intro/flickr8k/train: another rank stopped before it was done" in text


def fail_on_rank_0(rank: int, *arguments: Any) -> list[str]:
    def fail(*_: Any, **__: Any) -> None:
        raise LookupError("odd")

    if rank == 0:
        HubFolder.fetch_all = fail  # type: ignore[method-assign]
    return prepare_in_rank(rank, *arguments)


def test_an_error_of_another_kind_reaches_every_rank_by_name(hub: Hub, tmp_path: Path) -> None:
    outcomes = in_ranks(2, fail_on_rank_0, hub.url, [tmp_path] * 2, {})
    assert outcomes[0] == ("LookupError", "odd")
    assert outcomes[1][0] == "RuntimeError"
    assert "failed on rank 0: odd (LookupError)" in outcomes[1][1]


def test_an_error_that_takes_more_than_a_message_reaches_other_ranks_as_its_base() -> None:
    rebuilt = rank_order._rebuilt("UnicodeDecodeError", "metadata.csv: not UTF-8")
    assert type(rebuilt) is ValueError
    assert "not UTF-8" in str(rebuilt)
