"""Which pictures a viewer shows otherwise than the model sees them.

The pixels are used as ``Image.convert("RGB")`` of Pillow gives them: not turned, without regard to
transparency, and only the first picture of a file. Most people look at their pictures in a viewer,
which turns them, hides what is transparent and plays animations.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from tqdm.contrib.concurrent import thread_map

from step37_data.common.image_entry import ImageFile
from step37_data.common.threads import default_threads
from step37_data.images.decode import BrokenImageError, open_image

_TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = 1
_ORIENTATIONS = range(1, 9)


def viewer_difference(path: ImageFile) -> str | None:
    """Say how a viewer shows a picture otherwise than its pixels are used.

    Only the header is read, and of animations what separates the pictures. So transparency is
    reported whether or not anything is hidden by it.

    Returns:
        The differences, or None if there are none or the file cannot be read.
    """
    try:
        with open_image(path) as image:
            return "; ".join(_differences(image)) or None
    except BrokenImageError:  # :func:`find_broken_images` tells of it
        return None


def _differences(image: Image.Image) -> list[str]:
    found = []
    if image.mode.startswith(("I", "F")):
        found.append(f"more than 8 bits a pixel ({image.mode}): values above 255 become white")
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        found.append(f"transparency ({image.mode}): the colours below it are seen")
    # A PNG would be decoded to look for EXIF that follows the pixels. Pillow itself turns a TIFF.
    if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
        orientation = image.getexif().get(_ORIENTATION_TAG, _UPRIGHT)
        if orientation in _ORIENTATIONS and orientation != _UPRIGHT:
            found.append(f"EXIF orientation {orientation}: the picture is not turned")
    # What else an MPO holds is not shown by a viewer either.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        found.append(f"{frames} frames or pages: only the first is used")
    return found


def find_viewer_differences(paths: Sequence[str], quiet: bool = False) -> dict[str, str]:
    """Find the image files that a viewer shows otherwise, and how, by their headers; in order."""
    bar = {"desc": "Reading headers", "unit": "file", "disable": quiet}
    found = thread_map(viewer_difference, paths, max_workers=default_threads(), **bar)
    return {path: told for path, told in zip(paths, found, strict=True) if told is not None}
