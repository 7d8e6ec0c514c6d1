"""Finds the image files of a data set that an image viewer shows otherwise than training does."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.contrib.concurrent import thread_map

from step37_data.common.threads import default_threads
from step37_data.images.decode import BrokenImageError, open_image, viewed_otherwise


def find_viewer_differences(paths: Sequence[str], quiet: bool = False) -> dict[str, str]:
    """Find the image files that a viewer shows otherwise, in order.

    Returns:
        By path the differences, as :func:`~step37_data.images.decode.viewed_otherwise` names them.
        Files that cannot be read are left out; :func:`find_broken_images` tells of them.
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
