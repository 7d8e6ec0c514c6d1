"""The first pipeline stage's side of `pp_media`: hand each microbatch its own media, then let go.

PyTorch's stages run a microbatch as `forward_one_chunk(index, ...)`. While media are staged these
calls put the cursor on that index, so that no count of forwards has to be kept: the forward that
probes shapes on the first step, a model that moves the cursor only for microbatches with images,
and a forward that is recomputed in the backward pass leave the others' media where they belong.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

VLM_PP_MEDIA_KEY = "_vlm_pp_media_chunks"

# What models take: the chunks of a key lie under the attribute _vlm_{key}_chunks.
_CROPS = ("num_patches", "patch_pixel_values", "patch_newline_mask")
_STAGED = ("pixel_values", "image_grid_hws", *_CROPS, "pixel_values_videos", "video_grid_thw")
_CURSOR = "_vlm_chunk_idx"
_MISSING = object()


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
    set anew for each microbatch.

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
    unknown = media.keys() - set(_STAGED)
    if unknown:
        raise ValueError(f"batch[{VLM_PP_MEDIA_KEY!r}] holds unknown media {sorted(unknown)}")

    model = model_parts[0]
    stages = getattr(pp.info, "stages", None) or ()
    first_stage = next((stage for stage in stages if stage.is_first), None)
    with ExitStack() as undo:
        values = {f"_vlm_{key}_chunks": media.get(key) for key in _STAGED}
        for attribute, value in {**values, _CURSOR: 0}.items():
            # getattr, because a compiled module keeps its attributes on the module that it wraps.
            _set_attribute(model, attribute, value, getattr(model, attribute, _MISSING), undo)
        if hasattr(first_stage, "forward_one_chunk"):
            _follow_stage(model, first_stage, undo)
        else:
            index = itertools.count()
            hook = model.register_forward_pre_hook(lambda *_: setattr(model, _CURSOR, next(index)))
            undo.callback(hook.remove)
        yield


def _follow_stage(model: torch.nn.Module, stage: Any, undo: ExitStack) -> None:
    """Put the cursor on the microbatch of every forward, and of backward passes, which recompute.

    Schedules that overlap passes run a backward in a second thread: the forward goes first.
    """
    forward_runs = threading.Lock()

    def forward(run: Callable[..., Any], chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with forward_runs:
            setattr(model, _CURSOR, chunk_id)
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
            # vars: removing the instance's attribute lets the class's method show again.
            _set_attribute(stage, name, method, vars(stage).get(name, _MISSING), undo)


def _set_attribute(owner: Any, name: str, value: Any, before: Any, undo: ExitStack) -> None:
    if before is _MISSING:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)
    setattr(owner, name, value)
