"""What an operation costs the host: Python time and launches, with nothing launched.

``python -m bench host`` needs no GPU. The launchers run as they would on an H100, on a driver that
launches nothing (:mod:`bench.no_gpu`): what is timed is the host's part of a call, without the
driver's own. Tensors are narrow, so that what PyTorch computes on the host meanwhile costs nothing.
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

HIDDEN, WIDTH, ROWS = 64, 64, 169
START = 7
CALLS = 200
H100 = 90


def operations() -> dict[str, Callable[[], object]]:
    zeros = functools.partial(torch.zeros, dtype=torch.bfloat16)
    input_ids = torch.tensor([[START] + [0] * (ROWS + 1)])
    words, gradient = zeros(ROWS + 2, 1, HIDDEN), zeros(ROWS + 2, 1, HIDDEN)
    features, view = zeros(1, ROWS, WIDTH), zeros(1, WIDTH, ROWS).transpose(1, 2)
    weight = zeros(HIDDEN, WIDTH)
    make_plan = functools.partial(plan_insert, input_ids, [(START, [ROWS])], impl="triton")
    plan = make_plan()
    words.requires_grad_()

    def insert(features: Tensor) -> Tensor:
        return project_and_insert(words, features, weight, None, plan, impl="triton")

    return {
        "plan": make_plan,
        "project and insert": lambda: insert(features),
        "project and insert, channels-first": lambda: insert(view),
        # To the weight and the features, the library would multiply on the host.
        "project and insert, and backward to the embeddings": lambda: torch.autograd.grad(
            insert(features), words, gradient
        ),
    }


def median_us(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=rounds + 1)[1:]) / CALLS * 1e6


def measure(rounds: int) -> Iterator[tuple[str, int, float]]:
    """Name, launches and µs of the host a call (median over rounds) of all operations."""
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
        print("bench.subjects.host: unset TRITON_INTERPRET; interpreted kernels are not launched")
        return 1
    where = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in where.items() if value))
    print("\n| operation | launches | µs of the host |\n|---|---|---|")
    for name, launches, us in measure(options.rounds):
        print(f"| {name} | {launches} | {us:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
