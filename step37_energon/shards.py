"""Writes a folder of pictures and captions as WebDataset shards: ``step37-data shard``."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import stat
import tarfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from step37_data.caches.hub_cache import refuse_links
from step37_data.caches.lengths import write_atomically
from step37_data.common.checks import checked_int
from step37_data.common.threads import map_threads
from step37_data.flickr8k_loader import Flickr8kSample, read_flickr8k_metadata

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "gif", "bmp", "dib"),
    *("tif", "tiff", "jp2", "j2k", "jpx", "ico", "pcx", "ppm", "pgm", "pbm", "pnm", "qoi", "sgi"),
    "tga",
)
"""File name extensions, in lower case, under which a WebDataset sample may hold a picture: one or
more of every format that :func:`~step37_data.images.decode.picture_formats` can name."""

# The file, in the folder of a split's shards, that says which samples they hold.
_ORIGIN_FILE = ".step37_origin.json"
# The file, in the same folder, with a line for every written shard: from what it was written.
_WRITTEN_FILE = ".step37_written.jsonl"
# The lock file, in the folder of all shards.
_LOCK_FILE = ".step37_lock"

# Threads that wait for the file system; there may be more of them than cores.
_STAT_THREADS = 16
# The most unusable pictures that a message names.
_SHOWN = 10


class _Stamp(NamedTuple):
    """Size and time of a picture, to find out whether it has changed since it was written."""

    size: int
    modified_ns: int


class _Split(NamedTuple):
    """A split to be written: the folder of its files, its samples, and the state of each file."""

    root: Path
    samples: Sequence[Flickr8kSample]
    stamps: Mapping[str, _Stamp]

    @property
    def names(self) -> list[str]:
        """The path of every sample's picture, relative to the folder of the split."""
        return [
            Path(sample.image_path).relative_to(self.root).as_posix() for sample in self.samples
        ]


def write_shards(
    folder: Path,
    out: Path,
    *,
    caption_key: str = "caption_0",
    sample_count: int | None = None,
    samples_per_shard: int = 1000,
    progress: bool = True,
) -> dict[str, dict[str, int]]:
    """Write every split of ``folder`` as shards: the unchanged picture and caption of each sample.

    ``{folder}/{split}/metadata.csv`` becomes ``{out}/{split}/000000.tar`` and so on, in the order
    of its rows. The keys of the samples count from 000000000; in splits other than ``train`` they
    begin with the name of the split, as in ``val-000000000``.

    The size and time of all pictures are read before the first shard is written. A shard gets its
    name only when it is complete. An existing shard is kept if its size, and the sizes and times of
    its pictures, are the same as when it was written; else it is written again. So an interrupted
    run continues where it stopped. The same folder gives the same bytes.

    Two runs must not write into one folder at the same time, see :func:`one_writer`.

    Args:
        folder: the data set, with a folder for every split.
        out: folder of the shards; created if it does not exist.
        caption_key, sample_count: see :func:`~step37_data.flickr8k_loader.read_flickr8k_metadata`.
        samples_per_shard: the last shard of a split may hold fewer.
        progress: show a progress bar.

    Returns:
        For each split the number of samples of every shard, by the path of the shard in ``out``.

    Raises:
        ValueError: no split has samples; ``samples_per_shard`` is no integer of at least 1;
            pictures are missing, are no regular files, lie outside of their split by a link or have
            a suffix that is not among :data:`PICTURE_SUFFIXES`; ``out`` holds shards of other
            samples, is ``folder`` itself, or a link in it leads outside; or ``metadata.csv`` cannot
            be read.
        OSError: a picture cannot be read, or a shard cannot be written.
    """
    checked_int("samples_per_shard", samples_per_shard)
    splits = _read_splits(folder, caption_key, sample_count)
    written: dict[str, dict[str, int]] = {}
    for name, split in splits.items():
        target = out / name
        if target.resolve() == split.root.resolve():
            raise ValueError(f"{out}: holds the pictures; use another folder for the shards")
        refuse_links(out, target, target / _ORIGIN_FILE, target / _WRITTEN_FILE)
        target.mkdir(parents=True, exist_ok=True)
        _check_origin(target, split, samples_per_shard)
        written[name] = {
            f"{name}/{shard}": count
            for shard, count in _write_split(target, split, samples_per_shard, progress)
        }
    return written


@contextlib.contextmanager
def one_writer(out: Path) -> Iterator[None]:
    """Lock a folder of shards for this process, and remove unfinished files of killed runs.

    The folder is created if it does not exist. Without locks in the file system, it logs a warning.

    Raises:
        ValueError: another process has locked it.
    """
    import fcntl  # does not exist on every system

    out.mkdir(parents=True, exist_ok=True)
    refuse_links(out, out / _LOCK_FILE)
    with (out / _LOCK_FILE).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another run writes shards into it; wait for it") from error
        except OSError as error:
            logger.warning(
                f"{out}: cannot be locked ({error}); let one run at a time write into it"
            )
        else:
            for unfinished in out.glob("*/.*.tar.*.part"):
                unfinished.unlink()
        yield


def columns_of(metadata: Path) -> list[str]:
    """Read the names of the columns of a ``metadata.csv``, for messages."""
    with metadata.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def _read_splits(folder: Path, caption_key: str, sample_count: int | None) -> dict[str, _Split]:
    splits, problems, columns = {}, [], ""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    if (folder / "metadata.csv").is_file():
        above = folder.resolve().parent
        raise ValueError(f"{folder} is a split; give the folder above it: {above}")
    for metadata in sorted(folder.glob("*/metadata.csv")):
        if not metadata.is_file():  # reading from a pipe may never end
            raise ValueError(f"{metadata}: expected a regular file")
        samples = read_flickr8k_metadata(metadata, caption_key, sample_count)
        if not samples:
            columns += f"; {metadata} has the columns {', '.join(columns_of(metadata))}"
            continue
        root = metadata.parent
        paths = list(dict.fromkeys(sample.image_path for sample in samples))
        looked_at = map_threads(functools.partial(_look_at, root.resolve()), paths, _STAT_THREADS)
        problems += [told for told in looked_at if isinstance(told, str)]
        found = zip(paths, looked_at, strict=True)
        stamps = {path: stamp for path, stamp in found if isinstance(stamp, _Stamp)}
        splits[root.name] = _Split(root, samples, stamps)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{folder}: nothing is written: {'; '.join(problems[:_SHOWN])}{more}")
    if not splits:
        raise ValueError(
            f"{folder}: no {caption_key} (caption_key) and file_name in any */metadata.csv{columns}"
        )
    return splits


def _look_at(root: Path, path: str) -> _Stamp | str:
    """Return size and time of a picture, or why it cannot be used."""
    if _suffix(path) not in PICTURE_SUFFIXES:
        return f"{path}: expected a picture named .{', .'.join(PICTURE_SUFFIXES)}"
    try:
        resolved = Path(path).resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:  # a circle of links: RuntimeError before Python 3.13
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(status.st_mode):
        return f"{path}: expected a regular file"
    if not resolved.is_relative_to(root):
        return f"{path} leads by a link to {resolved}, outside of {root}; copy the file"
    return _Stamp(status.st_size, status.st_mtime_ns)


def _suffix(path: str) -> str:
    return Path(path).suffix[1:].lower()


def _check_origin(target: Path, split: _Split, samples_per_shard: int) -> None:
    """Refuse a folder with shards of other samples; record from what the new ones are made."""
    digest = hashlib.sha256()
    for name, sample in zip(split.names, split.samples, strict=True):
        digest.update(json.dumps([name, sample.caption]).encode())
    wanted = {"samples": digest.hexdigest(), "samples_per_shard": samples_per_shard}
    note = target / _ORIGIN_FILE
    if not note.exists():
        write_atomically(note, json.dumps(wanted).encode())
        return
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        told = f"{note} is damaged ({error}), so what {target} holds is not known"
        raise ValueError(f"{told}; delete {target} or use another folder") from error
    if found != wanted:
        raise ValueError(
            f"{target} holds shards of other samples, or shards of another number of samples; use "
            "another folder"
        )


def _write_split(
    target: Path, split: _Split, samples_per_shard: int, progress: bool
) -> Iterator[tuple[str, int]]:
    """Write missing and changed shards; returns the number of samples of all shards, by name."""
    journal = target / _WRITTEN_FILE
    written = _read_journal(journal)
    samples = split.samples
    with tqdm(total=len(samples), desc=target.name, unit="sample", disable=not progress) as bar:
        for number, first in enumerate(range(0, len(samples), samples_per_shard)):
            chunk = samples[first : first + samples_per_shard]
            path = target / f"{number:06d}.tar"
            stamps = [split.stamps[sample.image_path] for sample in chunk]
            pictures = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
            if not path.is_file() or written.get(path.name) != (pictures, path.stat().st_size):
                size = _write_shard(path, chunk, _keys(target.name, first))
                line = {"shard": path.name, "pictures": pictures, "size": size}
                with journal.open("a", encoding="utf-8") as file:
                    file.write(f"\n{json.dumps(line)}")  # the last line may be cut off
            bar.update(len(chunk))
            yield path.name, len(chunk)


def _read_journal(journal: Path) -> dict[str, tuple[str, int]]:
    """Read from what each shard was written, and its size; of several lines the last is valid.

    A damaged line is ignored, so that its shard is written again.
    """
    written = {}
    if journal.exists():
        for text in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                written[line["shard"]] = (line["pictures"], line["size"])
    return written


def _keys(split: str, first: int) -> Iterator[str]:
    """Yield the keys of the samples of a split, from number ``first`` on.

    Energon refuses a data set in which a key occurs twice, so keys contain the name of the split,
    except for ``train``. They contain no dot, after which the name of a part would begin.
    """
    prefix = "" if split == "train" else f"{quote(split, safe='').replace('.', '%2E')}-"
    return (f"{prefix}{number:09d}" for number in itertools.count(first))


def _write_shard(path: Path, samples: Sequence[Flickr8kSample], keys: Iterator[str]) -> int:
    """Write a shard to a temporary file and rename it when it is complete; returns its size."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with unfinished.open("xb") as file:
            _write_samples(file, samples, keys)
            size = file.tell()
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return size


def _write_samples(file: BinaryIO, samples: Sequence[Flickr8kSample], keys: Iterator[str]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in zip(keys, samples, strict=False):
            for part, content in _parts(sample):
                # No time and no owner, so that the same folder gives the same bytes.
                member = tarfile.TarInfo(f"{key}.{part}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _parts(sample: Flickr8kSample) -> Iterator[tuple[str, bytes]]:
    yield _suffix(sample.image_path), Path(sample.image_path).read_bytes()
    yield "txt", sample.caption.encode()
