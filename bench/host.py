"""What an operation costs the host: Python time and launches, with nothing launched.

``python -m bench.host`` needs no GPU and uses none. The launchers run as they would on an H100, on
a driver that launches nothing (:mod:`bench.no_gpu`), with small tensors in host memory: what is
timed is the host's part of a call, without the driver's own. Below a few hundred rows it decides
how long a forward pass takes. Tensors are one picture's 169 rows, but narrow, so that what PyTorch
computes on the host meanwhile (a zero gradient, say) costs next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from bench.harness import environment
from bench.no_gpu import NoDriver
from step37_kernels import insert, plan_insert
from step37_kernels import project_and_insert as project
from step37_kernels.ops import tiles

HIDDEN, WIDTH, IMAGES, ROWS = 64, 128, 1, 169
START = 7
CALLS = 200
H100 = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCost:
    """One operation: launches, and µs of the host per call (median over rounds)."""

    operation: str
    launches: int
    host_us: float


def _operations() -> dict[str, Callable[[], object]]:
    input_ids = torch.zeros(1, 1 + IMAGES * (ROWS + 1), dtype=torch.int64)
    input_ids[0, : -1 : ROWS + 1] = START
    groups = [(START, [ROWS] * IMAGES)]
    words = torch.zeros(input_ids.shape[1], 1, HIDDEN, dtype=torch.bfloat16)
    features = torch.zeros(IMAGES, ROWS, WIDTH, dtype=torch.bfloat16)
    view = torch.zeros(IMAGES, WIDTH, ROWS, dtype=torch.bfloat16).transpose(1, 2)
    weight = torch.zeros(HIDDEN, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    plan = plan_insert(input_ids, groups)
    gradient = torch.zeros_like(words)

    def forward_and_backward() -> None:
        weight.grad = None
        project(words, features, weight, None, plan).backward(gradient)

    return {
        "plan": lambda: plan_insert(input_ids, groups),
        "project and insert": lambda: project(words, features, weight, None, plan),
        "project and insert, channels-first": lambda: project(words, view, weight, None, plan),
        "project and insert, and backward to the weight": forward_and_backward,
    }


def _median_us(call: Callable[[], object], rounds: int) -> float:
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(times)


def measure(rounds: int) -> list[HostCost]:
    """All operations. Makes :class:`bench.no_gpu.NoDriver` this process's driver, for good."""
    launches = [0]

    def count(*_: object) -> None:
        launches[0] += 1

    NoDriver("sm_90", count).install()
    insert.use_triton = lambda *_: True
    tiles._capability = lambda _: H100  # type: ignore[assignment]
    costs = []
    for name, call in _operations().items():
        call()
        launches[0] = 0
        call()
        number = launches[0]
        host_us = _median_us(call, rounds)
        costs.append(HostCost(operation=name, launches=number, host_us=host_us))
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("bench.host: unset TRITON_INTERPRET; interpreted kernels are not launched")
        return 1
    where = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in where.items() if value))
    print("\n| operation | launches | µs of the host |")
    print("|---|---|---|")
    for cost in measure(options.rounds):
        print(f"| {cost.operation} | {cost.launches} | {cost.host_us:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
