"""Does what :class:`step37_kernels.ImageInsertEmbedding` does, and other ways to do it.

Each is a function ``(embeddings [S, B, H], input_ids [B, S], groups, weight [H, C]) → [S, B, H]``
with ``groups`` a sequence of ``(start_token, features [N, L, C])``. The vectorised ones assume what
every batch of the suite has: as many start tokens as features, whole spans, no overlap.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Kind
from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.dispatch import Impl

Groups = Sequence[tuple[int, Tensor]]
Forward = Callable[[Tensor, Tensor, Groups, Tensor], Tensor]

BRIDGE = "megatron.bridge.models.stepfun.modelling_step37.image_insert_embedding"


def step37(impl: Impl, hidden: int, width: int) -> Forward:
    """Make our way: the module that users have, which starts the product beside the plan.

    The word embedding that it calls hands out the embeddings of the case.
    """
    given: list[Tensor] = []
    with torch.device("meta"):
        module = ImageInsertEmbedding(lambda **_: given.pop(), width, hidden, impl=impl)
    # Each call brings a weight of its own, which is no parameter of the module.
    projector: Any = module.align_projector
    del projector.weight

    def forward(embeddings: Tensor, input_ids: Tensor, groups: Groups, weight: Tensor) -> Tensor:
        given.append(embeddings)
        projector.weight = weight
        images = [ImageForInsert(token, image_features=x) for token, x in groups]
        out: Tensor = module(input_ids, images)
        return out

    return forward


def stock(embeddings: Tensor, input_ids: Tensor, groups: Groups, weight: Tensor) -> Tensor:
    """Insert with the same operations as the replaced class.

    It has one product and one clone for each group, and two ``.item()`` for each picture.
    """
    for token, features in groups:
        projected = F.linear(features, weight)
        locations = (input_ids == token).nonzero()
        fused = embeddings.clone()
        for location, feature in zip(locations, projected.unbind(0), strict=True):
            batch, start = int(location[0].item()), int(location[1].item()) + 1
            fused[start : start + feature.shape[0], batch] = feature
        embeddings = fused
    return embeddings


def span_mask(input_ids: Tensor, token: int, rows: int) -> Tensor:
    """Mark the ``rows`` positions after each start token: ``[B, S]`` bool."""
    seq_len = input_ids.shape[1]
    started = (input_ids == token).cumsum(1)
    recent = started - F.pad(started, (rows, 0))[:, :seq_len]
    return F.pad(recent, (1, 0))[:, :seq_len] > 0


def masked_scatter(embeddings: Tensor, input_ids: Tensor, groups: Groups, weight: Tensor) -> Tensor:
    """Insert as most vision-language models in PyTorch do: a mask, and ``masked_scatter``."""
    fused = embeddings.transpose(0, 1)
    for token, features in groups:
        mask = span_mask(input_ids, token, features.shape[1])
        fused = fused.masked_scatter(mask.unsqueeze(-1), F.linear(features, weight))
    return fused.transpose(0, 1)


def index_copy(embeddings: Tensor, input_ids: Tensor, groups: Groups, weight: Tensor) -> Tensor:
    """Insert by the best plain PyTorch we know: one product, one ``index_copy``, no host wait."""
    seq_len, batch_size, hidden = embeddings.shape
    positions = []
    for token, features in groups:
        num_rows = features.shape[0] * features.shape[1]
        mask = span_mask(input_ids, token, features.shape[1]).flatten()
        slot = torch.where(mask, mask.cumsum(0) - 1, num_rows)
        index = torch.arange(mask.shape[0], device=mask.device)
        position = index % seq_len * batch_size + index // seq_len
        # Positions outside the mask go to one slot past the end.
        slots = position.new_zeros(num_rows + 1)
        positions.append(slots.scatter(0, slot, position)[:num_rows])
    rows = torch.cat([features.reshape(-1, features.shape[-1]) for _, features in groups])
    flat = embeddings.reshape(seq_len * batch_size, hidden)
    fused = flat.index_copy(0, torch.cat(positions), F.linear(rows, weight))
    return fused.view(seq_len, batch_size, hidden)


def module_peer(cls: Callable[..., Any], hidden: int, width: int) -> Forward:
    """Make a peer of a class with the interface of Megatron-Bridge's ``ImageInsertEmbedding``.

    Its language embedding is a stand-in that returns the embeddings of the case.
    """
    given: list[Tensor] = []
    # On the meta device, because each call sets the weight of the case.
    with torch.device("meta"):
        module = cls(lambda **_: given.pop(), width, hidden)

    def forward(embeddings: Tensor, input_ids: Tensor, groups: Groups, weight: Tensor) -> Tensor:
        given.append(embeddings)
        images = [SimpleNamespace(insert_start_token=t, image_features=x) for t, x in groups]
        weights = {"align_projector.weight": weight}
        out: Tensor = torch.func.functional_call(module, weights, (input_ids, images))
        return out

    return forward


def bridge(hidden: int, width: int) -> list[Peer]:
    """Make a peer of Megatron-Bridge's own class; an empty list if that is not installed."""
    try:
        module = importlib.import_module(BRIDGE)
    except ModuleNotFoundError:
        return []
    peer = module_peer(module.ImageInsertEmbedding, hidden, width)
    return [Peer("Megatron-Bridge", "peer", peer)]


class Peer(NamedTuple):
    """One implementation of the whole insertion."""

    name: str
    kind: Kind
    function: Forward


def peers(hidden: int, width: int, impl: Impl, compile_backend: str | None) -> list[Peer]:
    """List all implementations of the whole insertion, ours first."""
    found = [
        Peer("step37", "ours", step37(impl, hidden, width)),
        Peer("stock", "stock", stock),
        Peer("masked_scatter", "peer", masked_scatter),
        Peer("index_copy", "peer", index_copy),
    ]
    functions = (masked_scatter, index_copy) if compile_backend else ()
    compiled = functools.partial(torch.compile, dynamic=False, backend=compile_backend)
    found += [Peer(f"torch.compile {f.__name__}", "peer", compiled(f)) for f in functions]
    return [*found, *bridge(hidden, width)]
