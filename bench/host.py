"""What an operation costs the host: Python time and launches, with nothing launched.

``python -m bench.host`` needs no GPU and uses none. The launchers run as they would on an H100, on
a driver that launches nothing (:mod:`bench.no_gpu`), with small tensors in host memory: what is
timed is the host's part of a call, without the driver's own. Below a few hundred rows it decides
how long a forward pass takes. Tensors are one picture's 169 rows, but narrow, so that what PyTorch
computes on the host meanwhile (a zero gradient, say) costs next to nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from bench.harness import environment
from bench.no_gpu import NoDriver
from step37_kernels import plan_insert, project_and_insert
from step37_kernels.ops import tiles

HIDDEN, WIDTH, IMAGES, ROWS = 64, 128, 1, 169
START = 7
CALLS = 200
H100 = 90


def operations() -> dict[str, Callable[[], object]]:
    input_ids = torch.zeros(1, 1 + IMAGES * (ROWS + 1), dtype=torch.int64)
    input_ids[0, : -1 : ROWS + 1] = START
    groups = [(START, [ROWS] * IMAGES)]
    words = torch.zeros(input_ids.shape[1], 1, HIDDEN, dtype=torch.bfloat16)
    features = torch.zeros(IMAGES, ROWS, WIDTH, dtype=torch.bfloat16)
    view = torch.zeros(IMAGES, WIDTH, ROWS, dtype=torch.bfloat16).transpose(1, 2)
    weight = torch.zeros(HIDDEN, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.zeros_like(words)
    make_plan = functools.partial(plan_insert, input_ids, groups, impl="triton")
    plan = make_plan()

    def insert(features: Tensor) -> Tensor:
        return project_and_insert(words, features, weight, None, plan, impl="triton")

    def forward_and_backward() -> None:
        weight.grad = None
        insert(features).backward(gradient)

    return {
        "plan": make_plan,
        "project and insert": lambda: insert(features),
        "project and insert, channels-first": lambda: insert(view),
        "project and insert, and backward to the weight": forward_and_backward,
    }


def median_us(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=rounds + 1)[1:]) / CALLS * 1e6


def measure(rounds: int) -> Iterator[tuple[str, int, float]]:
    """Name, launches and µs of the host a call (median over rounds) of all operations.

    Makes :class:`bench.no_gpu.NoDriver` this process's driver, for good.
    """
    launches = [0]

    def count(*_: object) -> None:
        launches[0] += 1

    NoDriver("sm_90", count).install()
    tiles._capability = lambda _: H100  # type: ignore[assignment]
    for name, call in operations().items():
        call()
        launches[0] = 0
        call()
        yield name, launches[0], median_us(call, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("bench.host: unset TRITON_INTERPRET; interpreted kernels are not launched")
        return 1
    where = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in where.items() if value))
    print("\n| operation | launches | µs of the host |\n|---|---|---|")
    for name, launches, us in measure(options.rounds):
        print(f"| {name} | {launches} | {us:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
