"""Assigns image files to the placeholders in the text of a sample."""

from __future__ import annotations

from collections.abc import Sequence

from step37_data.common.image_entry import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE, Entry, ImageFile
from step37_data.images.crops import plan_file


class SampleImages:
    """Assigns the images of a sample to its placeholders, in order.

    Args:
        given: ``(path, item type)`` of the sample.
        as_viewed: ``ImageOptions.as_viewed`` with which the pictures will be read; the windows of
            crops depend on it.

    Attributes:
        given: as above.
        wanted: the item type of every ``<im_patch>`` of the placeholders so far.
    """

    def __init__(self, given: Sequence[tuple[ImageFile, int]], *, as_viewed: bool = False) -> None:
        self.given: list[Entry] = list(given)
        self.wanted: list[int] = []
        self._as_viewed = as_viewed
        self._left = {
            wanted: iter([path for path, kind in given if kind == wanted])
            for wanted in (IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE)
        }
        self._dealt: list[Entry] = []

    def seen(self) -> list[Entry]:
        """The entries of the placeholders so far, then the images that have no placeholder."""
        surplus = ((path, kind) for kind, paths in self._left.items() for path in paths)
        return [*self._dealt, *surplus]

    def see(self, kind: int, in_crops: bool = False) -> tuple[bool, ...]:
        """Assign the next file of ``kind`` to a placeholder, if one is left.

        Args:
            kind: item type of the placeholder.
            in_crops: whether the placeholder stands for the file's crops and its full image.

        Returns:
            For each crop, whether a newline follows it; empty without crops.
        """
        path = next(self._left[kind], None)
        if in_crops and path is not None:
            plan = plan_file(path, as_viewed=self._as_viewed)
            crops = [(path, PATCH_ITEM_TYPE, window) for window in plan.windows]
            self._dealt += [*crops, (path, kind, plan.full_window)]
            self.wanted += [PATCH_ITEM_TYPE] * len(crops) + [kind]
            return plan.newline_mask
        if path is not None:
            self._dealt.append((path, kind))
        self.wanted.append(kind)
        return ()
