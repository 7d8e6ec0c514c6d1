"""Defines every operation of this package in plain PyTorch; tests compare the kernels with it.

It is written to be read, with plain loops, and it is slow. It imports no kernel, and autograd
differentiates it. The fused kernels must do what these functions do. The arithmetic of pixels is in
:mod:`step37_kernels.pixels.reference`.

Shape letters: ``S`` sequence, ``B`` batch, ``H`` hidden size, ``C`` encoder output width, ``R``
feature rows of all groups together, ``L`` rows of one feature, ``G`` groups, ``N`` features.

An *insertion group* is a start token and the features that go after its occurrences: for
Step-3.7-Flash ``<im_start>`` with 169 rows a picture, ``<patch_start>`` with 81 rows a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from step37_kernels.pixels.reference import clip_normalize, resize_clip_normalize

__all__ = [
    "Plan",
    "clip_normalize",
    "embed_project_and_insert",
    "feature_list",
    "image_insert_embedding",
    "insert_features",
    "insert_locations",
    "plan_insert",
    "plan_placeholders",
    "project",
    "project_and_insert",
    "resize_clip_normalize",
]

Features = Tensor | Sequence[Tensor]
"""``[N, L, C]``, or a sequence that mixes ``[L, C]`` and ``[N, L, C]`` (ragged)."""


def feature_list(features: Features) -> list[Tensor]:
    """Split the features of one group into one ``[L, C]`` tensor each, in insertion order."""
    if isinstance(features, Tensor):
        if features.ndim != 3:
            raise ValueError(f"features: expected [N, L, C], got {tuple(features.shape)}")
        return list(features.unbind(0))
    flat: list[Tensor] = []
    for item in features:
        if item.ndim == 2:
            flat.append(item)
        elif item.ndim == 3:
            flat.extend(item.unbind(0))
        else:
            raise ValueError(f"features: expected [L, C] or [N, L, C], got {tuple(item.shape)}")
    return flat


def insert_locations(input_ids: Tensor, start_token: int) -> list[tuple[int, int]]:
    """Find where the features of a group begin.

    Args:
        input_ids: ``[B, S]`` token ids.
        start_token: the group's start token.

    Returns:
        ``(batch, position)`` pairs in row-major order, the position one past the start token. It
        may equal ``S``: a start token in the last column has no row after it.
    """
    found = (input_ids == start_token).nonzero().tolist()
    return [(batch, position + 1) for batch, position in found]


def insert_features(
    embeddings: Tensor, features: Features, input_ids: Tensor, start_token: int
) -> Tensor:
    """Overwrite the rows after each start token by the features of one group.

    The k-th feature goes to the k-th location, up to the smaller of both counts, and is cut at the
    end of its sequence. Where spans overlap the later feature wins, row by row.

    Args:
        embeddings: ``[S, B, H]``, left as it is.
        features: rows of width ``H``, already projected; cast to the embeddings' dtype.
        input_ids: ``[B, S]``.
        start_token: the group's start token.

    Returns:
        ``[S, B, H]``.
    """
    locations = insert_locations(input_ids, start_token)
    rows = feature_list(features)
    if not locations or not rows:
        return embeddings
    fused = embeddings.clone()
    for (batch, start), feature in zip(locations, rows, strict=False):
        end = min(start + feature.shape[0], fused.shape[0])
        fused[start:end, batch] = feature[: end - start].to(fused)
    return fused


def project(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[..., C]`` → ``[..., H]``: ``features @ weightᵀ + bias`` in the weight's dtype."""
    return F.linear(features.to(weight), weight, bias)


def image_insert_embedding(
    embeddings: Tensor,
    input_ids: Tensor,
    groups: Sequence[tuple[int, Features]],
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Project and insert the features of all groups, one group after the other.

    Args:
        embeddings: ``[S, B, H]`` word embeddings.
        input_ids: ``[B, S]``.
        groups: ``(start_token, features)`` pairs; a later group overwrites an earlier one.
        weight: ``[H, C]`` projector weight.
        bias: ``[H]`` or None.

    Returns:
        ``[S, B, H]`` in the embeddings' dtype.
    """
    for start_token, features in groups:
        projected = [project(feature, weight, bias) for feature in feature_list(features)]
        embeddings = insert_features(embeddings, projected, input_ids, start_token)
    return embeddings


class Plan(NamedTuple):
    """Where every feature row goes: the tensors of a :class:`step37_kernels.InsertPlan`."""

    destinations: Tensor
    """``[R]`` int32: ``s * B + b`` of a row that survives, −1 of one cut off or overwritten."""
    row_at: Tensor
    """``[S, B]`` int32: the feature row that a position receives, −1 where the text row stays."""
    starts: Tensor
    """``[N]`` int32: ``s * B + b`` of each feature's first row, −1 for one without location."""
    start_counts: Tensor
    """``[G]`` int32: how many start tokens of each group ``input_ids`` holds."""


def plan_insert(input_ids: Tensor, groups: Sequence[tuple[int, Sequence[int]]]) -> Plan:
    """Find where every feature row lands, by writing the row numbers instead of the rows.

    Args:
        input_ids: ``[B, S]``.
        groups: ``(start_token, row_counts)`` pairs, in insertion order. The rows of all features
            of all groups are numbered 0 … R−1 in that order.
    """
    batch_size, seq_len = input_ids.shape
    row_at = torch.full((seq_len, batch_size), -1, dtype=torch.int32)
    starts: list[int] = []
    start_counts: list[int] = []
    num_rows = 0
    for start_token, row_counts in groups:
        locations = insert_locations(input_ids, start_token)
        start_counts.append(len(locations))
        for k, count in enumerate(row_counts):
            if k < len(locations):
                batch, start = locations[k]
                starts.append(start * batch_size + batch)
                for row in range(min(count, seq_len - start)):
                    row_at[start + row, batch] = num_rows + row
            else:
                starts.append(-1)
            num_rows += count
    destinations = torch.full((num_rows,), -1, dtype=torch.int32)
    for position, row in enumerate(row_at.flatten().tolist()):
        if row >= 0:
            destinations[row] = position
    return Plan(
        destinations,
        row_at,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(start_counts, dtype=torch.int32),
    )


def plan_placeholders(
    input_ids: Tensor, token: int, num_rows: int, *, batch_first: bool = False
) -> Plan:
    """Send the k-th row to the k-th position that holds ``token``, up to the smaller count.

    Args:
        input_ids: ``[B, S]``.
        token: the placeholder's id.
        num_rows: R.
        batch_first: number positions ``b * S + s``, and return ``row_at`` as ``[B, S]``.
    """
    batch_size, seq_len = input_ids.shape
    row_at = torch.full((batch_size, seq_len), -1, dtype=torch.int32)
    destinations, starts = [-1] * num_rows, [-1] * num_rows
    placeholders = (input_ids == token).nonzero().tolist()
    for row, (b, s) in zip(range(num_rows), placeholders, strict=False):
        row_at[b, s] = row
        starts[row] = s * batch_size + b
        destinations[row] = b * seq_len + s if batch_first else starts[row]
    return Plan(
        torch.tensor(destinations, dtype=torch.int32),
        row_at if batch_first else row_at.T.contiguous(),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([len(placeholders)], dtype=torch.int32),
    )


def project_and_insert(
    embeddings: Tensor,
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
) -> Tensor:
    """Project feature rows and put each at its destination, one row after the other.

    Args:
        embeddings: ``[S, B, H]``, or ``[B, S, H]`` of a batch-first plan; left as it is.
        features: the rows of all groups, ``R`` together: a tensor ``[..., C]`` or a sequence.
        weight: ``[H, C]``.
        bias: ``[H]`` or None.
        plan: from :func:`plan_insert` or :func:`plan_placeholders`.
    """
    tensors = [features] if isinstance(features, Tensor) else list(features)
    rows = [row for tensor in tensors for row in tensor.reshape(-1, tensor.shape[-1])]
    fused = embeddings.clone()
    for row, destination in zip(rows, plan.destinations.tolist(), strict=True):
        if destination >= 0:
            place = divmod(destination, embeddings.shape[1])
            fused[place] = project(row, weight, bias).to(fused)
    return fused


def embed_project_and_insert(
    input_ids: Tensor,
    table: Tensor,
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    batch_first: bool = False,
) -> Tensor:
    """Look up the words of text positions, then :func:`project_and_insert`.

    Args:
        input_ids: ``[B, S]``; under feature rows they may be anything.
        table: ``[V, H]``.
        features, weight, bias, plan: as in :func:`project_and_insert`.
        batch_first: the plan is of ``[B, S, H]``.
    """
    ids = input_ids if batch_first else input_ids.T
    no_text = torch.zeros_like(table[0])
    rows = [
        table[word] if row < 0 else no_text
        for word, row in zip(ids.flatten(), plan.row_at.flatten().tolist(), strict=True)
    ]
    embeddings = torch.stack(rows).view(*ids.shape, table.shape[1])
    return project_and_insert(embeddings, features, weight, bias, plan)
