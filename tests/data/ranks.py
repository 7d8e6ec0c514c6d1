"""Several ranks of a process group: real processes that meet on loopback."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tests.fork_server import fork_server
from tests.limits import HANGS_AFTER_S


def in_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns or raises on each rank; None for one that died.

    ``work`` is a function of a module; what a test patches does not reach it.
    """
    context = fork_server()
    results = context.SimpleQueue()
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_rank, args=(rank, count, port.port, results, work, arguments))
        for rank in range(count)
    ]
    begin = time.monotonic()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=HANGS_AFTER_S - (time.monotonic() - begin))
    stuck = [process for process in ranks if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a rank was left waiting"
    outcomes: list[Any] = [None] * count
    while not results.empty():
        rank, outcome = results.get()
        outcomes[rank] = outcome
    return outcomes


def _rank(
    rank: int, count: int, port: int, results: Any, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=HANGS_AFTER_S / 2),
    )
    try:
        results.put((rank, work(rank, *arguments)))
    except Exception as error:
        results.put((rank, (type(error).__name__, str(error))))
