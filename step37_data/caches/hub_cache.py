"""A folder of files from a hub: what it was filled from, and whether its files are whole."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path, PurePosixPath

from step37_data.caches.lengths import write_atomically

logger = logging.getLogger(__name__)

# What the cache folder was filled from; huggingface_hub keeps its notes in .cache as well.
_ORIGIN_FILE = ".cache/step37_origin.json"
NOTES = ".cache/huggingface/download"


def path_inside(folder: Path, name: str) -> Path:
    """``folder / name``, provided that ``name`` stays inside on every operating system."""
    parts = PurePosixPath(name).parts
    outside = not parts or name.startswith("/") or ".." in parts
    if outside or any(character in name for character in "\\:\0"):
        raise ValueError(f"file name {name!r} leaves the folder {str(folder)!r}")
    return folder.joinpath(*parts)


def flaw_of(root: Path, path: Path) -> str | None:
    """What is wrong with a file, as far as can be told without the hub; None if nothing is."""
    if not path.is_file():
        return "is missing" if not path.exists() else "is not a regular file"
    try:
        # huggingface_hub's own note: commit, hash, time.
        note = (root / NOTES / f"{path.relative_to(root)}.metadata").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        note = []
    size = path.stat().st_size
    expected = note[1].strip() if len(note) > 1 else ""
    if len(expected) not in (40, 64):
        return None if size else "is empty"
    # The hash of a large file, or git's of a small one.
    digest = hashlib.new("sha256" if len(expected) == 64 else "sha1", usedforsecurity=False)
    digest.update(b"" if len(expected) == 64 else b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() == expected:
        return None
    return f"is damaged: expected the hash {expected}, found {digest.hexdigest()} of {size} bytes"


def refuse_links(root: Path, *paths: Path) -> None:
    """Raise ``ValueError`` where writing to a path would write outside of ``root``."""
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path} leads by a link to {path.resolve()}, outside of {root}")


def check_origin(root: Path, repo_id: str, revision: str | None) -> None:
    """Refuse a cache of another data set or revision; note down what a new one will hold."""
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
