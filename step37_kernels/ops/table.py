"""Computes the gradient of the word embedding's table, row by row.

The positions come in order by id (:mod:`step37_kernels.ops.order`), so those of one id, a
*segment*, are neighbours. Two launches sum them:

1. in ``sum_segments_kernel`` each program takes a block of positions and sums each segment in it.
   If the whole segment is in the block, the sum is written to its row of the table. If the segment
   begins before the block or ends after it, the sum is kept in a buffer;
2. ``join_segments_kernel`` adds the kept sums of each segment that spans several blocks.

So the work of a program is bounded however often an id occurs: one block, or one column of kept
sums. Each row is written by one program, so no atomics are needed and two runs are bit-equal. Sums
are fp32.

Shape letters: ``P`` positions, ``H`` hidden size, ``V`` rows of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import (
    INTERPRETED,
    ceil_div,
    device_of,
    in_vectors,
    round_to,
    whole_vectors,
)
from step37_kernels.ops.launch import launch

# Positions of a program, how many of their rows are on the way at a time, and columns: 8 for each
# thread, one vector of a 16-bit type.
BLOCK_P = 16
SUM_ROWS = 4
SUM_COLUMNS = 512
SUM_WARPS = 2
JOIN_BLOCKS = 8
JOIN_COLUMNS = 256
JOIN_WARPS = 4


@triton.jit
def _put(out_ptrs, values, mask, ADD: tl.constexpr, INTERPRET: tl.constexpr):
    """Store sums, or add them to the values that are there; round once."""
    if ADD:
        values += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, round_to(values, out_ptrs.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _end_segment(
    sums, ids_ptr, index, end, num_positions, num_rows, first, goes_back, out_ptr, kept_ptr,
    cols, H, ADD: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write the running sum if its segment ends at this row, or if the block does.

    Returns the sum to which the next row is added: zeros after the end of a segment.
    """
    row = tl.load(ids_ptr + index, mask=index < end, other=-1).to(tl.int64)
    after = tl.load(ids_ptr + index + 1, mask=index + 1 < num_positions, other=-1).to(tl.int64)
    if (row >= 0) & (row < num_rows):
        earlier = goes_back & (row == first)
        if row != after:
            if earlier:
                tl.store(kept_ptr + cols, sums, mask=cols < H)
            else:
                _put(out_ptr + row * H + cols, sums, cols < H, ADD, INTERPRET)
        elif index + 1 == end:
            slot = tl.where(earlier, 0, 1)
            tl.store(kept_ptr + slot * H + cols, sums, mask=cols < H)
    return tl.where(row != after, 0.0, sums)


_NUMBERS = ["num_positions", "num_rows", "batch_size", "stride_s", "stride_b"]


@triton.jit(do_not_specialize=_NUMBERS)
def sum_segments_kernel(
    grad_ptr,  # [S, B, H], any strides
    ids_ptr,  # [P] int32 or int64, sorted: id of each text position; outside 0 … V − 1 elsewhere
    order_ptr,  # [P] int64: position of each of these ids
    out_ptr,  # [V, H] contiguous: rows are written, or added to if ADD
    kept_ptr,  # [blocks, 2, H] fp32, out: sums of a block's first and last segment that span blocks
    H,
    stride_h,
    num_positions,
    num_rows,  # V
    batch_size,
    stride_s,
    stride_b,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,  # stride_s and stride_b are whole vectors
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,  # rows loaded at a time
    BLOCK_H: tl.constexpr,
):
    across = tl.cdiv(H, BLOCK_H)
    block = tl.program_id(0) // across
    cols = (tl.program_id(0) % across) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin = block * BLOCK_P
    end = tl.minimum(begin + BLOCK_P, num_positions)
    first = tl.load(ids_ptr + begin).to(tl.int64)
    before = tl.load(ids_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    last = tl.load(ids_ptr + end - 1).to(tl.int64)
    goes_back = first == before  # the first segment began in an earlier block
    kept_ptr += block.to(tl.int64) * 2 * H
    sums = tl.zeros((BLOCK_H,), tl.float32)
    if (first < num_rows) & (last >= 0):
        for index in range(begin, end, ROWS):
            lane = tl.arange(0, ROWS)
            inside = index + lane < end
            ids = tl.load(ids_ptr + index + lane, mask=inside, other=-1)
            positions = tl.load(order_ptr + index + lane, mask=inside, other=0)
            s = (positions // batch_size) * in_vectors(stride_s, ALIGNED).to(tl.int64)
            b = (positions % batch_size) * in_vectors(stride_b, ALIGNED).to(tl.int64)
            grad_ptrs = grad_ptr + (s + b)[:, None] + (cols.to(tl.int64) * stride_h)[None, :]
            live = (ids >= 0) & (ids < num_rows)
            values = tl.load(grad_ptrs, mask=live[:, None] & (cols < H)[None, :], other=0.0)
            values = values.to(tl.float32)
            for k in tl.static_range(ROWS):
                row = tl.sum(tl.where((lane == k)[:, None], values, 0.0), axis=0)
                sums = _end_segment(
                    sums + row, ids_ptr, index + k, end, num_positions, num_rows, first, goes_back,
                    out_ptr, kept_ptr, cols, H, ADD, INTERPRET,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_positions", "num_rows"])
def join_segments_kernel(
    ids_ptr,  # [P] sorted, as above
    kept_ptr,  # [blocks, 2, H] fp32
    out_ptr,  # [V, H]
    H,
    num_positions,
    num_rows,
    ADD: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Add the kept sums of a segment; the program of the block in which it begins does that."""
    across = tl.cdiv(H, BLOCK_H)
    block = tl.program_id(0) // across
    begin = block * BLOCK_P
    end = tl.minimum(begin + BLOCK_P, num_positions)
    row = tl.load(ids_ptr + end - 1).to(tl.int64)
    after = tl.load(ids_ptr + end, mask=end < num_positions, other=-1).to(tl.int64)
    first = tl.load(ids_ptr + begin).to(tl.int64)
    before = tl.load(ids_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    begins_here = (first != row) | (before != row)
    if (row >= 0) & (row < num_rows) & (row == after) & begins_here:
        cols = (tl.program_id(0) % across) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_width = (cols < H)[None, :]
        sums = tl.zeros((BLOCKS, BLOCK_H), tl.float32)
        number = block + tl.arange(0, BLOCKS)
        more = BLOCKS
        while more == BLOCKS:
            heads = tl.load(
                ids_ptr + number * BLOCK_P, mask=number * BLOCK_P < num_positions, other=-1
            )
            belongs = (number == block) | (heads.to(tl.int64) == row)
            slot = number.to(tl.int64) * 2 + tl.where(number == block, 1, 0)
            kept_ptrs = kept_ptr + slot[:, None] * H + cols[None, :]
            sums += tl.load(kept_ptrs, mask=belongs[:, None] & in_width, other=0.0)
            more = tl.sum(belongs.to(tl.int32), axis=0)
            number += BLOCKS
        out_ptrs = out_ptr + row * H + cols
        _put(out_ptrs, tl.sum(sums, axis=0), cols < H, ADD, INTERPRET)


def put_table_gradient(
    grad_output: Tensor, ids: Tensor, order: Tensor, out: Tensor, *, add: bool
) -> None:
    """Sum the gradients of each id's positions into its row of ``out``, in two launches.

    Args:
        grad_output: ``[S, B, H]``, any strides; only rows of text positions are read.
        ids: ``[P]`` int32 or int64, P = S · B, sorted: the ids of all positions; negative, or not
            below V, if nothing was looked up there.
        order: ``[P]`` int64: the position ``s * B + b`` of each of these ids.
        out: ``[V, H]`` contiguous.
        add: add to the rows of ``out`` instead of replacing them. Rows of other ids stay.
    """
    seq_len, batch_size, hidden = grad_output.shape
    num_positions, num_rows = seq_len * batch_size, out.shape[0]
    if not num_positions or not hidden:
        return
    blocks = ceil_div(num_positions, BLOCK_P)
    kept = torch.empty((blocks, 2, hidden), dtype=torch.float32, device=out.device)
    stride_s, stride_b, stride_h = grad_output.stride()
    with device_of(out):
        launch(
            sum_segments_kernel,
            (blocks * ceil_div(hidden, SUM_COLUMNS),),
            *(grad_output, ids, order, out, kept, hidden, stride_h),
            *(num_positions, num_rows, batch_size, stride_s, stride_b),
            ADD=add,
            ALIGNED=whole_vectors(stride_s, stride_b),
            INTERPRET=INTERPRETED,
            BLOCK_P=BLOCK_P,
            ROWS=SUM_ROWS,
            BLOCK_H=SUM_COLUMNS,
            num_warps=SUM_WARPS,
        )
        launch(
            join_segments_kernel,
            (blocks * ceil_div(hidden, JOIN_COLUMNS),),
            *(ids, kept, out, hidden, num_positions, num_rows),
            ADD=add,
            INTERPRET=INTERPRETED,
            BLOCK_P=BLOCK_P,
            BLOCKS=JOIN_BLOCKS,
            BLOCK_H=JOIN_COLUMNS,
            num_warps=JOIN_WARPS,
        )
