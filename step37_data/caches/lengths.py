"""Measures the length of every sample once, in tokens, and keeps the lengths on disk.

Packing needs the length of every sample before the first step, and measuring means tokenising. If a
data set has ``fingerprint()`` and ``sample_keys()``, its lengths are cached for each sample. So
after a change of one caption only that sample is measured again, an interrupted measurement
continues, and with another tokenizer all samples are measured.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tqdm import tqdm

from step37_data.caches.rank_order import fill_cache_once
from step37_data.common.checks import item_at
from step37_data.common.threads import available_cores

logger = logging.getLogger(__name__)

_RECORD = np.dtype([("key", "S16"), ("length", "<i8")])
_SECONDS_BETWEEN_WRITES = 30.0
_CHUNK = 256
# Below this, starting processes costs more than it saves.
_PARALLEL_FROM = 4096


@runtime_checkable
class KeyedDataset(Protocol):
    """A map-style data set whose lengths can be cached."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A name for everything besides the samples that decides lengths: tokenizer, template."""

    def sample_keys(self) -> np.ndarray:
        """uint64 ``[N, 2]``: 128 bits that identify each sample; equal keys mean equal lengths."""


def probe_lengths(
    dataset: Any,
    *,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    description: str = "Probing lengths",
    together: bool = False,
    keys: np.ndarray | None = None,
) -> np.ndarray:
    """Return ``len(dataset[i])`` for every i, from the cache or measured.

    Args:
        dataset: map-style data set; with ``cache_dir`` a :class:`KeyedDataset`.
        cache_dir: folder of cached lengths; None measures every sample. Several runs may share it:
            files are replaced atomically, and at worst a sample is measured twice.
        workers: processes that measure; None is one per available core for large data sets;
            small ones are measured in this process. On platforms that spawn processes the data set
            has to be picklable.
        progress: show a progress bar while measuring.
        description: name of the work on the bar and in the log.
        together: set it if every rank of a process group makes this call, with ``cache_dir``: one
            rank measures, the others wait and then read (see ``fill_cache_once``).
        keys: ``dataset.sample_keys()``, where they are known already.

    Returns:
        int64 ``[N]``.

    Raises:
        TypeError: ``cache_dir`` is given for a data set without keys.
        ValueError: a sample is a mapping with ``tokens``, and its ``len()`` is not their number; a
            plain dictionary's ``len()`` counts keys.
        Exception: any error of the data set. Lengths measured before it are kept.
    """
    total = len(dataset)
    measure = functools.partial(
        _measure, dataset, workers=workers, progress=progress, description=description
    )
    if cache_dir is None:
        lengths = np.empty(total, dtype=np.int64)
        for chunk, values in measure(np.arange(total)):
            lengths[chunk] = values
        return lengths
    cache = LengthCache(cache_dir, dataset, keys)

    def fill() -> None:
        missing = np.flatnonzero(cache.look_up() < 0)
        # Samples with equal keys are measured once.
        _, firsts = np.unique(cache.keys[missing], return_index=True)
        todo = missing[np.sort(firsts)]
        if len(todo):
            logger.info("%s: measuring %d of %d lengths", description, len(todo), total)
            cache.record(measure(todo))

    if together:
        # If the cache cannot be written, every rank measures the lengths itself.
        fill_cache_once(
            fill,
            lambda: not cache.is_writable() or bool((cache.look_up() >= 0).all()),
            what=description,
        )
    fill()
    return cache.look_up()


class LengthCache:
    """Keeps lengths on disk, in the file ``cache_dir / {fingerprint}.npz``.

    It holds two arrays: ``keys``, K sorted keys of 16 bytes, and ``lengths``, int64 ``[K]``. NumPy
    writes it as a ZIP archive, whose checksums show if it is damaged. A damaged file is reported,
    ignored, and overwritten by the next write.

    Args:
        cache_dir: folder that holds a file per fingerprint.
        dataset: the samples to look up.
        keys: ``dataset.sample_keys()``, where they are known already.

    Raises:
        TypeError: the data set has no ``fingerprint`` and ``sample_keys``.
        ValueError: the keys are not ``[N, 2]``.
    """

    def __init__(self, cache_dir: str | Path, dataset: Any, keys: np.ndarray | None = None) -> None:
        if not isinstance(dataset, KeyedDataset):
            kind = type(dataset).__name__
            raise TypeError(f"cache_dir: {kind} has no fingerprint() and sample_keys() to cache by")
        folder = Path(cache_dir).expanduser()
        self._file = folder / f"{dataset.fingerprint()[:32]}.npz"
        keys = np.ascontiguousarray(dataset.sample_keys() if keys is None else keys, dtype="<u8")
        if keys.shape != (len(dataset), 2):
            raise ValueError(f"sample_keys: expected shape ({len(dataset)}, 2), got {keys.shape}")
        # Sixteen bytes as one element. NumPy ignores zeros at the end, in both of two keys.
        self.keys = keys.view("S16").reshape(-1)
        self._lengths = np.full(len(keys), -1, dtype=np.int64)
        self._merged = np.empty(0, dtype=_RECORD)

    def is_writable(self) -> bool:
        """Whether the file, or else the folder for it, appears to be writable."""
        folder = self._file.parent
        while not folder.exists():
            folder = folder.parent
        return os.access(folder, os.W_OK) and not self._file.is_dir()

    def look_up(self) -> np.ndarray:
        """Return int64 ``[N]``: the known lengths, −1 for unknown ones."""
        if (missing := np.flatnonzero(self._lengths < 0)).size:
            # Looked up in sorted order, which is fast: neighbouring keys are in the CPU's cache.
            missing = missing[np.argsort(self.keys[missing])]
            records = self._records()
            keys = self.keys[missing]
            places = np.searchsorted(records["key"], keys)
            inside = places < len(records)
            missing, keys, found = missing[inside], keys[inside], records[places[inside]]
            known = found["key"] == keys
            self._lengths[missing[known]] = found["length"][known]
        return self._lengths

    def record(self, measured: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        """Store ``(indices, lengths)``; write them twice a minute, at the end, and on failure."""
        pending: list[np.ndarray] = []
        written = time.monotonic()
        try:
            for indices, lengths in measured:
                records = np.empty(len(indices), dtype=_RECORD)
                records["key"], records["length"] = self.keys[indices], lengths
                pending.append(records)
                if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                    self._write(pending)
                    pending, written = [], time.monotonic()
        finally:
            self._write(pending)

    def _records(self) -> np.ndarray:
        return self._merged if len(self._merged) else _read(self._file)

    def _write(self, more: list[np.ndarray]) -> None:
        records = np.concatenate([*more, self._merged, _read(self._file)])
        # Kept in memory too: the file may be read-only, or another process may replace it.
        self._merged = records[np.unique(records["key"], return_index=True)[1]]
        content = io.BytesIO()
        np.savez(content, keys=self._merged["key"], lengths=self._merged["length"])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, content.getvalue())
        except OSError as error:
            logger.warning("%s cannot be written (%s): its lengths are lost", self._file, error)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old content or all of the new one."""
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
    dataset: Any,
    indices: np.ndarray,
    *,
    workers: int | None,
    progress: bool,
    description: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Measure samples; yields ``(indices, lengths)`` chunk by chunk, in order."""
    if workers is None:
        workers = available_cores() if len(indices) >= _PARALLEL_FROM else 0
    measured = torch.utils.data.DataLoader(
        _Lengths(dataset),
        _CHUNK,
        sampler=indices,
        num_workers=workers if workers > 1 else 0,
        collate_fn=np.transpose,
    )
    with tqdm(total=len(indices), desc=description, unit="sample", disable=not progress) as bar:
        for chunk, lengths in measured:
            yield chunk, lengths
            bar.update(len(chunk))


class _Lengths(torch.utils.data.Dataset[tuple[int, int]]):
    """Yields the index and the length of samples, for the workers of a DataLoader."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, int]:
        index = int(index)  # a NumPy integer comes in
        sample = item_at(self._dataset, index, "sample")
        length = len(sample)
        if isinstance(sample, Mapping) and "tokens" in sample:
            expected = max(0, len(sample["tokens"]) - 1)
            if length != expected:
                told = f"len() of the {type(sample).__name__} is {length}, expected {expected}"
                raise ValueError(f"sample {index}: {told}, one less than its tokens")
        return index, length


def _read(path: Path) -> np.ndarray:
    """Read the records of a file; returns none if it cannot be used."""
    nothing = np.empty(0, dtype=_RECORD)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return nothing
    except OSError as error:  # it is a folder, or a circle of links
        logger.warning("%s cannot be read (%s): its lengths will be measured again", path, error)
        return nothing
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            keys, lengths = arrays["keys"], arrays["lengths"]
            records = np.empty(len(keys), dtype=_RECORD)
            if keys.dtype != _RECORD["key"] or lengths.shape != records.shape:
                raise ValueError("expected K keys of 16 bytes and as many lengths")
            records["key"], records["length"] = keys, lengths
    # For a damaged archive zipfile and numpy raise a dozen types of errors.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning(
            "%s is damaged: ignored, its lengths will be measured again (%s)", path, reason
        )
        return nothing
    return records
