"""Backward: gradient rows are masked or gathered once, then two dense matrix products.

``grad_output [S, B, H]`` comes with any strides (expanded, transposed, sliced) and is only read.
Shape letters as in :mod:`step37_kernels.ops.project`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import (
    INTERPRETED,
    ceil_div,
    device_of,
    dot_precision,
    in_vectors,
    round_to,
    whole_vectors,
)
from step37_kernels.ops.gemm import (
    halves,
    load_block,
    mma,
    num_programs,
    operand,
    partial_sums,
    rows_times_weight,
    sum_splits,
    tile_of,
)
from step37_kernels.ops.launch import Constants, Launcher
from step37_kernels.ops.tiles import Product, Tile, tile_for

COPY_BLOCK_P = 8
COPY_BLOCK_H = 512
GATHER_BLOCK_R = 32
GATHER_BLOCK_H = 128
_STRIDES = ["batch_size", "stride_s", "stride_b"]


@triton.jit
def _gradient_pointers(
    grad_ptr, positions, cols, batch_size, stride_s, stride_b, stride_h, WHOLE: tl.constexpr
):
    stride_s = in_vectors(stride_s, WHOLE)
    stride_b = in_vectors(stride_b, WHOLE)
    s = (positions // batch_size).to(tl.int64)
    b = (positions % batch_size).to(tl.int64)
    return grad_ptr + (s * stride_s + b * stride_b)[:, None] + (cols.to(tl.int64) * stride_h)[None]


@triton.jit(do_not_specialize=["num_positions", *_STRIDES])
def embedding_grad_kernel(
    grad_ptr,  # [S, B, H] grad_output, any strides
    row_at_ptr,  # [S * B] int32: ≥ 0 where a feature row overwrote the embedding
    out_ptr,  # [P, H] contiguous, out
    H,
    stride_h,
    num_positions,
    batch_size,
    stride_s,
    stride_b,
    WHOLE: tl.constexpr,  # stride_s and stride_b are whole vectors
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    positions = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = (positions < num_positions)[:, None] & (cols < H)[None, :]
    row_at = tl.load(row_at_ptr + positions, mask=positions < num_positions, other=0)
    grad_ptrs = _gradient_pointers(
        grad_ptr, positions, cols, batch_size, stride_s, stride_b, stride_h, WHOLE
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
    H,
    stride_h,
    num_rows,
    batch_size,
    stride_s,
    stride_b,
    WHOLE: tl.constexpr,
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
        grad_ptr, destinations, cols, batch_size, stride_s, stride_b, stride_h, WHOLE
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
    grad,  # [R, H] contiguous; descriptor of [BLOCK_M, BLOCK_K] blocks, or pointer
    weight,  # [H, C] contiguous; descriptor of [BLOCK_K, BLOCK_N] blocks, or pointer
    dtype_ptr,  # any pointer of the weight's dtype; not read
    live_ptr,  # [1] int32, read if HAS_LIVE: gradients of rows from this one on are not wanted
    out_ptr,  # [R, C] contiguous, out: grad @ weight
    partial_ptr,  # [SPLIT_K, R, C] fp32, out if SPLIT_K > 1; then out is left to the second pass
    H,
    C,
    num_rows,
    HAS_LIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    live_rows = num_rows
    if HAS_LIVE:
        live_rows = tl.load(live_ptr)
    num_m = tl.cdiv(live_rows, BLOCK_M)
    num_tiles = num_m * tl.cdiv(C, BLOCK_N)
    first = tl.program_id(0)
    split = tl.program_id(1)
    if PERSISTENT:
        for tile in tl.range(first, num_tiles, tl.num_programs(0), flatten=True):
            rows_times_weight(
                tile, num_m, split, grad, weight, dtype_ptr, dtype_ptr, out_ptr, partial_ptr,
                num_rows, C, H, False, False, False, EVEN_K, EVEN_N, PRECISION, INTERPRET, TMA,
                SPLIT_K, SUBTILES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )  # fmt: skip
    elif first < num_tiles:
        rows_times_weight(
            first, num_m, split, grad, weight, dtype_ptr, dtype_ptr, out_ptr, partial_ptr,
            num_rows, C, H, False, False, False, EVEN_K, EVEN_N, PRECISION, INTERPRET, TMA,
            SPLIT_K, SUBTILES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip


@triton.jit
def _store_sum(acc, out_ptr, row, col, H, C, ADD: tl.constexpr, INTERPRET: tl.constexpr,
               ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    inside = (rows < H)[:, None] & (cols < C)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, round_to(acc, out_ptr.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _grad_weight_tile(
    tile,
    num_m,
    grad,
    x,
    out_ptr,
    num_rows,
    live_rows,
    H,
    C,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    TMA: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(tile, num_m, tl.cdiv(C, BLOCK_N), GROUP_M)
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    # An epilogue that reads what it writes needs registers for both: either the accumulator starts
    # from there, or the epilogue goes by halves.
    START: tl.constexpr = ACCUMULATE and SUBTILES == 1
    if START:
        hs = row + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        held = out_ptr + hs.to(tl.int64)[:, None] * C + cols[None, :]
        acc = tl.load(held, mask=(hs < H)[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, live_rows, BLOCK_K):
        a = load_block(grad, k, row, num_rows, H, BLOCK_K, BLOCK_M, "zero", "zero", TMA)
        b = load_block(x, k, col, num_rows, C, BLOCK_K, BLOCK_N, "zero", "zero", TMA)
        acc = mma(a.T, b, acc, PRECISION, INTERPRET)
    ADD: tl.constexpr = ACCUMULATE and SUBTILES == 2
    if SUBTILES == 2:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_sum(left, out_ptr, row, col, H, C, ADD, INTERPRET, BLOCK_M, HALF)
        _store_sum(right, out_ptr, row, col + HALF, H, C, ADD, INTERPRET, BLOCK_M, HALF)
    else:
        _store_sum(acc, out_ptr, row, col, H, C, ADD, INTERPRET, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows"])
def grad_weight_kernel(
    grad,  # [R, H] contiguous; descriptor of [BLOCK_K, BLOCK_M] blocks, or pointer
    x,  # [R, C] contiguous; descriptor of [BLOCK_K, BLOCK_N] blocks, or pointer
    live_ptr,  # [1] int32, read if HAS_LIVE: rows from this one on are zero in both
    out_ptr,  # [H, C] contiguous, out: gradᵀ @ x, on top of what it holds if ACCUMULATE
    H,
    C,
    num_rows,
    HAS_LIVE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    live_rows = num_rows
    if HAS_LIVE:
        live_rows = tl.load(live_ptr)
    num_m = tl.cdiv(H, BLOCK_M)
    num_tiles = num_m * tl.cdiv(C, BLOCK_N)
    first = tl.program_id(0)
    if PERSISTENT:
        for tile in tl.range(first, num_tiles, tl.num_programs(0), flatten=True):
            _grad_weight_tile(
                tile, num_m, grad, x, out_ptr, num_rows, live_rows, H, C,
                ACCUMULATE, PRECISION, INTERPRET, TMA, SUBTILES,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )  # fmt: skip
    elif first < num_tiles:
        _grad_weight_tile(
            first, num_m, grad, x, out_ptr, num_rows, live_rows, H, C,
            ACCUMULATE, PRECISION, INTERPRET, TMA, SUBTILES,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip


_embedding_grad = Launcher(embedding_grad_kernel)
_gather_grad = Launcher(gather_grad_kernel)
_grad_features = Launcher(grad_features_kernel)
_grad_weight = Launcher(grad_weight_kernel)


@functools.lru_cache
def _copy_constants(whole: bool) -> Constants:
    return Constants(WHOLE=whole, BLOCK_P=COPY_BLOCK_P, BLOCK_H=COPY_BLOCK_H)


def embedding_grad(grad_output: Tensor, row_at: Tensor) -> Tensor:
    """``grad_output [S, B, H]`` with the overwritten rows zeroed, as a new contiguous tensor."""
    seq_len, batch_size, hidden = grad_output.shape
    out = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    num_positions = seq_len * batch_size
    grid = (ceil_div(num_positions, COPY_BLOCK_P), ceil_div(hidden, COPY_BLOCK_H))
    stride_s, stride_b, stride_h = grad_output.stride()
    with device_of(out):
        _embedding_grad(
            grid,
            (grad_output, row_at, out),
            (hidden, stride_h),
            (num_positions, batch_size, stride_s, stride_b),
            _copy_constants(whole_vectors(stride_s, stride_b)),
        )
    return out


@functools.lru_cache
def _gather_constants(whole: bool, bias_sum: bool) -> Constants:
    return Constants(
        WHOLE=whole,
        BIAS_SUM=bias_sum,
        INTERPRET=INTERPRETED,
        BLOCK_R=GATHER_BLOCK_R,
        BLOCK_H=GATHER_BLOCK_H,
    )


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
    blocks = ceil_div(num_rows, GATHER_BLOCK_R)
    partial = torch.empty(
        blocks if bias_sum else 0, hidden, dtype=torch.float32, device=grad_output.device
    )
    stride_s, stride_b, stride_h = grad_output.stride()
    with device_of(rows):
        _gather_grad(
            (blocks, ceil_div(hidden, GATHER_BLOCK_H)),
            (grad_output, destinations, rows, partial),
            (hidden, stride_h),
            (num_rows, batch_size, stride_s, stride_b),
            _gather_constants(whole_vectors(stride_s, stride_b), bias_sum),
        )
    return rows, partial.sum(0).to(dtype) if bias_sum else rows.new_empty(0)


@functools.lru_cache
def _features_constants(
    tile: Tile, hidden: int, width: int, has_live: bool, precision: str
) -> Constants:
    return Constants(
        HAS_LIVE=has_live,
        EVEN_K=hidden % tile.block_k == 0,
        EVEN_N=width % tile.block_n == 0,
        PRECISION=precision,
        INTERPRET=INTERPRETED,
        **tile.options(),
    )


def grad_features(grad_rows: Tensor, weight: Tensor, live_rows: Tensor | None) -> Tensor:
    """``grad_rows [R, H] @ weight [H, C]`` → ``[R, C]`` in their dtype; R > 0.

    Rows from ``live_rows [1]`` (int32) on, where it is given, are left as they are in new memory.
    """
    num_rows, hidden = grad_rows.shape
    width = weight.shape[1]
    out = torch.empty(num_rows, width, dtype=grad_rows.dtype, device=grad_rows.device)
    tile = tile_for("grad_features", num_rows, grad_rows, weight)
    partial = partial_sums(tile, num_rows, width, out)
    with device_of(out):
        _grad_features(
            (num_programs(tile, num_rows, width, out.device), tile.split_k),
            (
                operand(grad_rows, tile.block_m, tile.block_k, tile),
                operand(weight, tile.block_k, tile.block_n, tile),
                weight,
                weight if live_rows is None else live_rows,
                out,
                partial,
            ),
            (hidden, width),
            (num_rows,),
            _features_constants(
                tile, hidden, width, live_rows is not None, dot_precision(out.dtype)
            ),
        )
        sum_splits(tile, partial, weight, None, None, out)
    return out


@functools.lru_cache
def _weight_constants(tile: Tile, has_live: bool, accumulate: bool, precision: str) -> Constants:
    options = tile.options()
    del options["SPLIT_K"]  # the reduction over rows is not split: the output has tiles enough
    return Constants(
        HAS_LIVE=has_live,
        ACCUMULATE=accumulate,
        PRECISION=precision,
        INTERPRET=INTERPRETED,
        **options,
    )


def grad_weight(grad_rows: Tensor, x: Tensor, live_rows: Tensor | None) -> Tensor:
    """``grad_rowsᵀ [H, R] @ x [R, C]`` → ``[H, C]`` in their dtype; R > 0."""
    out = torch.empty(grad_rows.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    grad_weight_into(grad_rows, x, live_rows, out, accumulate=False)
    return out


def grad_weight_into(
    grad_rows: Tensor, x: Tensor, live_rows: Tensor | None, out: Tensor, *, accumulate: bool
) -> None:
    """Write ``grad_rowsᵀ @ x`` to ``out [H, C]`` of any floating dtype, or add it in fp32.

    Rows from ``live_rows [1]`` (int32) on, where it is given, are zeros and are passed over.
    """
    num_rows, hidden = grad_rows.shape
    width = x.shape[1]
    product: Product = "accumulate_weight" if accumulate else "grad_weight"
    tile = tile_for(product, num_rows, grad_rows, x)
    with device_of(out):
        _grad_weight(
            (num_programs(tile, hidden, width, out.device),),
            (
                operand(grad_rows, tile.block_k, tile.block_m, tile),
                operand(x, tile.block_k, tile.block_n, tile),
                grad_rows if live_rows is None else live_rows,
                out,
            ),
            (hidden, width),
            (num_rows,),
            _weight_constants(tile, live_rows is not None, accumulate, dot_precision(x.dtype)),
        )
