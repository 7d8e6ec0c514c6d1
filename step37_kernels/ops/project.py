"""Forward: pack feature rows where their layout needs it; project, round and scatter them.

Shape letters: ``R`` feature rows of all groups, ``C`` encoder output width, ``H`` hidden size,
``P = S · B`` positions of the ``[S, B, H]`` output.
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
from step37_kernels.ops.tiles import tile_for

PACK_BLOCK_L = 64
PACK_BLOCK_C = 64


@triton.jit(do_not_specialize=["rows_each", "first_row", "stride_n"])
def pack_rows_kernel(
    source_ptr,  # [N, L, C], any strides
    packed_ptr,  # [R, C] contiguous, out: rows first_row … first_row + N·L
    rows_each,
    C,
    first_row,
    stride_n,
    stride_l,
    stride_c,
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
        + n * stride_n
        + rows.to(tl.int64)[:, None] * stride_l
        + cols.to(tl.int64)[None, :] * stride_c
    )
    values = tl.load(source, mask=inside)
    target = (first_row + n * rows_each + rows)[:, None] * C + cols[None, :]
    tl.store(packed_ptr + target, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def project_scatter_kernel(
    x_ptr,  # [R, C] contiguous
    weight_ptr,  # [H, C] contiguous
    bias_ptr,  # [H], read if HAS_BIAS
    destinations_ptr,  # [R] int32: position s * B + b, or −1
    out_ptr,  # [P, H] contiguous: only the rows of destinations are written
    num_rows,
    H,
    C,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read others' values again and are never stored: no load in the
    # loop needs a mask unless C is no multiple of BLOCK_K.
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    w_rows = tl.minimum(cols, H - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * C + ks[None, :]
    w_ptrs = weight_ptr + w_rows[None, :] * C + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, C, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(ks < C - k)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(ks < C - k)[:, None], other=0.0)
        acc = mma(x, w, acc, PRECISION, INTERPRET)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + w_rows).to(tl.float32)[None, :]

    # To the weight's dtype first, as a projector on its own would, then to the embeddings'.
    projected = round_to(acc, weight_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    projected = round_to(projected, out_ptr.dtype.element_ty, INTERPRET)
    destinations = tl.load(destinations_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    out_ptrs = out_ptr + destinations[:, None] * H + cols[None, :]
    tl.store(out_ptrs, projected, mask=(destinations >= 0)[:, None] & (cols < H)[None, :])


def pack_rows(features: list[Tensor], num_rows: int) -> Tensor:
    """``[N, L, C]`` tensors of any strides → one contiguous ``[R, C]``, one launch a tensor."""
    width = features[0].shape[2]
    packed = torch.empty(num_rows, width, dtype=features[0].dtype, device=features[0].device)
    first_row = 0
    with device_of(packed):
        for feature in features:
            n, rows_each, _ = feature.shape
            grid = (n * triton.cdiv(rows_each, PACK_BLOCK_L), triton.cdiv(width, PACK_BLOCK_C))
            pack_rows_kernel[grid](
                feature,
                packed,
                rows_each,
                width,
                first_row,
                *feature.stride(),
                BLOCK_L=PACK_BLOCK_L,
                BLOCK_C=PACK_BLOCK_C,
            )
            first_row += n * rows_each
    return packed


def project_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, destinations: Tensor, out: Tensor
) -> None:
    """Write ``x @ weightᵀ + bias`` to the rows ``destinations`` of ``out``; one launch.

    Args:
        x: ``[R, C]`` contiguous, R > 0, in the weight's dtype.
        weight: ``[H, C]`` contiguous.
        bias: ``[H]`` contiguous or None.
        destinations: ``[R]`` int32, unique where ≥ 0.
        out: ``[S, B, H]`` contiguous.
    """
    num_rows, width = x.shape
    hidden = weight.shape[0]
    tile = tile_for("forward", num_rows, x.dtype, x.device)
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(hidden, tile.block_n),)
    with device_of(x):
        project_scatter_kernel[grid](
            x,
            weight,
            weight if bias is None else bias,
            destinations,
            out,
            num_rows,
            hidden,
            width,
            HAS_BIAS=bias is not None,
            EVEN_K=width % tile.block_k == 0,
            PRECISION=dot_precision(x.dtype),
            INTERPRET=INTERPRETED,
            **tile.options(),
        )
