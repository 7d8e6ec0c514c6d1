"""Lets one rank fill a cache while the others wait; if one fails, all raise its error."""

from __future__ import annotations

import builtins
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_WAIT = timedelta(hours=12)


def fill_cache_once(fill: Callable[[], None], is_filled: Callable[[], bool], *, what: str) -> None:
    """Run ``fill`` on as few ranks as possible; return when every rank can read the result.

    Global rank 0 fills first. If ranks then still miss something, because their node has a cache on
    its own disk, one rank of each such node fills it. Without a process group this is ``fill()``.

    The ranks wait in a separate gloo group. That needs no GPU, may last hours (the watchdog of the
    default group gives up after minutes), and ends at once if a process dies.

    Args:
        fill: completes the cache; does not change what it holds already.
        is_filled: says whether this rank finds everything in its cache.
        what: name of the work in error messages.

    Raises:
        Exception: the error of ``fill`` or ``is_filled``. If that failed on another rank, an error
            of the same built-in type, or else ``RuntimeError``, with that rank and its message.
        RuntimeError: a rank died, or a cache is still incomplete after it was filled.
    """
    if not (dist.is_available() and dist.is_initialized()):
        fill()
        return
    group = dist.new_group(backend="gloo", timeout=_WAIT)
    try:
        _run_and_agree(fill if dist.get_rank() == 0 else None, group, what)
        leaders = _ranks_to_fill(is_filled, group, what)
        if leaders:
            _run_and_agree(fill if dist.get_rank() in leaders else None, group, what)
            if still := _ranks_to_fill(is_filled, group, what):
                raise RuntimeError(f"{what}: still incomplete on ranks {sorted(still)}")
    finally:
        dist.destroy_process_group(group)


def _ranks_to_fill(is_filled: Callable[[], bool], group: dist.ProcessGroup, what: str) -> set[int]:
    """Find the lowest rank of every node on which a rank misses something."""
    lowest: dict[str, int] = {}
    looked = _run_and_agree(lambda: (socket.gethostname(), is_filled()), group, what)
    for rank, (node, complete) in enumerate(looked):
        if not complete:
            lowest.setdefault(node, rank)
    return set(lowest.values())


def _run_and_agree(work: Callable[[], Any] | None, group: dist.ProcessGroup, what: str) -> list:
    """Run ``work`` on the ranks that have some; raise on every rank if it failed on any.

    Returns:
        The result of each rank; None for ranks without work.
    """
    result = error = failure = None
    if work is not None:
        try:
            result = work()
        except Exception as caught:  # raised again below, when the other ranks have it too
            error, failure = caught, (type(caught).__name__, str(caught))
    outcomes: list = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(outcomes, (result, failure), group=group)
    except RuntimeError as lost:
        raise RuntimeError(f"{what}: another rank stopped before it was done ({lost})") from lost
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise _rebuilt(failure[0], f"{what} failed on rank {rank}: {failure[1]}")
    return [result for result, _ in outcomes]


def _rebuilt(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (OSError, ValueError, RuntimeError)):
        # UnicodeError takes five arguments, so its base class is raised.
        return ValueError(message) if issubclass(kind, UnicodeError) else kind(message)
    return RuntimeError(f"{message} ({name})")
