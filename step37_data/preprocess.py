"""A packed batch to the model's input: tokens and pixels on the device.

Image files are decoded by Pillow and resized as Pillow does it; the numbers are those of the stock
path, bit for bit, whatever device they are made on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step37_data.decode import BrokenImages, OnBroken
from step37_data.stacks import Device, decode_all, load_stacks, resolve_device, to_device
from step37_kernels.image_insert_embedding import ImageForInsert

logger = logging.getLogger(__name__)

IMAGE_ITEM_TYPE = 0
PATCH_ITEM_TYPE = 1

ImagePath = tuple[str, int]
RopeArgs = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, int]]


def load_images(
    image_paths: Sequence[ImagePath],
    *,
    image_size: int,
    patch_image_size: int,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    on_broken: OnBroken = "zero",
    broken: BrokenImages | None = None,
    threads: int | None = None,
) -> list[tuple[torch.Tensor, int]]:
    """Read, resize and normalise image files.

    Element for element what Pillow and NumPy give: ``Image.open(path).convert("RGB")``, BILINEAR
    to a square, ``((x / 255) - mean) / std`` in fp32.

    Args:
        image_paths: ``(path, IMAGE_ITEM_TYPE or PATCH_ITEM_TYPE)`` per image.
        image_size, patch_image_size: side in pixels of the images of either type.
        device: where the results go; None is the CUDA device, or the CPU where there is none.
        dtype: of the results.
        on_broken: an unreadable file gives a black 224×224 picture and a warning (``"zero"``,
            ``"skip-loss"``) or a :class:`~step37_data.decode.BrokenImageError` (``"raise"``).
        broken: told about every image, for the report at the end of the epoch.
        threads: decoding threads; None takes the cores at hand, at most 8.

    Returns:
        ``(tensor [3, side, side], type)`` per image, in the order given.

    Raises:
        ValueError: an image type is neither of the two, or ``on_broken`` none of the three.
    """
    by_type: dict[int, list[int]] = {IMAGE_ITEM_TYPE: [], PATCH_ITEM_TYPE: []}
    for i, (_, kind) in enumerate(image_paths):
        by_type[_checked_type(kind)].append(i)
    loaded = load_stacks(
        [
            ([image_paths[i][0] for i in by_type[kind]], side)
            for kind, side in ((IMAGE_ITEM_TYPE, image_size), (PATCH_ITEM_TYPE, patch_image_size))
        ],
        resolve_device(device),
        dtype,
        on_broken,
        broken,
        threads,
    )
    rows = [iter(stack.images) for stack in loaded]
    return [(next(rows[kind]), int(kind)) for _, kind in image_paths]


def _checked_type(kind: int) -> int:
    if kind not in (IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE):
        raise ValueError(
            f"image type: expected {IMAGE_ITEM_TYPE} (image) or {PATCH_ITEM_TYPE} (crop), "
            f"got {kind!r}"
        )
    return int(kind)


def build_image_for_insert(
    images_and_types: Iterable[tuple[torch.Tensor, int]],
    *,
    patch_start_id: int,
    image_start_id: int,
    limit_images: int | None = None,
    limit_patches: int | None = None,
    rope_args_fn: RopeArgs | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    device: Device = None,
) -> list[ImageForInsert]:
    """Group images into insertion groups: crops first, then images; no empty group.

    Args:
        images_and_types: ``(tensor [3, H, W], IMAGE_ITEM_TYPE or PATCH_ITEM_TYPE)``; within a type
            all of one shape.
        patch_start_id, image_start_id: the start token of each group.
        limit_images, limit_patches: keep this many of each, the first ones; None keeps all.
        rope_args_fn: gives ``(rope_cu_seqlens, rope_max_seq_len)`` for the images of a group.
        dtype: of the stacked images; None leaves it.
        device: of the stacked images; None is the CUDA device, or the CPU where there is none.

    Raises:
        ValueError: an image type is neither of the two.
    """
    by_type: dict[int, list[torch.Tensor]] = {PATCH_ITEM_TYPE: [], IMAGE_ITEM_TYPE: []}
    for image, kind in images_and_types:
        by_type[_checked_type(kind)].append(image)
    target = resolve_device(device)
    groups = []
    for kind, start, limit in (
        (PATCH_ITEM_TYPE, patch_start_id, limit_patches),
        (IMAGE_ITEM_TYPE, image_start_id, limit_images),
    ):
        kept = by_type[kind][:limit]
        if not kept:
            continue
        stacked = torch.stack(kept)
        group = ImageForInsert(
            insert_start_token=start,
            images=to_device(stacked if dtype is None else stacked.to(dtype), target),
        )
        if rope_args_fn is not None:
            cu_seqlens, longest = rope_args_fn(kept)
            group.rope_cu_seqlens, group.rope_max_seq_len = cu_seqlens, int(longest)
        groups.append(group)
    return groups


def compute_rope_args(
    images: Sequence[torch.Tensor] | torch.Tensor, patch_size: int, *, device: Device = None
) -> tuple[torch.Tensor, int]:
    """Cumulated counts of vision patches, ``(H // patch_size) * (W // patch_size)`` an image.

    Args:
        images: ``[..., H, W]`` each; sizes may differ.
        patch_size: side in pixels of a vision patch.
        device: of the result; None is the CUDA device, or the CPU where there is none.

    Returns:
        int32 ``[N + 1]`` starting with 0, and the largest count.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    counts = [(image.shape[-2] // patch_size) * (image.shape[-1] // patch_size) for image in images]
    cu_seqlens = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    return to_device(cu_seqlens, resolve_device(device)), max(counts)


def preprocess_packed_batch(
    batch: Mapping[str, Any],
    *,
    img_start_token_id: int,
    patch_start_token_id: int,
    image_size: int,
    patch_image_size: int,
    encoder_patch_size: int,
    only_pp_first_stage: bool = True,
    device: Device = None,
    dtype: torch.dtype = torch.bfloat16,
    on_broken: OnBroken = "zero",
    broken: BrokenImages | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Build the model's input from a packed batch.

    Args:
        batch: as ``pack_samples`` gives it: ``tokens``, ``labels``, ``loss_masks`` ``[T]``,
            ``cu_seqlens`` int32 ``[n + 1]``, ``position_id`` ``[T]``, ``image_paths``. Left as it
            is. Without ``tokens`` (later pipeline stages) only the sequence layout comes out.
            Tensors are expected on the host: the start tokens are counted there, so tokens that
            are on a CUDA device already are fetched back, which waits for the device.
        img_start_token_id, patch_start_token_id: the start tokens of images and crops.
        image_size, patch_image_size: side in pixels of images and crops.
        encoder_patch_size: side in pixels of a vision patch.
        only_pp_first_stage: load images only on Megatron's first pipeline stage, if Megatron's
            parallel state is initialised.
        device: where everything goes; None is the CUDA device, or the CPU where there is none.
        dtype: of the images.
        on_broken: see :func:`load_images`; ``"skip-loss"`` also sets the loss mask of the samples
            that hold an unreadable image to zero (on every stage that has tokens, which therefore
            decodes them).
        broken: told about every image, for the report at the end of the epoch.
        threads: decoding threads.

    Returns:
        ``input_ids``, ``labels``, ``loss_masks`` ``[1, T]``, ``images`` (a list of
        ``ImageForInsert``), ``cu_seqlens``, ``position_id`` on ``device``, and ``max_seq_len``, a
        0-dimensional tensor that stays where ``cu_seqlens`` came from, so that reading it costs no
        synchronisation.
    """
    target = resolve_device(device)
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
    used = [
        _used_images(batch.get("image_paths", ()), tokens, kind, start)
        for kind, start in (
            (PATCH_ITEM_TYPE, patch_start_token_id),
            (IMAGE_ITEM_TYPE, img_start_token_id),
        )
    ]
    groups: list[ImageForInsert] = []
    reasons: list[list[str | None]] = []
    if not only_pp_first_stage or _is_first_pipeline_stage():
        stacks = load_stacks(
            [(used[0].paths, patch_image_size), (used[1].paths, image_size)],
            target,
            dtype,
            on_broken,
            broken,
            threads,
        )
        reasons = [stack.broken for stack in stacks]
        for images, stack in zip(used, stacks, strict=True):
            if images.paths:
                rope, longest = compute_rope_args(stack.images, encoder_patch_size, device=target)
                groups.append(
                    ImageForInsert(
                        insert_start_token=images.start_token,
                        images=stack.images,
                        rope_cu_seqlens=rope,
                        rope_max_seq_len=longest,
                    )
                )
    elif on_broken == "skip-loss":
        # The loss is computed on this stage, perhaps: it has to know as much as the first one.
        for images in used:
            items = [(path, None) for path in images.paths]
            decoded = decode_all(items, on_broken, broken, threads)
            reasons.append([each.broken for each in decoded])
    if on_broken == "skip-loss":
        loss_masks = _without_broken(loss_masks, cu_seqlens.cpu(), used, reasons)
    return {
        "input_ids": to_device(batch["tokens"], target)[None].contiguous(),
        "labels": to_device(batch["labels"], target)[None].contiguous(),
        "loss_masks": to_device(loss_masks, target)[None].contiguous(),
        "images": groups,
        **layout,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _UsedImages:
    """The images of one type that have a place in the pack.

    Attributes:
        start_token: of their type.
        paths: one for each place, as far as both go.
        positions: int64, the start token of each.
    """

    start_token: int
    paths: list[str]
    positions: torch.Tensor


def _used_images(
    image_paths: Iterable[ImagePath], tokens: torch.Tensor, kind: int, start_token: int
) -> _UsedImages:
    """Pair the images of type ``kind`` with the start tokens, in order, up to the smaller count."""
    paths = [path for path, own in image_paths if _checked_type(own) == kind]
    positions = (tokens == start_token).nonzero().flatten()
    if len(paths) != len(positions):
        logger.warning(
            "the pack holds %d images of type %d and %d start tokens %d for them; the first %d of "
            "each are used",
            len(paths),
            kind,
            len(positions),
            start_token,
            min(len(paths), len(positions)),
        )
    return _UsedImages(
        start_token=start_token,
        paths=paths[: len(positions)],
        positions=positions[: len(paths)],
    )


def _without_broken(
    loss_masks: torch.Tensor,
    cu_seqlens: torch.Tensor,
    used: Sequence[_UsedImages],
    reasons: Sequence[Sequence[str | None]],
) -> torch.Tensor:
    """``loss_masks`` with zeros over every sample that holds an unreadable image."""
    spoilt = sorted(
        {
            int(torch.searchsorted(cu_seqlens, position, right=True)) - 1
            for images, own in zip(used, reasons, strict=True)
            for position, reason in zip(images.positions.tolist(), own, strict=True)
            if reason is not None
        }
    )
    if not spoilt:
        return loss_masks
    loss_masks = loss_masks.clone()
    for sample in spoilt:
        loss_masks[cu_seqlens[sample] : cu_seqlens[sample + 1]] = 0
    logger.warning(
        "samples %s of a pack of %d take no part in the loss: an image of theirs is unreadable",
        spoilt,
        len(cu_seqlens) - 1,
    )
    return loss_masks


def _is_first_pipeline_stage() -> bool:
    """True unless Megatron is in use in this process and says otherwise.

    Megatron is looked up, not imported: if nobody imported it, there is no pipeline.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None or not parallel_state.is_initialized():
        return True
    return bool(parallel_state.is_pipeline_first_stage())
