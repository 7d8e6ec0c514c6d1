"""Which file each placeholder in the text of a sample shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from step37_data.images.crops import Window, plan_file
from step37_data.images.encoded import ImageFile
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
