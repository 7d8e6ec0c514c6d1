"""Reads image files as RGB pictures, as Pillow does, and reports files that cannot be read."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from step37_data.common.extras import how_to_get
from step37_data.common.image_entry import EncodedImage, ImageFile

logger = logging.getLogger(__name__)

OnBroken = Literal["zero", "raise", "skip-loss"]

BROKEN_SIZE = (224, 224)

_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LONGEST_KEYWORD = 79  # bytes of the keyword of a text in a PNG

# Formats that Pillow reads without help (for EPS it would start Ghostscript, an external program).
# It tries them in this order, so common ones come first.
_PICTURE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "AVIF",
    "BMP",
    "DIB",
    "ICO",
    "JPEG2000",
    "MPO",
    "PCX",
    "PPM",
    "QOI",
    "SGI",
    "TGA",
    "TIFF",
)
_formats_lock = threading.Lock()
_formats: tuple[str, ...] = ()


def picture_formats() -> tuple[str, ...]:
    """Return the formats that are read and that the installed Pillow supports. Thread-safe.

    Pillow loads its plugins when it first needs them, which is not thread-safe. So the first call
    loads all of them, and other threads wait for it.
    """
    global _formats
    with _formats_lock:
        if not _formats:
            Image.init()
            _formats = tuple(name for name in _PICTURE_FORMATS if name in Image.OPEN)
        return _formats


class BrokenImageError(ValueError):
    """An image file could not be read.

    Attributes:
        reason: what went wrong, without the path.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class BrokenImages:
    """Counts unreadable image files, for a report at the end of an epoch. Thread-safe.

    Attributes:
        seen: images read since the last report, or tried.
        occurrences: how many of these were unreadable; a file tried twice counts twice.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self.seen = 0
        self.occurrences = 0
        self._lock = threading.Lock()

    def record(self, path: str, reason: str | None) -> None:
        """Count ``path`` as read, or as unreadable for ``reason``."""
        with self._lock:
            self.seen += 1
            if reason is not None:
                self.occurrences += 1
                self._reasons[path] = reason

    @property
    def reasons(self) -> dict[str, str]:
        """The unreadable files, each with its last error."""
        with self._lock:
            return dict(self._reasons)

    def report(self, shown: int = 10) -> str | None:
        """Log how many images were unreadable, with ``shown`` paths, and reset the counts.

        Returns:
            The message logged, or None if every image could be read.
        """
        with self._lock:
            reasons, occurrences, seen = self._reasons, self.occurrences, self.seen
            self._reasons, self.occurrences, self.seen = {}, 0, 0
        if not occurrences:
            return None
        lines = [f"{occurrences} of {seen} images could not be read ({len(reasons)} files)"]
        lines += [f"  {path}: {reason}" for path, reason in list(reasons.items())[:shown]]
        if len(reasons) > shown:
            lines.append(f"  and {len(reasons) - shown} more")
        message = "\n".join(lines)
        logger.warning("%s", message)
        return message


@contextlib.contextmanager
def open_image(path: ImageFile, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image file for a ``with`` block, as ``Image.open(path)`` does, and close it again.

    Paths that begin with ``s3://`` are read through megfile, as by the stock loader.

    Raises:
        BrokenImageError: there is no regular file; it is of a format that is not among
            :func:`picture_formats`, whatever its name ends in; the picture has more than
            ``max_pixels``; or Pillow cannot read it, here or inside the block: Pillow's readers
            raise errors of any kind on damaged files. A ``MemoryError`` says nothing about the file
            and is raised as it is.
        ImportError: the path begins with ``s3://`` and megfile is not installed. That is no fault
            of the image, so it is not raised as a ``BrokenImageError``; neither is what megfile
            raises where the store cannot be reached.
    """
    source: str | io.BytesIO
    if isinstance(path, EncodedImage):
        source = io.BytesIO(path.data)
    else:
        source = _fetched(path) if path.startswith("s3://") else path
    try:
        # Reading from a pipe or a device may never end.
        if isinstance(source, str) and not os.path.isfile(source) and os.path.exists(source):
            raise OSError("expected a regular file")
        with _opened(source) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(
                    f"{image.width}×{image.height} pixels are more than max_pixels = {max_pixels}"
                )
            yield image
    except (MemoryError, BrokenImageError):
        raise
    except Exception as error:
        raise _broken(path, error) from error


def _opened(source: str | io.BytesIO) -> Image.Image:
    formats = picture_formats()
    try:
        return Image.open(source, formats=formats)
    except UnidentifiedImageError as error:
        if isinstance(source, str):
            with open(source, "rb") as file:
                start = file.read(16)
        else:
            start = source.getvalue()[:16]
        for name, (_, accept) in Image.OPEN.items():
            if name not in formats and accept is not None and accept(start) is True:
                raise ValueError(f"{name}: not a picture format that is read") from error
        raise


def _broken(path: ImageFile, error: Exception) -> BrokenImageError:
    reason = f"{type(error).__name__}: {error}"
    return BrokenImageError(f"image {path} could not be read: {reason}", reason)


def _fetched(path: str) -> io.BytesIO:
    try:
        from megfile import smart_open
    except ModuleNotFoundError as error:
        raise ImportError(f"image {path}: s3:// {how_to_get(error)}", name=error.name) from error
    try:
        with smart_open(path, "rb") as file:
            return io.BytesIO(file.read())
    except OSError as error:
        raise _broken(path, error) from error


def read_rgb(
    path: ImageFile, max_pixels: int | None = None, *, as_viewed: bool = False
) -> Image.Image:
    """Read an image file as ``Image.open(path).convert("RGB")`` does, and close it.

    Args:
        path: of the file, or its content.
        max_pixels: a picture with more pixels is refused before it is decoded.
        as_viewed: see :func:`rgb_image`.

    Raises:
        BrokenImageError: see :func:`open_image`.
    """
    with open_image(path, max_pixels) as image:
        return rgb_image(image, as_viewed=as_viewed)


def why_broken(path: ImageFile) -> str | None:
    """Say what is wrong with an image file; None if it can be read."""
    try:
        read_rgb(path)
    except BrokenImageError as error:
        return error.reason
    return None


def rgb_image(image: Image.Image, *, as_viewed: bool = False) -> Image.Image:
    """Decode a picture that :func:`open_image` has opened, as ``image.convert("RGB")`` does.

    If simplejpeg is installed, it decodes intact JPEGs of three colours or grey. The pixels are the
    same, in two thirds of the time.

    Args:
        image: not decoded yet.
        as_viewed: decode as image viewers do: turned by the EXIF orientation, transparent parts on
            white, the upper 8 of 16 bits. If False, ``convert`` decides: the picture is not turned,
            transparent parts show the colours stored in them, and 16-bit grey values above 255
            become white.
    """
    if as_viewed and (_orientation(image) != 1 or _has_16_bits(image) or _has_alpha(image)):
        return _viewed(image)
    pixels = _by_simplejpeg(image)
    return _in_rgb(image) if pixels is None else Image.fromarray(pixels)


def shown_size(image: Image.Image, *, as_viewed: bool = False) -> tuple[int, int]:
    """Return (width, height) of the result of :func:`rgb_image`, from the header of the file."""
    width, height = image.size
    return (height, width) if as_viewed and _orientation(image) >= 5 else (width, height)


def decode_into(
    memory: npt.NDArray[np.uint8], image: Image.Image, *, as_viewed: bool = False
) -> None:
    """Write the pixels of :func:`rgb_image` to ``memory``, ``[height, width, 3]``.

    simplejpeg decodes directly into it. Pillow's pixels take four bytes each and are copied.
    """
    if as_viewed or _by_simplejpeg(image, memory) is None:
        memory[...] = np.asarray(rgb_image(image, as_viewed=as_viewed))


def viewed_otherwise(image: Image.Image) -> list[str]:
    """List how an image viewer shows the picture differently from training; mostly empty.

    Args:
        image: opened by :func:`open_image`. Its pixels are decoded if it can have transparent
            parts, or is a PNG with EXIF after its pixels.

    Returns:
        The differences that exist, in this order. With ``as_viewed`` the first three disappear:

        * ``"turned by EXIF"``;
        * ``"transparent"``: at least one pixel is;
        * ``"16 bits"``: 16-bit grey, whose values above 255 become white;
        * ``"more than 16 bits"``: 32-bit integers or fractions, whose values above 255 do so too;
        * ``"animated"``: several frames or pages, of which only the first is used.
    """
    transparent = _has_alpha(image) and image.convert("RGBA").getextrema()[3][0] < 255
    found = {
        "turned by EXIF": _orientation(image) != 1,
        "transparent": transparent,
        "16 bits": _has_16_bits(image),
        "more than 16 bits": image.mode in ("I", "F") and not _has_16_bits(image),
        "animated": image.format != "MPO" and getattr(image, "is_animated", False),
    }
    return [name for name, holds in found.items() if holds]


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, by which viewers turn the picture: 1 (not at all) to 8."""
    if image.format == "TIFF":
        return 1  # Pillow always turns these itself
    try:
        # If a PNG has no EXIF before its pixels, Pillow decodes it to look after them.
        decodes = image.format == "PNG" and "exif" not in image.info
        in_vain = decodes and not _has_exif_behind_pixels(image)
        exif = Image.Image.getexif(image) if in_vain else image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
    except Exception as error:  # Pillow raises errors of any kind on damaged EXIF
        logger.debug("the EXIF of a picture is unreadable, so it is not turned: %s", error)
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_exif_behind_pixels(image: Image.Image) -> bool:
    """Whether a PNG has EXIF or XMP after its pixels; reads only the headers of its chunks."""
    file = image.fp
    if file is None:  # decoded already, so Pillow has read all of the file
        return True
    place = file.tell()
    try:
        at, behind = len(_PNG_SIGNATURE), False
        file.seek(at)
        while len(header := file.read(8)) == 8:
            size, kind = int.from_bytes(header[:4], "big"), header[4:]
            behind = behind or kind == b"IDAT"
            if behind and kind == b"eXIf":
                return True
            if behind and kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword = file.read(min(size, _LONGEST_KEYWORD + 1)).partition(b"\0")[0]
                if keyword in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
                    return True
            at += size + 12  # size and kind come before the content, a checksum after it
            file.seek(at)
        return False
    finally:
        file.seek(place)


def _has_16_bits(image: Image.Image) -> bool:
    """Whether it is 16-bit grey; Pillow itself reduces 16-bit colours to 8 bits."""
    of_16 = image.mode == "I" and image.format in ("PNG", "PPM")
    return of_16 or image.mode.startswith("I;16")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or (
        image.mode in ("RGB", "L", "P", "1") and "transparency" in image.info
    )


def _viewed(image: Image.Image) -> Image.Image:
    """Convert to RGB as image viewers show the picture."""
    of_16_bits, orientation = _has_16_bits(image), _orientation(image)
    image.load()
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
    if of_16_bits:
        # The upper byte, which Pillow also uses of 16-bit colours.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not _has_alpha(image):
        return _in_rgb(image)
    image = image.convert("RGBA")
    shown = Image.new("RGB", image.size, (255, 255, 255))
    shown.paste(image, mask=image.getchannel("A"))
    return shown


def _in_rgb(image: Image.Image) -> Image.Image:
    """Do ``image.convert("RGB")``, without copying a picture that is in RGB already."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_simplejpeg(
    image: Image.Image, memory: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8] | None:
    """Decode by simplejpeg, into ``memory`` if given; None if Pillow has to read the file.

    If it returns None, ``memory`` may have been overwritten.
    """
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    if plain and (fast := _simplejpeg()):
        image.fp.seek(0)
        with contextlib.suppress(ValueError):  # faulty files are left to Pillow
            pixels = fast.decode_jpeg(image.fp.read(), strict=True, buffer=memory)
            if pixels.shape == (image.height, image.width, 3):
                return pixels
    return None


@functools.cache
def _simplejpeg() -> Any:
    """Return the module simplejpeg if installed and equal to Pillow; they are compared once."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((151, 83), Image.Resampling.BICUBIC)
    for subsampling, progressive in itertools.product((0, 1, 2), (False, True)):
        file = io.BytesIO()
        picture.save(file, "JPEG", subsampling=subsampling, progressive=progressive)
        with Image.open(file) as image:
            if not np.array_equal(simplejpeg.decode_jpeg(file.getvalue()), np.asarray(image)):
                logger.warning("simplejpeg's pixels are not Pillow's: Pillow decodes, more slowly")
                return None
    return simplejpeg


def pass_over(error: BrokenImageError, on_broken: OnBroken | None) -> str:
    """Warn that a black picture is used and return the reason; raise with ``on_broken="raise"``."""
    if on_broken == "raise":
        raise error
    logger.warning("%s: black is used in its place", error)
    return error.reason
