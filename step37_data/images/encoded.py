"""Image files in memory, for samples that come without a path."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a picture of a WebDataset sample is called, after the last dot.
PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The bytes of an image file, to stand wherever a path may: in ``images``, ``image_paths``.

    Attributes:
        name: what messages call it.
        data: the file, encoded as it is.
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


ImageFile = str | EncodedImage
