"""Holds the text rows: embeddings, or a table and the ids to look up in it; with its gradient.

Shape letters: ``S`` sequence, ``B`` batch, ``H`` hidden size, ``V`` rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from step37_kernels import operators
from step37_kernels.dispatch import check_kernel_dtype
from step37_kernels.integration.main_grad import check_has_main_grad, rows_into_main_grad
from step37_kernels.lookup_tensors import InOrder
from step37_kernels.plan_tensors import is_outside
from step37_kernels.ranges import profiled

if TYPE_CHECKING:
    from step37_kernels.plan import InsertPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """Where the rows of text positions come from."""

    rows: Tensor
    """Embeddings ``[S, B, H]`` (``[B, S, H]`` of a batch-first plan), or with ``input_ids`` the
    table ``[V, H]``."""
    input_ids: Tensor | None = None
    """``[S, B]``, ``[B, S]`` of a batch-first plan: the ids as the output lies in memory."""
    fused: bool = False
    """Whether the gradient of the table is added to its ``main_grad``, row by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output, ``[S, B, H]``."""
        if self.input_ids is None:
            return tuple(self.rows.shape)
        return (*self.input_ids.shape, self.rows.shape[-1])

    def embeddings(self, row_at: Tensor | None = None, *, triton: bool = False) -> Tensor:
        """Return the embeddings ``[S, B, H]``, and look them up first if these are a table and ids.

        Args:
            row_at: ``[S, B]``: the feature row at each position, −1 at text positions. Only ids at
                text positions are looked up; the others may be anything. None: all are text.
            triton: look up by the kernel; ``row_at`` is −1 everywhere then.

        Raises:
            ValueError: the kernel is to look up in a table of a dtype that it does not take, or the
                table has no ``main_grad`` for its fused gradient.
        """
        if self.input_ids is None:
            return self.rows
        if triton:
            check_kernel_dtype(self.rows, "table")
        ids = self.input_ids
        if row_at is not None and not triton:
            ids = torch.where(row_at < 0, ids, -1)
        fused_into = fusion_target(self.rows, "table", self.fused)
        result: Tensor = LookUp.apply(
            self.rows, ids, row_at if triton else None, fused_into, triton, float("nan")
        )
        return result


def fusion_target(parameter: Tensor, name: str, fused: bool) -> tuple[Tensor] | None:
    """Return the parameter if its gradient goes to its ``main_grad``, None if to autograd.

    The parameter comes in a tuple, so that autograd does not take it for an input.

    Raises:
        ValueError: it has no ``main_grad``.
    """
    if not (fused and parameter.requires_grad):
        return None
    check_has_main_grad(parameter, name)
    return (parameter,)


def check_ids(input_ids: Tensor, plan: InsertPlan | None, num_rows: int) -> None:
    """Raise on an id at a text position that is no row of the table, where values are at hand.

    On CUDA, and under ``torch.compile``, ids are not read on the host: such a row becomes NaN.

    Args:
        input_ids: any shape. With a plan as the output lies in memory: ``[S, B]``, ``[B, S]`` of a
            batch-first plan.
        plan: says which positions are text; None: all are. Where it has counted the unknown ids
            itself and found none, nothing is looked for again.
        num_rows: V.

    Raises:
        IndexError: there is one (as PyTorch's own lookup raises). The message has its place in the
            ids as the caller gave them, ``[B, S]``.
    """
    if type(input_ids) is not Tensor or not input_ids.is_cpu or torch.compiler.is_compiling():
        return
    if plan is not None and plan.vocabulary == num_rows and not plan.unknown_ids.any():
        return
    outside = is_outside(input_ids, num_rows)
    if plan is not None:
        outside &= plan.row_at < 0
        if not plan.batch_first:
            input_ids, outside = input_ids.t(), outside.t()
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"input_ids: expected 0 to {num_rows - 1} at text positions, the rows of the table, "
            f"got {int(input_ids[place])} at {place} of {tuple(input_ids.shape)}, and "
            f"{int(outside.sum()) - 1} more"
        )


def table_gradient(
    grad_output: Tensor,
    in_order: InOrder,
    *,
    table: tuple[torch.Size, torch.dtype],
    fused_into: tuple[Tensor] | None,
    triton: bool,
) -> Tensor | None:
    """Compute the table's gradient: return it to autograd, or add it to ``main_grad`` if fused.

    Args:
        grad_output: ``[S, B, H]``.
        in_order: its positions in order by id.
        table: shape and dtype of the table.
        fused_into: from :func:`fusion_target`.
        triton: by the kernels.
    """
    if fused_into is None:
        (num_rows, _), dtype = table
        return operators.table_gradient(grad_output, *in_order, num_rows, dtype, triton)

    def put(main_grad: Tensor) -> None:
        operators.add_table_gradient(grad_output, *in_order, main_grad, triton)

    return rows_into_main_grad(fused_into[0], put)


class LookUp(torch.autograd.Function):
    """Look up rows of a table by ids of any shape; the gradient touches only these rows.

    An id outside the table gives a row filled with ``outside``, and gets no gradient. The gradient
    can be differentiated again, as with PyTorch's own lookup, unless it is fused.
    """

    generate_vmap_rule = True  # for torch.func, which works with impl="torch"

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd takes no keywords
        table: Tensor,
        input_ids: Tensor,
        row_at: Tensor | None,
        fused_into: tuple[Tensor] | None,
        triton: bool,
        outside: float,
    ) -> Tensor:
        del fused_into
        if triton and row_at is not None:
            return operators.look_up(table.contiguous(), input_ids, row_at)
        known = input_ids.clamp(0, max(table.shape[0] - 1, 0))
        rows = F.embedding(known, table)
        # Not in place: in a graph of PyTorch 2.11 the changed tensor would have no gradient.
        return rows.masked_fill(is_outside(input_ids, table.shape[0])[..., None], outside)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        table, input_ids, _, ctx.fused_into, ctx.triton, _ = inputs
        ctx.save_for_backward(input_ids if ctx.needs_input_grad[0] else None)
        ctx.table = table.shape, table.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (input_ids,) = ctx.saved_tensors
        with profiled("gradient"):
            if ctx.fused_into is None and torch.is_grad_enabled():
                gradient = _SumByRow.apply(grad_output, input_ids, ctx.table, ctx.triton)
            else:
                gradient = _table_gradient_once(ctx, grad_output, input_ids)
        return gradient, None, None, None, None, None


@once_differentiable
def _table_gradient_once(ctx: Any, grad_output: Tensor, input_ids: Tensor) -> Tensor | None:
    num_rows = ctx.table[0][0]
    return table_gradient(
        grad_output,
        operators.order_by_id(input_ids, num_rows, ctx.triton),
        table=ctx.table,
        fused_into=ctx.fused_into,
        triton=ctx.triton,
    )


class _SumByRow(torch.autograd.Function):
    """The gradient of :class:`LookUp`; its own gradient is a lookup again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor,
        input_ids: Tensor,
        table: tuple[torch.Size, torch.dtype],
        triton: bool,
    ) -> Tensor:
        in_order = operators.order_by_id(input_ids, table[0][0], triton)
        gradient = table_gradient(
            grad_output, in_order, table=table, fused_into=None, triton=triton
        )
        return cast(Tensor, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        _, input_ids, _, ctx.triton = inputs
        ctx.save_for_backward(input_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input_ids,) = ctx.saved_tensors
        return LookUp.apply(grad, input_ids, None, None, ctx.triton, 0.0), None, None, None
