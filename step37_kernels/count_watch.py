"""Warns when start tokens and image features differ in number, without waiting for the device."""

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
    """Compares numbers that are on their way from the device."""

    def __init__(self) -> None:
        self._pending: deque[tuple[FlatRuns, Tensor, torch.cuda.Event]]
        self._pending = deque()
        # Between looking at the oldest and taking it, another thread's forward may have taken it.
        self._polling = threading.Lock()

    def watch(self, runs: FlatRuns, start_counts: Tensor) -> None:
        """Warn now (CPU), or queue a copy of the counts that a later :meth:`poll` reads (CUDA).

        Args:
            runs: of all groups of the plan.
            start_counts: ``[G]`` int32 on the device.
        """
        if start_counts.is_meta or isinstance(start_counts, FakeTensor):
            # Shapes without values: there is nothing to count.
            return
        if not start_counts.is_cuda:
            self._warn(runs, start_counts)
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(start_counts.shape, dtype=torch.int32, device="cpu", pin_memory=True)
            host.copy_(start_counts, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(start_counts.device))
            self._pending.append((runs, host, copied))

    def poll(self) -> None:
        """Warn about the plans whose counts have arrived."""
        if torch.compiler.is_compiling():
            return
        if self._pending and torch.cuda.is_current_stream_capturing():
            return
        arrived = []
        with self._polling:
            while self._pending and self._pending[0][2].query():
                arrived.append(self._pending.popleft())
        for runs, host, _ in arrived:
            self._warn(runs, host)

    @staticmethod
    def _warn(runs: FlatRuns, start_counts: Tensor) -> None:
        counts = zip(runs.tokens, runs.group_sizes, start_counts.tolist(), strict=True)
        for token, features, count in counts:
            if count == features:
                continue
            mismatch = _mismatch(token, features, count)
            if count == 0:
                # Every picture of the group is left out: a wrong id rather than a cut sample.
                logger.error(
                    "image features and start tokens differ in number: %s. There is none of them: "
                    "is %d the tokenizer's <im_start>? strict=True raises an error at once",
                    mismatch,
                    token,
                )
            else:
                logger.warning("image features and start tokens differ in number: %s", mismatch)


count_watch = CountWatch()
"""Of the process, not of a module: a module with events in it could not be copied or pickled."""
