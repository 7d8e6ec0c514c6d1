"""Finds the image files of a data set that image viewers show differently from training."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.contrib.concurrent import thread_map

from step37_data.common.threads import default_threads
from step37_data.images.decode import BrokenImageError, open_image, viewed_otherwise


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
