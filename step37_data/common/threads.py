"""Runs functions in threads that the interpreter does not wait for when it ends.

A thread may be stuck in a file or a connection, and must not keep the process alive.
"""

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
"""The queue of a thread: functions, each with the future for its result; None ends the thread."""


def start_thread(work: Work, name: str) -> threading.Thread:
    """Start a daemon thread that runs the functions in ``work`` one after the other."""
    thread = threading.Thread(target=_work_off, args=(work,), name=name, daemon=True)
    thread.start()
    return thread


def _work_off(work: Work) -> None:
    while (item := work.get()) is not None:
        future, make = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(make())
            except BaseException as error:  # raised again when the result is read
                future.set_exception(error)
        del item, future, make  # they would keep its data alive until the next item comes


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Count the threads that decode by default: as many as cores, at most 8."""
    return min(8, available_cores())


def map_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None
) -> list[_Result]:
    """Return ``list(map(function, items))``, computed by ``threads`` threads.

    The calling thread is one of them. The first error is raised.
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
