"""Splits images and videos so that each pipeline microbatch gets those of its own samples.

PyTorch's pipeline schedules cut every tensor of a batch along dimension 0 with
`torch.tensor_split`. That is right for `input_ids` and wrong for pixels, whose rows are images,
crops or patches. So the media are taken out of the batch when it is made, cut at the same samples
as `input_ids` (`prepare_vlm_media_for_pp`), and given to the first stage for one step of the
schedule (`stage_vlm_media_for_pp`):

    collate = wrap_vlm_collate_for_pp(collate, n_microbatches)
    ...
    with stage_vlm_media_for_pp(pp, model_parts, batch):
        pp.info.schedule.step(batch.pop("input_ids"), target=target, losses=losses, **batch)

Chunks are views of their inputs. Counts and grids are read on the host. If they are on an
accelerator the host waits for it, so prepare a batch before moving it there.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch

from step37_data.common.checks import checked_int

logger = logging.getLogger(__name__)

VLM_PP_MEDIA_KEY = "_vlm_pp_media_chunks"
PP_MEDIA_CHUNKS_ATTR = "_pp_media_chunks"
PP_MEDIA_INDEX_KEY = "pp_media_index"

Counts = torch.Tensor | Sequence[int]

_GRID_KEYS = ("image_grid_hws", "image_grid_thw", "image_sizes", "image_position_ids")
_CROP_KEYS = ("num_patches", "patch_pixel_values", "patch_newline_mask")
# Keys with one row for each image (or row of pixels), and the key with one for each video.
_ROWS_OF_IMAGES = ("grid_thws", "image_flags")
_ROWS_OF_VIDEOS = ("second_per_grid_ts",)
_IMAGE_KEYS = (
    "pixel_values", *_CROP_KEYS, *_GRID_KEYS, *_ROWS_OF_IMAGES, "n_images_per_sample"
)  # fmt: skip
_VIDEO_KEYS = (
    "pixel_values_videos", "video_grid_thw", *_ROWS_OF_VIDEOS, "n_videos_per_sample"
)  # fmt: skip
_VLM_MEDIA_KEYS = (*_IMAGE_KEYS, *_VIDEO_KEYS)
_COUNT_KEYS = ("num_patches", "n_images_per_sample", "n_videos_per_sample")

# What the first stage gets. Models up to NeMo Automodel 0.7 read the chunks of a key of _BY_CURSOR
# from the attribute _vlm_{key}_chunks, and the index of the microbatch from _vlm_chunk_idx.
_BY_CURSOR = (
    "pixel_values", "image_grid_hws", *_CROP_KEYS, "pixel_values_videos", "video_grid_thw"
)  # fmt: skip
_STAGED = (*_BY_CURSOR, *_ROWS_OF_IMAGES, *_ROWS_OF_VIDEOS)
_CURSOR = "_vlm_chunk_idx"
_MISSING = object()


def microbatch_limits(batch_size: int, n_microbatches: int) -> list[int]:
    """Return the `n_microbatches + 1` sample limits of the cut that `torch.tensor_split` makes.

    Microbatch k holds samples `limits[k]` to `limits[k + 1]`: the first `batch_size %
    n_microbatches` hold one more than the others. With too few samples the last ones are empty.

    >>> microbatch_limits(6, 4)
    [0, 2, 4, 5, 6]
    """
    checked_int("n_microbatches", n_microbatches)
    quotient, remainder = divmod(checked_int("batch_size", batch_size, least=0), n_microbatches)
    return [k * quotient + min(k, remainder) for k in range(n_microbatches + 1)]


def chunk_vlm_media(
    pixel_values: torch.Tensor | list[torch.Tensor],
    image_grid: torch.Tensor | None,
    batch_size: int,
    n_microbatches: int,
    *,
    n_images_per_sample: Counts | None = None,
) -> tuple[list[torch.Tensor | list[torch.Tensor]], list[torch.Tensor] | None]:
    """Split images (or videos) and their grids at the samples where `tensor_split` cuts the batch.

    The counts say how many images each sample has. There are four layouts, which differ in the
    number of rows of `pixel_values`:

    1. `[images, C, H, W]`: each row is a full image.
    2. `[images, max_patches, D]`: each row holds the patches of an image, padded.
    3. `[patches, ...]`: each row is a patch; an image has as many as the product of its row in the
       grid. `n_images_per_sample` is given.
    4. As 3, without `n_images_per_sample`: there are as many images as samples, one for each.

    A list of `images` tensors of any shapes is split like layout 1.

    Args:
        pixel_values: one of the layouts above.
        image_grid: `[images, 2]` (h, w) or `[images, 3]` (t, h, w), in patches. With layouts 1 and
            2 it may have any shape `[images, ...]`, or be None.
        batch_size: samples in the batch, B.
        n_microbatches: microbatches of the schedule.
        n_images_per_sample: `[B]` integers, tensor or sequence. None: one image a sample.

    Returns:
        Pixel chunks and grid chunks (None without a grid), one for each microbatch, in order. Those
        of microbatches without images or without samples have no rows.

    Raises:
        ValueError: the rows, the grid and the counts do not fit together; the message gives all.
    """
    misaligned = functools.partial(
        _misaligned,
        pixel_values=pixel_values,
        image_grid=image_grid,
        batch_size=batch_size,
        n_microbatches=n_microbatches,
        n_images_per_sample=n_images_per_sample,
    )
    limits = microbatch_limits(batch_size, n_microbatches)
    image_limits = _image_limits(n_images_per_sample, limits, misaligned)
    n_rows = _n_rows("pixel_values", pixel_values, or_list=True)
    n_images = n_rows if image_grid is None else _n_rows("image_grid", image_grid)
    if n_images != image_limits[-1]:
        raise misaligned(
            f"{n_images} images, n_images_per_sample (None: one each) sums to {image_limits[-1]}"
        )

    # In a two-dimensional tensor with a grid, rows are patches, never images.
    may_be_images = isinstance(pixel_values, list) or image_grid is None or pixel_values.ndim >= 3
    patch_counts = None if isinstance(pixel_values, list) else _patch_counts(image_grid)
    # If both layouts fit, every image is one patch, and both cuts are the same.
    if patch_counts is not None and sum(patch_counts) == n_rows:
        pixel_limits = _limits_of(patch_counts, image_limits)
    elif may_be_images and n_rows == n_images:
        pixel_limits = image_limits
    else:
        raise misaligned(f"{n_rows} rows are neither the {n_images} images nor their patches")

    grid_chunks = None if image_grid is None else _cut(image_grid, image_limits)
    return _cut(pixel_values, pixel_limits), grid_chunks


def chunk_step3_media(
    pixel_values: torch.Tensor,
    *,
    batch_size: int,
    n_microbatches: int,
    num_patches: Counts | None = None,
    patch_pixel_values: torch.Tensor | None = None,
    patch_newline_mask: torch.Tensor | None = None,
    n_images_per_sample: Counts | None = None,
) -> dict[str, list[torch.Tensor]]:
    """Split full images, their crops ("patches") and the crops' newline masks for the microbatches.

    `pixel_values` holds one full image for each sample, `patch_pixel_values` the crops of all
    samples one after the other. In the flat layout there are no full images: `pixel_values` itself
    holds the `sum(num_patches)` crops. If the number of rows fits both layouts, it is taken as flat
    if `num_patches` counts crops and there is no `patch_pixel_values`; `num_patches` then counts
    for samples if it has one entry for each.

    Args:
        pixel_values: `[B, ...]`, or `[sum(n_images_per_sample), ...]`, or flat
            `[sum(num_patches), ...]`.
        batch_size: samples in the batch, B.
        n_microbatches: microbatches of the schedule.
        num_patches: `[B]` integers, tensor or sequence: crops of each sample. With
            `n_images_per_sample` it may count the crops of each image instead. None: no crops.
        patch_pixel_values: `[sum(num_patches), ...]`.
        patch_newline_mask: `[sum(num_patches)]`, marks the crops that end a row.
        n_images_per_sample: `[B]` integers: full images of each sample. None: one a sample.

    Returns:
        Lists with a tensor for each microbatch under `pixel_values` and `num_patches` (int64), and
        under `patch_pixel_values` and `patch_newline_mask` where these were given.

    Raises:
        ValueError: rows and counts do not fit together, or fit in two ways; the message gives all.
    """
    misaligned = functools.partial(
        _misaligned,
        pixel_values=pixel_values,
        batch_size=batch_size,
        n_microbatches=n_microbatches,
        num_patches=num_patches,
        patch_pixel_values=patch_pixel_values,
        patch_newline_mask=patch_newline_mask,
        n_images_per_sample=n_images_per_sample,
    )
    limits = microbatch_limits(batch_size, n_microbatches)
    image_limits = _image_limits(n_images_per_sample, limits, misaligned)
    n_rows, n_images = _n_rows("pixel_values", pixel_values), image_limits[-1]

    # Counts may be for samples or for images. Their number decides, or both cut in the same way.
    if num_patches is None:
        num_patches = torch.zeros(n_images, dtype=torch.long, device=pixel_values.device)
        crops, readings = [0] * n_images, [image_limits]
    else:
        crops = _as_counts("num_patches", num_patches)
        readings = [reading for reading in (limits, image_limits) if reading[-1] == len(crops)]
    if not readings:
        raise misaligned(f"num_patches has {len(crops)} entries, not one a sample or image")
    # The flat layout of NeMo Automodel's collate: its counts are for samples if both would fit.
    flat = patch_pixel_values is None and any(crops)
    if not flat and readings[0] != readings[-1]:
        raise misaligned("num_patches may count the crops of samples or of images")
    crop_limits = _limits_of(crops, readings[0])
    n_crops = crop_limits[-1]

    chunks = {"num_patches": _cut(torch.as_tensor(num_patches).reshape(-1).long(), readings[0])}
    of_crops = {"patch_pixel_values": patch_pixel_values, "patch_newline_mask": patch_newline_mask}
    for name, rows in of_crops.items():
        if rows is not None:
            if _n_rows(name, rows) != n_crops:
                raise misaligned(f"{name} has {len(rows)} rows, num_patches sums to {n_crops}")
            chunks[name] = _cut(rows, crop_limits)

    if not flat and n_rows == n_images:
        chunks["pixel_values"] = _cut(pixel_values, image_limits)
    elif (flat or (n_crops == 0 and n_images_per_sample is None)) and n_rows == n_crops:
        # Without crops and rows the batch is text only, unless image counts were given.
        chunks["pixel_values"] = _cut(pixel_values, crop_limits)
    else:
        raise misaligned(f"{n_rows} pixel rows are neither {n_images} images nor {n_crops} crops")
    return chunks


chunk_patch_mapped_media = chunk_step3_media
"""The same, by the name that newer releases of NeMo Automodel have for it."""


def prepare_vlm_media_for_pp(
    batch: MutableMapping[str, Any], batch_size: int, n_microbatches: int
) -> MutableMapping[str, Any]:
    """Split the media of a batch, and store them in it under `VLM_PP_MEDIA_KEY` instead.

    Pixels with a grid are split by `chunk_vlm_media`; the grid is the first of `image_grid_hws`,
    `image_grid_thw`, `image_sizes` and `image_position_ids` in the batch, and is always stored as
    `image_grid_hws`. Pixels with crops are split by `chunk_step3_media`, videos with
    `video_grid_thw` by `chunk_vlm_media`. `grid_thws` and `image_flags` have a row for each row of
    the grid, or of `pixel_values` without a grid; `second_per_grid_ts` has one for each row of
    `video_grid_thw`. Media keys that are None count as absent.

    Args:
        batch: the collate function's result; changed in place, unless this raises.
        batch_size: samples in the batch: rows of `input_ids`.
        n_microbatches: microbatches of the schedule.

    Returns:
        `batch`, without media keys, and without `VLM_PP_MEDIA_KEY` if it held no pixels. Besides
        the chunks, `VLM_PP_MEDIA_KEY` holds `pp_media_index`, int64 `[B]`: the microbatch of each
        sample.

    Raises:
        ValueError: media that cannot be aligned with the samples, or that lack their pixels.
    """
    limits = microbatch_limits(batch_size, n_microbatches)
    media = {key: batch[key] for key in _VLM_MEDIA_KEYS if batch.get(key) is not None}
    _check_media(media, batch_size, batch.get("input_ids"))
    chunks: dict[str, Any] = {}
    if "pixel_values" in media:
        chunks |= _image_chunks(media, batch_size, n_microbatches)
        rows_of = "pixel_values" if chunks.get("image_grid_hws") is None else "image_grid_hws"
        for key in _ROWS_OF_IMAGES:
            if key in media:
                chunks[key] = _cut_like(rows_of, chunks[rows_of], key, media[key])
    if "pixel_values_videos" in media:
        chunks["pixel_values_videos"], chunks["video_grid_thw"] = chunk_vlm_media(
            media["pixel_values_videos"],
            media.get("video_grid_thw"),
            batch_size,
            n_microbatches,
            n_images_per_sample=media.get("n_videos_per_sample"),
        )
        rows_of = "pixel_values_videos" if "video_grid_thw" not in media else "video_grid_thw"
        for key in _ROWS_OF_VIDEOS:
            if key in media:
                chunks[key] = _cut_like(rows_of, chunks[rows_of], key, media[key])
    if chunks and batch.get(VLM_PP_MEDIA_KEY) is not None:
        raise ValueError(f"batch already holds {VLM_PP_MEDIA_KEY!r}: it was prepared before")
    for key in _VLM_MEDIA_KEYS:
        batch.pop(key, None)
    if chunks:
        sizes = torch.tensor(limits).diff()
        index = torch.repeat_interleave(torch.arange(n_microbatches), sizes)
        given = {key: cut for key, cut in chunks.items() if cut is not None}
        batch[VLM_PP_MEDIA_KEY] = {**given, PP_MEDIA_INDEX_KEY: index}
    return batch


def wrap_vlm_collate_for_pp(
    collate_fn: Callable[[Any], MutableMapping[str, Any]], n_microbatches: int
) -> Callable[[Any], MutableMapping[str, Any]]:
    """Return a function that calls `collate_fn`, then `prepare_vlm_media_for_pp`.

    The batch size is the number of rows of `input_ids`. A result that is not a mapping, or has no
    media, is returned unchanged. The function can be pickled if `collate_fn` can.

    Raises:
        ValueError: `n_microbatches` below 1; at the call: media without `input_ids`.
    """
    microbatch_limits(0, n_microbatches)
    return functools.partial(_collate_and_prepare, collate_fn, n_microbatches)


def _collate_and_prepare(
    collate_fn: Callable[[Any], MutableMapping[str, Any]], n_microbatches: int, examples: Any
) -> MutableMapping[str, Any]:
    batch = collate_fn(examples)
    if not isinstance(batch, MutableMapping) or batch.keys().isdisjoint(_VLM_MEDIA_KEYS):
        return batch
    if batch.get("input_ids") is None:
        found = ", ".join(key for key in _VLM_MEDIA_KEYS if key in batch)
        raise ValueError(f"the batch has media ({found}) but no input_ids to count")
    return prepare_vlm_media_for_pp(batch, len(batch["input_ids"]), n_microbatches)


def _check_media(media: Mapping[str, Any], batch_size: int, input_ids: Any) -> None:
    if media and input_ids is not None and len(input_ids) != batch_size:
        raise ValueError(f"batch_size is {batch_size}, but input_ids has {len(input_ids)} rows")
    for key, value in media.items():
        pixels = "pixel_values" if key in _IMAGE_KEYS else "pixel_values_videos"
        # Counts of zero are allowed, and so are no rows.
        if pixels not in media and _number_of_media(key, value):
            raise ValueError(f"{key} {_described(value)} comes without {pixels}")
    videos = media.get("pixel_values_videos")
    if isinstance(videos, torch.Tensor) and "video_grid_thw" not in media:
        raise ValueError(f"pixel_values_videos {_described(videos)} come without video_grid_thw")


def _cut_like(reference: str, chunks: Sequence[Any], key: str, rows: Any) -> list[Any]:
    """Cut `rows` as the `chunks` of `reference` are cut."""
    limits = [0, *accumulate(len(chunk) for chunk in chunks)]
    n_rows = _n_rows(key, rows, or_list=True)
    if n_rows != limits[-1]:
        raise ValueError(
            f"{key} {_described(rows)} has {n_rows} rows, but {reference} has {limits[-1]}"
        )
    return _cut(rows, limits)


def _number_of_media(key: str, value: Any) -> int:
    return sum(_as_counts(key, value)) if key in _COUNT_KEYS else len(value)


def _image_chunks(media: dict[str, Any], batch_size: int, n_microbatches: int) -> dict[str, Any]:
    pixel_values, counts = media["pixel_values"], media.get("n_images_per_sample")
    grids = [key for key in _GRID_KEYS if key in media]
    crops = {key: media[key] for key in _CROP_KEYS if key in media}
    if not grids and not isinstance(pixel_values, list):
        return chunk_step3_media(
            pixel_values,
            batch_size=batch_size,
            n_microbatches=n_microbatches,
            n_images_per_sample=counts,
            **crops,
        )
    if crops:
        raise ValueError(
            f"pixel_values {_described(pixel_values)} with {[*crops, *grids]}: no layout has both"
        )
    if len(grids) > 1:
        logger.warning("pixel_values come with several grids: using %s of %s", grids[0], grids)
    grid = _select_image_grid(*map(media.get, _GRID_KEYS))
    chunks = chunk_vlm_media(
        pixel_values, grid, batch_size, n_microbatches, n_images_per_sample=counts
    )
    return dict(zip(("pixel_values", "image_grid_hws"), chunks, strict=True))


def _select_image_grid(
    image_grid_hws: Any, image_grid_thw: Any, image_sizes: Any, image_position_ids: Any
) -> Any:
    """Return the first of these grids that is not None."""
    grids = (image_grid_hws, image_grid_thw, image_sizes, image_position_ids)
    return next((grid for grid in grids if grid is not None), None)


def _image_limits(
    counts: Counts | None, limits: Sequence[int], misaligned: Callable[[str], ValueError]
) -> list[int]:
    """Turn limits in samples into limits in their images."""
    images = [1] * limits[-1] if counts is None else _as_counts("n_images_per_sample", counts)
    if len(images) != limits[-1]:
        raise misaligned(f"n_images_per_sample has {len(images)} entries, not one a sample")
    return _limits_of(images, limits)


def _limits_of(counts: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Turn limits in entries into limits in what the entries count."""
    running = [0, *accumulate(counts)]
    return [running[limit] for limit in limits]


def _cut(rows: Any, limits: Sequence[int]) -> list[Any]:
    return [rows[start:end] for start, end in pairwise(limits)]


def _as_counts(name: str, counts: Counts) -> list[int]:
    if isinstance(counts, torch.Tensor):
        counts = counts.reshape(-1).tolist()
    counts = list(counts) if isinstance(counts, Iterable) else counts
    if not isinstance(counts, list) or any(isinstance(count, bool) for count in counts):
        raise ValueError(f"{name}: expected integers, got {counts!r}")
    return [checked_int(name, count, least=0) for count in counts]


def _patch_counts(image_grid: torch.Tensor | None) -> list[int] | None:
    """Return the patches of each image, or None where the grid does not count patches."""
    if image_grid is None or image_grid.ndim != 2 or image_grid.is_floating_point():
        return None
    counts = image_grid.prod(dim=1).tolist()
    return counts if all(count > 0 for count in counts) else None


def _n_rows(name: str, rows: Any, or_list: bool = False) -> int:
    is_list = or_list and isinstance(rows, list)
    if not is_list and (not isinstance(rows, torch.Tensor) or rows.ndim == 0):
        raise TypeError(f"{name} must be a tensor with rows, got {_described(rows)}")
    return len(rows)


def _misaligned(reason: str, **named: Any) -> ValueError:
    got = ", ".join(f"{name}={_described(value)}" for name, value in named.items())
    return ValueError(f"cannot align the media with the samples: {reason}; got {got}")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        is_counts = value.ndim <= 1 and not value.is_floating_point() and value.numel() <= 64
        return f"{tuple(value.shape)}" + (f" {value.tolist()}" if is_counts else "")
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return f"list of {[tuple(row.shape) for row in value]}"
    return repr(value)


# ---- at the first stage


@contextmanager
def stage_vlm_media_for_pp(
    pp: Any, model_parts: Sequence[torch.nn.Module], batch: MutableMapping[str, Any]
) -> Iterator[None]:
    """Attach the media that `prepare_vlm_media_for_pp` split to stage 0, for one schedule call.

    It takes `VLM_PP_MEDIA_KEY` out of `batch` on every rank. Inside the context, on the rank of the
    first stage, `model_parts[0]` has the chunks as attributes, in the two forms that models read:

    1. A list with one entry for each microbatch, or None, in each of `_vlm_pixel_values_chunks`,
       `_vlm_image_grid_hws_chunks`, `_vlm_num_patches_chunks`, `_vlm_patch_pixel_values_chunks`,
       `_vlm_patch_newline_mask_chunks`, `_vlm_pixel_values_videos_chunks` and
       `_vlm_video_grid_thw_chunks`, and in `_vlm_chunk_idx` the index of the microbatch that is
       running. The model may advance this index or not: it is set again for each microbatch.
    2. All lists by key in `_pp_media_chunks`. The model finds the entry of its microbatch by the
       argument `pp_media_index`, int64 with one entry for each sample. It is put into `batch`,
       which the schedule splits, if the model's `forward` names it or a NeMo Automodel that
       supports it is loaded.

    On leaving, also by an exception, the model, the stage and the batch are restored.

    Args:
        pp: a pipeline whose `info` has `has_first_stage` and `stages`, PyTorch's pipeline stages of
            this rank. Without stages each forward of the model is taken for the next microbatch.
        model_parts: the modules of this rank's stages, the first stage's first. It has to be the
            module whose forward reads the attributes, not a wrapper (DDP) around it.
        batch: the batch that the schedule runs next.

    Raises:
        ValueError: `model_parts` is empty, or the media hold keys that no stage can take.
        RuntimeError: on leaving, if microbatches with media ran and the model read none in either
            form, so that images would be silently ignored. Not checked any more once a model has
            read some.
    """
    media = dict(batch.pop(VLM_PP_MEDIA_KEY, None) or {})
    index = media.pop(PP_MEDIA_INDEX_KEY, None)
    if not media or not pp.info.has_first_stage:
        yield
        return
    if not model_parts:
        raise ValueError("model_parts is empty, but this rank has the first stage")
    unknown = media.keys() - set(_STAGED)
    if unknown:
        raise ValueError(f"batch[{VLM_PP_MEDIA_KEY!r}] holds unknown media {sorted(unknown)}")

    model = model_parts[0]
    stages = getattr(pp.info, "stages", None) or ()
    first_stage = next((stage for stage in stages if stage.is_first), None)
    watched = {key: _Chunks(chunks) for key, chunks in media.items()}
    ran: set[int] = set()

    def runs(chunk_id: int) -> None:
        ran.add(chunk_id)
        setattr(model, _CURSOR, chunk_id)

    with ExitStack() as undo:
        values = {f"_vlm_{key}_chunks": watched.get(key) for key in _BY_CURSOR}
        for attribute, value in {**values, PP_MEDIA_CHUNKS_ATTR: watched, _CURSOR: 0}.items():
            # getattr, because a compiled module keeps its attributes on the module that it wraps.
            before = getattr(model, attribute, _MISSING)
            _set_attribute(model, attribute, value, before=before, undo=undo)
        if index is not None and _takes_index(model):
            batch[PP_MEDIA_INDEX_KEY] = index
            undo.callback(batch.pop, PP_MEDIA_INDEX_KEY, None)
        if hasattr(first_stage, "forward_one_chunk"):
            _follow_stage(model, first_stage, runs, undo)
        else:
            count = itertools.count()
            hook = model.register_forward_pre_hook(lambda *_: runs(next(count)))
            undo.callback(hook.remove)
        yield
    if any(chunks.taken for chunks in watched.values()):
        _take_media.add(model)
    elif model not in _take_media and (dropped := sorted(ran & _with_media(media))):
        raise RuntimeError(
            f"microbatches {dropped} have images or videos, but {type(model).__name__} looked at "
            f"none of them: neither in _vlm_*_chunks at _vlm_chunk_idx nor in "
            f"{PP_MEDIA_CHUNKS_ATTR} by an argument {PP_MEDIA_INDEX_KEY} of its forward"
        )


_take_media: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""The models that have read media in one of the two forms."""


class _Chunks(list[Any]):
    """A list of chunks that records whether one of them was read."""

    taken = False

    def __getitem__(self, index: Any) -> Any:
        self.taken = True
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self.taken = True
        return super().__iter__()


def _with_media(media: Mapping[str, Sequence[Any]]) -> set[int]:
    """Find the microbatches that have pixels."""
    pixels = (media.get(key, ()) for key in ("pixel_values", "pixel_values_videos"))
    return {number for chunks in pixels for number, rows in enumerate(chunks) if len(rows)}


def _takes_index(model: torch.nn.Module) -> bool:
    """Whether the model, or the framework that defines it, supports the argument `pp_media_index`.

    A `**kwargs` alone does not mean that: a model without support passes the argument on.
    """
    automodel = sys.modules.get("nemo_automodel.shared.pipeline")
    named = PP_MEDIA_INDEX_KEY in inspect.signature(model.forward).parameters
    return named or hasattr(automodel, "PP_MEDIA_INDEX_KEY")


def _follow_stage(
    model: torch.nn.Module, stage: Any, runs: Callable[[int], None], undo: ExitStack
) -> None:
    """Call `runs` with the microbatch of every forward, and set the index for it.

    The index is also set for backward passes, which may recompute the forward. PyTorch's stages run
    a microbatch as `forward_one_chunk(index, ...)`, so its index is known without counting
    forwards. Counting would go wrong with the forward that finds out shapes on the first step, with
    models that advance the index only for microbatches with images, and with recomputed forwards.

    Schedules that overlap passes run a backward in a second thread. While a forward runs, that does
    not change the index.
    """
    forward_runs = threading.Lock()

    def forward(run: Callable[..., Any], chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with forward_runs:
            runs(chunk_id)
            return run(chunk_id, *args, **kwargs)

    def backward(run: Callable[..., Any], chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if forward_runs.acquire(blocking=False):
            setattr(model, _CURSOR, chunk_id)
            forward_runs.release()
        return run(chunk_id, *args, **kwargs)

    for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
        follow = forward if name == "forward_one_chunk" else backward
        if hasattr(stage, name):
            method = functools.partial(follow, getattr(stage, name))
            # Removing the instance's attribute makes the class's method effective again.
            _set_attribute(stage, name, method, before=vars(stage).get(name, _MISSING), undo=undo)


def _set_attribute(owner: Any, name: str, value: Any, *, before: Any, undo: ExitStack) -> None:
    if before is _MISSING:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)
    setattr(owner, name, value)
