"""Turns a packed batch into the model's input: tokens and pixels on the device.

Image files are decoded by Pillow and resized as Pillow does it. On the CPU and on CUDA devices the
values are bit for bit those of the stock functions.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from step37_data.common.checks import checked_int
from step37_data.common.image_entry import (
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    Entry,
    ImageEntry,
    checked_kind,
)
from step37_data.images import decode
from step37_data.images.device import Device, resolve_device, to_device
from step37_data.images.options import ImageKeywords, ImageOptions
from step37_data.images.stacks import find_broken, load_stacks
from step37_data.text.tokens import IMAGE_START_TOKEN, PATCH_START_TOKEN
from step37_kernels.image_insert_embedding import ImageForInsert
from step37_kernels.pixels.normalize import CLIP_MEAN as _CLIP_MEAN  # noqa: F401
from step37_kernels.pixels.normalize import CLIP_STD as _CLIP_STD  # noqa: F401
from step37_kernels.pixels.normalize import clip_normalize

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

_START_NAMES = {IMAGE_ITEM_TYPE: IMAGE_START_TOKEN, PATCH_ITEM_TYPE: PATCH_START_TOKEN}

RopeArgs = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, int]]


def load_images(
    image_paths: Sequence[Entry],
    *,
    image_size: int,
    patch_image_size: int,
    **options: Unpack[ImageKeywords],
) -> list[tuple[torch.Tensor, int]]:
    """Read, resize and normalise image files.

    The values are those that Pillow and NumPy give, bit for bit:
    ``Image.open(path).convert("RGB")``, BILINEAR to a square, ``((x / 255) - mean) / std`` in fp32.

    Args:
        image_paths: ``(path, IMAGE_ITEM_TYPE or PATCH_ITEM_TYPE)`` per image; with a third element,
            the window, it is the full image or a crop of a picture in multicrop. Such a picture is
            decoded once, and reported to ``broken`` once, however many windows it has. A path may
            be replaced by an :class:`~step37_data.common.image_entry.EncodedImage`.
        image_size, patch_image_size: side in pixels of full images and of crops.
        options: the attributes of :class:`~step37_data.images.options.ImageOptions`, as keywords.
            Here the defaults of ``device`` and ``dtype`` are ``"cpu"`` and ``torch.float32``, as in
            the function that this one replaces.

    Returns:
        ``(tensor [3, side, side], type)`` per image, in the order given.

    Raises:
        ValueError: an entry of ``image_paths`` has another form or does not fit ``multicrop``, an
            image type is neither of the two, or an option has a value that is not allowed.
        TypeError: there is no such option.
    """
    options.setdefault("device", "cpu")
    options.setdefault("dtype", torch.float32)
    reading = ImageOptions(image_size=image_size, patch_image_size=patch_image_size, **options)
    entries = reading.checked_entries(image_paths)
    stacks, _ = load_stacks(entries, reading)
    rows = {kind: iter(stack) for kind, stack in stacks.items()}
    return [(next(rows[entry.kind]), entry.kind) for entry in entries]


def _load_image(path: str) -> Image.Image:
    """Read a picture in RGB; for an unreadable one log a warning and return 224×224 black."""
    try:
        return decode.read_rgb(path)
    except decode.BrokenImageError as error:
        decode.pass_over(error, "zero")
        return Image.new("RGB", decode.BROKEN_SIZE)


def _image_to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """Resize by Pillow's BILINEAR, divide by 255 and normalise: ``[3, size, size]`` fp32."""
    resized = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    normalized = clip_normalize(torch.from_numpy(resized)[None], dtype=torch.float32, impl="torch")
    return normalized[0]


def build_image_for_insert(  # noqa: PLR0913 - the parameters of the function that it replaces
    images_and_types: Iterable[tuple[torch.Tensor, int]],
    *,
    patch_start_id: int,
    image_start_id: int,
    limit_images: int | None = None,
    limit_patches: int | None = None,
    rope_args_fn: RopeArgs | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    device: Device = None,
    to_cuda: bool | None = None,
) -> list[ImageForInsert]:
    """Make insertion groups of images: first the crops, then the full images; no empty group.

    Args:
        images_and_types: ``(tensor [3, H, W], IMAGE_ITEM_TYPE or PATCH_ITEM_TYPE)``; within a type
            all of one shape.
        patch_start_id, image_start_id: the start token of each group.
        limit_images, limit_patches: keep this many of each, the first ones; None keeps all.
        rope_args_fn: returns ``(rope_cu_seqlens, rope_max_seq_len)`` for the images of a group.
        dtype: dtype of the stacked images; None keeps theirs.
        device: where the stacked images go; None is the CUDA device, or the CPU without one.
        to_cuda: True is ``device="cuda"``, False ``device="cpu"``, as the replaced function has it.

    Raises:
        ValueError: an image type is neither of the two.
    """
    given = [(image, checked_kind("images_and_types", kind)) for image, kind in images_and_types]
    patches = (PATCH_ITEM_TYPE, patch_start_id, limit_patches)
    groups = []
    for wanted, start, limit in (patches, (IMAGE_ITEM_TYPE, image_start_id, limit_images)):
        if kept := [image for image, kind in given if kind == wanted][:limit]:
            stacked = torch.stack(kept).to(dtype or kept[0].dtype)
            group = ImageForInsert(start, to_device(stacked, _device(device, to_cuda)))
            if rope_args_fn is not None:
                cu_seqlens, longest = rope_args_fn(kept)
                group.rope_cu_seqlens, group.rope_max_seq_len = cu_seqlens, int(longest)
            groups.append(group)
    return groups


def compute_rope_args(
    images: Sequence[torch.Tensor] | torch.Tensor,
    patch_size: int,
    *,
    device: Device = None,
    to_cuda: bool | None = None,
) -> tuple[torch.Tensor, int]:
    """Compute the rotary arguments of images: running totals of their vision patches, and the most.

    An image has ``(H // patch_size) * (W // patch_size)`` vision patches.

    Args:
        images: ``[..., H, W]`` each; sizes may differ.
        patch_size: side in pixels of a vision patch.
        device: where the result goes; None is the CUDA device, or the CPU without one.
        to_cuda: True is ``device="cuda"``, False ``device="cpu"``, as the replaced function has it.

    Returns:
        int32 ``[N + 1]`` starting with 0, and the largest count.

    Raises:
        ValueError: there are no images, or ``patch_size`` is no integer of at least 1.
    """
    patch_size = checked_int("patch_size", patch_size)
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    counts = [(image.shape[-2] // patch_size) * (image.shape[-1] // patch_size) for image in images]
    cu_seqlens = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    return to_device(cu_seqlens, _device(device, to_cuda)), max(counts)


def _device(device: Device, to_cuda: bool | None) -> torch.device:
    return resolve_device(device if to_cuda is None else "cuda" if to_cuda else "cpu")


def preprocess_packed_batch(
    batch: Mapping[str, Any],
    *,
    img_start_token_id: int,
    patch_start_token_id: int,
    image_size: int,
    patch_image_size: int,
    encoder_patch_size: int,
    only_pp_first_stage: bool = True,
    **options: Unpack[ImageKeywords],
) -> dict[str, Any]:
    """Build the model's input from a packed batch.

    Args:
        batch: as ``pack_samples`` gives it: ``tokens``, ``labels``, ``loss_masks`` ``[T]``,
            ``cu_seqlens`` int32 ``[n + 1]``, ``position_id`` ``[T]``, ``image_paths``. It is not
            changed. Without ``tokens`` (later pipeline stages) only the sequence layout is
            returned. Tensors should be on the host, where start tokens are counted; tokens on a
            CUDA device are copied back, for which the host waits.
        img_start_token_id, patch_start_token_id: the start tokens of images and crops.
        image_size, patch_image_size: side in pixels of full images and of crops.
        encoder_patch_size: side in pixels of a vision patch.
        only_pp_first_stage: load images only on Megatron's first pipeline stage, if Megatron's
            parallel state is initialised. With ``on_broken="skip-loss"`` every stage that has
            tokens decodes them nevertheless, to find the samples to take out of the loss.
        options: the attributes of :class:`~step37_data.images.options.ImageOptions`, as keywords.
            All results go to ``device``, not only images. The default of ``as_viewed`` is the value
            in the pack, with which the crops were planned.

    Returns:
        ``input_ids``, ``labels``, ``loss_masks`` ``[1, T]``, ``images`` (a list of
        ``ImageForInsert``), ``cu_seqlens``, ``position_id`` on ``device``, and ``max_seq_len``, a
        0-dimensional tensor on the device that ``cu_seqlens`` came from: from the host, it can be
        read without a synchronisation.

    Raises:
        ValueError: an argument has a value that is not allowed, a start token is negative (not
            resolved), a tensor has another shape (a batch that was not unwrapped), ``image_paths``
            do not fit ``multicrop``, or crops were planned with another ``as_viewed`` than given.
        TypeError: there is no such option.
    """
    unset = "(-1: the provider's build_datasets() has not run)"
    starts = {
        PATCH_ITEM_TYPE: checked_int(f"patch_start_token_id {unset}", patch_start_token_id, 0),
        IMAGE_ITEM_TYPE: checked_int(f"img_start_token_id {unset}", img_start_token_id, 0),
    }
    checked_int("encoder_patch_size", encoder_patch_size)
    _check_shapes(batch)
    if options.get("on_broken") is None:
        options["on_broken"] = batch.get("on_broken", "zero")
    planned_as_viewed = bool(batch.get("as_viewed", False))
    options.setdefault("as_viewed", planned_as_viewed)
    reading = ImageOptions(image_size=image_size, patch_image_size=patch_image_size, **options)
    skip_loss = reading.on_broken == "skip-loss"
    target = resolve_device(reading.device)
    cu_seqlens = batch["cu_seqlens"]
    layout = {
        "cu_seqlens": to_device(cu_seqlens, target),
        "max_seq_len": torch.max(cu_seqlens[1:] - cu_seqlens[:-1]),
        "position_id": to_device(batch["position_id"], target),
    }
    if "tokens" not in batch:
        return layout

    tokens = batch["tokens"].cpu()
    loss_masks = batch["loss_masks"]
    given = reading.checked_entries(batch.get("image_paths", ()))
    in_crops = any(entry.window is not None for entry in given)
    if in_crops and reading.as_viewed != planned_as_viewed:
        planned = f"the crops of this pack were planned with {planned_as_viewed}"
        remedy = "give the template or the provider the same, or leave it out here"
        raise ValueError(f"as_viewed: {reading.as_viewed}, but {planned}; {remedy}")
    entries, positions = _used_images(given, tokens, starts)
    groups = []
    if not only_pp_first_stage or _is_first_pipeline_stage():
        stacks, reasons = load_stacks(entries, reading)
        for kind, images in stacks.items():
            if len(images):
                group = ImageForInsert(starts[kind], images)
                rope = compute_rope_args(images, encoder_patch_size, device=target)
                group.rope_cu_seqlens, group.rope_max_seq_len = rope
                groups.append(group)
    elif skip_loss:
        # This stage may compute the loss, so it needs to know which files are unreadable.
        reasons = find_broken(entries, reading)
    if skip_loss:
        spoilt = [place for place, why in zip(positions, reasons, strict=True) if why is not None]
        loss_masks = _without_samples(loss_masks, cu_seqlens.cpu(), spoilt)
    rows = {"input_ids": batch["tokens"], "labels": batch["labels"], "loss_masks": loss_masks}
    on_target = {key: to_device(row, target)[None].contiguous() for key, row in rows.items()}
    return {**on_target, "images": groups, **layout}


def _check_shapes(batch: Mapping[str, Any]) -> None:
    for key in ("cu_seqlens", "position_id", "tokens", "labels", "loss_masks"):
        if key in batch and batch[key].ndim != 1:
            expected = "[n + 1]" if key == "cu_seqlens" else "[T]"
            got = f"got {list(batch[key].shape)}; give the DataLoader the data set's collate_fn"
            raise ValueError(f"batch: expected {key} of shape {expected}, {got}")


def _used_images(
    given: Sequence[ImageEntry], tokens: torch.Tensor, starts: Mapping[int, int]
) -> tuple[list[ImageEntry], list[int]]:
    """Pair the images of each type with the start tokens of that type, in order.

    Returns:
        The images that have a start token, crops first, and the position of each one's token.
    """
    entries: list[ImageEntry] = []
    positions: list[int] = []
    for kind, start in starts.items():
        of_kind = [entry for entry in given if entry.kind == kind]
        places = (tokens == start).nonzero().flatten().tolist()
        used = min(len(of_kind), len(places))
        if len(of_kind) != len(places):
            told = f"{len(of_kind)} images of type {kind} and {len(places)} start tokens {start}"
            told = f"the pack holds {told} for them; the first {used} of each are used"
            if places:
                logger.warning(told)
            else:
                # Every picture of the type is left out: probably the token id is wrong.
                name = _START_NAMES[kind]
                logger.error(f"{told}. There is none of them: is {start} the tokenizer's {name}?")
        entries += of_kind[:used]
        positions += places[:used]
    return entries, positions


def _without_samples(
    loss_masks: torch.Tensor, cu_seqlens: torch.Tensor, positions: Sequence[int]
) -> torch.Tensor:
    """Set ``loss_masks`` to zero in the samples that contain the ``positions``."""
    if not positions:
        return loss_masks
    places = torch.tensor(positions, dtype=cu_seqlens.dtype)
    samples = (torch.searchsorted(cu_seqlens, places, right=True) - 1).unique().tolist()
    loss_masks = loss_masks.clone()
    for sample in samples:
        loss_masks[cu_seqlens[sample] : cu_seqlens[sample + 1]] = 0
    logger.warning(f"samples {samples} of a pack take no part in the loss: unreadable images")
    return loss_masks


def _is_first_pipeline_stage() -> bool:
    """Whether this process is Megatron's first pipeline stage; True without Megatron.

    Megatron is not imported here: if it has not been imported, there is no pipeline.
    """
    state = sys.modules.get("megatron.core.parallel_state")
    return state is None or not state.is_initialized() or bool(state.is_pipeline_first_stage())
