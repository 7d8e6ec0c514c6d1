"""Backward: gradient rows are masked or gathered once, then two dense matrix products.

``grad_output [S, B, H]`` comes with any strides (expanded, transposed, sliced) and is only read.
Shape letters as in :mod:`step37_kernels.ops.project`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import (
    INTERPRETED,
    device_of,
    dot_precision,
    mma,
    round_to,
    tile_of,
)
from step37_kernels.ops.tiles import Product, tile_for

COPY_BLOCK_P = 8
COPY_BLOCK_H = 512
GATHER_BLOCK_R = 32
GATHER_BLOCK_H = 128
_STRIDES = ["batch_size", "stride_s", "stride_b"]


@triton.jit
def _gradient_pointers(grad_ptr, positions, cols, batch_size, stride_s, stride_b, stride_h):
    s = (positions // batch_size).to(tl.int64)
    b = (positions % batch_size).to(tl.int64)
    return grad_ptr + (s * stride_s + b * stride_b)[:, None] + (cols.to(tl.int64) * stride_h)[None]


@triton.jit(do_not_specialize=["num_positions", *_STRIDES])
def embedding_grad_kernel(
    grad_ptr,  # [S, B, H] grad_output, any strides
    row_at_ptr,  # [S * B] int32: ≥ 0 where a feature row overwrote the embedding
    out_ptr,  # [P, H] contiguous, out
    num_positions,
    H,
    batch_size,
    stride_s,
    stride_b,
    stride_h,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    positions = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = (positions < num_positions)[:, None] & (cols < H)[None, :]
    row_at = tl.load(row_at_ptr + positions, mask=positions < num_positions, other=0)
    grad_ptrs = _gradient_pointers(
        grad_ptr, positions, cols, batch_size, stride_s, stride_b, stride_h
    )
    # Overwritten rows are not even read.
    values = tl.load(grad_ptrs, mask=exists & (row_at < 0)[:, None], other=0.0)
    out_ptrs = out_ptr + positions.to(tl.int64)[:, None] * H + cols[None, :]
    tl.store(out_ptrs, values, mask=exists)


@triton.jit(do_not_specialize=["num_rows", *_STRIDES])
def gather_grad_kernel(
    grad_ptr,  # [S, B, H] grad_output, any strides
    destinations_ptr,  # [R] int32
    rows_ptr,  # [R, H] contiguous, out, in the weight's dtype
    partial_ptr,  # [cdiv(R, BLOCK_R), H] fp32, out if BIAS_SUM
    num_rows,
    H,
    batch_size,
    stride_s,
    stride_b,
    stride_h,
    BIAS_SUM: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_width = (cols < H)[None, :]
    destinations = tl.load(destinations_ptr + rows, mask=rows < num_rows, other=-1)
    grad_ptrs = _gradient_pointers(
        grad_ptr, destinations, cols, batch_size, stride_s, stride_b, stride_h
    )
    values = tl.load(grad_ptrs, mask=(destinations >= 0)[:, None] & in_width, other=0.0)
    values = round_to(values.to(tl.float32), rows_ptr.dtype.element_ty, INTERPRET)
    rows_ptrs = rows_ptr + rows.to(tl.int64)[:, None] * H + cols[None, :]
    tl.store(rows_ptrs, values, mask=(rows < num_rows)[:, None] & in_width)
    if BIAS_SUM:
        partial = tl.sum(values.to(tl.float32), axis=0)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * H + cols, partial, mask=cols < H)


@triton.jit(do_not_specialize=["num_rows"])
def grad_features_kernel(
    grad_ptr,  # [R, H] contiguous
    weight_ptr,  # [H, C] contiguous
    out_ptr,  # [R, C] contiguous, out: grad @ weight
    num_rows,
    H,
    C,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    in_width = (cols < C)[None, :]
    g_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    g_ptrs = grad_ptr + g_rows[:, None] * H + ks[None, :]
    w_ptrs = weight_ptr + ks.to(tl.int64)[:, None] * C + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if EVEN_K:
            g = tl.load(g_ptrs)
            w = tl.load(w_ptrs, mask=in_width, other=0.0)
        else:
            g = tl.load(g_ptrs, mask=(ks < H - k)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(ks < H - k)[:, None] & in_width, other=0.0)
        acc = mma(g, w, acc, PRECISION, INTERPRET)
        g_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * C
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :]
    result = round_to(acc, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptrs, result, mask=(rows < num_rows)[:, None] & in_width)


@triton.jit(do_not_specialize=["num_rows"])
def grad_weight_kernel(
    grad_ptr,  # [R, H] contiguous
    x_ptr,  # [R, C] contiguous
    out_ptr,  # [H, C] contiguous, out: gradᵀ @ x, on top of what it holds if ACCUMULATE
    num_rows,
    H,
    C,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(H, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP_M)
    hs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    g_ptrs = grad_ptr + ks.to(tl.int64)[:, None] * H + hs[None, :]
    x_ptrs = x_ptr + ks.to(tl.int64)[:, None] * C + cols[None, :]
    out_ptrs = out_ptr + hs.to(tl.int64)[:, None] * C + cols[None, :]
    inside = (hs < H)[:, None] & (cols < C)[None, :]
    if ACCUMULATE:
        # Read before the loop: an epilogue that reads what it writes needs twice the registers.
        acc = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, num_rows, BLOCK_K):
        in_rows = (ks < num_rows - k)[:, None]
        g = tl.load(g_ptrs, mask=in_rows & (hs < H)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=in_rows & (cols < C)[None, :], other=0.0)
        acc = mma(tl.trans(g), x, acc, PRECISION, INTERPRET)
        g_ptrs += BLOCK_K * H
        x_ptrs += BLOCK_K * C
    tl.store(out_ptrs, round_to(acc, out_ptr.dtype.element_ty, INTERPRET), mask=inside)


def embedding_grad(grad_output: Tensor, row_at: Tensor) -> Tensor:
    """``grad_output [S, B, H]`` with the overwritten rows zeroed, as a new contiguous tensor."""
    seq_len, batch_size, hidden = grad_output.shape
    out = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    num_positions = seq_len * batch_size
    grid = (triton.cdiv(num_positions, COPY_BLOCK_P), triton.cdiv(hidden, COPY_BLOCK_H))
    with device_of(out):
        embedding_grad_kernel[grid](
            grad_output,
            row_at,
            out,
            num_positions,
            hidden,
            batch_size,
            *grad_output.stride(),
            BLOCK_P=COPY_BLOCK_P,
            BLOCK_H=COPY_BLOCK_H,
        )
    return out


def gather_grad(
    grad_output: Tensor, destinations: Tensor, dtype: torch.dtype, *, bias_sum: bool
) -> tuple[Tensor, Tensor]:
    """Gather the gradient of every feature row, zeros for rows that did not survive.

    Args:
        grad_output: ``[S, B, H]``, any strides.
        destinations: ``[R]`` int32, R > 0.
        dtype: the projector's; the gradient of the cast to the embeddings' dtype.
        bias_sum: also sum the rows, as the bias gradient.

    Returns:
        ``[R, H]`` contiguous, and ``[H]`` (``[0]`` without ``bias_sum``). The sum is taken in fp32
        over blocks of rows in a fixed order.
    """
    _, batch_size, hidden = grad_output.shape
    num_rows = destinations.shape[0]
    rows = torch.empty(num_rows, hidden, dtype=dtype, device=grad_output.device)
    blocks = triton.cdiv(num_rows, GATHER_BLOCK_R)
    partial = torch.empty(
        blocks if bias_sum else 0, hidden, dtype=torch.float32, device=grad_output.device
    )
    with device_of(rows):
        gather_grad_kernel[(blocks, triton.cdiv(hidden, GATHER_BLOCK_H))](
            grad_output,
            destinations,
            rows,
            partial,
            num_rows,
            hidden,
            batch_size,
            *grad_output.stride(),
            BIAS_SUM=bias_sum,
            INTERPRET=INTERPRETED,
            BLOCK_R=GATHER_BLOCK_R,
            BLOCK_H=GATHER_BLOCK_H,
        )
    return rows, partial.sum(0).to(dtype) if bias_sum else rows.new_empty(0)


def grad_features(grad_rows: Tensor, weight: Tensor) -> Tensor:
    """``grad_rows [R, H] @ weight [H, C]`` → ``[R, C]`` in their dtype; R > 0."""
    num_rows, hidden = grad_rows.shape
    width = weight.shape[1]
    out = torch.empty(num_rows, width, dtype=grad_rows.dtype, device=grad_rows.device)
    tile = tile_for("grad_features", num_rows, grad_rows.dtype, grad_rows.device)
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(width, tile.block_n),)
    with device_of(out):
        grad_features_kernel[grid](
            grad_rows,
            weight,
            out,
            num_rows,
            hidden,
            width,
            EVEN_K=hidden % tile.block_k == 0,
            PRECISION=dot_precision(out.dtype),
            INTERPRET=INTERPRETED,
            **tile.options(),
        )
    return out


def grad_weight(grad_rows: Tensor, x: Tensor) -> Tensor:
    """``grad_rowsᵀ [H, R] @ x [R, C]`` → ``[H, C]`` in their dtype; R > 0."""
    out = torch.empty(grad_rows.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    grad_weight_into(grad_rows, x, out, accumulate=False)
    return out


def grad_weight_into(grad_rows: Tensor, x: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Write ``grad_rowsᵀ @ x`` to ``out [H, C]`` of any floating dtype, or add it in fp32."""
    num_rows, hidden = grad_rows.shape
    width = x.shape[1]
    product: Product = "accumulate_weight" if accumulate else "grad_weight"
    tile = tile_for(product, num_rows, x.dtype, x.device)
    grid = (triton.cdiv(hidden, tile.block_m) * triton.cdiv(width, tile.block_n),)
    with device_of(out):
        grad_weight_kernel[grid](
            grad_rows,
            x,
            out,
            num_rows,
            hidden,
            width,
            ACCUMULATE=accumulate,
            PRECISION=dot_precision(x.dtype),
            INTERPRET=INTERPRETED,
            **tile.options(),
        )
