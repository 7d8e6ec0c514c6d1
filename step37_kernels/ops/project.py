"""Forward: pack feature rows where their layout needs it; project, round and scatter them.

Shape letters: ``R`` feature rows of all groups, ``C`` encoder output width, ``H`` hidden size,
``P = S · B`` positions of the ``[S, B, H]`` output.
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
    whole_vectors,
)
from step37_kernels.ops.gemm import (
    num_programs,
    operand,
    partial_sums,
    rows_times_weight,
    sum_splits,
)
from step37_kernels.ops.launch import Constants, Launcher
from step37_kernels.ops.tiles import Tile, tile_for

PACK_BLOCK_L = 64
PACK_BLOCK_C = 64


@triton.jit(do_not_specialize=["rows_each", "first_row", "stride_n"])
def pack_rows_kernel(
    source_ptr,  # [N, L, C], any strides
    packed_ptr,  # [R, C] contiguous, out: rows first_row … first_row + N·L
    C,
    stride_l,
    stride_c,
    rows_each,
    first_row,
    stride_n,
    WHOLE: tl.constexpr,  # stride_n is whole vectors
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Along L where the view is channels-first (stride_l = 1) loads are coalesced, along C stores:
    # the compiler exchanges the tile through shared memory between the two.
    blocks_l = tl.cdiv(rows_each, BLOCK_L)
    n = (tl.program_id(0) // blocks_l).to(tl.int64)
    rows = (tl.program_id(0) % blocks_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < rows_each)[:, None] & (cols < C)[None, :]
    source = (
        source_ptr
        + n * in_vectors(stride_n, WHOLE)
        + rows.to(tl.int64)[:, None] * stride_l
        + cols.to(tl.int64)[None, :] * stride_c
    )
    values = tl.load(source, mask=inside)
    target = (first_row + n * rows_each + rows)[:, None] * C + cols[None, :]
    tl.store(packed_ptr + target, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def project_scatter_kernel(
    x,  # [R, C] contiguous; descriptor of [BLOCK_M, BLOCK_K] blocks, or pointer
    weight,  # [H, C] contiguous; descriptor of [BLOCK_N, BLOCK_K] blocks, or pointer
    bias_ptr,  # [H], read if HAS_BIAS; else any pointer of the weight's dtype
    destinations_ptr,  # [R] int32: position s * B + b, or −1
    live_ptr,  # [1] int32, read if HAS_LIVE: rows from this one on are dropped, and not computed
    out_ptr,  # [P, H] contiguous: only the rows of destinations are written
    partial_ptr,  # [SPLIT_K, R, H] fp32, out if SPLIT_K > 1; then out is left to the second pass
    H,
    C,
    num_rows,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
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
    num_tiles = num_m * tl.cdiv(H, BLOCK_N)
    first = tl.program_id(0)
    split = tl.program_id(1)
    if PERSISTENT:
        for tile in tl.range(first, num_tiles, tl.num_programs(0), flatten=True):
            rows_times_weight(
                tile, num_m, split, x, weight, bias_ptr, destinations_ptr, out_ptr, partial_ptr,
                num_rows, H, C, True, HAS_BIAS, True, EVEN_K, False, PRECISION, INTERPRET, TMA,
                SPLIT_K, SUBTILES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )  # fmt: skip
    elif first < num_tiles:
        rows_times_weight(
            first, num_m, split, x, weight, bias_ptr, destinations_ptr, out_ptr, partial_ptr,
            num_rows, H, C, True, HAS_BIAS, True, EVEN_K, False, PRECISION, INTERPRET, TMA,
            SPLIT_K, SUBTILES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip


_pack_rows = Launcher(pack_rows_kernel)


@functools.lru_cache
def _pack_constants(whole: bool) -> Constants:
    return Constants(WHOLE=whole, BLOCK_L=PACK_BLOCK_L, BLOCK_C=PACK_BLOCK_C)


_project_scatter = Launcher(project_scatter_kernel)


def pack_rows(features: list[Tensor], num_rows: int) -> Tensor:
    """``[N, L, C]`` tensors of any strides → one contiguous ``[R, C]``, one launch a tensor."""
    width = features[0].shape[2]
    packed = torch.empty(num_rows, width, dtype=features[0].dtype, device=features[0].device)
    first_row = 0
    with device_of(packed):
        for feature in features:
            n, rows_each, _ = feature.shape
            grid = (n * ceil_div(rows_each, PACK_BLOCK_L), ceil_div(width, PACK_BLOCK_C))
            stride_n, *strides = feature.stride()
            _pack_rows(
                grid,
                (feature, packed),
                (width, *strides),
                (rows_each, first_row, stride_n),
                _pack_constants(whole_vectors(stride_n)),
            )
            first_row += n * rows_each
    return packed


@functools.lru_cache
def _constants(tile: Tile, width: int, has_bias: bool, has_live: bool, precision: str) -> Constants:
    return Constants(
        HAS_BIAS=has_bias,
        HAS_LIVE=has_live,
        EVEN_K=width % tile.block_k == 0,
        PRECISION=precision,
        INTERPRET=INTERPRETED,
        **tile.options(),
    )


def project_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    live_rows: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``x @ weightᵀ + bias`` to the rows ``destinations`` of ``out``; one launch, or two
    where the tile table splits the reduction of a few rows.

    Args:
        x: ``[R, C]`` contiguous, R > 0, in the weight's dtype.
        weight: ``[H, C]`` contiguous.
        bias: ``[H]`` contiguous or None.
        destinations: ``[R]`` int32, unique where ≥ 0.
        live_rows: ``[1]`` int32, how many rows from the first on have a destination at all; None
            where they may be anywhere.
        out: ``[S, B, H]`` contiguous.
    """
    num_rows, width = x.shape
    hidden = weight.shape[0]
    tile = tile_for("forward", num_rows, x, weight)
    partial = partial_sums(tile, num_rows, hidden, out)
    with device_of(x):
        _project_scatter(
            (num_programs(tile, num_rows, hidden, x.device), tile.split_k),
            (
                operand(x, tile.block_m, tile.block_k, tile),
                operand(weight, tile.block_n, tile.block_k, tile),
                weight if bias is None else bias,
                destinations,
                destinations if live_rows is None else live_rows,
                out,
                partial,
            ),
            (hidden, width),
            (num_rows,),
            _constants(
                tile, width, bias is not None, live_rows is not None, dot_precision(x.dtype)
            ),
        )
        sum_splits(tile, partial, weight, bias, destinations, out)
