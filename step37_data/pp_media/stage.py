"""The first pipeline stage's side of `pp_media`: hand each microbatch its own media, then let go.

PyTorch's stages run a microbatch as `forward_one_chunk(index, ...)`. While media are staged these
calls put the cursor on that index, so that no count of forwards has to be kept: the forward that
probes shapes on the first step, a model that moves the cursor only for microbatches with images,
and a forward that is recomputed in the backward pass leave the others' media where they belong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import Any

import torch

from step37_kernels.image_insert_embedding import ImageForInsert

VLM_PP_MEDIA_KEY = "_vlm_pp_media_chunks"

_ATTRIBUTE_OF_KEY = {
    "pixel_values": "_vlm_pixel_values_chunks",
    "image_grid_hws": "_vlm_image_grid_hws_chunks",
    "num_patches": "_vlm_num_patches_chunks",
    "patch_pixel_values": "_vlm_patch_pixel_values_chunks",
    "patch_newline_mask": "_vlm_patch_newline_mask_chunks",
    "pixel_values_videos": "_vlm_pixel_values_videos_chunks",
    "video_grid_thw": "_vlm_video_grid_thw_chunks",
}
_CURSOR = "_vlm_chunk_idx"
_PACKED_IMAGES = "images"
_MISSING = object()


def microbatch_limits(batch_size: int, n_microbatches: int) -> list[int]:
    """Return the `n_microbatches + 1` sample limits of the cut that `torch.tensor_split` makes.

    Microbatch k holds samples `limits[k]` to `limits[k + 1]`: the first `batch_size %
    n_microbatches` hold one more than the others, and none is left out where there are too few.

    >>> microbatch_limits(6, 4)
    [0, 2, 4, 5, 6]
    """
    if n_microbatches < 1:
        raise ValueError(f"n_microbatches must be at least 1, got {n_microbatches}")
    if batch_size < 0:
        raise ValueError(f"batch_size must not be negative, got {batch_size}")
    quotient, remainder = divmod(batch_size, n_microbatches)
    return [k * quotient + min(k, remainder) for k in range(n_microbatches + 1)]


@contextmanager
def stage_vlm_media_for_pp(
    pp: Any, model_parts: Sequence[torch.nn.Module], batch: MutableMapping[str, Any]
) -> Iterator[None]:
    """Attach the media that `prepare_vlm_media_for_pp` split to stage 0, for one schedule call.

    Takes `VLM_PP_MEDIA_KEY` out of `batch` on every rank. On the rank of the first stage
    `model_parts[0]` carries, inside the context, a list with one entry a microbatch, or None, under
    each of `_vlm_pixel_values_chunks`, `_vlm_image_grid_hws_chunks`, `_vlm_num_patches_chunks`,
    `_vlm_patch_pixel_values_chunks`, `_vlm_patch_newline_mask_chunks`,
    `_vlm_pixel_values_videos_chunks` and `_vlm_video_grid_thw_chunks`, and under `_vlm_chunk_idx`
    the index of the microbatch that is running. The model may move the cursor on or leave it: it is
    set anew for each microbatch. Packed images (`prepare_packed_images_for_pp`) reach the model's
    forward as its keyword `images`, except for the forward that only probes shapes.

    On leaving, also by an exception, the model and the stage are as they were.

    Args:
        pp: a pipeline whose `info` has `has_first_stage` and `stages`, PyTorch's pipeline stages of
            this rank. Without stages each forward of the model counts as the next microbatch.
        model_parts: the modules of this rank's stages, the first stage's first: the very object
            whose forward reads the attributes, not a wrapper (DDP) around it.
        batch: what the schedule is about to run.

    Raises:
        ValueError: `model_parts` is empty, or the media hold keys that no stage can take.
    """
    media = batch.pop(VLM_PP_MEDIA_KEY, None)
    if not media or not pp.info.has_first_stage:
        yield
        return
    if not model_parts:
        raise ValueError("model_parts is empty, but this rank has the first stage")
    unknown = set(media) - set(_ATTRIBUTE_OF_KEY) - {_PACKED_IMAGES}
    if unknown:
        raise ValueError(f"batch[{VLM_PP_MEDIA_KEY!r}] holds unknown media {sorted(unknown)}")

    model = model_parts[0]
    first_stage = next(
        (stage for stage in getattr(pp.info, "stages", None) or () if stage.is_first), None
    )
    with ExitStack() as undo:
        for key, attribute in _ATTRIBUTE_OF_KEY.items():
            undo.enter_context(_model_attribute_set(model, attribute, media.get(key)))
        undo.enter_context(_model_attribute_set(model, _CURSOR, 0))
        if hasattr(first_stage, "forward_one_chunk"):
            cursor = undo.enter_context(_cursor_follows_stage(model, first_stage))
        else:
            cursor = undo.enter_context(_cursor_follows_forwards(model))
        if _PACKED_IMAGES in media:
            undo.enter_context(_images_given(model, media[_PACKED_IMAGES], cursor))
        yield


class _Cursor:
    """The microbatch that a forward of the first stage's model belongs to, None outside of any."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._in_forward = False
        self.microbatch: int | None = None

    def move_to(self, microbatch: int) -> None:
        self.microbatch = microbatch
        setattr(self._model, _CURSOR, microbatch)

    @contextmanager
    def forward_of(self, microbatch: int) -> Iterator[None]:
        with self._lock:
            self._in_forward = True
            self.move_to(microbatch)
        try:
            yield
        finally:
            with self._lock:
                self._in_forward = False
                self.microbatch = None

    @contextmanager
    def backward_of(self, microbatch: int) -> Iterator[None]:
        """Point at the microbatch for a forward that is recomputed in its backward pass.

        Schedules that overlap passes run a backward in a second thread: the forward goes first.
        """
        with self._lock:
            owns_cursor = not self._in_forward
            if owns_cursor:
                self.move_to(microbatch)
        try:
            yield
        finally:
            with self._lock:
                if owns_cursor and not self._in_forward:
                    self.microbatch = None


@contextmanager
def _cursor_follows_stage(model: torch.nn.Module, stage: Any) -> Iterator[_Cursor]:
    cursor = _Cursor(model)
    run_forward = stage.forward_one_chunk

    def forward_one_chunk(fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with cursor.forward_of(fwd_chunk_id):
            return run_forward(fwd_chunk_id, *args, **kwargs)

    def following(run_backward: Callable[..., Any]) -> Callable[..., Any]:
        def backward(bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            with cursor.backward_of(bwd_chunk_id):
                return run_backward(bwd_chunk_id, *args, **kwargs)

        return backward

    with ExitStack() as undo:
        undo.enter_context(_stage_method_set(stage, "forward_one_chunk", forward_one_chunk))
        for name in ("backward_one_chunk", "backward_weight_one_chunk"):
            if hasattr(stage, name):
                backward = following(getattr(stage, name))
                undo.enter_context(_stage_method_set(stage, name, backward))
        yield cursor


@contextmanager
def _cursor_follows_forwards(model: torch.nn.Module) -> Iterator[_Cursor]:
    cursor = _Cursor(model)
    n_done = 0

    def before(_module: torch.nn.Module, _args: Any) -> None:
        cursor.move_to(n_done)

    def after(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        nonlocal n_done
        n_done += 1
        cursor.move_to(n_done)

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield cursor
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _images_given(
    model: torch.nn.Module, chunks: Sequence[list[ImageForInsert]], cursor: _Cursor
) -> Iterator[None]:
    def give_images(
        _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The forward that probes shapes may run on made-up tokens, which have no place for images.
        if cursor.microbatch is None:
            return None
        if kwargs.get(_PACKED_IMAGES) is not None:
            raise ValueError("the first stage is called with images, and images are staged for it")
        # The model fills features into the groups: into copies, so that they go with this forward.
        groups = [replace(group) for group in chunks[cursor.microbatch]]
        return args, {**kwargs, _PACKED_IMAGES: groups}

    handle = model.register_forward_pre_hook(give_images, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attribute_set(owner: Any, name: str, value: Any, before: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _model_attribute_set(model: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    # getattr, because a compiled module keeps its attributes on the module that it wraps.
    with _attribute_set(model, name, value, getattr(model, name, _MISSING)):
        yield


@contextmanager
def _stage_method_set(stage: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    # vars, because removing the instance's attribute lets the class's method show again.
    with _attribute_set(stage, name, method, vars(stage).get(name, _MISSING)):
        yield


def prepare_packed_images_for_pp(
    batch: MutableMapping[str, Any], n_microbatches: int
) -> MutableMapping[str, Any]:
    """Move a batch of packs' `images` to `VLM_PP_MEDIA_KEY`, split for the microbatches.

    Inside `stage_vlm_media_for_pp` the first stage's forward then gets its packs' images as the
    keyword `images`, as Step37Model takes them; the other stages get none. (Megatron's schedules
    ask the data iterator for each microbatch and need none of this.)

    Args:
        batch: `input_ids`, `[packs, T]`, and `images`, for each pack its list of `ImageForInsert`
            or None. Changed in place, but not where this raises.
        n_microbatches: microbatches of the schedule.

    Returns:
        `batch`, without `images`.

    Raises:
        KeyError: `batch` lacks `images` or `input_ids`.
        ValueError: as `chunk_packed_images`, or the batch was prepared before.
    """
    chunks = chunk_packed_images(batch["images"], n_microbatches, batch["input_ids"])
    if batch.get(VLM_PP_MEDIA_KEY) is not None:
        raise ValueError(f"batch already holds {VLM_PP_MEDIA_KEY!r}: it was prepared before")
    del batch["images"]
    batch[VLM_PP_MEDIA_KEY] = {_PACKED_IMAGES: chunks}
    return batch


def chunk_packed_images(
    images_per_pack: Sequence[Sequence[ImageForInsert] | None],
    n_microbatches: int,
    input_ids: torch.Tensor,
) -> list[list[ImageForInsert]]:
    """Return for each microbatch the insertion groups of the packs it holds.

    A microbatch of one pack gets that pack's groups as they are. Where it holds several, groups
    with the same start token become one, its images in the order of the packs: the k-th image goes
    to the k-th start token of the microbatch, row by row. That holds only if every pack has as many
    images as start tokens, which is checked (and read from the device, if the ids are there).

    Args:
        images_per_pack: for each pack its insertion groups, in the order they are applied.
        n_microbatches: microbatches of the schedule.
        input_ids: `[packs, T]` integers.

    Returns:
        `n_microbatches` lists; an empty one where no pack of the microbatch has images.

    Raises:
        ValueError: not one entry a pack; packs of one microbatch that differ in the order or the
            fields of their groups, or hold more or fewer images than start tokens.
    """
    n_packs = len(images_per_pack)
    if input_ids.ndim != 2 or len(input_ids) != n_packs:
        raise ValueError(
            f"input_ids must be [packs, T] with the {n_packs} packs of images, "
            f"got {tuple(input_ids.shape)}"
        )
    limits = microbatch_limits(n_packs, n_microbatches)
    packs = [list(groups or ()) for groups in images_per_pack]
    return [
        _merged_groups(packs[start:end], input_ids[start:end], start)
        for start, end in pairwise(limits)
    ]


def _merged_groups(
    packs: list[list[ImageForInsert]], input_ids: torch.Tensor, first_pack: int
) -> list[ImageForInsert]:
    if len(packs) <= 1:
        return list(chain.from_iterable(packs))
    order = TopologicalSorter[int]()
    for number, groups in enumerate(packs, first_pack):
        tokens = [group.insert_start_token for group in groups]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"pack {number} has two groups with one start token: {tokens}")
        for token in tokens:
            order.add(token)
        for earlier, later in pairwise(tokens):
            order.add(later, earlier)
    try:
        merged_order = list(order.static_order())
    except CycleError as error:
        raise ValueError(
            f"packs {first_pack} to {first_pack + len(packs) - 1} share a microbatch, but apply "
            f"their groups in different orders (start tokens {error.args[1]})"
        ) from error

    by_token = [{group.insert_start_token: group for group in groups} for groups in packs]
    if merged_order:
        starts = torch.stack([(input_ids == token).sum(dim=1) for token in merged_order], dim=1)
        for number, (groups_of_pack, row) in enumerate(
            zip(by_token, starts.tolist(), strict=True), first_pack
        ):
            for token, n_starts in zip(merged_order, row, strict=True):
                n_images = _n_images(groups_of_pack.get(token))
                if n_images != n_starts:
                    raise ValueError(
                        f"pack {number} has {n_images} images for {n_starts} start tokens {token}: "
                        f"in one microbatch with other packs they would take the others' places"
                    )
    return [_merged([pack[token] for pack in by_token if token in pack]) for token in merged_order]


def _n_images(group: ImageForInsert | None) -> int:
    if group is None:
        return 0
    if group.images is not None:
        return len(group.images)
    if group.image_features is None:
        return 0
    if isinstance(group.image_features, torch.Tensor):
        return len(group.image_features)
    return sum(1 if f.ndim == 2 else len(f) for f in group.image_features)


def _merged(groups: list[ImageForInsert]) -> ImageForInsert:
    if len(groups) == 1:
        return groups[0]
    merged: dict[str, Any] = {}
    for name, merge in _MERGE_OF_FIELD.items():
        values = [getattr(group, name) for group in groups]
        present = [value for value in values if value is not None]
        if not present:
            continue
        if len(present) < len(values):
            raise ValueError(
                f"of the packs of one microbatch with start token {groups[0].insert_start_token}, "
                f"{len(present)} of {len(values)} have {name}: all or none must"
            )
        merged[name] = merge(present)
    return replace(groups[0], **merged)


def _joined_images(images: list[torch.Tensor]) -> torch.Tensor:
    shapes = [tuple(image.shape) for image in images]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"images of one start token must have one size, got {shapes}")
    return torch.cat(images)


def _joined_features(features: list[torch.Tensor | list[torch.Tensor]]) -> Any:
    if all(isinstance(f, torch.Tensor) for f in features):
        tensors: list[torch.Tensor] = features  # type: ignore[assignment]
        if len({tuple(f.shape[1:]) for f in tensors}) == 1:
            return torch.cat(tensors)
    return list(chain.from_iterable([f] if isinstance(f, torch.Tensor) else f for f in features))


def _joined_cu_seqlens(cu_seqlens: list[torch.Tensor]) -> torch.Tensor:
    """Chain cumulative lengths, `[N_i + 1]` each, into one, `[sum(N_i) + 1]`."""
    lengths = [cu.diff() for cu in cu_seqlens]
    joined = torch.cat([cu_seqlens[0][:1], *lengths])
    return joined.cumsum(dim=0, dtype=joined.dtype)


_MERGE_OF_FIELD: dict[str, Callable[[list[Any]], Any]] = {
    "images": _joined_images,
    "image_features": _joined_features,
    "rope_cu_seqlens": _joined_cu_seqlens,
    "rope_max_seq_len": max,
}
