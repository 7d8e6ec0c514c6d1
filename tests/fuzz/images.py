"""Damaged files of every format that Pillow writes: Pillow's picture, or black; black of formats
that are not read as pictures."""

from __future__ import annotations

import contextlib
import functools
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from step37_data.images.crops import plan_file
from step37_data.images.decode import BrokenImageError, read_rgb
from step37_data.preprocess import load_images
from step37_kernels.pixels.normalize import clip_normalize

# A damaged header can ask for gigabytes, one thread at a time.
MAX_PIXELS = 4_000_000
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "F", "I", "LA", "YCbCr")
# The formats that are read as pictures. A file of any other is broken: EPS would start a program.
READ = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
# Pillow leaves them to others, or they are no format of their own.
NOT_READ = {"BUFR", "GRIB", "HDF5", "WMF", "MPO"}


@functools.cache
def formats() -> tuple[str, ...]:
    """Those that Pillow can write and read."""
    Image.init()
    return tuple(sorted(set(Image.SAVE) & set(Image.OPEN) - NOT_READ))


def case(rng: np.random.Generator, folder: Path) -> None:
    path = folder / f"picture.{rng.choice(['jpg', 'png', 'bin'])}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(damaged(rng, written(rng, folder)))
        got = None
        with contextlib.suppress(BrokenImageError):
            got = np.asarray(read_rgb(str(path), MAX_PIXELS))
        try:
            known = [name for name in READ if name in Image.OPEN]
            with Image.open(path, formats=known) as image:
                small = image.width * image.height <= MAX_PIXELS
                wanted = np.asarray(image.convert("RGB")) if small else None
        except MemoryError:
            raise
        except Exception:  # whatever a decoder raises
            wanted = None
        assert (got is None) == (wanted is None)
        assert wanted is None or np.array_equal(got, wanted)
        plan_file(str(path))
        sizes = {"image_size": 28, "patch_image_size": 14, "max_pixels": MAX_PIXELS}
        loaded = load_images([(str(path), 0), (str(path), 1)], threads=1, **sizes)
        for (pixels, _), side in zip(loaded, (28, 14), strict=True):
            assert pixels.shape == (3, side, side)
            assert torch.isfinite(pixels).all()
            assert wanted is not None or torch.equal(pixels, black(side))


def black(side: int) -> torch.Tensor:
    return clip_normalize(torch.zeros(1, side, side, 3, dtype=torch.uint8), dtype=torch.float32)[0]


def written(rng: np.random.Generator, folder: Path) -> bytes:
    """A small picture in a format and a mode that go together."""
    pixels = rng.integers(0, 256, (*rng.integers(1, 40, 2), 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    kind = str(rng.choice(formats()))
    if kind in ("ICO", "ICNS"):
        picture = picture.resize((64, 64))
    for mode in (*rng.permutation(MODES), "RGB", "L", "F", "1"):
        try:
            changed = (
                picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
            )
            changed.save(folder / "whole", format=kind)
        except (OSError, ValueError, KeyError, TypeError):  # not in this mode
            continue
        return (folder / "whole").read_bytes()
    return b""


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut, flipped, zeroed, spliced, doubled: more often in the first bytes, where headers are."""
    data = bytearray(content)
    for _ in range(int(rng.choice([0, 1, 1, 2, 5, 20]))):
        if not data:
            break
        end = len(data) if rng.random() < 0.7 else min(len(data), 100)
        at = int(rng.integers(end))
        length = int(rng.integers(1, 9))
        match rng.integers(7):
            case 0:
                data = data[: int(rng.integers(len(data) + 1))]
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case 3:
                data[at : at + length] = b"\xff" * len(data[at : at + length])
            case 4:
                data[at:at] = rng.bytes(length)
            case 5:
                del data[at : at + length]
            case 6:
                other = int(rng.integers(len(data)))
                data[at : at + length] = data[other : other + length]
    return bytes(data)
