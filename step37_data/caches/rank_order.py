"""One rank fills a cache, the others wait, and a failure of one is the failure of all."""

from __future__ import annotations

import builtins
import socket
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

_WAIT = timedelta(hours=12)


def fill_cache_once(fill: Callable[[], None], is_filled: Callable[[], bool], *, what: str) -> None:
    """Run ``fill`` on as few ranks as possible; return when every rank can read the result.

    Global rank 0 fills first. Ranks that still miss something (a cache on a node's own disk) then
    fill it one per node. Outside a process group this is ``fill()``.

    The ranks meet in a gloo group of their own: waiting takes no GPU, may last hours where the
    default group's watchdog would give up after minutes, and ends at once when a process dies.

    Args:
        fill: brings the cache up to date; leaves alone what is there.
        is_filled: whether this rank finds everything in its cache.
        what: names the work in error messages.

    Raises:
        Exception: what ``fill`` or ``is_filled`` raised. Where it failed on another rank: the same
            built-in type, or ``RuntimeError`` for any other type, with the rank and the message.
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
    """The lowest rank of every node where some rank misses something."""
    filled = False

    def look() -> None:
        nonlocal filled
        filled = is_filled()

    _run_and_agree(look, group, what)
    lowest: dict[str, int] = {}
    for rank, (node, complete) in enumerate(_gather((socket.gethostname(), filled), group, what)):
        if not complete:
            lowest.setdefault(node, rank)
    return set(lowest.values())


def _run_and_agree(work: Callable[[], None] | None, group: dist.ProcessGroup, what: str) -> None:
    """Run ``work`` where there is some; raise on every rank if it raised on any."""
    error: Exception | None = None
    if work is not None:
        try:
            work()
        except Exception as caught:  # raised again below, after the other ranks know of it
            error = caught
    report = None if error is None else (type(error).__name__, str(error))
    reports = _gather(report, group, what)
    if error is not None:
        raise error
    for rank, failure in enumerate(reports):
        if failure is not None:
            name, message = failure
            raise _rebuilt(name, f"{what} failed on rank {rank}: {message}")


def _rebuilt(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (OSError, ValueError, RuntimeError)):
        # A UnicodeError needs five arguments; its base says the same.
        return ValueError(message) if issubclass(kind, UnicodeError) else kind(message)
    return RuntimeError(f"{message} ({name})")


def _gather(value: object, group: dist.ProcessGroup, what: str) -> list:
    values: list = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise RuntimeError(f"{what}: another rank stopped before it was done ({error})") from error
    return values
