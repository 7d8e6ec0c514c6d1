"""Downloads files of a data set from the hub into a local folder, and finds damaged ones."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import posixpath
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from step37_data.caches.hub_listing import HubListing
from step37_data.caches.lengths import write_atomically
from step37_data.common.checks import checked_int
from step37_data.common.threads import map_threads

logger = logging.getLogger(__name__)

# Records which data set the folder holds; huggingface_hub keeps its records in .cache too.
_ORIGIN_FILE = ".cache/step37_origin.json"
_NOTES = ".cache/huggingface/download"
_HASHES = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
# Threads that check files wait for the file system, not for a core; so many files at a time.
_LOOKING_THREADS = 16
_LOOKED_AT_ONCE = 1024
# A listing costs two requests and one for every thousand files of the folder; it saves one a file.
_WORTH_LISTING = 32
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """A local folder that mirrors a data set of the hub.

    Args:
        repo_id: data set on the hub, such as ``intro/flickr8k``.
        cache_dir: the local folder; ``~`` is expanded.
        revision: branch, tag or commit; None is the default branch. A folder holds one data set at
            one revision.
        endpoint: URL of the hub; None is the one ``huggingface_hub`` is set to.
        max_workers: how many files are downloaded at a time.
        progress: show a progress bar while downloading.

    Raises:
        ValueError: ``max_workers`` is no integer of at least 1.
    """

    repo_id: str
    cache_dir: str | Path
    revision: str | None = None
    endpoint: str | None = None
    max_workers: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        checked_int("max_workers", self.max_workers)

    @functools.cached_property
    def root(self) -> Path:
        """The folder. Made once: a path for every file would cost as much as looking at it."""
        return Path(self.cache_dir).expanduser()

    def path_of(self, name: str) -> str:
        """Return the path of the file ``name`` of the data set, whether or not it exists yet."""
        return path_inside(str(self.root), name)

    def is_own(self, name: str) -> bool:
        """Whether the file exists, is undamaged, and was not downloaded from the hub."""
        path = self.path_of(name)
        return flaw_of(self.root, path) is None and not os.path.isfile(_note_of(self.root, path))

    def flaws(self, paths: Sequence[str]) -> dict[str, str]:
        """Say what is wrong with files, by path; files without a flaw are left out."""
        noted = os.path.isdir(self.root / _NOTES)

        def look(some: Sequence[str]) -> dict[str, str]:
            found = ((path, flaw_of(self.root, path, noted)) for path in some)
            return {path: flaw for path, flaw in found if flaw is not None}

        starts = range(0, len(paths), _LOOKED_AT_ONCE)
        parts = [paths[start : start + _LOOKED_AT_ONCE] for start in starts]
        looked = map_threads(look, parts, _LOOKING_THREADS)
        return {path: flaw for part in looked for path, flaw in part.items()}

    def check_origin(self) -> None:
        """Refuse a folder that holds another data set or revision; mark an empty one for this one.

        Raises:
            ValueError: the folder holds something else, or a link leads out of it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        check_origin(self.root, self.repo_id, self.revision)

    def fetch(self, name: str, listing: HubListing | None = None) -> str:
        """Path of the file ``name``, downloaded if it is missing or damaged.

        The hub's client writes to a temporary file and moves it to its place when it is complete.
        The client waits and asks again if the hub limits requests, breaks off or is down for a
        moment. After another failure (a server error during the download, a wrong length or hash)
        the download is repeated once.

        Args:
            name: path inside the data set, with forward slashes.
            listing: of the data set. A file that it knows is asked for at once; without it, and for
                a second download, the client asks for the header of the file first.

        Raises:
            ValueError: ``name`` leaves the folder, by its name or by a link.
            FileNotFoundError: the hub has no such file, or is out of reach.
            OSError: the download failed otherwise.
        """
        path, name = self.path_of(name), posixpath.normpath(name)
        for last in (False, True):
            flaw = flaw_of(self.root, path)
            if flaw is None:
                return path
            self._download(name, path, flaw, None if last else listing, last=last)
        if flaw := flaw_of(self.root, path):
            again = f"also after it was downloaded twice from {self.repo_id}"
            raise OSError(f"{path} {flaw}, {again}")
        return path

    def fetch_all(self, names: Sequence[str], what: str) -> None:
        """Download files, several at a time; after a failure no further download is started.

        Where there are many, their folder is listed first: then a file costs one request, not two.

        An interrupt ends this at once, though a thread may be waiting minutes for the hub. An error
        is raised as soon as the files before it in ``names`` are there.

        Args:
            names: names of the files.
            what: name of the work on the progress bar and in the log.

        Raises:
            OSError, ValueError: as for :meth:`fetch`.
        """
        from huggingface_hub import utils as hub

        logger.info("downloading %d files of %s", len(names), what)
        get = self.fetch
        if len(names) >= _WORTH_LISTING:
            listing = HubListing.of(
                repo_id=self.repo_id,
                folder=posixpath.commonpath([posixpath.dirname(name) for name in names]),
                revision=self.revision,
                endpoint=self.endpoint,
            )
            if listing is not None:
                get = functools.partial(self.fetch, listing=listing)
        with contextlib.ExitStack() as undo:
            # huggingface_hub would show a bar for every file; we show one for all files.
            if not hub.are_progress_bars_disabled():
                hub.disable_progress_bars()
                undo.callback(hub.enable_progress_bars)
            looks: dict[str, Any] = {"desc": f"Downloading {what}", "unit": "file"}
            bar = undo.enter_context(tqdm(total=len(names), disable=not self.progress, **looks))

            failed = threading.Event()

            def fetch(name: str) -> None:
                if failed.is_set():
                    return
                try:
                    get(name)
                except BaseException:
                    failed.set()
                    raise
                bar.update()

            map_threads(fetch, names, self.max_workers)

    def _download(
        self, name: str, path: str, flaw: str, listing: HubListing | None, *, last: bool
    ) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        refuse_links(self.root, Path(path), self.root / _NOTES)
        if os.path.exists(path):
            logger.warning("%s %s: downloading it again", path, flaw)
        # The base class is that of its HTTP library (requests or httpx, depending on the version).
        failures: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
        try:
            with _put_aside(path):
                if listing is not None and name in listing.hashes:
                    listing.download(name, Path(path), Path(_note_of(self.root, path)))
                else:
                    hf_hub_download(
                        self.repo_id,
                        name,
                        repo_type="dataset",
                        local_dir=self.root,
                        revision=self.revision,
                        endpoint=self.endpoint,
                    )
        except LocalEntryNotFoundError as error:
            # The client could not find out anything about the file; the cause says why.
            raise self._failure(name, f"{path} {flaw}", error.__cause__ or error, True) from error
        except failures as error:
            status = _status_of(error)
            if last or (status is not None and status < 500):
                raise self._failure(name, f"{path} {flaw}", error, False) from error
            logger.warning("%s/%s: the download failed (%s)", self.repo_id, name, error)

    def _failure(self, name: str, flaw: str, error: BaseException, out_of_reach: bool) -> OSError:
        """Make a built-in error, which other ranks can raise too."""
        status = _status_of(error)
        told = f"{flaw}, and {self.repo_id}/{name} could not be downloaded"
        if status == 429:
            return OSError(
                f"{told}: the hub limits requests, for longer than its client waits ({error}); "
                "start again later, or log in for a higher limit: what is there is kept"
            )
        # The hub does not reveal that a private data set exists: it answers 401.
        missing = out_of_reach if status is None else status in (401, 404)
        return (FileNotFoundError if missing else OSError)(f"{told}: {error}")


def _status_of(error: BaseException) -> int | None:
    """Return the status of the HTTP response behind an error; None if there is none."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def _put_aside(path: str) -> Iterator[None]:
    """Move a damaged file away, so that the client downloads it anew; restore it after an error."""
    if not os.path.isfile(path):
        yield
        return
    aside = f"{path}.damaged"
    os.replace(path, aside)
    try:
        yield
    except BaseException:
        os.replace(aside, path)
        raise
    os.unlink(aside)


def path_inside(folder: str, name: str) -> str:
    """Return ``folder/name``, if that is inside ``folder``.

    Raises:
        ValueError: it is not inside, or no file can have that name; the message says which.
    """
    if "/" in name or name in ("", ".", ".."):
        inner = posixpath.normpath(name)
        if inner.startswith("/") or inner.split("/", 1)[0] == "..":
            raise ValueError(f"file name {name!r} leaves the folder {folder!r}")
        if inner == ".":
            raise ValueError(f"file name {name!r} is that of the folder {folder!r} itself")
        name = inner
    if "\0" in name:
        raise ValueError(f"file name {name!r} holds a NUL character, which no file name may")
    if os.name == "nt" and ("\\" in name or ":" in name):
        raise ValueError(f"file name {name!r} holds a backslash or colon, which Windows refuses")
    return name if folder == "." else f"{folder}/{name}"


def _note_of(root: str | Path, path: str | Path) -> str:
    """The file in which huggingface_hub records commit, hash and time of a download."""
    folder, path = str(root), str(path)
    within = path if folder == "." else path.removeprefix(f"{folder}/")
    return f"{folder}/{_NOTES}/{within}.metadata"


def flaw_of(root: str | Path, path: str | Path, noted: bool = True) -> str | None:
    """Say what is wrong with a file, as far as it can be found out offline; None if nothing is.

    Args:
        root: the folder.
        path: path of a file in the folder.
        noted: whether the hub's client may have recorded a hash of it. The hash is compared if it
            is a SHA-256 or SHA-1 of the content, or git's hash of it as a blob.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return "is missing"
        raise
    if not stat.S_ISREG(state.st_mode):
        return "is not a regular file"
    expected = _noted_hash(root, path) if noted else None
    if expected is None:
        return None if state.st_size else "is empty"
    found = _hashes(path, state.st_size, sha256=len(expected) == 64)
    if expected in found:
        return None
    told = " or ".join(found)
    return f"is damaged: expected the hash {expected}, found {told} of {state.st_size} bytes"


def _noted_hash(root: str | Path, path: str | Path) -> str | None:
    """The hash of a file that huggingface_hub recorded; None if there is none of a known kind."""
    try:
        with open(_note_of(root, path), encoding="utf-8") as note:
            lines = note.read().splitlines()
    except (OSError, ValueError):  # no record, or none that can be read
        return None
    expected = lines[1].strip().lower() if len(lines) > 1 else ""
    return expected if _HASHES.fullmatch(expected) else None


def _hashes(path: str | Path, size: int, *, sha256: bool) -> list[str]:
    """Hash a file: its SHA-256, or else git's hash of it as a blob and its SHA-1.

    The hub gives the SHA-256 of a large file and git's hash of a small one; some mirrors the SHA-1.
    """
    digests: list[Any]
    if sha256:
        digests = [hashlib.sha256(usedforsecurity=False)]
    else:
        blob = b"blob %d\0" % size
        digests = [hashlib.sha1(begin, usedforsecurity=False) for begin in (blob, b"")]
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    return [digest.hexdigest() for digest in digests]


def refuse_links(root: Path, *paths: Path) -> None:
    """Raise ``ValueError`` if a link leads a path out of ``root``."""
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path} leads by a link to {path.resolve()}, outside of {root}")


def check_origin(root: Path, repo_id: str, revision: str | None) -> None:
    """Refuse a cache that holds another data set or revision; mark a new cache for this one."""
    note = root / _ORIGIN_FILE
    wanted = json.dumps({"repo_id": repo_id, "revision": revision})
    if note.is_file():
        found = note.read_text(encoding="utf-8", errors="replace")
        if found != wanted:
            raise ValueError(f"cache_dir: {note} says {found!r}, not {wanted}; use another folder")
    elif any(entry.name != ".cache" for entry in root.iterdir()):
        if revision is not None:
            logger.warning(f"{root}: not filled by this loader, revision {revision} is not checked")
    else:
        refuse_links(root, note)
        note.parent.mkdir(exist_ok=True)
        write_atomically(note, wanted.encode())
