"""Subject ``host``: times the host's part of each call and counts its launches, without a GPU.

The launchers run as on an H100, with a driver that launches nothing (:mod:`bench.no_gpu`). So the
time is that of the host's part of a call, without the CUDA driver. That driver remains for the rest
of the process, and ``TRITON_INTERPRET`` must not be set. Tensors are narrow, so that PyTorch's own
computations on the host take no time.
"""

from __future__ import annotations

import collections
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.harness import Settings, where
from bench.no_gpu import NoDriver
from bench.report import Column, Table
from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    embed_project_and_insert,
    image_insert_embedding,
    insert,
    operators,
    plan_insert,
    project_and_insert,
)
from step37_kernels.count_watch import count_watch
from step37_kernels.ops import plan_rows, project, tiles

HIDDEN, WIDTH, ROWS = 64, 512, 169
START = 7
CALLS = 200
H100 = 90
MULTIPROCESSORS = 8
"""As many as nine pictures have tiles of this width: a whole wave, as on a real chip with H = 4096;
of one picture the tile is split there, and a second launch adds its parts."""
PICTURES = (1, 9, 39)
IN_A_FORWARD = "module, forward, 1 picture"
"""The operation that is taken apart."""

Call = Callable[[], object]


def nothing(*_: object) -> None:
    """Take the place of what only tensors on the CPU cost, and of copies to pinned memory."""


def operations() -> dict[str, Call]:
    """Make the calls to time, by name."""
    zeros = functools.partial(torch.zeros, dtype=torch.bfloat16)
    input_ids = torch.tensor([[START] + [0] * (ROWS + 1)])
    words, gradient = zeros(ROWS + 2, 1, HIDDEN), zeros(ROWS + 2, 1, HIDDEN)
    features, view = zeros(1, ROWS, WIDTH), zeros(1, WIDTH, ROWS).transpose(1, 2)
    weight, table = zeros(HIDDEN, WIDTH), zeros(16, HIDDEN)
    make_plan = functools.partial(plan_insert, input_ids, [(START, [ROWS])], impl="triton")
    plan = make_plan()
    words.requires_grad_()
    table.requires_grad_()

    def put(features: Tensor) -> Tensor:
        return project_and_insert(words, features, weight, None, plan, impl="triton")

    def look_up_and_put() -> Tensor:
        return embed_project_and_insert(
            input_ids, table, features, weight, None, plan, impl="triton"
        )

    found: dict[str, Call] = {}
    for pictures in PICTURES:
        name = f"module, forward, {pictures} picture" + "s" * (pictures > 1)
        found[name] = module_forward(pictures)
    return {
        **found,
        "plan": make_plan,
        "project and insert": lambda: put(features),
        "project and insert, channels-first": lambda: put(view),
        # To the weight and the features, the library would multiply on the host.
        "project and insert, and backward to the embeddings": lambda: torch.autograd.grad(
            put(features), words, gradient
        ),
        "embed, project and insert, and backward to the table": lambda: torch.autograd.grad(
            look_up_and_put(), table, gradient
        ),
    }


def module_forward(pictures: int) -> Call:
    """Make a forward of the module that looks words up itself, with everything recorded that
    backward needs."""
    table = nn.Embedding(16, HIDDEN, dtype=torch.bfloat16)
    module = ImageInsertEmbedding(table, WIDTH, HIDDEN, impl="triton").bfloat16()
    input_ids = torch.zeros(1, pictures * 224, dtype=torch.int64)
    features = torch.zeros(pictures, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return lambda: module(input_ids, [ImageForInsert(START, image_features=features)])


class Counts:
    """What launches hand to the driver."""

    def __init__(self) -> None:
        self.launches = 0
        self.tensor_maps = 0
        """Descriptors of tensors: the driver encodes a map of each, in every launch."""
        self._counting = False

    def launch(self, *arguments: object) -> None:
        """Stand for the driver's launch. It counts only within :meth:`of`, because looking at all
        arguments takes some microseconds, which are not ours."""
        if self._counting:
            self.launches += 1
            self.tensor_maps += sum(isinstance(each, TensorDescriptor) for each in arguments)

    def of(self, call: Call) -> tuple[int, int]:
        """Count the launches and tensor maps of one call."""
        self.launches = self.tensor_maps = 0
        self._counting = True
        call()
        self._counting = False
        return self.launches, self.tensor_maps


def median_us(call: Call, rounds: int) -> float:
    """Time a call in µs: the median of single calls, which a busy machine interrupts now and
    then."""
    times = []
    for _ in range(rounds * CALLS):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1e3


def measure(calls: dict[str, Call], counts: Counts, rounds: int) -> Iterator[tuple[Any, ...]]:
    """Yield of each call its name, launches, tensor maps, and µs of the host."""
    for name, call in calls.items():
        call()
        launches, tensor_maps = counts.of(call)
        yield name, launches, tensor_maps, median_us(call, rounds)


class Layer(NamedTuple):
    """Functions whose own time, without what they call of other layers, belongs together."""

    name: str
    functions: Sequence[tuple[Any, str]]
    """Where each is looked up when it is called, and under which name."""


LAYERS = (
    Layer("Triton's launcher", [(project, "launch"), (plan_rows, "launch")]),
    Layer("descriptors for tensor maps", [(project, "TensorDescriptor")]),
    Layer(
        "arguments of launches, room for results",
        [(project, "project_insert"), (plan_rows, "plan_rows")],
    ),
    Layer("operators of torch.library", [(operators, "plan"), (operators, "project_insert")]),
    Layer(
        "autograd.Function",
        [(insert._ProjectAndInsert, "apply"), (insert._ProjectAndInsert, "forward")],
    ),
    Layer("the plan's Python", [(image_insert_embedding, "plan_runs")]),
    Layer("the insertion's Python", [(image_insert_embedding, "insert_projected")]),
)
REST = "the module's Python"


class Stopwatch:
    """Measures each layer's own time within a call."""

    def __init__(self) -> None:
        self.own_ns: dict[str, int] = collections.defaultdict(int)
        self._children = [0]  # ns of what was called, of each function under way

    def timed(self, layer: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function count towards a layer."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._children.append(0)
            begin = time.perf_counter_ns()
            try:
                return function(*arguments, **options)
            finally:
                elapsed = time.perf_counter_ns() - begin
                self.own_ns[layer] += elapsed - self._children.pop()
                self._children[-1] += elapsed

        return call


def take_apart(call: Call, rounds: int) -> Iterator[tuple[str, float, float]]:
    """Yield of each layer its own µs in a call, and its share; the functions stay replaced."""
    watch = Stopwatch()
    for layer in LAYERS:
        for owner, name in layer.functions:
            timed = watch.timed(layer.name, getattr(owner, name))
            setattr(owner, name, staticmethod(timed) if isinstance(owner, type) else timed)
    whole = watch.timed(REST, call)
    names = [layer.name for layer in LAYERS] + [REST]
    found: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(rounds * CALLS):
        watch.own_ns.clear()
        whole()
        for name in names:
            found[name].append(watch.own_ns[name])
    us = {name: statistics.median(each) / 1e3 for name, each in found.items()}
    for name, own in us.items():
        yield name, own, 100 * own / sum(us.values())


def run(settings: Settings) -> Iterator[Table]:
    """Yield two tables: every operation; and where the µs of one forward go."""
    rounds, counts = settings.options["rounds"], Counts()
    NoDriver("sm_90", counts.launch).install()
    tiles._capability = lambda _: H100  # type: ignore[assignment]
    project.processors = lambda _: MULTIPROCESSORS  # type: ignore[assignment]
    image_insert_embedding.check_ids = nothing  # type: ignore[assignment]
    insert.check_ids = nothing  # type: ignore[assignment]
    count_watch.watch = nothing  # type: ignore[method-assign, assignment]
    calls = operations()
    gc.disable()
    yield Table(
        text=where(torch.device("cpu")),
        columns=(
            Column("operation"), Column("launches"), Column("tensor maps"),
            Column("µs of the host", "{:.0f}"),
        ),
        lines=measure(calls, counts, rounds),
    )  # fmt: skip
    yield Table(
        title=f"Where the host's time goes: {IN_A_FORWARD}",
        text="Each line's own time, without that of the others; medians.",
        columns=(Column("what"), Column("µs", "{:.1f}"), Column("%", "{:.0f}")),
        lines=take_apart(calls[IN_A_FORWARD], rounds),
    )
    gc.enable()
