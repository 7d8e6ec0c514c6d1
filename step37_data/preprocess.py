"""A packed batch to the model's input: tokens and pixels on the device.

Image files are decoded by Pillow and resized as Pillow does it; the numbers are those of the stock
path, bit for bit, whatever device they are made on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from step37_data.decode import ON_BROKEN, BrokenImages, Decoded, OnBroken, decode, map_threads
from step37_kernels.image_insert_embedding import ImageForInsert
from step37_kernels.pixels import clip_normalize

logger = logging.getLogger(__name__)

IMAGE_ITEM_TYPE = 0
PATCH_ITEM_TYPE = 1

Device = torch.device | str | None
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
    target = resolve_device(device)
    sides = [_side(kind, image_size, patch_image_size) for _, kind in image_paths]
    decoded = _decode_all([path for path, _ in image_paths], on_broken, broken, threads)
    out: list[tuple[torch.Tensor, int]] = [(torch.empty(0), 0)] * len(image_paths)
    for side in sorted(set(sides)):
        members = [i for i, own in enumerate(sides) if own == side]
        pixels = _normalize_pictures([decoded[i].picture for i in members], side, target, dtype)
        for row, i in enumerate(members):
            out[i] = (pixels[row], int(image_paths[i][1]))
    return out


def _side(kind: int, image_size: int, patch_image_size: int) -> int:
    if kind == IMAGE_ITEM_TYPE:
        return image_size
    if kind == PATCH_ITEM_TYPE:
        return patch_image_size
    raise ValueError(
        f"image type: expected {IMAGE_ITEM_TYPE} (image) or {PATCH_ITEM_TYPE} (crop), got {kind!r}"
    )


def _decode_all(
    paths: Sequence[str], on_broken: OnBroken, broken: BrokenImages | None, threads: int | None
) -> list[Decoded]:
    if on_broken not in ON_BROKEN:
        raise ValueError(f"on_broken: expected one of {', '.join(ON_BROKEN)}, got {on_broken!r}")
    decoded = list(map_threads(lambda path: decode(path, on_broken), paths, threads))
    if broken is not None:
        for path, result in zip(paths, decoded, strict=True):
            broken.record(path, result.broken)
    return decoded


def _normalize_pictures(
    pictures: Sequence[Image.Image], side: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """``[N, 3, side, side]`` on ``device``."""
    pixels = torch.empty((len(pictures), side, side, 3), dtype=torch.uint8)
    for row, picture in enumerate(pictures):
        resized = picture.resize((side, side), resample=Image.Resampling.BILINEAR)
        pixels[row] = torch.from_numpy(np.array(resized))
    return clip_normalize(to_device(pixels, device), dtype=dtype)


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
        if kind not in by_type:
            raise ValueError(
                f"image type: expected {IMAGE_ITEM_TYPE} (image) or {PATCH_ITEM_TYPE} (crop), "
                f"got {kind!r}"
            )
        by_type[kind].append(image)
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

    images: list[ImageForInsert] = []
    if not only_pp_first_stage or _is_first_pipeline_stage():
        tokens = batch["tokens"].cpu()
        loaded = load_images(
            batch.get("image_paths", []),
            image_size=image_size,
            patch_image_size=patch_image_size,
            device=target,
            dtype=dtype,
            on_broken=on_broken,
            broken=broken,
            threads=threads,
        )
        images = build_image_for_insert(
            loaded,
            patch_start_id=patch_start_token_id,
            image_start_id=img_start_token_id,
            limit_images=int((tokens == img_start_token_id).sum()),
            limit_patches=int((tokens == patch_start_token_id).sum()),
            rope_args_fn=lambda kept: compute_rope_args(kept, encoder_patch_size, device=target),
            dtype=dtype,
            device=target,
        )
    return {
        "input_ids": to_device(batch["tokens"], target)[None].contiguous(),
        "labels": to_device(batch["labels"], target)[None].contiguous(),
        "loss_masks": to_device(batch["loss_masks"], target)[None].contiguous(),
        "images": images,
        **layout,
    }


def resolve_device(device: Device) -> torch.device:
    """``device``; for None the current CUDA device, or the CPU where there is none."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to ``device`` without waiting: through pinned memory where the device is CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _is_first_pipeline_stage() -> bool:
    """True unless Megatron is in use in this process and says otherwise.

    Megatron is looked up, not imported: if nobody imported it, there is no pipeline.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None or not parallel_state.is_initialized():
        return True
    return bool(parallel_state.is_pipeline_first_stage())
