"""``metadata.csv``: the rows that were written, or an error that names the file."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from step37_data.flickr8k_loader import read_flickr8k_metadata
from tests.fuzz.images import damaged

PIECES = ("a dog", " ", ",", '"', '""', "\n", "\r\n", "é", "猫🐈", "\ufeff", "=1", "", ";", "\t")
NAMES = ("a.jpg", "b c.jpg", "dir/d.jpg", "é.png", "")
LEAVING = ("../x.jpg", "/etc/passwd", "a/../../b", "c:\\d.jpg", "\\\\host\\x")


def case(rng: np.random.Generator, folder: Path) -> None:
    path = folder / "metadata.csv"
    names = [*NAMES, *LEAVING] if rng.random() < 0.2 else NAMES
    rows = []
    for _ in range(int(rng.integers(0, 12))):
        caption = "".join(rng.choice(PIECES, int(rng.integers(0, 5))))
        rows.append([str(rng.choice(names)), caption])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(
            file, quoting=csv.QUOTE_ALL if rng.random() < 0.5 else csv.QUOTE_MINIMAL
        )
        writer.writerows([["file_name", "caption_0"], *rows])
    count = int(rng.integers(1, 9)) if rng.random() < 0.3 else None
    whole = path.read_bytes()
    content = damaged(rng, whole) if rng.random() < 0.6 else whole
    path.write_bytes(content)
    expected = [
        (str(folder / name), caption.strip()) for name, caption in rows if name and caption.strip()
    ]
    told = None
    samples = []
    try:
        samples = read_flickr8k_metadata(path, "caption_0", count)
    except ValueError as error:
        told = str(error)
    if told is not None:
        assert str(path) in told
        assert content != whole or set(names) & set(LEAVING)
        return
    got = [(sample.image_path, sample.caption) for sample in samples]
    assert count is None or len(got) <= count
    assert all(caption == caption.strip() != "" for _, caption in got)
    for image, _ in got:
        assert Path(image).is_relative_to(folder)
        assert ".." not in Path(image).parts
    if content == whole:
        assert got == expected[:count]
