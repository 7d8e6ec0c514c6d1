"""Threads that no one waits for at the end of the interpreter: one of them may be stuck."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from step37_data.common.checks import checked_int

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Work = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
"""What a thread is to do, one after the other, and where the results go; None ends it."""


def start_thread(work: Work, name: str) -> threading.Thread:
    """A daemon that works off ``work``: the interpreter joins all other threads when it ends."""
    thread = threading.Thread(target=_work_off, args=(work,), name=name, daemon=True)
    thread.start()
    return thread


def _work_off(work: Work) -> None:
    while (item := work.get()) is not None:
        future, make = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)
        del item, future, make  # They hold what may be forgotten before the next item comes.


def available_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Decoding threads if nobody says how many: the cores this process may use, at most 8."""
    return min(8, available_cores())


def map_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None
) -> list[_Result]:
    """``map(function, items)`` on ``threads`` threads, in order; the first error is raised.

    ``threads=1`` runs in the calling thread.
    """
    count = default_threads() if threads is None else checked_int("threads", threads)
    if count == 1:
        return list(map(function, items))
    work: Work = queue.SimpleQueue()
    futures: list[Future[_Result]] = []
    for item in items:
        futures.append(Future())
        work.put((futures[-1], functools.partial(function, item)))
    for _ in range(min(count, len(futures))):
        work.put(None)
        start_thread(work, "step37-decode")
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
