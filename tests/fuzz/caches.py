"""Files of a cache that were cut, garbled or swapped: found out, never believed."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np

from step37_data.caches.hub_cache import check_origin, flaw_of
from step37_data.caches.lengths import LengthCache, probe_lengths
from tests.fuzz.images import damaged


class Texts:
    """A data set of texts, whose lengths are those of the texts."""

    def __init__(self, texts: list[bytes], tokenizer: str) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> bytes:
        return self.texts[index]

    def fingerprint(self) -> str:
        return self.tokenizer

    def sample_keys(self) -> np.ndarray:
        digests = [hashlib.blake2b(text, digest_size=16).digest() for text in self.texts]
        return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def case(rng: np.random.Generator, folder: Path) -> None:
    (_lengths if rng.random() < 0.5 else _downloads if rng.random() < 0.8 else _origin)(rng, folder)


def _lengths(rng: np.random.Generator, folder: Path) -> None:
    def texts() -> Texts:
        made = [rng.bytes(int(n)) for n in rng.integers(0, 30, int(rng.integers(1, 20)))]
        return Texts(made + made[: int(rng.integers(3))], str(rng.choice(["one", "two"])))

    sets = [texts() for _ in range(3)]
    for number in rng.integers(0, 3, 4):
        for file in folder.rglob("*.npz"):
            if rng.random() < 0.5:
                content = file.read_bytes()
                file.write_bytes(damaged(rng, content))
        chosen = sets[number]
        wanted = [len(text) for text in chosen.texts]
        got = probe_lengths(chosen, cache_dir=folder, progress=False)
        assert got.tolist() == wanted
        assert LengthCache(folder, chosen).look_up().tolist() == wanted
    if rng.random() < 0.2:
        results: dict[int, list[int]] = {}

        def race(number: int) -> None:
            measured = probe_lengths(sets[number], cache_dir=folder, progress=False)
            results[number] = measured.tolist()

        threads = [threading.Thread(target=race, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {i: [len(text) for text in one.texts] for i, one in enumerate(sets)}


def _downloads(rng: np.random.Generator, folder: Path) -> None:
    """A file with the note that huggingface_hub leaves beside it."""
    content = rng.bytes(int(rng.integers(0, 3000)))
    path = folder / "train" / "picture.jpg"
    note = folder / ".cache" / "huggingface" / "download" / "train" / "picture.jpg.metadata"
    for place in (path, note):
        place.parent.mkdir(parents=True, exist_ok=True)
    if rng.random() < 0.5:
        digest = hashlib.sha256(content).hexdigest()
    else:
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    note.write_text(f"{'0' * 40}\n{digest}\n1.5\n")
    found = damaged(rng, content)
    path.write_bytes(found)
    flaw = flaw_of(folder, path)
    assert (flaw is None) == (found == content), flaw
    # A note that is damaged itself may ask for another download; it must not raise.
    note.write_bytes(damaged(rng, note.read_bytes()))
    flaw_of(folder, path)


def _origin(rng: np.random.Generator, folder: Path) -> None:
    note = folder / ".cache" / "step37_origin.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    wanted = {"repo_id": "a/b", "revision": None}
    whole = json.dumps(wanted).encode()
    note.write_bytes(damaged(rng, whole))
    told = None
    try:
        check_origin(folder, "a/b", None)
    except ValueError as error:
        told = str(error)
    if told is None:
        assert json.loads(note.read_bytes()) == wanted
    else:
        assert str(folder) in told
        assert note.read_bytes() != whole
