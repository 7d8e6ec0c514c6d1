"""Compile tiles in several processes at once, before they are timed.

One process would compile for minutes, and a tile at which the compiler aborts would end it. The
processes need no GPU: they launch nowhere (:mod:`bench.no_gpu`), and leave what they compile in
Triton's cache on disk, where the process that times finds it.

``python -m bench.tune.compile_pool 90`` is one of them: a request a line in, an answer a line out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from bench.harness import DTYPES, dtype_name
from bench.no_gpu import NoDriver, compiled
from bench.resources import usage
from bench.tune.products import ROWS, Operands, launch
from step37_kernels.ops import project, project_backward
from step37_kernels.ops.tiles import Product, Tile

READY = "ready"
KERNELS = {
    "forward": project.project_scatter_kernel,
    "grad_features": project_backward.grad_features_kernel,
    "grad_weight": project_backward.grad_weight_kernel,
    "accumulate_weight": project_backward.grad_weight_kernel,
}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    """A thread."""
    stack: int
    """Bytes a thread: registers that were spilled."""
    shared: int
    """Bytes a block."""


def request(product: Product, tile: Tile, dtype: torch.dtype) -> str:
    """What is to be compiled; equal for equal tiles."""
    return json.dumps({"product": product, "dtype": dtype_name(dtype), "tile": asdict(tile)})


def _compile(line: str) -> Usage:
    wanted = json.loads(line)
    dtype = DTYPES[wanted["dtype"]]
    product: Product = wanted["product"]
    operands = Operands.blank(product, dtype)
    destinations = torch.empty(ROWS, dtype=torch.int32)
    launch(product, Tile(**wanted["tile"]), operands, destinations)
    binary = compiled(KERNELS[product])[-1]
    return Usage(*usage(binary.asm["cubin"]), shared=binary.metadata.shared)


def serve(capability: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    NoDriver(f"sm_{capability}").install()
    print(READY, file=answers)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = asdict(_compile(line))
        except (TritonError, RuntimeError) as error:
            text = str(error).strip().splitlines() or [""]
            answer = {"error": f"does not compile: {type(error).__name__}: {text[-1]}"}
        print(json.dumps(answer), file=answers)


class _Worker:
    """A process that compiles; ends with the ``with`` statement that it is the context of."""

    def __init__(self, capability: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (__exit__ closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.tune.compile_pool", str(capability)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request that nobody read
            self._requests.close()
        self._answers.close()
        self._errors.close()

    def kill(self) -> None:
        self._process.kill()

    def is_ready(self) -> bool:
        """Wait until it answers; False if it ended instead."""
        return self._answers.readline().strip() == READY

    def errors(self) -> str:
        """The end of what it wrote to its standard error."""
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def ask(self, line: str) -> Usage | str | None:
        """What a request takes, or why it does not compile; None if the process is gone."""
        try:
            self._requests.write(line + "\n")
            self._requests.flush()
        except BrokenPipeError:
            return None
        answer = json.loads(self._answers.readline() or "null")
        if answer is None:
            return None
        return answer["error"] if "error" in answer else Usage(**answer)


def compile_all(
    requests: Sequence[str], capability: int, deadline: float, workers: int
) -> dict[str, Usage | str]:
    """What each request takes, or why it does not compile.

    Args:
        requests: as :func:`request` makes them.
        capability: of the GPU; 90 is Hopper's.
        deadline: ``time.perf_counter()`` at which those without an answer are given up.
        workers: processes.

    Raises:
        RuntimeError: a process does not start.
    """
    waiting = deque(requests)
    results: dict[str, Usage | str] = {}
    running: list[_Worker] = []
    over = threading.Event()

    def work() -> None:
        while waiting and not over.is_set():
            with _Worker(capability) as worker:
                running.append(worker)
                if not worker.is_ready():
                    if over.is_set():
                        return
                    raise RuntimeError(f"bench.tune.compile_pool does not start: {worker.errors()}")
                for line in _take(waiting):
                    answer = worker.ask(line)
                    if answer is not None:
                        results[line] = answer
                    elif not over.is_set():
                        results[line] = "the compiler ended the process"
                    if answer is None:
                        break

    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(work) for _ in range(min(workers, len(requests)))]
        try:
            wait(futures, max(deadline - time.perf_counter(), 0), FIRST_EXCEPTION)
        finally:
            over.set()
            waiting.clear()
            for worker in running.copy():
                worker.kill()
    for future in futures:
        future.result()
    return results


def _take(waiting: deque[str]) -> Iterator[str]:
    """Whatever is still there, one at a time."""
    with contextlib.suppress(IndexError):
        while True:
            yield waiting.popleft()


if __name__ == "__main__":
    serve(sys.argv[1])
