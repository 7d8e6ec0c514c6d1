"""What stands for pictures in the text of a sample, and which file each of it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from step37_data.images.crops import Window, plan_file
from step37_data.images.encoded import ImageFile
from step37_data.text.tokens import (
    DEFAULT_TOKENS,
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    PATCH_NEWLINE_TOKEN,
    ImageTokens,
)

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


def token_runs(
    newline_mask: Sequence[bool], names: ImageTokens = DEFAULT_TOKENS
) -> list[tuple[str, int]]:
    """What stands for a picture in the text: its crops row by row, then the full image.

    Args:
        newline_mask: of the picture's plan.
        names: the tokens, and how many rows an image has.

    Returns:
        ``(token, how often in a row)``; two crops side by side, without the end, are
        ``<patch_start>`` 1, ``<im_patch>`` 81, ``<patch_end>`` 1, ``<patch_start>`` 1, …
    """

    def framed(start: str, rows: int, end: str) -> list[tuple[str, int]]:
        return [(start, 1), (names.image_token, rows), (end, 1)]

    image = framed(names.image_start_token, names.image_token_count, names.image_end_token)
    crop = framed(names.patch_start_token, names.patch_token_count, names.patch_end_token)
    runs: list[tuple[str, int]] = []
    for newline in newline_mask:
        runs += [*crop, (PATCH_NEWLINE_TOKEN, 1)] if newline else crop
    return runs + image


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
