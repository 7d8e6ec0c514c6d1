"""Computes where every feature row goes in the sequence.

:func:`plan_insert` (rows after start tokens) and :func:`plan_placeholders` (rows at placeholders)
make an :class:`InsertPlan`.

Shape letters: ``S`` sequence, ``B`` batch, ``R`` feature rows of all groups together, ``L`` rows of
one feature, ``G`` groups, ``N`` features.

No loop here is over images: see :data:`step37_kernels.runs.Runs`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels import operators
from step37_kernels.count_watch import count_mismatches
from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.ranges import profiled
from step37_kernels.runs import FlatRuns, Runs, to_runs

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertPlan:
    """Says where each feature row goes, and which feature row each position receives.

    Feature rows of all groups are numbered 0 … R−1 in the order in which they are written: groups
    in list order, features in group order, rows from first to last. Positions are numbered in the
    memory order of the output: ``s * B + b`` for ``[S, B, H]``, and ``b * S + s`` for
    ``[B, S, H]`` (``batch_first``).

    Example, B = 1, S = 8, one group with start token 7 and features of 3, 2 and 4 rows::

        position     0   1   2   3   4   5   6   7
        input_ids    5   7   5   7   5   5   7   5      starts: 2, 4, 7
        feature 0            0   1   2                  rows 0-2 → positions 2, 3, 4
        feature 1                    3   4              rows 3-4 → positions 4, 5; row 2 loses 4
        feature 2                                5      rows 5-8 → position 7; rows 6-8 cut off
        row_at      −1  −1   0   1   3   4  −1   5

        destinations = [2, 3, −1, 4, 5, 7, −1, −1, −1]

    A row is dropped (−1) if its position is beyond the end of its sequence, if a later row goes to
    the same position, or if there is no start token left for its feature.
    """

    destinations: Tensor
    """``[R]`` int32: position of each feature row, or −1. No position occurs twice."""
    row_at: Tensor
    """``[S, B]`` int32 (``[B, S]`` if ``batch_first``): the feature row that a position receives,
    or −1 for a text row: the entry of ``destinations`` that holds the position."""
    starts: Tensor
    """``[N]`` int32: ``s * B + b`` of each feature's first row, whatever ``batch_first`` is; −1 for
    a feature without a start token. ``s`` equals S where no row fits."""
    counts: Tensor
    """``[G + 1]`` int32: :attr:`start_counts`, then :attr:`unknown_ids`."""
    runs: Runs
    """``(start_token, ((features, rows of each), …))`` of each group; known on the host."""
    flat_runs: FlatRuns
    """The same numbers in flat tuples."""
    local_rows: Tensor | None = None
    """Only in a plan from :meth:`shard`: ``[M]`` int32, the feature row that each entry of
    ``destinations`` (then ``[M]``) belongs to; −1 in unused entries. None in a whole plan."""
    live_rows: Tensor | None = None
    """Only in a plan from :meth:`shard`: ``[1]`` int32, how many entries of ``local_rows`` are in
    use. The kernels stop there, so a rank computes its own rows, not M."""
    batch_first: bool = False
    """Whether the plan is for ``[B, S, H]``."""
    vocabulary: int = 0
    """V, the rows of the table that text positions are looked up in; 0 if not given."""

    @property
    def start_counts(self) -> Tensor:
        """``[G]`` int32: start tokens of each group in ``input_ids``."""
        return self.counts[:-1]

    @property
    def unknown_ids(self) -> Tensor:
        """``[1]`` int32: text positions whose id is outside the table; 0 without a vocabulary."""
        return self.counts[-1:]

    @property
    def num_rows(self) -> int:
        """R, the rows of all features of all groups."""
        return self.flat_runs.num_rows

    @property
    def seq_len(self) -> int:
        """S."""
        return self.row_at.shape[self.batch_first]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.row_at.shape[not self.batch_first]

    def shard(self, positions: Tensor) -> InsertPlan:
        """Make the plan of a rank that holds only some positions of the sequence.

        The number of feature rows that land there is known on the device only. At most
        M = min(R, S_local · B) can, so the results have M entries and the host need not wait.

        Args:
            positions: ``[S_local]`` integers: for each local position, its position in the whole
                sequence; none occurs twice.

        Returns:
            A plan for ``[S_local, B, H]``: ``row_at``, ``destinations`` and ``local_rows`` are this
            rank's; ``starts`` and ``start_counts`` stay those of the whole sequence.

        Raises:
            ValueError: ``positions`` is not one-dimensional, or this plan is a shard already.
        """
        if positions.ndim != 1:
            raise ValueError(f"positions: expected [S_local], got {tuple(positions.shape)}")
        if self.local_rows is not None:
            raise ValueError("plan: already the plan of a shard")
        held = self.row_at.index_select(int(self.batch_first), positions)
        capacity = min(self.num_rows, held.numel())
        flat = held.flatten().long()
        # Number the rows that land here, in order; the others go to one slot past the end.
        lands = torch.zeros(self.num_rows + 1, dtype=torch.bool, device=flat.device)
        lands = lands.index_fill(0, torch.where(flat < 0, self.num_rows, flat), True)[:-1]
        slot_of_row = torch.where(lands, lands.cumsum(0) - 1, capacity)
        everyone = torch.arange(self.num_rows, dtype=torch.int32, device=flat.device)
        local_rows = everyone.new_full((capacity + 1,), -1).scatter(0, slot_of_row, everyone)[:-1]
        slot_of_row = torch.cat([slot_of_row, slot_of_row.new_full((1,), capacity)])
        slots = slot_of_row[flat]
        here = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
        destinations = here.new_full((capacity + 1,), -1).scatter(0, slots, here)[:-1]
        row_at = torch.where(slots == capacity, -1, slots).to(torch.int32).view_as(held)
        return dataclasses.replace(
            self,
            row_at=row_at,
            destinations=destinations,
            local_rows=local_rows,
            live_rows=lands.sum(dtype=torch.int32).view(1),
        )

    def check(self) -> None:
        """Raise if the batch has a fault that a correct batch never has. Waits for the device.

        Raises:
            ValueError: start tokens and features differ in number; a span is cut off at the end of
                its sequence; two spans overlap; ids at text positions are outside the table. The
                message names group, feature and position.
        """
        problems = count_mismatches(self.flat_runs, self.start_counts.tolist())
        if self.local_rows is not None:
            raise ValueError("plan: check the plan of the whole sequence, not that of a shard")
        starts = iter(self.starts.tolist())
        spans: dict[int, list[tuple[int, int, str]]] = {}
        for token, group in self.runs:
            for k, count in enumerate(rows for n, rows in group for _ in range(n)):
                position = next(starts)
                if position < 0:
                    continue
                start, batch = divmod(position, self.batch_size)
                end = start + count
                where = f"feature {k} of start token {token} (batch row {batch}, "
                where += f"positions {start} to {end - 1})"
                if end > self.seq_len:
                    problems.append(f"{where} is cut off at the sequence length {self.seq_len}")
                if count:
                    spans.setdefault(batch, []).append((start, end, where))
        for column in spans.values():
            column.sort()
            furthest = column[0]
            for span in column[1:]:
                if span[0] < furthest[1]:
                    problems.append(f"{span[2]} overlaps {furthest[2]}")
                furthest = max(furthest, span, key=lambda item: item[1])
        if unknown := self.unknown_ids.item():
            problems.append(
                f"{unknown} ids at text positions are outside the table of {self.vocabulary} rows"
            )
        if problems:
            raise ValueError("input_ids and image features do not fit: " + "; ".join(problems))


def plan_insert(
    input_ids: Tensor,
    groups: Sequence[tuple[int, Sequence[int]]],
    *,
    batch_first: bool = False,
    impl: Impl = "auto",
) -> InsertPlan:
    """Find where every feature row lands, for all insertion groups at once.

    The locations of a group are the positions right after its start token, in row-major (batch,
    then sequence) order; the k-th feature goes to the k-th location, up to the smaller of both
    counts. A span is cut at the end of its sequence, and where spans overlap the later one in
    (group, feature) order wins, row by row. See :class:`InsertPlan` for a worked example.

    The host does not wait for the device: row counts are known on the host, from tensor shapes, and
    what depends on the ids stays on the device.

    Args:
        input_ids: ``[B, S]`` int32 or int64 token ids, any strides.
        groups: ``(start_token, row_counts)`` of each insertion group, in insertion order;
            ``row_counts`` holds the number of rows of each of its features.
        batch_first: plan for ``[B, S, H]`` in place of ``[S, B, H]``.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The plan, on the device of ``input_ids``.

    Raises:
        ValueError: ``input_ids`` is not ``[B, S]``, a row count is negative, a start token is no
            value of the ids' dtype, B·S or R exceeds int32, or ``impl`` cannot run there.
        TypeError: ``input_ids`` is neither int32 nor int64, or a start token or row count is no
            integer.
    """
    try:
        runs = to_runs(groups)
    except TypeError as error:
        raise TypeError(f"groups: expected (int, sequence of int) of each: {error}") from error
    return plan_runs(input_ids, runs, batch_first=batch_first, impl=impl)


def plan_placeholders(
    input_ids: Tensor,
    token: int,
    num_rows: int,
    *,
    batch_first: bool = False,
    impl: Impl = "auto",
) -> InsertPlan:
    """Send the k-th feature row to the k-th position that holds ``token``, row-major.

    NeMo Automodel and many models of ``transformers`` merge this way
    (``embeddings[input_ids == token] = rows``, ``masked_scatter``): every row has its own
    placeholder. If there are too many rows, the last are dropped; placeholders without a row keep
    their word embedding. In the plan every row is a feature, and ``token`` is the start token of
    its only group::

        position     0   1   2   3   4   5
        input_ids    5   9   9   5   9   9      token 9, 3 rows
        row_at      −1   0   1  −1   2  −1
        destinations = [1, 2, 4]

    It takes one launch, as :func:`plan_insert` does; the host does not wait for the device.

    Args:
        input_ids: ``[B, S]`` int32 or int64 token ids, any strides.
        token: the placeholder's id.
        num_rows: R.
        batch_first: plan for ``[B, S, H]`` in place of ``[S, B, H]``.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The plan, on the device of ``input_ids``.

    Raises:
        ValueError: ``input_ids`` is not ``[B, S]``, ``num_rows`` is negative, ``token`` is no value
            of the ids' dtype, B·S or R exceeds int32, or ``impl`` cannot run there.
        TypeError: ``input_ids`` is neither int32 nor int64, or ``token`` or ``num_rows`` is no
            integer.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows: expected at least 0, got {num_rows}")
    runs = ((operator.index(token), ((operator.index(num_rows), 1),)),)
    return plan_runs(input_ids, runs, shift=0, batch_first=batch_first, impl=impl)


def plan_runs(
    input_ids: Tensor,
    runs: Runs,
    *,
    shift: int = 1,
    batch_first: bool = False,
    vocabulary: int = 0,
    impl: Impl = "auto",
    watch: bool = False,
) -> InsertPlan:
    """:func:`plan_insert` for features that come as tensors ``[N, L, C]``.

    Args:
        input_ids: ``[B, S]``.
        runs: ``(start_token, ((N, L), …))`` of each group: the shapes of its tensors.
        shift: positions from a token to its feature's first row: 1, or 0 of placeholders.
        batch_first, impl: as there.
        vocabulary: rows of the table that text positions are looked up in. Ids outside it are
            counted; with 0 none are.
        watch: warn, later, if start tokens and features differ in number or ids are unknown.
    """
    triton = use_triton(impl, input_ids.device)
    flat = FlatRuns.of(runs)
    _check_ids(input_ids, flat)
    with profiled("plan"):
        destinations, row_at, starts, counts = operators.plan(
            input_ids,
            flat.tokens,
            flat.group_sizes,
            flat.features,
            flat.rows,
            shift,
            batch_first,
            vocabulary,
            triton,
            watch,
        )
    return InsertPlan(
        destinations=destinations,
        row_at=row_at,
        starts=starts,
        counts=counts,
        runs=runs,
        flat_runs=flat,
        batch_first=batch_first,
        vocabulary=vocabulary,
    )


def _check_ids(input_ids: Tensor, runs: FlatRuns) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected [B, S], got {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids: expected int32 or int64, got {input_ids.dtype}")
    limit = 2 ** (8 * input_ids.itemsize - 1)
    for token in runs.tokens:
        if not -limit <= token < limit:
            raise ValueError(f"start token: expected a value of {input_ids.dtype}, got {token}")
    batch_size, seq_len = input_ids.shape
    num_rows = runs.num_rows
    if max(num_rows, (seq_len + 1) * batch_size) > _INT32_MAX:
        raise ValueError(
            f"input_ids, groups: at most {_INT32_MAX} positions and feature rows, "
            f"got {tuple(input_ids.shape)} ids and {num_rows} rows"
        )
