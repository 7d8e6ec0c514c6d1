"""What the three matrix products share: the walk over tiles, loading a block, writing one back.

Operands are two-dimensional, contiguous matrices. A kernel gets them as tensor descriptors, whose
blocks the copy engine (TMA) brings to shared memory, or as pointers: constexpr ``TMA`` says which.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from step37_kernels.ops.common import INTERPRETED, ceil_div, round_to
from step37_kernels.ops.launch import Constants, Launcher
from step37_kernels.ops.tiles import Tile


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``acc + a @ b`` with fp32 accumulation."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile coordinates of a program: ``GROUP_M`` rows of tiles share their columns in L2."""
    per_group = GROUP_M * num_n
    first_m = (pid // per_group) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    inside = pid % per_group
    return first_m + inside % rows, inside // rows


@triton.jit
def load_block(
    matrix,  # [num_rows, num_cols] contiguous
    row,
    col,
    num_rows,
    num_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROW_EDGE: tl.constexpr,
    COL_EDGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """The ``[ROWS, COLS]`` block at (row, col).

    An edge says what is beyond the last row or column: ``"zero"`` reads zeros; ``"clamp"`` reads
    the last one again, without a mask, where nobody looks at the result; ``"none"``: no block
    reaches there. The copy engine reads zeros in all cases.
    """
    if TMA:
        block = matrix.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        inside = tl.full((ROWS, COLS), 1, tl.int1)
        if ROW_EDGE == "clamp":
            rows = tl.minimum(rows, num_rows - 1)
        elif ROW_EDGE == "zero":
            inside &= (rows < num_rows)[:, None]
        if COL_EDGE == "zero":
            inside &= (cols < num_cols)[None, :]
        block_ptrs = matrix + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
        if ROW_EDGE == "zero" or COL_EDGE == "zero":
            block = tl.load(block_ptrs, mask=inside, other=0.0)
        else:
            block = tl.load(block_ptrs)
    return block


@triton.jit
def halves(block, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a ``[ROWS, COLS]`` block."""
    return tl.split(tl.permute(tl.reshape(block, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def store_block(
    acc,  # [ROWS, COLS] fp32
    bias_ptr,  # [N] in the weight's dtype: read if HAS_BIAS, else any pointer of that dtype
    destinations_ptr,  # [M] int32, read if SCATTER
    out_ptr,  # [*, N] contiguous, of any floating dtype
    row,
    col,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    SCATTER: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add the bias, round, and write row ``m`` to row ``destinations[m]`` (or ``m``) of ``out``."""
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    # To the weight's dtype first, as a projector on its own would, then to the output's.
    values = round_to(acc, bias_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    values = round_to(values, out_ptr.dtype.element_ty, INTERPRET)
    if SCATTER:
        targets = tl.load(destinations_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
    else:
        targets = tl.where(rows < M, rows, -1).to(tl.int64)
    out_ptrs = out_ptr + targets[:, None] * N + cols[None, :]
    tl.store(out_ptrs, values, mask=(targets >= 0)[:, None] & (cols < N)[None, :])


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    bias_ptr,
    destinations_ptr,
    out_ptr,
    partial_ptr,  # [SPLIT_K, M, N] fp32, out if SPLIT_K > 1; everything else is left then
    row,
    col,
    split,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    SCATTER: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """The end of a product's tile: :func:`store_block`, in halves if ``SUBTILES`` is 2, which
    needs fewer registers; or the fp32 values for :func:`sum_splits_kernel`."""
    if SPLIT_K > 1:
        rows = row + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        first = (split.to(tl.int64) * M + rows) * N
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(partial_ptr + first[:, None] + cols[None, :], acc, mask=inside)
    elif SUBTILES == 2:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        store_block(
            left, bias_ptr, destinations_ptr, out_ptr, row, col, M, N,
            HAS_BIAS, SCATTER, INTERPRET, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        store_block(
            right, bias_ptr, destinations_ptr, out_ptr, row, col + BLOCK_N // 2, M, N,
            HAS_BIAS, SCATTER, INTERPRET, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        store_block(
            acc, bias_ptr, destinations_ptr, out_ptr, row, col, M, N,
            HAS_BIAS, SCATTER, INTERPRET, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def rows_times_weight(
    tile,
    num_m,  # tiles along M to walk over
    split,
    a,  # [M, K], read in [BLOCK_M, BLOCK_K] blocks
    weight,  # [N, K] in [BLOCK_N, BLOCK_K] blocks if TRANSPOSED, else [K, N] in [BLOCK_K, BLOCK_N]
    bias_ptr,
    destinations_ptr,
    out_ptr,
    partial_ptr,
    M,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows times the weight, the ``split``-th part of its reduction, and its end."""
    pid_m, pid_n = tile_of(tile, num_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    K_EDGE: tl.constexpr = "none" if EVEN_K else "zero"
    N_EDGE: tl.constexpr = "none" if EVEN_N else "zero"
    blocks_k = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first_k = split * blocks_k * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(first_k, tl.minimum(first_k + blocks_k * BLOCK_K, K), BLOCK_K):
        # Rows and columns past the end are never stored, so they may hold anything.
        x = load_block(a, row, k, M, K, BLOCK_M, BLOCK_K, "clamp", K_EDGE, TMA)
        if TRANSPOSED:
            w = load_block(weight, col, k, N, K, BLOCK_N, BLOCK_K, "clamp", K_EDGE, TMA).T
        else:
            w = load_block(weight, k, col, K, N, BLOCK_K, BLOCK_N, K_EDGE, N_EDGE, TMA)
        acc = mma(x, w, acc, PRECISION, INTERPRET)
    finish_tile(
        acc, bias_ptr, destinations_ptr, out_ptr, partial_ptr, row, col, split, M, N,
        HAS_BIAS, SCATTER, INTERPRET, BLOCK_M, BLOCK_N, SPLIT_K, SUBTILES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def sum_splits_kernel(
    partial_ptr,  # [SPLIT_K, M, N] fp32
    bias_ptr,
    destinations_ptr,
    out_ptr,
    N,
    M,
    HAS_BIAS: tl.constexpr,
    SCATTER: tl.constexpr,
    INTERPRET: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Second pass of a product split along K: the parts are added in order, so two runs agree."""
    row = tl.program_id(0) * ROWS
    col = tl.program_id(1) * COLS
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    part_ptrs = partial_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    acc = tl.load(part_ptrs, mask=inside, other=0.0)
    for _ in tl.static_range(1, SPLIT_K):
        part_ptrs += M.to(tl.int64) * N
        acc += tl.load(part_ptrs, mask=inside, other=0.0)
    store_block(
        acc, bias_ptr, destinations_ptr, out_ptr, row, col, M, N,
        HAS_BIAS, SCATTER, INTERPRET, ROWS, COLS,
    )  # fmt: skip


_sum_splits = Launcher(sum_splits_kernel)
_SUM_ROWS, _SUM_COLS = 8, 512


def operand(matrix: Tensor, rows: int, cols: int, tile: Tile) -> Tensor | TensorDescriptor:
    """A matrix as the kernels of this tile take it, to be read in ``[rows, cols]`` blocks."""
    if tile.tma:
        # Not the tensor's own strides: that of an only row may be anything, and is never used.
        return TensorDescriptor(matrix, matrix.shape, (matrix.shape[1], 1), [rows, cols])
    return matrix


def num_programs(tile: Tile, rows: int, cols: int, device: torch.device) -> int:
    """Programs along the first axis for an output of ``[rows, cols]``."""
    tiles = ceil_div(rows, tile.block_m) * ceil_div(cols, tile.block_n)
    return min(tiles, _processors(device)) if tile.persistent else tiles


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # in the interpreter: so few that a program walks over several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache
def _sum_constants(has_bias: bool, scatter: bool, split_k: int) -> Constants:
    return Constants(
        HAS_BIAS=has_bias,
        SCATTER=scatter,
        INTERPRET=INTERPRETED,
        SPLIT_K=split_k,
        ROWS=_SUM_ROWS,
        COLS=_SUM_COLS,
    )


def partial_sums(tile: Tile, rows: int, cols: int, out: Tensor) -> Tensor:
    """Where a product that splits K leaves its parts; ``out`` itself where it does not."""
    if tile.split_k == 1:
        return out
    return torch.empty(tile.split_k, rows, cols, dtype=torch.float32, device=out.device)


def sum_splits(
    tile: Tile,
    partial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor | None,
    out: Tensor,
) -> None:
    """Second pass where the tile splits K: ``out`` gets the sum of the parts."""
    if tile.split_k == 1:
        return
    split_k, rows, cols = partial.shape
    _sum_splits(
        (ceil_div(rows, _SUM_ROWS), ceil_div(cols, _SUM_COLS)),
        (
            partial,
            weight if bias is None else bias,
            partial if destinations is None else destinations,
            out,
        ),
        (cols,),
        (rows,),
        _sum_constants(bias is not None, destinations is not None, split_k),
    )
