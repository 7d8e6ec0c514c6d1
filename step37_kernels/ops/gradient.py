"""Separates the rows of the output's gradient, before the matrix products of backward.

A row of ``grad_output [S, B, H]`` belongs either to a text row or to the feature row that was
written over it. The grid has two kinds of programs; there may be none of either:

1. Some take a block of positions. If the text rows came from embeddings, they write the gradient of
   the embeddings: text rows are copied, overwritten rows are set to zero without being read. If the
   text rows were looked up in a table, they put the positions in order by id instead
   (:mod:`step37_kernels.ops.order`), for :mod:`step37_kernels.ops.table`.
2. The others take a block of feature rows. They gather the rows at their destinations, for the
   gradients of features and weight, and sum them for the gradient of the bias.

Shape letters as in :mod:`step37_kernels.ops.project`.
"""

from __future__ import annotations

from typing import NamedTuple

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
from step37_kernels.ops.order import (
    COUNT_BLOCK,
    COUNT_LANES,
    COUNT_PARTS,
    count_positions,
    is_counted,
    order_by_id,
    room_for_order,
)

# Positions or rows of a program, and its columns. Every thread has whole vectors in both.
POSITION_BLOCK = (8, 512)
ROW_BLOCK = (32, 128)


@triton.jit
def _gradient_pointers(
    grad_ptr, positions, cols, batch_size, stride_s, stride_b, stride_h, ALIGNED: tl.constexpr
):
    stride_s = in_vectors(stride_s, ALIGNED)
    stride_b = in_vectors(stride_b, ALIGNED)
    s = (positions // batch_size).to(tl.int64)
    b = (positions % batch_size).to(tl.int64)
    return grad_ptr + (s * stride_s + b * stride_b)[:, None] + (cols.to(tl.int64) * stride_h)[None]


@triton.jit
def _embedding_gradient(
    program, grad_ptr, row_at_ptr, out_ptr, H, stride_h, num_positions, batch_size, stride_s,
    stride_b, ALIGNED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(H, BLOCK_H)
    positions = (program // across) * BLOCK_P + tl.arange(0, BLOCK_P)
    cols = (program % across) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (positions < num_positions)[:, None] & (cols < H)[None, :]
    row_at = tl.load(row_at_ptr + positions, mask=positions < num_positions, other=0)
    grad_ptrs = _gradient_pointers(
        grad_ptr, positions, cols, batch_size, stride_s, stride_b, stride_h, ALIGNED
    )
    # Overwritten rows are not read.
    values = tl.load(grad_ptrs, mask=inside & (row_at < 0)[:, None], other=0.0)
    out_ptrs = out_ptr + positions.to(tl.int64)[:, None] * H + cols[None, :]
    tl.store(out_ptrs, values, mask=inside)


@triton.jit
def _gather_rows(
    program, grad_ptr, destinations_ptr, rows_ptr, partial_ptr, H, stride_h, num_rows, batch_size,
    stride_s, stride_b, ROWS: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(H, BLOCK_H)
    block = program // across
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (program % across) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_width = (cols < H)[None, :]
    destinations = tl.load(destinations_ptr + rows, mask=rows < num_rows, other=-1)
    grad_ptrs = _gradient_pointers(
        grad_ptr, destinations, cols, batch_size, stride_s, stride_b, stride_h, ALIGNED
    )
    values = tl.load(grad_ptrs, mask=(destinations >= 0)[:, None] & in_width, other=0.0)
    values = round_to(values.to(tl.float32), rows_ptr.dtype.element_ty, INTERPRET)
    if ROWS:
        rows_ptrs = rows_ptr + rows.to(tl.int64)[:, None] * H + cols[None, :]
        tl.store(rows_ptrs, values, mask=(rows < num_rows)[:, None] & in_width)
    if BIAS:
        partial = tl.sum(values.to(tl.float32), axis=0)
        tl.store(partial_ptr + block.to(tl.int64) * H + cols, partial, mask=cols < H)


@triton.jit(
    do_not_specialize=[
        *["position_programs", "apart", "num_positions", "num_rows", "batch_size", "stride_s"],
        *["stride_b", "vocabulary"],
    ]
)
def gradient_rows_kernel(
    grad_ptr,  # [S, B, H] grad_output, any strides
    row_at_ptr,  # [S * B] int32: ≥ 0 where a feature row overwrote the embedding
    destinations_ptr,  # [R] int32: position of each row, or −1
    embeddings_ptr,  # [S * B, H] contiguous, out by the programs of positions, if ids_ptr is None
    rows_ptr,  # [R, H] contiguous, out if ROWS; in any case of the projector's dtype
    partial_ptr,  # [cdiv(R, BLOCK_R), H] fp32, out if BIAS: sums of a block's rounded rows
    ids_ptr,  # [S * B] int32 or int64, or None if the text rows came from embeddings
    sorted_ptr,  # [S * B] in the dtype of the ids, out by the programs of positions, or None
    order_ptr,  # [S * B] int64, out by the programs of positions, or None
    H,
    stride_h,
    position_programs,
    apart,  # programs 0, apart, 2 * apart, … are those of positions
    num_positions,
    num_rows,
    batch_size,
    stride_s,
    stride_b,
    vocabulary,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,  # stride_s and stride_b are whole vectors
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDTH_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH_R: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    COUNT_LANES: tl.constexpr,
    COUNT_PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    number = program // apart  # among the programs of positions
    if (program % apart == 0) & (number < position_programs):
        if ids_ptr is None:
            _embedding_gradient(
                number, grad_ptr, row_at_ptr, embeddings_ptr, H, stride_h, num_positions,
                batch_size, stride_s, stride_b, ALIGNED, BLOCK_P, WIDTH_P,
            )  # fmt: skip
        else:
            count_positions(
                number, ids_ptr, row_at_ptr, sorted_ptr, order_ptr, num_positions, vocabulary,
                COUNT_BLOCK, COUNT_LANES, COUNT_PARTS,
            )  # fmt: skip
    else:
        _gather_rows(
            program - tl.minimum(number + 1, position_programs), grad_ptr, destinations_ptr,
            rows_ptr, partial_ptr, H, stride_h, num_rows, batch_size, stride_s, stride_b, ROWS,
            BIAS, ALIGNED, INTERPRET, BLOCK_R, WIDTH_R,
        )  # fmt: skip


class RowGradients(NamedTuple):
    """What :func:`gradient_rows` computes. A tensor that is not wanted has the shape ``[0]``."""

    embeddings: Tensor
    """``[S, B, H]`` contiguous: ``grad_output`` with the overwritten rows zeroed."""
    rows: Tensor
    """``[R, H]`` in the projector's dtype: the gradient of the projected rows, zeros for dropped
    rows."""
    bias: Tensor
    """``[H]`` in that dtype: the sum of these rows, fp32 sums of blocks added in a fixed order."""
    ids: Tensor
    """``[S * B]`` in the dtype of the ids: those of all positions, sorted; −1 under feature rows;
    negative or not below ``vocabulary`` where no row of the table was looked up."""
    order: Tensor
    """``[S * B]`` int64: the position of each of these ids; positions of one id as they come."""


def gradient_rows(
    grad_output: Tensor,
    row_at: Tensor,
    destinations: Tensor,
    dtype: torch.dtype,
    *,
    embeddings: bool,
    rows: bool,
    bias: bool,
    input_ids: Tensor | None = None,
    vocabulary: int = 0,
) -> RowGradients:
    """Compute the gradients that need no matrix product, and the order of the ids, in one launch.

    Args:
        grad_output: ``[S, B, H]``, any strides; only read, each element at most once.
        row_at: ``[S, B]`` int32: the feature row at each position, −1 where the text stayed.
        destinations: ``[R]`` int32: the position of each feature row, −1 for rows that did not
            survive and for the unused entries of a shard.
        dtype: the projector's.
        embeddings, rows, bias: which gradients to compute. The first is for text rows that came
            from embeddings, so not with ``input_ids``.
        input_ids: ``[S, B]`` int32 or int64: put the positions in order by these ids. They are read
            in place where they are contiguous, as those of one sequence or of a batch-first plan
            are, and copied first otherwise. None: not wanted.
        vocabulary: the rows of the table in which they were looked up.

    Two more library operations, which pick the ids of text and sort them, take the place of
    counting where there are more positions than :func:`is_counted` allows.
    """
    seq_len, batch_size, hidden = grad_output.shape
    num_positions, num_rows = seq_len * batch_size, destinations.shape[0]
    stride_s, stride_b, stride_h = grad_output.stride()
    position_programs = row_programs = blocks = 0
    apart = 1
    if embeddings:
        position_programs = ceil_div(num_positions, POSITION_BLOCK[0])
        position_programs *= ceil_div(hidden, POSITION_BLOCK[1])
    if rows or bias:
        blocks = ceil_div(num_rows, ROW_BLOCK[0])
        row_programs = blocks * ceil_div(hidden, ROW_BLOCK[1])

    def empty(wanted: bool, shape: tuple[int, ...], of: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=of, device=grad_output.device)

    grad_embeddings = empty(embeddings, (seq_len, batch_size, hidden), grad_output.dtype)
    grad_rows = empty(rows, (num_rows, hidden), dtype)
    partial = empty(bias, (blocks, hidden), torch.float32)
    in_order = empty(False, (), torch.int64), empty(False, (), torch.int64)
    counting: tuple[Tensor | None, ...] = (None, None, None)
    if input_ids is not None and is_counted(num_positions, vocabulary):
        position_programs = ceil_div(num_positions, COUNT_BLOCK)
        # A program counts for longer than another gathers, so none should be the last; and while
        # all multiprocessors count, none reads the gradient. So they lie in the grid's first half.
        apart = max(1, (position_programs + row_programs) // max(1, 2 * position_programs))
        in_order = room_for_order(input_ids)
        counting = (input_ids.contiguous(), *in_order)
    elif input_ids is not None:
        in_order = order_by_id(torch.where(row_at < 0, input_ids, -1), vocabulary)
    programs = position_programs + row_programs
    if programs:
        with device_of(grad_output):
            launch(
                gradient_rows_kernel,
                (programs,),
                *(grad_output, row_at, destinations, grad_embeddings, grad_rows, partial),
                *counting,
                *(hidden, stride_h, position_programs, apart, num_positions, num_rows),
                *(batch_size, stride_s, stride_b, vocabulary),
                rows or not bias,  # without either there are no programs that ask
                bias,
                *(whole_vectors(stride_s, stride_b), INTERPRETED, *POSITION_BLOCK, *ROW_BLOCK),
                *(COUNT_BLOCK, COUNT_LANES, COUNT_PARTS),
            )
    grad_bias = partial.sum(0).to(dtype) if bias else empty(False, (), dtype)
    return RowGradients(grad_embeddings, grad_rows, grad_bias, *in_order)
