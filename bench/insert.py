"""Subject ``insert``: projecting feature rows and putting them in place, forward and backward.

Operations: ``forward`` (with everything recorded that backward needs), ``backward`` (of
embeddings, features and weight), ``forward+backward``; ``dX`` and ``dW``, the backward pass of
features and of the weight alone. Only floors see packed operands; ours and the peers start from
what a training step has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.harness import (
    Implementation,
    Key,
    Row,
    Settings,
    Work,
    dtype_name,
    measure,
    rotation,
)
from bench.oracle import Oracle
from bench.shapes import SHAPES, Batch, Shape, make_batch, make_case, shapes_named
from step37_kernels.dispatch import use_triton
from step37_kernels.testing import InsertCase, Layout

LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels-first")
OPERATIONS = ("forward", "backward", "forward+backward", "dX", "dW")
Results = dict[str, Any]


def work_of(operation: str, shape: Shape, itemsize: int) -> Work:
    """The least work of an operation.

    Forward may be done in place: text rows need not move. Backward writes a new gradient of the
    embeddings, text rows included, since ``grad_output`` is not ours to change.
    """
    R, S, H, C = shape.num_rows, shape.seq_len, shape.hidden, shape.width
    x, weight, rows = R * C, H * C, R * H
    product = 2 * R * H * C
    forward, dx, dw = (product, x + weight + rows), rows + weight + x, rows + x + weight
    backward = (2 * product, 2 * S * H + 2 * x + 2 * weight)
    flops, elements = {
        "forward": forward,
        "backward": backward,
        "forward+backward": (forward[0] + backward[0], forward[1] + backward[1]),
        "dX": (product, dx),
        "dW": (product, dw),
    }[operation]
    return Work(flops=flops, bytes=elements * itemsize, rows=R)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input sets of one batch, dtype and layout."""

    batch: Batch
    cases: list[InsertCase]

    def case(self, i: int) -> InsertCase:
        return self.cases[i % len(self.cases)]


@dataclass(frozen=True, slots=True)
class Leaves:
    """A case with fresh leaves, which require a gradient where the operation asks for it."""

    case: InsertCase
    embeddings: Tensor
    features: list[Tensor]
    weight: Tensor

    @classmethod
    def of(cls, case: InsertCase, operation: str, copy: bool) -> Leaves:
        """``copy``: of the embeddings, for one who overwrites them. The others must not find its
        results in place of theirs."""
        all_needed = operation not in ("dX", "dW")
        embeddings = case.embeddings.clone() if copy else case.embeddings.detach()
        return cls(
            case,
            embeddings.requires_grad_(all_needed),
            [x.detach().requires_grad_(all_needed or operation == "dX") for x in case.features],
            case.weight.detach().requires_grad_(all_needed or operation == "dW"),
        )

    def forward(self, function: peers.Forward) -> Graph:
        groups = [(token, x) for (token, _), x in zip(self.case.groups, self.features, strict=True)]
        output = function(self.embeddings, self.case.input_ids, groups, self.weight)
        leaves = {
            "grad_embeddings": [self.embeddings],
            "grad_features": self.features,
            "grad_weight": [self.weight],
        }
        needed = {name: tensors for name, tensors in leaves.items() if tensors[0].requires_grad}
        return Graph(output, needed, self.case.grad_output)


@dataclass(frozen=True, slots=True)
class Graph:
    """A forward pass that has run."""

    output: Tensor
    wanted: dict[str, list[Tensor]]
    grad_output: Tensor

    def gradients(self) -> Results:
        flat = [tensor for tensors in self.wanted.values() for tensor in tensors]
        grads = iter(torch.autograd.grad(self.output, flat, self.grad_output))
        return {name: [next(grads) for _ in tensors] for name, tensors in self.wanted.items()}


def insertion(peer: peers.Peer, operation: str, inputs: Inputs) -> Implementation:
    """An implementation of any operation from a function that inserts."""

    def leaves(i: int) -> Leaves:
        return Leaves.of(inputs.case(i), operation, copy=peer.overwrites)

    def forward(leaves: Leaves) -> Results:
        return {"output": leaves.forward(peer.function).output}

    def both(leaves: Leaves) -> Results:
        graph = leaves.forward(peer.function)
        return {"output": graph.output, **graph.gradients()}

    def graph(i: int) -> Graph:
        return leaves(i).forward(peer.function)

    if operation == "forward":
        return Implementation(name=peer.name, kind=peer.kind, prepare=leaves, run=forward)
    if operation == "forward+backward":
        return Implementation(name=peer.name, kind=peer.kind, prepare=leaves, run=both)
    return Implementation(name=peer.name, kind=peer.kind, prepare=graph, run=Graph.gradients)


def floors(operation: str, inputs: Inputs, layout: Layout) -> Iterator[Implementation]:
    """The bare matrix products of an operation on operands that are already packed."""
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
    needed = {
        "forward": ("projected",),
        "backward": ("grad_features", "grad_weight"),
        "forward+backward": tuple(products),
        "dX": ("grad_features",),
        "dW": ("grad_weight",),
    }[operation]
    yield Implementation(
        name="GEMM alone",
        kind="floor",
        prepare=packed,
        run=lambda operands: {name: products[name](*operands) for name in needed},
    )
    if operation == "forward" and layout == "channels-first":
        yield Implementation(
            name="nn.Linear alone, on the view",
            kind="floor",
            prepare=inputs.case,
            run=lambda case: {"projected": [F.linear(x, case.weight) for x in case.features]},
        )


def kernel_alone(operation: str, inputs: Inputs) -> Iterator[Implementation]:
    """Our dX and dW kernels on packed operands, as the floor beside them has."""
    from step37_kernels.ops import project_backward as ops

    floor = next(floors(operation, inputs, "contiguous"))
    runs: dict[str, Callable[[Any], Results]] = {
        "dX": lambda operands: {"grad_features": ops.grad_features(operands[1], operands[2], None)},
        "dW": lambda operands: {"grad_weight": ops.grad_weight(operands[1], operands[0], None)},
    }
    if operation in runs:
        yield Implementation(
            name="step37 kernel alone", kind="ours", prepare=floor.prepare, run=runs[operation]
        )


def implementations(
    operation: str,
    inputs: Inputs,
    layout: Layout,
    insertions: Sequence[peers.Peer],
    settings: Settings,
) -> list[Implementation]:
    """Everything that one group of rows compares."""
    if operation in ("dX", "dW"):
        # The pass of one gradient shows nothing of competitors that backward does not show.
        insertions = [peer for peer in insertions if peer.name == "step37"]
    elif operation == "backward":
        # Nor does it make a difference to it whether forward worked in place.
        insertions = [peer for peer in insertions if not peer.overwrites]
    found = [insertion(peer, operation, inputs) for peer in insertions]
    if use_triton(settings.impl, settings.device):
        found += kernel_alone(operation, inputs)
    return [*found, *floors(operation, inputs, layout)]


def run(settings: Settings) -> Iterator[list[Row]]:
    """The rows of every shape, dtype, layout and operation, one list a group."""
    for shape in shapes_named(settings.shapes or tuple(SHAPES)):
        yield from run_shape(shape, settings)


def run_shape(shape: Shape, settings: Settings) -> Iterator[list[Row]]:
    """All groups of one shape."""
    batch = make_batch(shape, settings.device)
    for dtype in settings.dtypes:
        for layout in LAYOUTS:
            # Compiled peers are compiled for this batch alone, which is their best case.
            torch.compiler.reset()
            insertions = peers.peers(
                shape.hidden, shape.width, settings.impl, settings.compile_backend
            )
            elements = shape.num_rows * shape.width + shape.hidden * shape.width
            elements += 2 * shape.seq_len * shape.hidden
            sets = rotation(settings.device, elements * dtype.itemsize)
            cases = [make_case(batch, dtype=dtype, layout=layout, seed=i) for i in range(sets)]
            inputs = Inputs(batch, cases)
            check = functools.partial(check_results, Oracle(cases[0], batch))
            for operation in OPERATIONS:
                key = Key(
                    subject="insert",
                    operation=operation,
                    shape=shape.name,
                    variant=layout,
                    dtype=dtype_name(dtype),
                )
                work = work_of(operation, shape, dtype.itemsize)
                compared = implementations(operation, inputs, layout, insertions, settings)
                yield measure(key, work, compared, check, settings)


def check_results(oracle: Oracle, implementation: Implementation, results: Results) -> str | None:
    """The gate of one result."""
    return oracle.check(results, narrow_partial_sums=implementation.kind != "ours")
