"""Warns when start tokens and image features differ in number, or ids are outside the table,
without waiting for the device."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from step37_kernels.runs import FlatRuns

logger = logging.getLogger(__name__)


def count_mismatches(runs: FlatRuns, start_counts: Sequence[int]) -> list[str]:
    """A sentence for each group whose start tokens and features differ in number.

    Args:
        runs: of all groups.
        start_counts: start tokens of each group in ``input_ids``, on the host.
    """
    return [
        _mismatch(token, features, count)
        for token, features, count in zip(runs.tokens, runs.group_sizes, start_counts, strict=True)
        if count != features
    ]


def _mismatch(token: int, features: int, count: int) -> str:
    return (
        f"start token {token}: {count} in input_ids, {features} features; "
        f"inserting {min(count, features)}"
    )


class CountWatch:
    """Compares counts of start tokens and features when they have arrived from the device."""

    def __init__(self) -> None:
        self._pending: deque[tuple[FlatRuns, Tensor, int, torch.cuda.Event]]
        self._pending = deque()
        # Two threads may run forwards: one could take the entry that the other has just looked at.
        self._polling = threading.Lock()

    def watch(self, runs: FlatRuns, counts: Tensor, vocabulary: int) -> None:
        """Warn now (CPU), or queue a copy of the counts that a later :meth:`poll` reads (CUDA).

        Args:
            runs: of all groups of the plan.
            counts: ``[G + 1]`` int32 on the device: start tokens of each group, then ids at text
                positions that are outside the table.
            vocabulary: rows of that table, for the message.
        """
        if counts.is_meta or isinstance(counts, FakeTensor):
            # Fake and meta tensors have no values to count.
            return
        if not counts.is_cuda:
            self._warn(runs, counts, vocabulary)
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(counts.shape, dtype=torch.int32, device="cpu", pin_memory=True)
            host.copy_(counts, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(counts.device))
            self._pending.append((runs, host, vocabulary, copied))

    def poll(self) -> None:
        """Warn about the plans whose counts have arrived."""
        if torch.compiler.is_compiling() or not self._pending:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        arrived = []
        with self._polling:
            while self._pending and self._pending[0][3].query():
                arrived.append(self._pending.popleft())
        for runs, host, vocabulary, _ in arrived:
            self._warn(runs, host, vocabulary)

    @staticmethod
    def _warn(runs: FlatRuns, counts: Tensor, vocabulary: int) -> None:
        *start_counts, unknown = counts.tolist()
        if unknown:
            logger.error(
                "%d ids at text positions are outside the table of %d rows, and give NaN: are "
                "they the tokenizer's? strict=True raises an error at once",
                unknown,
                vocabulary,
            )
        for token, features, count in zip(runs.tokens, runs.group_sizes, start_counts, strict=True):
            if count == features:
                continue
            mismatch = _mismatch(token, features, count)
            if count == 0:
                # Every picture of the group is left out: probably the token id is wrong.
                logger.error(
                    "image features and start tokens differ in number: %s. There is none of them: "
                    "is %d the tokenizer's <im_start>? strict=True raises an error at once",
                    mismatch,
                    token,
                )
            else:
                logger.warning("image features and start tokens differ in number: %s", mismatch)


count_watch = CountWatch()
"""The one watch of the process. CUDA events in a module could not be copied or pickled."""
