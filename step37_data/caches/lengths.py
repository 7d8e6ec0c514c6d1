"""Measures how long every sample is, once, and keeps the lengths on disk.

Packing needs the length of every sample before the first step, and a length costs a tokenisation.
A data set that offers ``fingerprint()`` and ``sample_keys()`` has its lengths cached per sample: a
changed caption is measured again, an interrupted run continues, another tokenizer starts over.
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
    together: bool = False,
    keys: np.ndarray | None = None,
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
        together: every rank of a process group makes this call, with ``cache_dir``; one measures,
            the others wait and read (see ``fill_cache_once``).
        keys: ``dataset.sample_keys()``, where they are known already.

    Returns:
        int64 ``[N]``.

    Raises:
        TypeError: ``cache_dir`` is given for a data set without keys.
        ValueError: a sample is a mapping with ``tokens`` whose ``len()`` is another number, such as
            that of its keys.
        Exception: what the data set raises for a sample. What was measured until then is kept.
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
    """Lengths on disk, in the file ``cache_dir / {fingerprint}.npz``.

    It holds two arrays: ``keys``, K sorted keys of 16 bytes, and ``lengths``, int64 ``[K]``. NumPy
    writes it as a ZIP archive, whose checksums tell a damaged file; that is reported, ignored and
    overwritten by the next write.

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
        # Sixteen bytes in one element: zeros at the end are no part of it, and no loss either.
        self.keys = keys.view("S16").reshape(-1)
        self._lengths = np.full(len(keys), -1, dtype=np.int64)
        self._merged = np.empty(0, dtype=_RECORD)

    def is_writable(self) -> bool:
        """Whether the file, or the folders above it, can be written, as far as one can tell."""
        folder = self._file.parent
        while not folder.exists():
            folder = folder.parent
        return os.access(folder, os.W_OK) and not self._file.is_dir()

    def look_up(self) -> np.ndarray:
        """int64 ``[N]``: the known lengths, −1 for the others."""
        if (missing := np.flatnonzero(self._lengths < 0)).size:
            # Asked for in order, neighbouring keys are found in the cache of the processor.
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
        """Write ``(indices, lengths)`` as they come: twice a minute, at the end, on failure."""
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
        # Kept: the file may be read-only, or become another writer's, who has not seen ours.
        self._merged = records[np.unique(records["key"], return_index=True)[1]]
        content = io.BytesIO()
        np.savez(content, keys=self._merged["key"], lengths=self._merged["length"])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, content.getvalue())
        except OSError as error:
            logger.warning("%s cannot be written (%s): its lengths are lost", self._file, error)


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
    dataset: Any,
    indices: np.ndarray,
    *,
    workers: int | None,
    progress: bool,
    description: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(indices, lengths)`` chunk by chunk, in order."""
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
    """Indices of samples and their lengths, for a DataLoader."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, int]:
        index = int(index)  # NumPy's, as it comes
        sample = item_at(self._dataset, index, "sample")
        length = len(sample)
        if isinstance(sample, Mapping) and "tokens" in sample:
            expected = max(0, len(sample["tokens"]) - 1)
            if length != expected:
                told = f"len() of the {type(sample).__name__} is {length}, expected {expected}"
                raise ValueError(f"sample {index}: {told}, one less than its tokens")
        return index, length


def _read(path: Path) -> np.ndarray:
    """The records of a file, none where it cannot be used."""
    nothing = np.empty(0, dtype=_RECORD)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return nothing
    except OSError as error:  # a folder, or links in a circle
        logger.warning("%s cannot be read (%s): its lengths will be measured again", path, error)
        return nothing
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            keys, lengths = arrays["keys"], arrays["lengths"]
            records = np.empty(len(keys), dtype=_RECORD)
            if keys.dtype != _RECORD["key"] or lengths.shape != records.shape:
                raise ValueError("expected K keys of 16 bytes and as many lengths")
            records["key"], records["length"] = keys, lengths
    # zipfile and numpy raise a dozen types for bytes that are no archive of arrays.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning(
            "%s is damaged: ignored, its lengths will be measured again (%s)", path, reason
        )
        return nothing
    return records
