"""Puts positions in order by id, and sums gradients by the row of the table they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from step37_kernels.plan_tensors import is_outside

InOrder = tuple[Tensor, Tensor]
"""Positions in order by the id that was looked up there, those of one id as they come: the ids,
``[P]``, negative or not below V where no row was looked up; and the position of each, int64."""


def order_by_id(input_ids: Tensor, num_rows: int, *, triton: bool) -> InOrder:
    """Put positions in order by id.

    This is done in backward: in forward it would take as long, would run twice under recomputation,
    and for nothing where no gradient is wanted. Nothing waits for the device.

    Args:
        input_ids: the id looked up at each position, of any shape; negative or not below V for
            none.
        num_rows: V.
        triton: by the kernels, else by PyTorch operations.
    """
    if triton:
        from step37_kernels.ops import order

        return order.order_by_id(input_ids, num_rows)
    ids, positions = torch.sort(input_ids.reshape(-1), stable=True)
    return ids, positions


def put_table_gradient(
    grad_output: Tensor, in_order: InOrder, out: Tensor, *, add: bool, triton: bool
) -> None:
    """Sum the gradients at all positions of each id into its row of ``out``.

    The sums are in fp32 at least, in a fixed order, so that two runs are bit-equal. Nothing waits
    for the device.

    Args:
        grad_output: ``[S, B, H]``, or ``[…, H]``, any strides.
        in_order: all positions, in order by id.
        out: ``[V, H]`` contiguous.
        add: add to the rows of ``out``. Otherwise store them; ``out`` is zero then.
        triton: by the kernels, else by PyTorch operations.
    """
    num_rows, hidden = out.shape
    ids, order = in_order
    if triton:
        from step37_kernels.ops import table

        if grad_output.ndim != 3:
            grad_output = grad_output.reshape(-1, 1, hidden)
        table.put_table_gradient(grad_output, ids, order, out, add=add)
        return
    if not ids.numel():
        return
    # Segment k holds the positions of the k-th smallest id; there are at most P segments.
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    segment = begins.cumsum(0) - 1
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    rows = grad_output.reshape(-1, hidden).index_select(0, order).to(wide)
    # index_put_ adds in a fixed order on every device; index_add_ does not on CUDA.
    sums = rows.new_zeros(rows.shape).index_put_((segment,), rows, accumulate=True)
    row_of = torch.full_like(ids, -1).scatter_(0, segment, ids)
    if row_of.is_cpu and type(row_of) is Tensor and not torch.compiler.is_compiling():
        # On the CPU, positions without a row are left out first. index_add_ would be slow.
        kept = ~is_outside(row_of, num_rows)
        sums, row_of = sums[kept], row_of[kept].long()
        out[row_of] = (out[row_of] + sums if add else sums).to(out.dtype)
        return
    outside = is_outside(row_of, num_rows)
    sums = sums.masked_fill(outside[:, None], 0)
    # Each row of the table has one segment. Segments without a row add zeros to row 0.
    row_of = row_of.masked_fill(outside, 0).long()
    out.index_put_((row_of,), sums.to(out.dtype), accumulate=True)
