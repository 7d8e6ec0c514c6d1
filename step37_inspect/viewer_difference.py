"""Finds the image files that an image viewer shows otherwise than stock reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tqdm.contrib.concurrent import thread_map

from step37_data.common.threads import default_threads
from step37_data.images.decode import BrokenImageError, open_image, viewed_otherwise


class Treatment(NamedTuple):
    """How pictures of one kind are used: as stock reads them, and with ``as_viewed``."""

    as_stock: str
    as_viewed: str


TREATMENTS = {
    "turned by EXIF": Treatment("not turned", "turned upright"),
    "transparent": Treatment("with the colours stored there", "on white"),
    "16 bits": Treatment("with values above 255 as white", "with the upper 8 bits"),
    "more than 16 bits": Treatment(*["with values above 255 as white"] * 2),
    "animated": Treatment(*["as their first frame"] * 2),
}
"""By what :func:`~step37_data.images.decode.viewed_otherwise` names, in its order."""


def find_viewer_differences(paths: Sequence[str], quiet: bool = False) -> dict[str, str]:
    """Find the image files that a viewer shows differently, in order.

    Returns:
        For each path its differences, named as by
        :func:`~step37_data.images.decode.viewed_otherwise`. Files that cannot be read are left out;
        :func:`find_broken_images` finds these.
    """
    bar = {"desc": "Comparing with a viewer", "unit": "file", "disable": quiet}
    found = thread_map(_differences, paths, max_workers=default_threads(), **bar)
    return {path: told for path, told in zip(paths, found, strict=True) if told}


def _differences(path: str) -> str:
    try:
        with open_image(path) as image:
            return "; ".join(viewed_otherwise(image))
    except BrokenImageError:
        return ""
