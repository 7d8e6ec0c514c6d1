"""Describes one picture of a sample: its file, full image or crop, and the tokens it takes.

The text modules (template, placeholders) and the image modules (crops, decoding) both need these
names, so they are in this package, which both may import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# The second element of an entry of ``image_paths``.
IMAGE_ITEM_TYPE = 0
PATCH_ITEM_TYPE = 1

IMAGE_TOKEN_COUNT = 169
"""Feature rows of a full image, which is also its number of ``<im_patch>`` tokens."""
PATCH_TOKEN_COUNT = 81
"""Feature rows of a crop, which is also its number of ``<im_patch>`` tokens."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The bytes of an image file, accepted wherever a path is: in ``images`` and ``image_paths``.

    Attributes:
        name: the name of the picture in messages.
        data: the content of the image file, still encoded (JPEG, PNG, …).
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


ImageFile = str | EncodedImage
"""Path of an image file, or the file's content."""

Window = tuple[int, int, int, int]
"""A rectangle in pixels: x, y, width, height."""

Entry = tuple[ImageFile, int] | tuple[ImageFile, int, Window]
"""An element of ``image_paths`` as packs hold it: file, item type and, with multicrop, window."""


class ImageEntry(NamedTuple):
    """A checked element of ``image_paths``; ``window`` is None if it has none.

    Attributes:
        path: path of the image file, or its content.
        kind: ``IMAGE_ITEM_TYPE`` or ``PATCH_ITEM_TYPE``.
        window: with multicrop, the part of the picture that is shown: a crop's window lies on the
            canvas, a full image's is ``CropPlan.full_window``. None: the whole file, without
            multicrop.
    """

    path: ImageFile
    kind: int
    window: Window | None = None

    @property
    def file(self) -> tuple[ImageFile, bool]:
        """The file that must be decoded for this entry, and whether multicrop is on."""
        return self.path, self.window is not None


def checked_kind(name: str, kind: Any) -> int:
    """Return ``kind`` if it is one of the two item types.

    Raises:
        ValueError: it is another value; the message names ``name``.
    """
    if kind not in (IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE):
        raise ValueError(f"{name}: expected the item type 0 (image) or 1 (crop), got {kind!r}")
    return int(kind)


def checked_entries(
    name: str, given: Any, *, bare_path_kind: int | None = None
) -> list[ImageEntry]:
    """Check a list of ``(path, item type)`` and ``(path, item type, window)``.

    Args:
        name: of the list, for messages.
        given: the list.
        bare_path_kind: item type of an element that is a path alone; None refuses such elements.

    Raises:
        ValueError: ``given`` is no list, or an element has another form; the message names
            ``name``.
    """
    if bare_path_kind is None:
        form = "(path, type) or (path, type, window)"
    else:
        form = "a path or (path, type)"
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{name}: expected a list of {form}, got {given!r}")
    entries = []
    for each in given:
        parts = each if isinstance(each, (list, tuple)) else (each, bare_path_kind)
        path, kind, window = (*parts, None, None, None)[:3]
        is_file = isinstance(path, (str, os.PathLike, EncodedImage))
        if not is_file or kind is None or len(parts) > 3:
            raise ValueError(f"{name}: expected {form}, got {each!r}")
        if window is not None:
            if not isinstance(window, (list, tuple)) or len(window) != 4:
                raise ValueError(
                    f"{name}: expected a window (x, y, width, height), got {window!r} of {path}"
                )
            x, y, width, height = map(int, window)
            window = (x, y, width, height)
        file = path if isinstance(path, EncodedImage) else os.fspath(path)
        entries.append(ImageEntry(file, checked_kind(f"{name}: {path}", kind), window))
    return entries
