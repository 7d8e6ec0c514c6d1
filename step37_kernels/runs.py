"""Describes the features of a batch on the host: start tokens, numbers of features, rows of each.

There are two forms of the same numbers. :data:`Runs` is nested by group, for people.
:class:`FlatRuns` has four flat tuples, for operators and kernels, which take no nested ones.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

Runs = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""``(start_token, ((features, rows of each), …))`` of each insertion group. A *run* is ``(features,
rows of each)``, one for each feature tensor ``[N, L, C]``. So a batch has few runs, however many
images it holds."""


class FlatRuns(NamedTuple):
    """The numbers of :data:`Runs` in four flat tuples."""

    tokens: tuple[int, ...]
    """``[G]``: start token of each group."""
    group_sizes: tuple[int, ...]
    """``[G]``: features of each group."""
    features: tuple[int, ...]
    """The number of features of each run; the runs of all groups in order."""
    rows: tuple[int, ...]
    """The number of rows of each feature in each run."""

    @classmethod
    def of(cls, runs: Runs) -> FlatRuns:
        # Loops, which every forward runs: generators would take five times as long.
        tokens, group_sizes, features, rows = [], [], [], []
        for token, group in runs:
            size = 0
            for count, rows_each in group:
                size += count
                features.append(count)
                rows.append(rows_each)
            tokens.append(token)
            group_sizes.append(size)
        return cls(tuple(tokens), tuple(group_sizes), tuple(features), tuple(rows))

    @property
    def num_rows(self) -> int:
        """R, the rows of all features."""
        return sum(map(operator.mul, self.features, self.rows))

    @property
    def num_features(self) -> int:
        """N, the features of all groups."""
        return sum(self.group_sizes)


def to_runs(groups: Sequence[tuple[int, Sequence[int]]]) -> Runs:
    """Turn ``(start_token, rows of each feature)`` of each group into :data:`Runs`.

    Neighbouring features with equally many rows become one run.

    Raises:
        TypeError: a start token or row count is no integer.
        ValueError: a row count is negative.
    """
    result = []
    for token, row_counts in groups:
        group: list[tuple[int, int]] = []
        for count in map(operator.index, row_counts):
            if count < 0:
                raise ValueError(f"groups: row counts must not be negative, got {count}")
            if group and group[-1][1] == count:
                group[-1] = (group[-1][0] + 1, count)
            else:
                group.append((1, count))
        result.append((operator.index(token), tuple(group)))
    return tuple(result)
