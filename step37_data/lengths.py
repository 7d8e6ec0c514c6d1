"""How long every sample is, found out once and kept on disk.

Packing needs the length of every sample before the first step, and a length costs a tokenisation.
A data set that offers ``fingerprint()`` and ``sample_keys()`` has its lengths cached per sample: a
changed caption is measured again, an interrupted run continues, another tokenizer starts over.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

logger = logging.getLogger(__name__)

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("length", "<i8")])
_DIGEST_SIZE = 16
_MERGED = "merged.lengths"
_SECONDS_BETWEEN_WRITES = 5.0
_CHUNK = 256
# Below this, starting processes costs more than it saves.
_PARALLEL_FROM = 4096


@runtime_checkable
class KeyedDataset(Protocol):
    """A map-style data set whose lengths can be cached."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> Any: ...

    def fingerprint(self) -> str:
        """Name of everything that decides lengths besides the samples: tokenizer, template."""

    def sample_keys(self) -> np.ndarray:
        """uint64 ``[N, 2]``: 128 bits of every sample's content; equal keys, equal lengths."""


def probe_lengths(
    dataset: Any,
    *,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    description: str = "Probing lengths",
) -> np.ndarray:
    """``len(dataset[i])`` for every i.

    Args:
        dataset: map-style data set; with ``cache_dir`` a :class:`KeyedDataset`.
        cache_dir: folder of cached lengths; None measures every sample. Safe to share: files are
            replaced atomically, and two writers cost at most a second measurement.
        workers: processes that measure; None is one per available core for large data sets, and
            none (this process measures) for small ones. Several need a data set that can be
            pickled where the platform spawns processes.
        progress: show a progress bar while measuring.
        description: name of the work on the bar and in the log.

    Returns:
        int64 ``[N]``.

    Raises:
        TypeError: ``cache_dir`` is given for a data set without keys.
        ValueError: a sample is a mapping with ``tokens`` whose ``len()`` is another number, such as
            that of its keys.
        Exception: what the data set raises for a sample. What was measured until then is kept.
    """
    total = len(dataset)
    if cache_dir is None:
        indices = np.arange(total)
        lengths = np.empty(total, dtype=np.int64)
        for chunk, values in _measure(dataset, indices, workers, progress, description):
            lengths[chunk] = values
        return lengths
    cache = LengthCache(cache_dir, dataset)
    keys = cache.keys
    lengths = cache.look_up()
    missing = np.flatnonzero(lengths < 0)
    if len(missing) == 0:
        return lengths
    # Samples with equal keys are measured once.
    _, firsts = np.unique(keys[missing], axis=0, return_index=True)
    todo = missing[np.sort(firsts)]
    logger.info(
        "%s: %d of %d lengths from %s, measuring %d",
        description,
        total - len(missing),
        total,
        cache.folder,
        len(todo),
    )
    cache.record(_measure(dataset, todo, workers, progress, description))
    return cache.look_up()


class LengthCache:
    """Lengths on disk, under ``cache_dir / fingerprint``: one merged file and newer parts.

    A file is a digest of 16 bytes and sorted records of 24 bytes (key, key, length). A file that
    does not match its digest is reported, ignored and overwritten by the next merge.

    Args:
        cache_dir: folder that holds a folder per fingerprint.
        dataset: the samples to look up.

    Raises:
        TypeError: the data set has no ``fingerprint`` and ``sample_keys``.
    """

    def __init__(self, cache_dir: str | Path, dataset: Any) -> None:
        if not isinstance(dataset, KeyedDataset):
            raise TypeError(
                f"cache_dir: lengths of {type(dataset).__name__} cannot be cached, it has no "
                "fingerprint() and sample_keys()"
            )
        self.folder = Path(cache_dir).expanduser() / dataset.fingerprint()[:32]
        self.keys = np.ascontiguousarray(dataset.sample_keys(), dtype=np.uint64)
        if self.keys.shape != (len(dataset), 2):
            raise ValueError(
                f"sample_keys: expected shape ({len(dataset)}, 2), got {self.keys.shape}"
            )

    def look_up(self) -> np.ndarray:
        """int64 ``[N]``: the known lengths, −1 for the others."""
        records = _unique_records([_read(path) for path in self._files()])
        lengths = np.full(len(self.keys), -1, dtype=np.int64)
        # Asked for in order, neighbouring keys are found in the cache of the processor.
        open_ones = np.argsort(self.keys[:, 0])
        places = np.searchsorted(np.ascontiguousarray(records["high"]), self.keys[open_ones, 0])
        # One turn, but for samples that share the first half of their key: records are sorted by
        # both halves, so theirs are neighbours.
        while len(open_ones):
            inside = places < len(records)
            open_ones, places = open_ones[inside], places[inside]
            candidates = records[places]
            found = (candidates["high"] == self.keys[open_ones, 0]) & (
                candidates["low"] == self.keys[open_ones, 1]
            )
            lengths[open_ones[found]] = candidates["length"][found]
            next_too = (candidates["high"] == self.keys[open_ones, 0]) & ~found
            open_ones, places = open_ones[next_too], places[next_too] + 1
        return lengths

    def record(self, measured: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write ``(indices, lengths)`` as they come: every few seconds, at the end, on failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pending: list[np.ndarray] = []
        written = time.monotonic()
        try:
            for indices, lengths in measured:
                pending.append(self._records(indices, lengths))
                if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                    self._write_part(pending)
                    pending, written = [], time.monotonic()
        finally:
            self._write_part(pending)
        self._merge()

    def _records(self, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        records = np.empty(len(indices), dtype=_RECORD)
        records["high"], records["low"] = self.keys[indices].T
        records["length"] = lengths
        return np.sort(records, order=["high", "low"])

    def _write_part(self, parts: list[np.ndarray]) -> None:
        if parts:
            handle, name = tempfile.mkstemp(suffix=".part", prefix="", dir=self.folder)
            os.close(handle)
            _write(Path(name).with_suffix(".lengths"), _unique_records(parts))
            os.unlink(name)

    def _merge(self) -> None:
        files = self._files()
        _write(self.folder / _MERGED, _unique_records([_read(path) for path in files]))
        for path in files:
            if path.name != _MERGED:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.lengths"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and move there: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _measure(
    dataset: Any, indices: np.ndarray, workers: int | None, progress: bool, description: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(indices, lengths)`` chunk by chunk, in order."""
    chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    if workers is None:
        workers = _available_cores() if len(indices) >= _PARALLEL_FROM else 0
    with tqdm(total=len(indices), desc=description, unit="sample", disable=not progress) as bar:
        measured = (
            _measure_in_processes(dataset, chunks, workers)
            if workers > 1
            else (_lengths_of(dataset, chunk) for chunk in chunks)
        )
        for chunk, lengths in zip(chunks, measured, strict=True):
            yield chunk, lengths
            bar.update(len(chunk))


def _measure_in_processes(
    dataset: Any, chunks: Sequence[np.ndarray], workers: int
) -> Iterator[np.ndarray]:
    # The platform's default start method, as torch's DataLoader uses; forked workers inherit the
    # data set, spawned ones unpickle it once.
    context = multiprocessing.get_context()
    with ProcessPoolExecutor(workers, context, _set_worker_dataset, (dataset,)) as pool:
        # A bounded queue: a hundred million indices are not pickled before the first is measured.
        queue: list[Future[np.ndarray]] = []
        try:
            for chunk in chunks:
                queue.append(pool.submit(_lengths_in_worker, chunk))
                if len(queue) >= 4 * workers:
                    yield queue.pop(0).result()
            while queue:
                yield queue.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_dataset: Any = None


def _set_worker_dataset(dataset: Any) -> None:
    global _worker_dataset
    _worker_dataset = dataset


def _lengths_in_worker(indices: np.ndarray) -> np.ndarray:
    return _lengths_of(_worker_dataset, indices)


def _lengths_of(dataset: Any, indices: np.ndarray) -> np.ndarray:
    return np.array([_length_of(index, dataset[index]) for index in indices.tolist()], np.int64)


def _length_of(index: int, sample: Any) -> int:
    length = len(sample)
    if isinstance(sample, Mapping) and "tokens" in sample:
        expected = max(0, len(sample["tokens"]) - 1)
        if length != expected:
            raise ValueError(
                f"sample {index}: len() of the {type(sample).__name__} is {length}, expected "
                f"{expected}, one less than its tokens; MultimodalSFTSample has that length"
            )
    return length


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _unique_records(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The records of all parts, each sorted, merged: sorted by key, one per key."""
    if len(parts) == 1:
        return parts[0]
    records = np.concatenate(parts) if parts else np.empty(0, dtype=_RECORD)
    records = records[np.lexsort((records["low"], records["high"]))]
    again = (records["high"][1:] == records["high"][:-1]) & (
        records["low"][1:] == records["low"][:-1]
    )
    return records[np.concatenate(([True], ~again))] if len(records) else records


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_SIZE).digest()


def _write(path: Path, records: np.ndarray) -> None:
    payload = records.tobytes()
    write_atomically(path, _digest(payload) + payload)


def _read(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # merged away by another process since the folder was listed
        return np.empty(0, dtype=_RECORD)
    payload = content[_DIGEST_SIZE:]
    if len(payload) % _RECORD.itemsize or _digest(payload) != content[:_DIGEST_SIZE]:
        logger.warning("%s is damaged: ignored, its lengths will be measured again", path)
        return np.empty(0, dtype=_RECORD)
    return np.frombuffer(payload, dtype=_RECORD)
