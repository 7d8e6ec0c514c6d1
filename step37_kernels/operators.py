"""Registers each kernel launch as an operator that ``torch.compile`` does not trace into.

The functions here are plain functions in eager mode and custom operators of the namespace
``step37`` under ``torch.compile``. Their annotations give the schema, and each has a fake
implementation, so that a graph is traced without running a kernel. Integers are symbolic: a new
packed length does not recompile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from step37_kernels import lookup_tensors
from step37_kernels.count_watch import count_watch
from step37_kernels.plan_tensors import make_plan
from step37_kernels.runs import FlatRuns

_F = TypeVar("_F", bound=Callable[..., Any])


def _operator(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Register a function as the operator ``step37::its_name``; eager mode calls it directly.

    Arguments are positional in both.

    Args:
        fake: makes results of the right shapes and dtypes without running the function.
        mutates: names of the arguments that the function writes to.
    """

    def register(function: _F) -> _F:
        operator = torch.library.custom_op(
            f"step37::{function.__name__}", function, mutates_args=mutates
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
    tokens: Sequence[int],
    group_sizes: Sequence[int],
    features: Sequence[int],
    rows: Sequence[int],
    shift: int,
    batch_first: bool,
    *_: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del shift
    shape = input_ids.shape if batch_first else input_ids.shape[::-1]
    total = sum(n * each for n, each in zip(features, rows, strict=True))
    empty = functools.partial(input_ids.new_empty, dtype=torch.int32)
    return empty(total), empty(shape), empty(sum(group_sizes)), empty(len(tokens) + 1)


@_operator(_fake_plan)
def plan(
    input_ids: Tensor,
    tokens: Sequence[int],
    group_sizes: Sequence[int],
    features: Sequence[int],
    rows: Sequence[int],
    shift: int,
    batch_first: bool,
    vocabulary: int,
    triton: bool,
    watch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`step37_kernels.plan_tensors.make_plan`.

    With ``watch`` it warns where counts differ. It does so inside this operator because
    ``torch.compile`` would remove another one whose result is not used.
    """
    runs = FlatRuns(tuple(tokens), tuple(group_sizes), tuple(features), tuple(rows))
    tensors = make_plan(
        input_ids,
        runs,
        shift=shift,
        batch_first=batch_first,
        vocabulary=vocabulary,
        triton=triton,
    )
    if watch:
        count_watch.poll()
        count_watch.watch(runs, tensors[3], vocabulary)
    return tensors


@_operator(
    lambda features: features[0].new_empty(
        sum(feature.shape[0] * feature.shape[1] for feature in features), features[0].shape[2]
    )
)
def copy_rows(features: list[Tensor]) -> Tensor:
    """``[N, L, C]`` tensors of any strides → one contiguous ``[R, C]``."""
    from step37_kernels.ops import copy_rows as ops

    return ops.copy_rows(features)


def _fake_project_insert(
    text: Tensor,
    sources: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    row_at: Tensor,
    *_: object,
) -> Tensor:
    del sources, weight, bias, destinations
    return text.new_empty(*row_at.shape, text.shape[-1])


@_operator(_fake_project_insert)
def project_insert(
    text: Tensor,
    sources: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    row_at: Tensor,
    live_rows: Tensor | None,
    input_ids: Tensor | None,
    after_plan: bool,
) -> Tensor:
    """A new ``[S, B, H]``: ``x @ weightᵀ + bias`` at the destinations, elsewhere text rows.

    Without ``input_ids`` the text rows are ``text [S, B, H]``. With ``input_ids [S, B]`` they are
    looked up in the table ``text [V, H]``.
    """
    from step37_kernels.ops import project

    return project.project_insert(
        text,
        sources,
        weight,
        bias,
        destinations,
        row_at,
        live_rows,
        input_ids=input_ids,
        after_plan=after_plan,
    )


@_operator(lambda table, *ids: table.new_empty(*ids[1].shape, table.shape[1]))
def look_up(table: Tensor, input_ids: Tensor, row_at: Tensor) -> Tensor:
    """A new ``[S, B, H]`` of the table's rows, by ``input_ids [S, B]``."""
    from step37_kernels.ops import project

    return project.look_up(table, input_ids, row_at)


def _fake_gradient_rows(
    grad_output: Tensor,
    row_at: Tensor,
    destinations: Tensor,
    dtype: torch.dtype,
    embeddings: bool,
    rows: bool,
    bias: bool,
    input_ids: Tensor | None,
    vocabulary: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del vocabulary
    hidden = grad_output.shape[2]
    nothing = grad_output.new_empty(0, dtype=dtype)
    num_positions, of = (0, torch.int64) if input_ids is None else (row_at.numel(), input_ids.dtype)
    return (
        grad_output.new_empty(grad_output.shape if embeddings else 0),
        nothing.new_empty(destinations.shape[0], hidden) if rows else nothing,
        nothing.new_empty(hidden) if bias else nothing.new_empty(0),
        row_at.new_empty(num_positions, dtype=of),
        row_at.new_empty(num_positions, dtype=torch.int64),
    )


@_operator(_fake_gradient_rows)
def gradient_rows(
    grad_output: Tensor,
    row_at: Tensor,
    destinations: Tensor,
    dtype: torch.dtype,
    embeddings: bool,
    rows: bool,
    bias: bool,
    input_ids: Tensor | None,
    vocabulary: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the embeddings, of the projected rows (in ``dtype``) and of the bias.

    One that is not wanted comes back empty. With ``input_ids [S, B]``, which were looked up in a
    table of ``vocabulary`` rows, two more tensors are the text positions in order by id
    (:data:`step37_kernels.lookup_tensors.InOrder`).
    """
    from step37_kernels.ops import gradient

    return gradient.gradient_rows(
        grad_output,
        row_at,
        destinations,
        dtype,
        embeddings=embeddings,
        rows=rows,
        bias=bias,
        input_ids=input_ids,
        vocabulary=vocabulary,
    )


@_operator(lambda *_: None, mutates=("main_grad",))
def add_weight_gradient(rows: Tensor, x: Tensor, main_grad: Tensor, add: bool) -> None:
    """``main_grad`` (+)= ``rowsᵀ @ x``, accumulated in the wider of the two dtypes.

    Args:
        rows: ``[R, H]`` gradient rows.
        x: ``[R, C]`` feature rows.
        main_grad: ``[H, C]``.
        add: to what ``main_grad`` holds, instead of replacing it.
    """
    if main_grad.dtype == x.dtype:
        torch.addmm(main_grad, rows.T, x, beta=int(add), out=main_grad)
    elif main_grad.dtype == torch.float32 and main_grad.is_cuda:
        torch.addmm(main_grad, rows.T, x, torch.float32, beta=int(add), out=main_grad)
    else:
        # PyTorch has no product with another result dtype on the CPU.
        product = rows.T.to(torch.float32) @ x.to(torch.float32)
        main_grad.copy_(main_grad + product if add else product)


@_operator(
    lambda input_ids, *_: (
        input_ids.new_empty(input_ids.numel()),
        input_ids.new_empty(input_ids.numel(), dtype=torch.int64),
    )
)
def order_by_id(input_ids: Tensor, num_rows: int, triton: bool) -> tuple[Tensor, Tensor]:
    """The positions in order by id, as :func:`step37_kernels.lookup_tensors.order_by_id` does."""
    return lookup_tensors.order_by_id(input_ids, num_rows, triton=triton)


def _fake_table_gradient(
    grad_output: Tensor, ids: Tensor, order: Tensor, num_rows: int, dtype: torch.dtype, triton: bool
) -> Tensor:
    del ids, order, triton
    return grad_output.new_empty(num_rows, grad_output.shape[-1], dtype=dtype)


@_operator(_fake_table_gradient)
def table_gradient(
    grad_output: Tensor, ids: Tensor, order: Tensor, num_rows: int, dtype: torch.dtype, triton: bool
) -> Tensor:
    """The dense gradient ``[V, H]`` of a table, from positions in order by id."""
    gradient = grad_output.new_zeros(num_rows, grad_output.shape[-1], dtype=dtype)
    lookup_tensors.put_table_gradient(grad_output, (ids, order), gradient, add=False, triton=triton)
    return gradient


@_operator(lambda *_: None, mutates=("main_grad",))
def add_table_gradient(
    grad_output: Tensor, ids: Tensor, order: Tensor, main_grad: Tensor, triton: bool
) -> None:
    """Add the gradient of the table to ``main_grad [V, H]``, only in rows that were looked up."""
    lookup_tensors.put_table_gradient(grad_output, (ids, order), main_grad, add=True, triton=triton)
