"""Finds which rows of the sequence a rank holds under sequence and context parallelism.

Both are described by the positions, in the whole sequence, of the rows that this rank holds. Every
rank makes the plan for the whole sequence; :meth:`InsertPlan.shard` keeps the rows that land on
this rank, so each rank projects only rows of its own shard.

This module uses ``torch.distributed``. Only :func:`sequence_layout` and :func:`auto_layout` import
Megatron, to read its process groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


class _Slice(torch.autograd.Function):
    """Takes this rank's ``[S / n, B, H]`` of a tensor that all ranks hold; backward gathers all."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.tensor_split(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        whole = gradient.new_empty(size * gradient.shape[0], *gradient.shape[1:])
        dist.all_gather_into_tensor(whole, gradient.contiguous(), group=ctx.group)
        return whole, None


class _SumGradient(torch.autograd.Function):
    """Returns its input; backward sums the gradient over the group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy, since autograd owns grad_output.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def context_parallel_positions(
    seq_len: int,
    size: int,
    rank: int,
    cu_seqlens: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """The positions that a context-parallel rank holds, divided as Megatron divides them.

    A sequence is cut into ``2 · size`` equal chunks, and rank r holds chunks r and
    ``2 · size − 1 − r``. Packed sequences (``thd``) are each cut by themselves.

    Args:
        seq_len: S of the whole sequence.
        size, rank: of the context-parallel group.
        cu_seqlens: ``[n + 1]`` bounds of the packed sequences, from 0 to S; each length a multiple
            of ``2 · size``. The host does not read them. None: one sequence.
        device: of the result if ``cu_seqlens`` is None.

    Returns:
        int64 ``[S / size]``, rising within each chunk.

    Raises:
        ValueError: S is no multiple of ``2 · size``, or the rank is not in the group.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank: expected 0 to {size - 1}, got {rank}")
    if seq_len % (2 * size):
        raise ValueError(f"seq_len: expected a multiple of {2 * size}, got {seq_len}")
    if cu_seqlens is None:
        half = seq_len // (2 * size)
        first = torch.arange(half, device=device)
        return torch.cat([first + rank * half, first + (2 * size - 1 - rank) * half])
    bounds = cu_seqlens.long()
    # Each packed sequence gives this rank 1 / size of its rows, in order.
    row = torch.arange(seq_len // size, device=bounds.device)
    sequence = torch.bucketize(row, bounds[1:] // size, right=True)
    start = bounds[:-1].index_select(0, sequence)
    chunk = (bounds.diff() // (2 * size)).index_select(0, sequence)
    inside = row - start // size
    second = inside >= chunk
    offset = torch.where(second, (2 * size - 2 - rank) * chunk, rank * chunk)
    return start + offset + inside


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """Describes how the sequence is divided among ranks.

    With a context-parallel group, only the ids of this rank's positions are looked up. With a
    sequence-parallel group (Megatron's tensor-parallel ranks), the looked-up rows are divided again
    among its ranks, unless the embedding has done so already. The gradient of the features is then
    summed over the group, so that it is complete on each rank, and the projector's parameters are
    marked ``sequence_parallel = True``, so that Megatron sums their gradients. Over a
    context-parallel group Megatron reduces all gradients itself, together with data parallelism.

    Attributes:
        sequence_parallel_group: ranks that share the rows looked up, or None.
        context_parallel_group: ranks that share the sequence, or None.
        cu_seqlens: bounds of packed sequences for the context-parallel cut, or None.
    """

    sequence_parallel_group: dist.ProcessGroup | None = None
    context_parallel_group: dist.ProcessGroup | None = None
    cu_seqlens: Tensor | None = None

    def positions_looked_up(self, seq_len: int, device: torch.device) -> Tensor | None:
        """The positions whose ids this rank looks up; None if it looks up all."""
        group = self.context_parallel_group
        if group is None or dist.get_world_size(group) == 1:
            return None
        return context_parallel_positions(
            seq_len,
            dist.get_world_size(group),
            dist.get_rank(group),
            self.cu_seqlens,
            device=device,
        )

    def shard(
        self, embeddings: Tensor, seq_len: int, looked_up: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's rows, and their positions in the whole sequence.

        Args:
            embeddings: returned by the language embedding: ``[S', B, H]`` for the S' positions
                looked up, or this rank's sequence-parallel part of them.
            seq_len: S.
            looked_up: from :meth:`positions_looked_up`.

        Raises:
            ValueError: S' cannot be divided among the ranks, or the embeddings have neither of the
                two lengths.
        """
        if looked_up is None:
            looked_up = torch.arange(seq_len, device=embeddings.device)
        group = self.sequence_parallel_group
        if group is None or not self.divides_rows():
            return embeddings, looked_up
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = looked_up.shape[0]
        if rows % size:
            raise ValueError(
                f"input_ids: {rows} rows cannot be divided among {size} sequence-parallel ranks"
            )
        if embeddings.shape[0] == rows:
            embeddings = _Slice.apply(embeddings, group)
        if embeddings.shape[0] != rows // size:
            raise ValueError(
                f"embeddings: expected {rows} rows or {rows // size}, got {embeddings.shape[0]}"
            )
        return embeddings, looked_up.tensor_split(size)[rank]

    def divides_rows(self) -> bool:
        """Whether looked-up rows are divided among sequence-parallel ranks."""
        group = self.sequence_parallel_group
        return group is not None and dist.get_world_size(group) > 1

    def description(self) -> str:
        """Among how many ranks the sequence is divided, and how."""
        groups = {
            "sequence-parallel": self.sequence_parallel_group,
            "context-parallel": self.context_parallel_group,
        }
        return "among " + " and ".join(
            f"{dist.get_world_size(group)} {kind} ranks"
            for kind, group in groups.items()
            if group is not None
        )

    def complete_gradient(self, features: Tensor) -> Tensor:
        """The features, with a gradient that is summed over the sequence-parallel ranks."""
        if not (self.divides_rows() and features.requires_grad):
            return features
        result: Tensor = _SumGradient.apply(features, self.sequence_parallel_group)
        return result


LayoutRule = Callable[[Any], SequenceLayout | None]
"""A function that returns this rank's layout; called in every forward, with the embedding."""

Layout = SequenceLayout | LayoutRule | Literal["auto"] | None
"""Which rows of the sequence a rank holds: all (None), a layout, or a rule that returns one of
these; ``"auto"`` is the rule :func:`auto_layout`."""


def check_layout(layout: Layout) -> None:
    """Raise ``ValueError`` unless it is a :data:`Layout`."""
    known = layout is None or layout == "auto" or isinstance(layout, SequenceLayout)
    if not (known or callable(layout)):
        raise ValueError(f"layout: expected 'auto', sequence_layout(...) or None, got {layout!r}")


def sequence_layout(
    *,
    sequence_parallel: bool = False,
    cu_seqlens: Tensor | None = None,
    pg_collection: Any = None,
) -> SequenceLayout | None:
    """Make the layout of this rank from Megatron's process groups.

    Args:
        sequence_parallel: ``config.sequence_parallel``.
        cu_seqlens: bounds of packed sequences, which context parallelism cuts one by one.
        pg_collection: Megatron's ``ProcessGroupCollection`` that the model was built with. Its
            ``cp`` is read, and with ``sequence_parallel`` its ``tp``. If None, the groups of
            Megatron's global ``parallel_state`` are read, which must be initialised.

    Returns:
        None where every rank holds the whole sequence.

    Raises:
        ValueError: a group that is read is not set in ``pg_collection``.
    """
    tensor_group = None
    if pg_collection is not None:
        context_group = _group_of(pg_collection, "cp")
        if sequence_parallel:
            tensor_group = _group_of(pg_collection, "tp")
    else:
        from megatron.core import parallel_state

        context_group = parallel_state.get_context_parallel_group()
        if sequence_parallel:
            tensor_group = parallel_state.get_tensor_model_parallel_group()
    if not (_has_several_ranks(tensor_group) or _has_several_ranks(context_group)):
        return None
    return SequenceLayout(
        sequence_parallel_group=tensor_group if _has_several_ranks(tensor_group) else None,
        context_parallel_group=context_group if _has_several_ranks(context_group) else None,
        cu_seqlens=cu_seqlens,
    )


def _group_of(pg_collection: Any, name: str) -> dist.ProcessGroup:
    group: dist.ProcessGroup | None = getattr(pg_collection, name, None)
    if group is None:
        kind = {"cp": "context", "tp": "tensor"}[name]
        raise ValueError(
            f"pg_collection: {name} is not set; it is the group of {kind}-parallel ranks, "
            "of this rank alone where there are no others"
        )
    return group


def _has_several_ranks(group: dist.ProcessGroup | None) -> bool:
    return group is not None and group.size() > 1


def auto_layout(language_embedding: Any) -> SequenceLayout | None:
    """Find the layout of this rank under sequence parallelism; this is ``layout="auto"``.

    It is called in every forward, because a model may be built before Megatron's groups exist.

    Args:
        language_embedding: Megatron-Core's ``LanguageModelEmbedding``, or any other. Its
            ``config.sequence_parallel`` decides whether rows are divided, its tensor-parallel group
            (Megatron's default one if it has none) which rows are this rank's. It may scatter its
            rows itself; they are divided only once.

    Returns:
        None if every rank holds the whole sequence: without sequence parallelism, and if
        Megatron-Core has not been imported. Also None for an embedding without ``config`` if
        Megatron's groups are not initialised or have one rank each.

    Raises:
        ValueError: under context parallelism, because it cannot be found out whether ``input_ids``
            are whole and how packed sequences are cut; or if the embedding has no ``config`` and
            several ranks share the model.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    tensor_ranks = context_ranks = 1
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        context_ranks = parallel_state.get_context_parallel_world_size()
    config = getattr(language_embedding, "config", None)
    if config is None:
        if tensor_ranks == context_ranks == 1:
            return None
        raise ValueError(
            "layout: 'auto' reads language_embedding.config, which "
            f"{type(language_embedding).__name__} has not; pass layout=sequence_layout(...), or "
            "layout=None where every rank holds the whole sequence"
        )
    context_ranks = max(context_ranks, getattr(config, "context_parallel_size", 1))
    if context_ranks > 1:
        raise ValueError(
            f"layout: 'auto' cannot tell how {context_ranks} context-parallel ranks share the "
            "sequence; give every rank the whole input_ids and pass "
            "layout=sequence_layout(sequence_parallel=..., cu_seqlens=...) to have each embed its "
            "own positions, or layout=None to have each embed all"
        )
    if parallel_state is None or not getattr(config, "sequence_parallel", False):
        return None
    group = getattr(language_embedding, "tp_group", None)
    if group is None:
        group = parallel_state.get_tensor_model_parallel_group()
    return SequenceLayout(sequence_parallel_group=group) if _has_several_ranks(group) else None
