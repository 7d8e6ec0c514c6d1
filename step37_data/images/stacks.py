"""The one road from image files to stacks of normalised pixels on a device.

Every picture of a pack is decoded once, however many windows of it are wanted; a file that is taken
as it is has a single window. For the CPU, Pillow cuts and resizes in the decoding threads. For
CUDA, the decoded pictures travel in one buffer and two launches a kind make the stacks of it, two
or four more the canvases of pictures seen in crops; the values are the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from step37_data.common.threads import map_threads
from step37_data.images.crop_pixels import (
    PIXEL_ORDERS,
    PixelOrder,
    canvas_image,
    cut,
    full_image,
    normalize_then_resize,
    padded_image,
    prepare_on_device,
)
from step37_data.images.crops import CropPlan, Window, plan_crops, plan_whole
from step37_data.images.decode import (
    ON_BROKEN,
    BrokenImageError,
    BrokenImages,
    OnBroken,
    decode,
)
from step37_data.images.device import to_device, upload
from step37_data.images.encoded import ImageFile
from step37_data.text.placeholders import ImageEntry
from step37_data.text.tokens import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE
from step37_kernels.pixels import pillow
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.resize import resize_clip_normalize

logger = logging.getLogger(__name__)


@functools.cache
def kernels_match_pillow() -> bool:
    """Whether the installed Pillow resizes as ours does, tried out once in both orders of passes.

    A Pillow newer than this package may have changed that order. Then Pillow itself resizes, on
    the host, so that the values stay its own.
    """
    rng = np.random.default_rng(0)
    for height, width in ((60, 20), (20, 60), (203, 2), (2, 203), (40, 37)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
        ours = pillow.resize(torch.from_numpy(pixels), 16, 16, pillow.installed_pillow())
        if not np.array_equal(ours.numpy(), np.asarray(picture)):
            logger.warning(
                "Pillow %s resizes in an order of passes that is not known here: images are "
                "resized by Pillow on the host, which is slower",
                pillow_version,
            )
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picture:
    """A decoded picture.

    Attributes:
        image: RGB; black where the file is unreadable.
        plan: of its windows.
        broken: None, or why it is black.
    """

    image: Image.Image
    plan: CropPlan
    broken: str | None = None

    def window(self, entry: ImageEntry) -> Window:
        """The window to show for ``entry``: of a picture that is black, all of it."""
        if entry.window is None or self.broken is not None:
            return self.plan.full_window
        return entry.window


_Pixels = list[npt.NDArray[np.uint8]]
# Of every picture: uint8 [h, w, 3] of each of its windows, or of itself alone.
_Pictures = dict[tuple[ImageFile, bool], tuple[_Picture, _Pixels]]


@dataclass(frozen=True, slots=True)
class ImageReader:
    """How files become pixels; see ``step37_data.preprocess.load_images`` for the words.

    Raises:
        ValueError: ``on_broken`` or ``pixel_order`` is none of the names they may be.
    """

    device: torch.device
    dtype: torch.dtype
    on_broken: OnBroken = "zero"
    broken: BrokenImages | None = None
    threads: int | None = None
    pixel_order: PixelOrder = "pillow"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("on_broken", self.on_broken, ON_BROKEN),
            ("pixel_order", self.pixel_order, PIXEL_ORDERS),
        ):
            if given not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")

    def load_stacks(
        self, entries: Sequence[ImageEntry], sides: Mapping[int, int]
    ) -> tuple[dict[int, torch.Tensor], list[str | None]]:
        """Make the stack of every kind at once.

        Args:
            entries: what to show.
            sides: per kind, the side of its images in pixels.

        Returns:
            Per kind ``[N, 3, side, side]``, in the order of its entries; and per entry None, or
            what is wrong with its file.

        Raises:
            BrokenImageError: a file is unreadable, or of another size than its windows were
                planned for, and ``on_broken`` is ``"raise"``.
        """
        by_device = self.device.type == "cuda" and kernels_match_pillow()
        pictures, stacks = (self._on_device if by_device else self._on_host)(entries, sides)
        return stacks, [pictures[entry.file][0].broken for entry in entries]

    def find_broken(self, entries: Sequence[ImageEntry]) -> list[str | None]:
        """What :meth:`load_stacks` would find wrong with the file of every entry."""
        pictures = self._read(entries, lambda _picture, _entries: [])
        return [pictures[entry.file][0].broken for entry in entries]

    def _read(
        self,
        entries: Sequence[ImageEntry],
        finish: Callable[[_Picture, Sequence[ImageEntry]], _Pixels],
    ) -> _Pictures:
        entries_of: dict[tuple[ImageFile, bool], list[ImageEntry]] = {}
        for entry in entries:
            entries_of.setdefault(entry.file, []).append(entry)

        def read(of_picture: Sequence[ImageEntry]) -> tuple[_Picture, _Pixels]:
            picture = _decoded(of_picture, self.on_broken, self.max_pixels)
            return picture, finish(picture, of_picture)

        read_pictures = map_threads(read, entries_of.values(), self.threads)
        pictures = dict(zip(entries_of, read_pictures, strict=True))
        if self.broken is not None:
            for (path, in_crops), of_picture in entries_of.items():
                # A picture seen in crops counts once, a file as it is whenever it is met.
                for _ in of_picture[:1] if in_crops else of_picture:
                    self.broken.record(str(path), pictures[path, in_crops][0].broken)
        return pictures

    def _on_host(
        self, entries: Sequence[ImageEntry], sides: Mapping[int, int]
    ) -> tuple[_Pictures, dict[int, torch.Tensor]]:
        by_pillow = self.pixel_order == "pillow"
        pictures = self._read(entries, functools.partial(_cut, sides=sides if by_pillow else None))
        finish = self._normalized if by_pillow else self._normalized_then_resized
        left = {file: iter(cuts) for file, (_, cuts) in pictures.items()}
        cuts_of: dict[int, list[torch.Tensor]] = {kind: [] for kind in sides}
        for entry in entries:
            cuts_of[entry.kind].append(torch.from_numpy(next(left[entry.file])))
        return pictures, {kind: finish(cuts, sides[kind]) for kind, cuts in cuts_of.items()}

    def _on_device(
        self, entries: Sequence[ImageEntry], sides: Mapping[int, int]
    ) -> tuple[_Pictures, dict[int, torch.Tensor]]:
        pictures = self._read(entries, _padded)
        uploaded = upload([pixels for _, (pixels,) in pictures.values()], self.device)
        ready = prepare_on_device(uploaded, [picture.plan for picture, _ in pictures.values()])
        number = {file: i for i, file in enumerate(pictures)}
        stacks = {}
        for kind, side in sides.items():
            windows = [
                (number[entry.file], pictures[entry.file][0].window(entry))
                for entry in entries
                if entry.kind == kind
            ]
            if kind == PATCH_ITEM_TYPE:
                source, crops = ready.canvases, [ready.window_rectangle(*at) for at in windows]
            else:
                source, crops = ready.full, [ready.full_rectangle(i) for i, _ in windows]
            if self.pixel_order == "pillow":
                stacks[kind] = resize_clip_normalize(source, side, crops=crops, dtype=self.dtype)
            else:
                cuts = [
                    source.image(at.image)[at.top : at.bottom, at.left : at.right] for at in crops
                ]
                stacks[kind] = self._normalized_then_resized(cuts, side)
        return pictures, stacks

    def _normalized(self, cuts: list[torch.Tensor], side: int) -> torch.Tensor:
        pixels = torch.stack(cuts) if cuts else torch.empty((0, side, side, 3), dtype=torch.uint8)
        return clip_normalize(to_device(pixels, self.device), dtype=self.dtype)

    def _normalized_then_resized(self, cuts: list[torch.Tensor], side: int) -> torch.Tensor:
        moved = [to_device(pixels, self.device) for pixels in cuts]
        return normalize_then_resize(moved, side, dtype=self.dtype, device=self.device)


def _decoded(
    entries: Sequence[ImageEntry], on_broken: OnBroken, max_pixels: int | None
) -> _Picture:
    """The picture of ``entries``, all of one file, whose windows are checked to be its own."""
    path, in_crops = entries[0].file
    decoded = decode(path, on_broken, max_pixels)
    image, reason = decoded.image, decoded.broken
    if in_crops and reason is None:
        try:
            plan = plan_crops(*image.size)
        except ValueError as problem:
            reason = str(problem)
        else:
            own = {PATCH_ITEM_TYPE: plan.windows, IMAGE_ITEM_TYPE: (plan.full_window,)}
            stray = [entry.window for entry in entries if entry.window not in own[entry.kind]]
            if not stray:
                return _Picture(image=image, plan=plan)
            reason = (
                f"it has {image.width}×{image.height} pixels, of which {stray[-1]} is no window: "
                "it was planned from another size, or was unreadable then"
            )
        unseen = BrokenImageError(f"image {path} could not be shown: {reason}", reason)
        if on_broken == "raise":
            raise unseen
        logger.warning("%s: black is used in its place", unseen)
        image = Image.new("RGB", (1, 1))
    return _Picture(image=image, plan=plan_whole(*image.size), broken=reason)


def _padded(picture: _Picture, entries: Sequence[ImageEntry]) -> _Pixels:  # noqa: ARG001
    return [np.asarray(padded_image(picture.image, picture.plan))]


def _cut(
    picture: _Picture, entries: Sequence[ImageEntry], sides: Mapping[int, int] | None
) -> _Pixels:
    """With Pillow, cut every window out, and resize it where there are ``sides``."""
    full = full_image(picture.image, picture.plan)
    sources = {IMAGE_ITEM_TYPE: full}
    if any(entry.kind == PATCH_ITEM_TYPE for entry in entries):
        sources[PATCH_ITEM_TYPE] = canvas_image(full, picture.plan)
    cuts = []
    for entry in entries:
        image = cut(sources[entry.kind], picture.window(entry))
        if sides is not None:
            side = sides[entry.kind]
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        cuts.append(np.array(image))
    return cuts
