"""Which file each placeholder in the text of a sample shows."""

from __future__ import annotations

from collections.abc import Sequence

from step37_data.common.image_entry import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE, Entry, ImageFile
from step37_data.images.crops import plan_file


class SampleImages:
    """The images of a sample, dealt out to its placeholders in their order.

    Args:
        given: ``(path, item type)`` of the sample.
        as_viewed: the pictures will be read with this ``ImageOptions.as_viewed``, on which the
            windows of crops depend.

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
        """What the placeholders show, then the images for which there was no placeholder."""
        surplus = ((path, kind) for kind, paths in self._left.items() for path in paths)
        return [*self._dealt, *surplus]

    def see(self, kind: int, in_crops: bool = False) -> tuple[bool, ...]:
        """Give the next placeholder its file of ``kind``, if one is left.

        Args:
            kind: item type of the placeholder.
            in_crops: the placeholder shows the windows of the file's crops and of the full image.

        Returns:
            The mask of the crops' newlines, empty without crops.
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
