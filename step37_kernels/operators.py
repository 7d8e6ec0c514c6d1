"""The launchers as ``torch.library`` operators, which ``torch.compile`` keeps whole.

Outside a compiled graph the functions here are the launchers themselves; inside one they are
operators of the namespace ``step37`` with a schema and a fake implementation, so that the graph is
traced without running a kernel. Row counts are ``SymInt``: a new packed length does not recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from step37_kernels.plan_tensors import PlanTensors, Runs, make_plan

_F = TypeVar("_F", bound=Callable[..., Any])


def _operator(schema: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Register a function under its own name; call it directly outside of compiled graphs."""

    def register(function: _F) -> _F:
        operator = torch.library.custom_op(
            f"step37::{function.__name__}", function, mutates_args=mutates, schema=schema
        )
        operator.register_fake(fake)

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return operator(*arguments)
            return function(*arguments)

        call.__name__ = function.__name__
        call.__doc__ = function.__doc__
        return call  # type: ignore[return-value]

    return register


def _fake_plan(
    input_ids: Tensor,
    tokens: list[int],
    runs_each: list[int],
    features: list[int],
    rows: list[int],
    triton: bool,
) -> PlanTensors:
    del runs_each, triton
    batch_size, seq_len = input_ids.shape
    total = sum(n * count for n, count in zip(features, rows, strict=True))

    def empty(*shape: int) -> Tensor:
        return input_ids.new_empty(shape, dtype=torch.int32)

    return empty(total), empty(seq_len, batch_size), empty(sum(features)), empty(len(tokens))


@_operator(
    "(Tensor input_ids, int[] tokens, int[] runs_each, SymInt[] features, SymInt[] rows, "
    "bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_plan,
)
def plan(
    input_ids: Tensor,
    tokens: list[int],
    runs_each: list[int],
    features: list[int],
    rows: list[int],
    triton: bool,
) -> PlanTensors:
    """:func:`step37_kernels.plan_tensors.make_plan` with the runs of all groups in flat lists."""
    pairs = iter(zip(features, rows, strict=True))
    runs: Runs = tuple(
        (token, tuple(next(pairs) for _ in range(count)))
        for token, count in zip(tokens, runs_each, strict=True)
    )
    return make_plan(input_ids, runs, triton)


def _fake_pack_rows(features: list[Tensor]) -> Tensor:
    total = sum(feature.shape[0] * feature.shape[1] for feature in features)
    return features[0].new_empty(total, features[0].shape[2])


@_operator("(Tensor[] features) -> Tensor", _fake_pack_rows)
def pack_rows(features: list[Tensor]) -> Tensor:
    """``[N, L, C]`` tensors of any strides → one contiguous ``[R, C]``."""
    from step37_kernels.ops import project

    total = sum(feature.shape[0] * feature.shape[1] for feature in features)
    return project.pack_rows(features, total)


def _fake_project_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    live_rows: Tensor | None,
    out: Tensor,
) -> None:
    del x, weight, bias, destinations, live_rows, out


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor destinations, Tensor? live_rows, "
    "Tensor(a!) out) -> ()",
    _fake_project_scatter,
    mutates=("out",),
)
def project_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    live_rows: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``x @ weightᵀ + bias`` to the rows ``destinations`` of ``out``."""
    from step37_kernels.ops import project

    project.project_scatter(x, weight, bias, destinations, live_rows, out)


def _fake_embedding_grad(grad_output: Tensor, row_at: Tensor) -> Tensor:
    del row_at
    return torch.empty_like(grad_output, memory_format=torch.contiguous_format)


@_operator("(Tensor grad_output, Tensor row_at) -> Tensor", _fake_embedding_grad)
def embedding_grad(grad_output: Tensor, row_at: Tensor) -> Tensor:
    """``grad_output`` with the overwritten rows zeroed."""
    from step37_kernels.ops import project_backward

    return project_backward.embedding_grad(grad_output, row_at)


def _fake_gather_grad(
    grad_output: Tensor, destinations: Tensor, dtype: torch.dtype, bias_sum: bool
) -> tuple[Tensor, Tensor]:
    hidden = grad_output.shape[2]
    rows = grad_output.new_empty(destinations.shape[0], hidden, dtype=dtype)
    return rows, rows.new_empty(hidden if bias_sum else 0)


@_operator(
    "(Tensor grad_output, Tensor destinations, ScalarType dtype, bool bias_sum) "
    "-> (Tensor, Tensor)",
    _fake_gather_grad,
)
def gather_grad(
    grad_output: Tensor, destinations: Tensor, dtype: torch.dtype, bias_sum: bool
) -> tuple[Tensor, Tensor]:
    """Gradient rows in ``dtype``, and their sum (empty without ``bias_sum``)."""
    from step37_kernels.ops import project_backward

    return project_backward.gather_grad(grad_output, destinations, dtype, bias_sum=bias_sum)


def _fake_grad_features(grad_rows: Tensor, weight: Tensor, live_rows: Tensor | None) -> Tensor:
    del live_rows
    return grad_rows.new_empty(grad_rows.shape[0], weight.shape[1])


@_operator("(Tensor grad_rows, Tensor weight, Tensor? live_rows) -> Tensor", _fake_grad_features)
def grad_features(grad_rows: Tensor, weight: Tensor, live_rows: Tensor | None) -> Tensor:
    """``grad_rows [R, H] @ weight [H, C]``."""
    from step37_kernels.ops import project_backward

    return project_backward.grad_features(grad_rows, weight, live_rows)


def _fake_grad_weight(grad_rows: Tensor, x: Tensor, live_rows: Tensor | None) -> Tensor:
    del live_rows
    return x.new_empty(grad_rows.shape[1], x.shape[1])


@_operator("(Tensor grad_rows, Tensor x, Tensor? live_rows) -> Tensor", _fake_grad_weight)
def grad_weight(grad_rows: Tensor, x: Tensor, live_rows: Tensor | None) -> Tensor:
    """``grad_rowsᵀ [H, R] @ x [R, C]``."""
    from step37_kernels.ops import project_backward

    return project_backward.grad_weight(grad_rows, x, live_rows)


def _fake_grad_weight_into(
    grad_rows: Tensor, x: Tensor, live_rows: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    del grad_rows, x, live_rows, out, accumulate


@_operator(
    "(Tensor grad_rows, Tensor x, Tensor? live_rows, Tensor(a!) out, bool accumulate) -> ()",
    _fake_grad_weight_into,
    mutates=("out",),
)
def grad_weight_into(
    grad_rows: Tensor, x: Tensor, live_rows: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """The same into ``out`` of any floating dtype; added in fp32 to what it holds, or written."""
    from step37_kernels.ops import project_backward

    project_backward.grad_weight_into(grad_rows, x, live_rows, out, accumulate=accumulate)
