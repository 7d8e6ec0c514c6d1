"""``step37-data shard``: a folder in the data set's layout to WebDataset shards for Energon."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from step37_data.caches.lengths import write_atomically
from step37_data.common.checks import checked_int
from step37_data.flickr8k_loader import Flickr8kSample, read_flickr8k_metadata

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""File name extensions under which a WebDataset sample may hold its picture."""

# Kept in the folder of the shards of a split: what they were made of.
_ORIGIN_FILE = ".step37_origin.json"


def write_shards(
    folder: Path,
    out: Path,
    *,
    caption_key: str = "caption_0",
    sample_count: int | None = None,
    samples_per_shard: int = 1000,
    progress: bool = True,
) -> dict[str, list[str]]:
    """Every split of ``folder`` as shards: per sample its picture, as it is, and its caption.

    ``{folder}/{split}/metadata.csv`` becomes ``{out}/{split}/000000.tar`` and so on, in the order
    of its rows. A shard appears when it is whole, and those that are there stay, so an interrupted
    run goes on where it stopped. The same folder gives the same bytes.

    Args:
        folder: with a folder for every split.
        out: made if it is not there.
        caption_key, sample_count: see :func:`~step37_data.flickr8k_loader.read_flickr8k_metadata`.
        samples_per_shard: the last shard of a split may hold fewer.
        progress: show a progress bar.

    Returns:
        Per split the paths of its shards in ``out``.

    Raises:
        ValueError: no split has samples; ``samples_per_shard`` is no integer of at least 1; a
            picture is of a format that the task encoder does not look for; ``out`` holds shards of
            other samples; or ``metadata.csv`` cannot be read.
        OSError: a picture cannot be read.
    """
    checked_int("samples_per_shard", samples_per_shard)
    shards = {}
    for metadata in sorted(folder.glob("*/metadata.csv")):
        split = metadata.parent.name
        samples = read_flickr8k_metadata(metadata, caption_key, sample_count)
        if not samples:
            continue
        target = out / split
        target.mkdir(parents=True, exist_ok=True)
        _check_origin(target, metadata.parent, samples, samples_per_shard)
        starts = range(0, len(samples), samples_per_shard)
        names = [f"{number:06d}.tar" for number in range(len(starts))]
        with tqdm(total=len(samples), desc=split, unit="sample", disable=not progress) as bar:
            for name, first in zip(names, starts, strict=True):
                chunk = samples[first : first + samples_per_shard]
                if not (target / name).exists():
                    _write_shard(target / name, chunk, first)
                bar.update(len(chunk))
        shards[split] = [f"{split}/{name}" for name in names]
    if not shards:
        raise ValueError(f"{folder}: no {caption_key} and file_name in any */metadata.csv")
    return shards


def _check_origin(
    target: Path, root: Path, samples: Sequence[Flickr8kSample], samples_per_shard: int
) -> None:
    """Refuse shards of other samples; note down what the new ones are made of."""
    digest = hashlib.sha256()
    for sample in samples:
        name = Path(sample.image_path).relative_to(root).as_posix()
        digest.update(json.dumps([name, sample.caption]).encode())
    wanted = {"samples": digest.hexdigest(), "samples_per_shard": samples_per_shard}
    note = target / _ORIGIN_FILE
    if not note.exists():
        write_atomically(note, json.dumps(wanted).encode())
    elif json.loads(note.read_text(encoding="utf-8")) != wanted:
        raise ValueError(
            f"{target} holds shards of other samples, or of another number of them a shard; use "
            "another folder"
        )


def _write_shard(path: Path, samples: Sequence[Flickr8kSample], first: int) -> None:
    unfinished = path.with_suffix(".tar.part")  # the next run writes over it
    with unfinished.open("wb") as file:
        _write_samples(file, samples, first)
    os.replace(unfinished, path)


def _write_samples(file: BinaryIO, samples: Sequence[Flickr8kSample], first: int) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples, first):
            for part, content in _parts(sample):
                # No time, no owner: the same folder gives the same bytes.
                member = tarfile.TarInfo(f"{number:09d}.{part}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _parts(sample: Flickr8kSample) -> Iterator[tuple[str, bytes]]:
    picture = Path(sample.image_path)
    part = picture.suffix[1:].lower()
    if part not in PICTURE_SUFFIXES:
        raise ValueError(f"{picture}: expected a picture named .{', .'.join(PICTURE_SUFFIXES)}")
    yield part, picture.read_bytes()
    yield "txt", sample.caption.encode()
