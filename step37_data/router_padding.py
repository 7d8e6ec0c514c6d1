"""Which positions of a pack are padding, for the routers of a mixture of experts.

A router that is told leaves padding out of its balancing loss, its z-loss and the counts behind its
expert bias. Megatron-Bridge's ``gpt_step`` tells it (since its pull request 5470); its step for
Step-3.7 does not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch


def padding_start(batch: Mapping[str, Any]) -> int:
    """The first position of a pack that is padding; the pack's length where none is.

    Padding is the last sub-sequence where that holds one token over and over, as input and as
    label, and has no loss: so ``pack_samples`` fills packs up, and so does Megatron-Bridge.

    Args:
        batch: as ``pack_samples`` gives it, on the host. Without ``tokens``, which later pipeline
            stages may not have, no position is known to be padding.
    """
    bounds = batch["cu_seqlens"].tolist()
    if "tokens" not in batch or len(bounds) < 2:
        return int(bounds[-1])
    last = slice(bounds[-2], bounds[-1])
    tokens, labels = batch["tokens"][last], batch["labels"][last]
    is_padding = (tokens == tokens[:1]).all() and (labels == tokens[:1]).all()
    return int(bounds[-2 if is_padding and not batch["loss_masks"][last].any() else -1])


def padding_mask(
    start: int, length: int, *, part: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """True for padding: bool ``[1, length / parts]``, as Megatron's ``GPTModel`` takes it.

    Args:
        start: the first position that is padding.
        length: of the padded pack, a multiple of the number of parts.
        part: which part of the sequence is wanted, and into how many it is split (sequence
            parallelism).
        device: where the mask is made.
    """
    index, parts = part
    size = length // parts
    return (torch.arange(index * size, (index + 1) * size, device=device) >= start)[None]


def why_not_told(chunk: Any) -> str:
    """Why the routers of a model cannot be told which positions are padding; empty if they can.

    Args:
        chunk: a chunk of the model, out of its wrappers, with Megatron's configuration.
    """
    config = getattr(chunk, "config", None)
    if not getattr(config, "num_moe_experts", None):
        return "the model has no experts"
    if not _takes_padding_mask(chunk):
        return "the model's forward takes no padding_mask"
    if "quantile_balancing" in getattr(config, "moe_router_load_balancing_type", ()):
        return "quantile balancing knows no padding"
    if getattr(config, "cuda_graph_impl", "none") == "transformer_engine":
        return "CUDA graphs of Transformer Engine take no padding_mask"
    return ""


def _takes_padding_mask(chunk: Any) -> bool:
    """By name, or, as in Step37Model, among the keywords that go on to its language model."""
    parameters = inspect.signature(chunk.forward).parameters
    if "padding_mask" in parameters:
        return True
    goes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    language_model = getattr(chunk, "language_model", None)
    if not goes_on or language_model is None:
        return False
    return "padding_mask" in inspect.signature(language_model.forward).parameters


def count_experts_without_padding() -> None:
    """Let Megatron's routers leave masked tokens out of the counts behind the expert bias.

    megatron-core up to 0.19.2 hands its own count a mask of the wrong shape, which is an error
    (Megatron-LM's issue 6111). The mask is applied before the count, which is right in every
    version, and changes nothing where no mask is given. Idempotent.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    count: Callable[..., None] = TopKRouter._apply_expert_bias
    if getattr(count, "step37_applies_the_mask", False):
        return

    @functools.wraps(count)
    def count_without_padding(
        router: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        if padding_mask is not None and router.enable_expert_bias:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        count(router, routing_map)

    count_without_padding.step37_applies_the_mask = True  # type: ignore[attr-defined]
    TopKRouter._apply_expert_bias = count_without_padding
