"""Runs cases: of one area, or of all in turn for so many seconds."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from tests.fuzz import caches, conversations, images, insertion, media, metadata

AREAS = {
    "insertion": insertion.case,
    "images": images.case,
    "metadata": metadata.case,
    "caches": caches.case,
    "media": media.case,
    "conversations": conversations.case,
}


def check(area: str, seed: int, number: int) -> None:
    """Run one case, in a folder of its own.

    Raises:
        Exception: what the case found.
    """
    rng = np.random.default_rng([zlib.crc32(area.encode()), seed, number])
    logging.disable()  # A case that is all damage has much to say.
    try:
        with tempfile.TemporaryDirectory(prefix="step37-fuzz-") as folder:
            AREAS[area](rng, Path(folder))
    finally:
        logging.disable(logging.NOTSET)


def run(seconds: float, seed: int, areas: list[str]) -> tuple[Counter[str], list[str]]:
    """Cases of each area in turn until the time is up, an equal share of it for each.

    Returns:
        The number of cases by area, and what was found, with how to have it again.
    """
    counts: Counter[str] = Counter()
    spent = dict.fromkeys(areas, 0.0)
    found: list[str] = []
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end and len(found) < 10:
        area = min(areas, key=spent.__getitem__)
        number = counts[area]
        try:
            check(area, seed, number)
        except Exception:  # a finding, whatever it is
            again = f"python -m tests.fuzz --area {area} --seed {seed} --case {number}"
            found.append(f"{again}\n{traceback.format_exc()}")
        counts[area] += 1
        spent[area] += time.monotonic() - now
    return counts, found
