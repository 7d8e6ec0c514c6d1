"""Subject ``host``: times the host's part of each call and counts its launches, without a GPU.

The launchers run as on an H100, with a driver that launches nothing (:mod:`bench.no_gpu`). So the
time is that of the host's part of a call, without the CUDA driver. That driver remains for the rest
of the process, and ``TRITON_INTERPRET`` must not be set. Tensors are narrow, so that PyTorch's own
computations on the host take no time.
"""

from __future__ import annotations

import functools
import statistics
import timeit
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import Settings, where
from bench.no_gpu import NoDriver
from bench.report import Column, Table
from step37_kernels import plan_insert, project_and_insert
from step37_kernels.ops import tiles

HIDDEN, WIDTH, ROWS = 64, 64, 169
START = 7
CALLS = 200
H100 = 90


def operations() -> dict[str, Callable[[], object]]:
    """Make the calls to time, by name."""
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
        # No gradients of weight and features: the library would multiply on the host.
        "project and insert, and backward to the embeddings": lambda: torch.autograd.grad(
            insert(features), words, gradient
        ),
    }


def median_us(call: Callable[[], object], rounds: int) -> float:
    """Time a call: the median over rounds, in µs."""
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=rounds + 1)[1:]) / CALLS * 1e6


def measure(rounds: int) -> Iterator[tuple[str, int, float]]:
    """Yield for each operation its name, and launches and host µs of a call."""
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


def run(settings: Settings) -> Iterator[Table]:
    """Yield one table: launches and host µs of every operation."""
    yield Table(
        text=where(torch.device("cpu")),
        columns=(Column("operation"), Column("launches"), Column("µs of the host", "{:.0f}")),
        lines=measure(settings.options["rounds"]),
    )
