"""Image files to RGB pictures: Pillow in a pool of threads, and what happens to broken files.

Pillow releases the GIL while it decodes and resizes, so threads are enough.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from step37_data.checks import checked_int
from step37_data.images.encoded import EncodedImage, ImageFile

logger = logging.getLogger(__name__)

OnBroken = Literal["zero", "raise", "skip-loss"]
ON_BROKEN = ("zero", "raise", "skip-loss")

BROKEN_SIZE = (224, 224)

# What Pillow's readers are known to raise on damaged files besides OSError, which covers missing
# files, folders, truncation and unknown formats.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BrokenImageError(ValueError):
    """An image file could not be read, and ``on_broken="raise"`` asked to be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One picture and, if its file was unreadable, why it is black.

    Attributes:
        image: RGB, of the size of the file.
        broken: None, or what went wrong with the file.
    """

    image: Image.Image
    broken: str | None

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 ``[height, width, 3]``, read-only."""
        return np.asarray(self.image)


class BrokenImages:
    """Counts unreadable image files, for a report at the end of an epoch. Thread-safe.

    Attributes:
        seen: images asked for since the last report.
        occurrences: unreadable ones among them; a file met twice counts twice.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self.seen = 0
        self.occurrences = 0
        self._lock = threading.Lock()

    def record(self, path: str, reason: str | None) -> None:
        """Note that ``path`` was read, or was not for ``reason``."""
        with self._lock:
            self.seen += 1
            if reason is not None:
                self.occurrences += 1
                self._reasons[path] = reason

    @property
    def reasons(self) -> dict[str, str]:
        """The unreadable files, each with its last error."""
        with self._lock:
            return dict(self._reasons)

    def report(self, shown: int = 10) -> str | None:
        """Log how many images were unreadable, with the first ``shown`` paths, and count anew.

        Returns:
            The message logged, or None if every image could be read.
        """
        with self._lock:
            reasons, occurrences, seen = self._reasons, self.occurrences, self.seen
            self._reasons, self.occurrences, self.seen = {}, 0, 0
        if not occurrences:
            return None
        lines = [f"{occurrences} of {seen} images could not be read ({len(reasons)} files)"]
        lines += [f"  {path}: {reason}" for path, reason in list(reasons.items())[:shown]]
        if len(reasons) > shown:
            lines.append(f"  and {len(reasons) - shown} more")
        message = "\n".join(lines)
        logger.warning("%s", message)
        return message


@contextlib.contextmanager
def open_image(path: ImageFile) -> Iterator[Image.Image]:
    """``Image.open(path)``, closed again; ``s3://`` through megfile, as the stock loader has it.

    Raises:
        ImportError: the path begins with ``s3://`` and megfile is not installed. No image is at
            fault then, so that is never taken for a broken one; nor is what megfile raises for a
            store that cannot be reached.
    """
    if isinstance(path, EncodedImage) or not path.startswith("s3://"):
        file = io.BytesIO(path.data) if isinstance(path, EncodedImage) else path
        with Image.open(file) as image:
            yield image
        return
    try:
        from megfile import smart_open
    except ModuleNotFoundError as error:
        raise ImportError(
            f"image {path}: s3:// is read through megfile, which cannot be imported ({error}); "
            "pip install megfile",
            name="megfile",
        ) from error
    with smart_open(path, "rb") as file, Image.open(file) as image:
        yield image


def read_rgb(path: ImageFile) -> Image.Image:
    """``Image.open(path).convert("RGB")``: no EXIF turn, the file closed again."""
    with open_image(path) as image:
        return image.convert("RGB")


def decode(path: ImageFile, on_broken: OnBroken) -> Decoded:
    """Read one image file.

    Args:
        path: of the file, or the file itself.
        on_broken: ``"zero"`` and ``"skip-loss"`` give a black 224×224 picture for an unreadable
            file, with a warning; ``"raise"`` raises.

    Raises:
        BrokenImageError: the file is unreadable and ``on_broken`` is ``"raise"``.
    """
    reason = None
    try:
        picture = read_rgb(path)
    except DECODE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        if on_broken == "raise":
            raise BrokenImageError(f"image {path} could not be read: {reason}") from error
        logger.warning("image %s could not be read, black is used in its place: %s", path, reason)
        picture = Image.new("RGB", BROKEN_SIZE)
    return Decoded(image=picture, broken=reason)


def available_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Decoding threads if nobody says how many: the cores this process may use, at most 8."""
    return min(8, available_cores())


def map_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None
) -> list[_Result]:
    """``map(function, items)`` on ``threads`` threads, in order; the first error is raised.

    ``threads=1`` runs in the calling thread.
    """
    count = default_threads() if threads is None else checked_int("threads", threads)
    if count == 1:
        return list(map(function, items))
    with ThreadPoolExecutor(count, thread_name_prefix="step37-decode") as pool:
        return list(pool.map(function, items))
