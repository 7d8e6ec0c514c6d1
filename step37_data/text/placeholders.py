"""Which file each placeholder in the text of a sample shows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from step37_data.images.crops import Window, plan_file
from step37_data.images.encoded import EncodedImage, ImageFile
from step37_data.text.tokens import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE

Entry = tuple[ImageFile, int] | tuple[ImageFile, int, Window]


class ImageEntry(NamedTuple):
    """One entry of ``image_paths``, which holds them as plain tuples, without a window of None.

    Attributes:
        path: of the file, or the file itself.
        kind: ``IMAGE_ITEM_TYPE`` or ``PATCH_ITEM_TYPE``.
        window: of a picture that is seen in crops: that of a crop lies on the canvas, that of the
            full image is ``CropPlan.full_window``. None is the whole file, as it is.
    """

    path: ImageFile
    kind: int
    window: Window | None = None

    @property
    def file(self) -> tuple[ImageFile, bool]:
        """What is decoded for it: a file, as it is or to be seen in crops."""
        return self.path, self.window is not None


def checked_kind(name: str, kind: Any) -> int:
    """``kind`` itself, one of the two item types.

    Raises:
        ValueError: it is another; the message has ``name``.
    """
    if kind not in (IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE):
        raise ValueError(f"{name}: expected the item type 0 (image) or 1 (crop), got {kind!r}")
    return int(kind)


def checked_entries(name: str, given: Any, alone: int | None = None) -> list[ImageEntry]:
    """A list of ``(path, item type)`` and ``(path, item type, window)``.

    Args:
        name: of the list.
        given: the list.
        alone: item type of a path that stands alone; None refuses it.

    Raises:
        ValueError: it is none, or an element is of another form; the message has ``name``.
    """
    form = "(path, type) or (path, type, window)" if alone is None else "a path or (path, type)"
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{name}: expected a list of {form}, got {given!r}")
    entries = []
    for each in given:
        parts = each if isinstance(each, (list, tuple)) else (each, alone)
        path, kind, window = (*parts, None, None, None)[:3]
        is_file = isinstance(path, (str, os.PathLike, EncodedImage))
        if not is_file or kind is None or len(parts) > 3:
            raise ValueError(f"{name}: expected {form}, got {each!r}")
        if window is not None:
            if not isinstance(window, (list, tuple)) or len(window) != 4:
                told = f"expected a window (x, y, width, height), got {window!r} of {path}"
                raise ValueError(f"{name}: {told}")
            x, y, width, height = map(int, window)
            window = (x, y, width, height)
        file = path if isinstance(path, EncodedImage) else os.fspath(path)
        entries.append(ImageEntry(file, checked_kind(f"{name}: {path}", kind), window))
    return entries


class SampleImages:
    """The images of a sample, dealt out to its placeholders in their order.

    Attributes:
        given: ``(path, item type)`` of the sample.
        wanted: the item type of every ``<im_patch>`` of the placeholders so far.
    """

    def __init__(self, given: Sequence[tuple[ImageFile, int]]) -> None:
        self.given: list[Entry] = list(given)
        self.wanted: list[int] = []
        self._left = {
            wanted: iter([path for path, kind in given if kind == wanted])
            for wanted in (IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE)
        }
        self._dealt: list[Entry] = []

    def seen(self) -> list[Entry]:
        """What the placeholders stand for, and images that no placeholder was left for."""
        surplus = ((path, kind) for kind, paths in self._left.items() for path in paths)
        return [*self._dealt, *surplus]

    def see(self, kind: int, in_crops: bool = False) -> tuple[bool, ...]:
        """Deal out the next file of ``kind``, where one is left: as it is, or its windows.

        Returns:
            The mask of the crops' newlines, empty without crops.
        """
        path = next(self._left[kind], None)
        if in_crops and path is not None:
            plan = plan_file(path)
            crops = [(path, PATCH_ITEM_TYPE, window) for window in plan.windows]
            self._dealt += [*crops, (path, kind, plan.full_window)]
            self.wanted += [PATCH_ITEM_TYPE] * len(crops) + [kind]
            return plan.newline_mask
        if path is not None:
            self._dealt.append((path, kind))
        self.wanted.append(kind)
        return ()
