"""Subject ``insert``: times projecting and inserting feature rows, forward and backward.

Operations: ``forward`` (including what it records for backward), ``backward`` (of embeddings,
features and weight), ``forward+backward``. Floors do only a part of the work, on packed operands or
with the plan made before; ours and the peers start from the inputs of a training step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.harness import Implementation, Key, Row, Settings, Work, dtype_name, measure, rotation
from bench.oracle import Oracle
from bench.shapes import Batch, Shape, make_batch, make_case, shapes_named
from step37_kernels import plan_insert, project_and_insert
from step37_kernels.dispatch import Impl
from step37_kernels.testing import FeatureLayout, InsertCase

LAYOUTS: tuple[FeatureLayout, ...] = ("contiguous", "channels-first")
OPERATIONS = ("forward", "backward", "forward+backward")
GRAPHS = 2  # input sets of a graph replay; each graph keeps its own memory
Results = dict[str, Any]


def work_of(operation: str, shape: Shape, itemsize: int) -> Work:
    """Count the least work of an operation on elements of ``itemsize`` bytes.

    Each tensor that is needed is read once, each result is written once. Forward copies text rows
    to its output, backward those of ``grad_output``.
    """
    R, S, H, C = shape.num_rows, shape.seq_len, shape.hidden, shape.width
    forward = R * C + H * C + (2 * S - R) * H
    backward = 2 * (S * H + R * C + H * C)
    products, elements = {
        "forward": (1, forward),
        "backward": (2, backward),
        "forward+backward": (3, forward + backward),
    }[operation]
    return Work(flops=products * 2 * R * H * C, bytes=elements * itemsize, rows=R)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input sets of one batch, dtype and layout."""

    batch: Batch
    cases: list[InsertCase]

    def case(self, i: int) -> InsertCase:
        return self.cases[i % len(self.cases)]


class Graph(NamedTuple):
    """A forward pass that has run, ready for backward."""

    output: Tensor
    wanted: dict[str, list[Tensor]]
    grad_output: Tensor

    def gradients(self) -> Results:
        flat = [tensor for tensors in self.wanted.values() for tensor in tensors]
        grads = iter(torch.autograd.grad(self.output, flat, self.grad_output))
        return {name: [next(grads) for _ in tensors] for name, tensors in self.wanted.items()}


def pass_of(function: peers.Forward, case: InsertCase) -> Callable[[], Graph]:
    """Make a forward pass on fresh leaves, all of which require a gradient."""
    tensors = (case.embeddings, case.weight, *case.features)
    embeddings, weight, *features = (tensor.detach().requires_grad_() for tensor in tensors)
    groups = [(token, x) for (token, _), x in zip(case.groups, features, strict=True)]
    wanted = {
        "grad_embeddings": [embeddings], "grad_features": features, "grad_weight": [weight],
    }  # fmt: skip

    def run() -> Graph:
        output = function(embeddings, case.input_ids, groups, weight)
        return Graph(output, wanted, case.grad_output)

    return run


def insertion(peer: peers.Peer, operation: str, inputs: Inputs) -> Implementation:
    """Make an implementation of an operation from a function that inserts."""

    def ready(i: int) -> Callable[[], Graph]:
        return pass_of(peer.function, inputs.case(i))

    def both(forward: Callable[[], Graph]) -> Results:
        graph = forward()
        return {"output": graph.output, **graph.gradients()}

    ways: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
        "forward": (ready, lambda forward: {"output": forward().output}),
        "backward": (lambda i: ready(i)(), Graph.gradients),
        "forward+backward": (ready, both),
    }
    prepare, run = ways[operation]
    return Implementation(name=peer.name, kind=peer.kind, prepare=prepare, run=run)


def floors(operation: str, inputs: Inputs, layout: FeatureLayout) -> Iterator[Implementation]:
    """Yield the floors of an operation: its bare matrix products, on packed operands.

    For forward there are also one product followed by a scatter of its rows to known positions, and
    the product alone on the channels-first view.
    """
    destinations = inputs.batch.destinations

    def packed(i: int) -> tuple[Tensor, Tensor, Tensor]:
        case = inputs.case(i)
        hidden, width = case.weight.shape
        x = torch.cat([x.reshape(-1, width) for x in case.features])
        g = case.grad_output.reshape(-1, hidden)[destinations]
        return x, g, case.weight

    products: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "projected": lambda x, _, weight: F.linear(x, weight),
        "grad_features": lambda _, g, weight: g @ weight,
        "grad_weight": lambda x, g, _: g.T @ x,
    }
    needed = {"forward": ["projected"], "backward": ["grad_features", "grad_weight"]}
    chosen = needed.get(operation, [*products])
    yield Implementation(
        name="GEMM alone",
        kind="floor",
        prepare=packed,
        run=lambda operands: {name: products[name](*operands) for name in chosen},
    )
    if operation != "forward":
        return

    def and_scatter(given: tuple[Tensor, InsertCase]) -> Results:
        x, case = given
        flat = case.embeddings.flatten(0, 1)
        return {"output": flat.index_copy(0, destinations, F.linear(x, case.weight))}

    yield Implementation(
        name="cuBLAS + scatter",
        kind="floor",
        prepare=lambda i: (packed(i)[0], inputs.case(i)),
        run=and_scatter,
    )
    if layout == "channels-first":
        yield Implementation(
            name="nn.Linear alone, on the view",
            kind="floor",
            prepare=inputs.case,
            run=lambda case: {"projected": [F.linear(x, case.weight) for x in case.features]},
        )


def kernel_alone(inputs: Inputs, impl: Impl) -> Implementation:
    """Make our product alone: with the plan made before, and nothing recorded for backward."""
    batch = inputs.batch
    plan = plan_insert(batch.input_ids, [(t, [rows] * n) for t, n, rows in batch.groups], impl=impl)

    def run(case: InsertCase) -> Results:
        given = (case.embeddings, case.features, case.weight, None, plan)
        return {"output": project_and_insert(*given, impl=impl)}

    return Implementation(name="step37 kernel alone", kind="ours", prepare=inputs.case, run=run)


def replay(one: Implementation) -> Implementation:
    """Make an implementation that replays CUDA graphs of another, one for each input set."""
    made: dict[int, tuple[torch.cuda.CUDAGraph, Results]] = {}

    def prepare(i: int) -> tuple[torch.cuda.CUDAGraph, Results]:
        i %= GRAPHS
        if i not in made:
            one.run(one.prepare(i))  # compiles and loads the kernels
            state = one.prepare(i)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = one.run(state)
            made[i] = graph, results
        return made[i]

    def run(state: tuple[torch.cuda.CUDAGraph, Results]) -> Results:
        state[0].replay()
        return state[1]

    return dataclasses.replace(one, name=f"{one.name}, graph replay", prepare=prepare, run=run)


def implementations(
    operation: str,
    inputs: Inputs,
    layout: FeatureLayout,
    *,
    insertions: Sequence[peers.Peer],
    settings: Settings,
) -> list[Implementation]:
    """List the implementations of one group of rows."""
    found = [insertion(peer, operation, inputs) for peer in insertions]
    if settings.device.type == "cuda" and operation != "backward":
        found.insert(1, replay(found[0]))
    if operation == "forward":
        found.insert(1, kernel_alone(inputs, settings.impl))
    return [*found, *floors(operation, inputs, layout)]


def run(settings: Settings) -> Iterator[list[Row]]:
    """Yield one group for each shape, dtype, layout and operation."""
    for shape in shapes_named(settings.shapes):
        yield from run_shape(shape, settings)


def run_shape(shape: Shape, settings: Settings) -> Iterator[list[Row]]:
    """Measure all groups of one shape."""
    batch = make_batch(shape, settings.device)
    for dtype in settings.dtypes:
        for layout in LAYOUTS:
            # Compiled peers are compiled for this batch only, which is their best case.
            torch.compiler.reset()
            options = (settings.impl, settings.compile_backend)
            insertions = peers.peers(shape.hidden, shape.width, *options)
            elements = shape.num_rows * shape.width + shape.hidden * shape.width
            elements += 2 * shape.seq_len * shape.hidden
            sets = rotation(settings.device, elements * dtype.itemsize)
            cases = [make_case(batch, dtype=dtype, layout=layout, seed=i) for i in range(sets)]
            inputs = Inputs(batch, cases)
            check = functools.partial(check_results, Oracle(cases[0], batch))
            for operation in OPERATIONS:
                key = Key(
                    subject="insert", operation=operation, shape=shape.name, variant=layout,
                    dtype=dtype_name(dtype),
                )  # fmt: skip
                work = work_of(operation, shape, dtype.itemsize)
                compared = implementations(
                    operation, inputs, layout, insertions=insertions, settings=settings
                )
                yield measure(key, work, compared, check=check, settings=settings)


def check_results(oracle: Oracle, implementation: Implementation, results: Results) -> str | None:
    """Check one result; returns what is wrong with it, or None."""
    return oracle.check(results, narrow_partial_sums=implementation.kind != "ours")
