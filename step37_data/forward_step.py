"""A forward step for Megatron-Bridge on packed batches, which prepares the next packs ahead.

Megatron is imported inside the functions that need it, not with this module.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from step37_data.common.checks import checked_int
from step37_data.images.options import ImageKeywords, ImageOptions
from step37_data.prefetch import CountsUsedPacks, ReadAhead
from step37_data.preprocess import preprocess_packed_batch
from step37_data.router_padding import (
    count_experts_without_padding,
    padding_mask,
    padding_start,
    why_not_told,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Says what one chunk of the model needs of a pack.

    ``pre_process`` and ``post_process`` are read from the chunk: with virtual pipeline stages a
    rank has several.
    """

    pre_process: bool
    """Whether the chunk embeds tokens and images."""
    post_process: bool
    """Whether the chunk computes the loss."""
    divisible_by: int
    """The packed length is padded to a multiple of this."""
    mask_part: tuple[int, int] | None = None
    """Which part of ``padding_mask`` the chunk takes, and how many parts there are: more than one
    with sequence parallelism. None where the chunk takes no mask."""


def model_inputs(
    batch: Mapping[str, Any], stage: Stage, *, preprocess: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Make the arguments of ``Step37Model.forward`` for one pack.

    The packed length T is padded to a multiple of ``stage.divisible_by``, on every stage in the
    same way, by one more sub-sequence: tokens 0, labels −100, no loss.

    Args:
        batch: as ``pack_samples`` gives it, tensors on the host.
        stage: what the chunk needs.
        preprocess: ``preprocess_packed_batch`` with everything but the batch given.

    Returns:
        ``input_ids`` ``[1, T]`` int64 (None between the first and the last chunk), ``images`` (a
        list of ``ImageForInsert``, empty past the first chunk), ``labels`` and ``loss_mask``
        ``[1, T]`` (last chunk), ``packed_seq_params`` (``thd``), ``cu_seqlens``, and None for
        ``position_ids`` and ``attention_mask``, which the packed layout replaces. Where the chunk
        takes it, ``padding_mask``, bool ``[1, T / parts]``: True for what was added here and for
        the padding that the pack has of its own.

    Raises:
        ValueError: the chunk needs tokens and the batch has none.
    """
    needs_tokens = stage.pre_process or stage.post_process
    if needs_tokens and "tokens" not in batch:
        which = "first" if stage.pre_process else "last"
        raise ValueError(f"batch: the {which} pipeline stage needs tokens, got {sorted(batch)}")
    first_padding = padding_start(batch) if stage.mask_part is not None else 0
    if not needs_tokens:
        batch = {key: batch[key] for key in ("cu_seqlens", "position_id")}
    prepared = preprocess(batch)
    length = prepared["position_id"].shape[-1]
    padding = -length % stage.divisible_by
    cu_seqlens = prepared["cu_seqlens"].to(torch.int32)
    if padding:
        cu_seqlens = F.pad(cu_seqlens, (0, 1), value=length + padding)
    # If the batch came from the host, this is there too, and reading it does not wait.
    longest = max(int(prepared["max_seq_len"]), padding)
    inputs: dict[str, Any] = {
        "input_ids": None,
        "images": [],
        "position_ids": None,
        "attention_mask": None,
        "packed_seq_params": _packed_seq_params(cu_seqlens, longest),
        "cu_seqlens": cu_seqlens,
    }
    if stage.mask_part is not None:
        inputs["padding_mask"] = padding_mask(
            first_padding,
            length + padding,
            part=stage.mask_part,
            device=prepared["position_id"].device,
        )
    if needs_tokens:
        inputs["input_ids"] = F.pad(prepared["input_ids"], (0, padding), value=0)
    if stage.pre_process:
        inputs["images"] = prepared["images"]
    if stage.post_process:
        inputs["labels"] = F.pad(prepared["labels"], (0, padding), value=IGNORED_LABEL)
        inputs["loss_mask"] = F.pad(prepared["loss_masks"], (0, padding), value=0)
    return inputs


def _packed_seq_params(cu_seqlens: torch.Tensor, longest: int) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    lengths = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    return PackedSeqParams(qkv_format="thd", **dict.fromkeys(bounds, cu_seqlens), **lengths)


class ForwardStep:
    """A forward step for Megatron-Bridge's ``pretrain`` or ``finetune``.

    It reads packs from the data iterator, prepares them ahead (decode threads, upload, resize), and
    runs the model on one of them. The host waits only if a pack is not ready.

    Packs are read ahead only if the data iterator is Megatron's ``RerunDataIterator``, as Bridge
    passes it. The iterator inside is replaced by a :class:`step37_data.prefetch.ReadAhead`, so that
    Bridge, when it skips an iteration, and Megatron, when it rewinds, still get the right pack. Any
    other iterator, and one that saves its own state, is read when the pack is needed.

    The routers of a model's experts are told which positions are padding, where its forward takes
    ``padding_mask``: padding then counts neither in their losses nor in their expert bias. With
    ``padding_mask=False`` in ``cfg.dataset`` padding counts, as in Bridge's step for Step-3.7.

    Expects of the configuration: ``cfg.dataset`` a ``Step37Flickr8kSFTDataProvider``, built;
    ``cfg.train.micro_batch_size`` 1; context parallel size 1.

    Args:
        prefetch_depth: packs prepared beyond the one in use; 0 prepares each when it is needed.
        only_pp_first_stage: see :func:`~step37_data.preprocess.preprocess_packed_batch`.
        options: the attributes of :class:`~step37_data.images.options.ImageOptions`, as keywords:
            ``device`` (where the model is), ``dtype``, ``on_broken``, ``threads`` and others, but
            not the sizes, which are those of the data set. Leave out ``as_viewed``: packs carry the
            value of the data set.

    Raises:
        ValueError: ``prefetch_depth`` is negative, or an option has a value that is not allowed.
        TypeError: there is no such option, or the data set decides it.
    """

    def __init__(
        self,
        *,
        prefetch_depth: int = 2,
        only_pp_first_stage: bool = True,
        **options: Unpack[ImageKeywords],
    ) -> None:
        self._depth = checked_int("prefetch_depth", prefetch_depth, least=0)
        for name in ("image_size", "patch_image_size"):
            if name in options:
                raise TypeError(f"{name}: the data set decides it (cfg.dataset.{name})")
        # So an option that does not exist is an error here, not at the first step.
        self._device = ImageOptions(**options).device
        self._preprocess = functools.partial(
            preprocess_packed_batch,
            only_pp_first_stage=only_pp_first_stage,
            **options,
        )
        self._ahead: list[ReadAhead] = []

    def __call__(
        self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, functools.partial[Any]]:
        """Run one microbatch.

        Args:
            state: Megatron-Bridge's ``GlobalState``.
            data_iterator: an iterator of packed dictionaries.
            model: a chunk of ``Step37Model``, wrapped or not.
            return_schedule_plan: return the plan for overlapped expert communication instead of
                the output.

        Returns:
            The output (the losses ``[1, T]`` on the last chunk) and Bridge's masked loss function.

        Raises:
            ValueError: this step cannot run the model or the batch.
        """
        from megatron.bridge.training.losses import create_masked_next_token_loss_function

        state.timers("batch-generator", log_level=2).start()
        with state.straggler_timer(bdata=True):
            inputs = self._next(state.cfg.dataset, data_iterator, model)
        state.timers("batch-generator").stop()
        with state.straggler_timer:
            output = _run(model, inputs, return_schedule_plan)
        checks = state.cfg.rerun_state_machine
        loss_function = create_masked_next_token_loss_function(
            inputs.get("loss_mask"), checks.check_for_nan_in_loss, checks.check_for_spiky_loss
        )
        return output, loss_function

    def close(self) -> None:
        """End the threads; the data iterators continue without them. May be called again."""
        for ahead in self._ahead:
            ahead.close()
        self._ahead.clear()

    def _next(self, dataset: Any, data_iterator: Any, model: Any) -> dict[str, Any]:
        if data_iterator is None:
            raise ValueError("data_iterator: every pipeline stage needs one, for cu_seqlens")
        ahead = getattr(data_iterator, "iterable", None)
        if not isinstance(ahead, ReadAhead):
            preprocess = functools.partial(
                self._preprocess,
                img_start_token_id=dataset.img_start_token_id,
                patch_start_token_id=dataset.patch_start_token_id,
                image_size=dataset.image_size,
                patch_image_size=dataset.patch_image_size,
                encoder_patch_size=dataset.encoder_patch_size,
            )
            # Bridge's own data set has no such field.
            stage = _stage_of(model, padding_mask=getattr(dataset, "padding_mask", True))
            prepare = functools.partial(model_inputs, stage=stage, preprocess=preprocess)
            if self._depth == 0 or not _may_be_read_ahead(data_iterator):
                return prepare(next(data_iterator))
            ahead = ReadAhead(
                data_iterator.iterable, prepare, depth=self._depth, device=self._device
            )
            data_iterator.iterable = ahead
            self._ahead.append(ahead)
        prepared: dict[str, Any] = ahead.prepared(next(data_iterator))
        return prepared


def _stage_of(model: Any, *, padding_mask: bool) -> Stage:
    from megatron.core.utils import get_attr_wrapped_model

    groups = get_attr_wrapped_model(model, "pg_collection")
    if groups.cp.size() > 1:
        raise ValueError(f"context parallel size: expected 1 (whole packs), got {groups.cp.size()}")
    chunk = get_attr_wrapped_model(model, "pre_process", return_model_obj=True)
    return Stage(
        pre_process=chunk.pre_process,
        post_process=chunk.post_process,
        # 16 for FP8 and Transformer Engine, the tensor parallel size for sequence parallelism.
        divisible_by=math.lcm(groups.tp.size(), 16),
        mask_part=_mask_part(chunk, groups.tp) if padding_mask else None,
    )


_mask_parts: WeakKeyDictionary[Any, tuple[int, int] | None] = WeakKeyDictionary()


def _mask_part(chunk: Any, tensor_parallel: Any) -> tuple[int, int] | None:
    """``Stage.mask_part`` of a chunk, found out and logged once."""
    if chunk not in _mask_parts:
        _mask_parts[chunk] = None
        if reason := why_not_told(chunk):
            logger.info(f"routers are not told which positions are padding: {reason}")
        else:
            count_experts_without_padding()
            # With sequence parallelism a chunk's decoder sees this rank's part on every stage,
            # because the embedding of the first one has split it.
            split = chunk.config.sequence_parallel
            part = (tensor_parallel.rank(), tensor_parallel.size()) if split else (0, 1)
            _mask_parts[chunk] = part
    return _mask_parts[chunk]


def _may_be_read_ahead(data_iterator: Any) -> bool:
    """Whether all readers of packs read from this object, and none from the iterator inside."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    if not isinstance(data_iterator, RerunDataIterator):
        return False
    # A saved state must count the packs that were used, not those that were read.
    packs = data_iterator.iterable
    return isinstance(packs, CountsUsedPacks) or not hasattr(packs, "save_state")


def _run(model: Any, inputs: dict[str, Any], return_schedule_plan: bool) -> Any:
    if not return_schedule_plan:
        return model(**inputs)
    from megatron.core.utils import get_model_config

    if not get_model_config(model).overlap_moe_expert_parallel_comm:
        raise ValueError("return_schedule_plan: needs the model's overlap_moe_expert_parallel_comm")
    # The plans of megatron-core keep padding_mask from the routers, so theirs count padding.
    left_out = ("cu_seqlens", "padding_mask")
    planned = {key: value for key, value in inputs.items() if key not in left_out}
    return model.build_schedule_plan(**planned)


forward_step = ForwardStep()
"""The forward step to give to Megatron-Bridge."""
