"""Forward: project feature rows and put each at its position, text rows at theirs, in one launch.

``project_insert`` writes every row of a new ``[S, B, H]`` once: programs with a tile of the product
write feature rows, further programs of the same launch copy text rows. Where the last wave of tiles
is split along the reduction, a second launch adds its parts, in order. Where nobody tuned tiles,
the library multiplies, and one kernel places its rows and the text rows.

Shape letters: ``R`` feature rows of all sources, ``C`` encoder output width, ``H`` hidden size,
``P = S · B`` positions of the ``[S, B, H]`` output.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
    _processors,
    mma,
    num_programs,
    operand,
    partial_sums,
    rows_times_weight,
    sum_splits,
)
from step37_kernels.ops.launch import Constants, Launcher, launch
from step37_kernels.ops.tiles import MAX_PARTS, Tile, insert_tile, schedule, tile_for

PACK_BLOCK_L = 64
PACK_BLOCK_C = 64


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


_project_scatter = Launcher(project_scatter_kernel)


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


# --- The insert ---------------------------------------------------------------------------------

MAX_SOURCES = 4
"""Contiguous tensors of feature rows that one launch reads where they are."""
COPY_BLOCK_P = 8
COPY_BLOCK_H = 2048
COPY_WARPS = 8
SUM_ROWS = 8
_ROWS = [f"rows_{i}" for i in range(MAX_SOURCES)]
_TEXT = ["num_positions", "batch_size", "stride_s", "stride_b"]


@triton.jit
def _choose(index, a_0, a_1, a_2, a_3, SOURCES: tl.constexpr):
    """``a_<index>``, for an index below SOURCES."""
    a = a_0
    if SOURCES > 1:  # noqa: SIM102 (one is known when this is compiled)
        if index >= 1:
            a = a_1
    if SOURCES > 2:  # noqa: SIM102 (one is known when this is compiled)
        if index >= 2:
            a = a_2
    if SOURCES > 3:  # noqa: SIM102 (one is known when this is compiled)
        if index >= 3:
            a = a_3
    return a


@triton.jit
def _choose_wide(index, a_0, a_1, a_2, a_3, SOURCES: tl.constexpr):
    """The same of numbers that may or may not fit into 32 bits, each for itself."""
    a_2 = a_2.to(tl.int64)
    a_3 = a_3.to(tl.int64)
    return _choose(index, a_0.to(tl.int64), a_1.to(tl.int64), a_2, a_3, SOURCES)


def _numbered(*names: str) -> list[str]:
    """``name_0`` … of each name, for each source."""
    return [f"{name}_{i}" for name in names for i in range(MAX_SOURCES)]


@triton.jit(
    do_not_specialize=_numbered("rows_each", "stride_n", "stride_l", "stride_c", "row", "program")
)
def pack_rows_kernel(
    source_0,  # [N, L, C], any strides
    source_1,
    source_2,
    source_3,
    packed_ptr,  # [R, C] contiguous, out
    C,
    rows_each_0,  # L
    rows_each_1,
    rows_each_2,
    rows_each_3,
    stride_n_0,
    stride_n_1,
    stride_n_2,
    stride_n_3,
    stride_l_0,
    stride_l_1,
    stride_l_2,
    stride_l_3,
    stride_c_0,
    stride_c_1,
    stride_c_2,
    stride_c_3,
    row_0,  # the first packed row of each source
    row_1,
    row_2,
    row_3,
    program_0,  # its first program along the first axis
    program_1,
    program_2,
    program_3,
    SOURCES: tl.constexpr,
    FASTEST: tl.constexpr,  # the axis whose stride is 1 in all sources: "L", "C", or ""
    WHOLE: tl.constexpr,  # the other strides are whole vectors
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Along L where the views are channels-first (stride_l = 1) loads are coalesced, along C stores:
    # the compiler exchanges the tile through shared memory between the two.
    program = tl.program_id(0)
    i = (program >= program_1).to(tl.int32) + (program >= program_2) + (program >= program_3)
    source = _choose(i, source_0, source_1, source_2, source_3, SOURCES)
    each = _choose(i, rows_each_0, rows_each_1, rows_each_2, rows_each_3, SOURCES)
    first_row = _choose(i, row_0, row_1, row_2, row_3, SOURCES)
    program -= _choose(i, program_0, program_1, program_2, program_3, SOURCES)
    stride_n = _choose_wide(i, stride_n_0, stride_n_1, stride_n_2, stride_n_3, SOURCES)
    blocks_l = tl.cdiv(each, BLOCK_L)
    n = (program // blocks_l).to(tl.int64)
    rows = (program % blocks_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < each)[:, None] & (cols < C)[None, :]
    row_offsets = rows.to(tl.int64)
    if FASTEST != "L":
        stride_l = _choose_wide(i, stride_l_0, stride_l_1, stride_l_2, stride_l_3, SOURCES)
        row_offsets *= in_vectors(stride_l, WHOLE)
    col_offsets = cols.to(tl.int64)
    if FASTEST != "C":
        col_offsets *= _choose_wide(i, stride_c_0, stride_c_1, stride_c_2, stride_c_3, SOURCES)
    source += n * in_vectors(stride_n, WHOLE)
    values = tl.load(source + row_offsets[:, None] + col_offsets[None, :], mask=inside)
    target = (first_row + n * each + rows)[:, None] * C + cols[None, :]
    tl.store(packed_ptr + target, values, mask=inside)


def pack_rows(features: Sequence[Tensor]) -> Tensor:
    """Non-empty ``[N, L, C]`` tensors of any strides as one contiguous ``[R, C]``."""
    width = features[0].shape[2]
    num_rows = sum(each.shape[:2].numel() for each in features)
    packed = torch.empty(num_rows, width, dtype=features[0].dtype, device=features[0].device)
    row = 0
    for first in range(0, len(features), MAX_SOURCES):
        some = list(features[first : first + MAX_SOURCES])
        values: list[tuple[int, ...]] = []
        programs = 0
        for each in some:
            n, rows_each, _ = each.shape
            values.append((rows_each, *each.stride(), row, programs))
            row += n * rows_each
            programs += n * ceil_div(rows_each, PACK_BLOCK_L)
        # Sources that are not there begin after the last program.
        values += [(*values[0][:-1], programs)] * (MAX_SOURCES - len(some))
        unit = [all(each.stride(axis) == 1 for each in some) for axis in (1, 2)]
        with device_of(packed):
            launch(
                pack_rows_kernel,
                (programs, ceil_div(width, PACK_BLOCK_C)),
                *some,
                *some[:1] * (MAX_SOURCES - len(some)),
                packed,
                width,
                *itertools.chain.from_iterable(zip(*values, strict=True)),
                SOURCES=len(some),
                FASTEST="L" if unit[0] else "C" if unit[1] else "",
                WHOLE=whole_vectors(*[s for each in some for s in each.stride()[:2]]),
                BLOCK_L=PACK_BLOCK_L,
                BLOCK_C=PACK_BLOCK_C,
            )
    return packed


@triton.jit
def _tile_place(
    tile, H, rows_0, rows_1, rows_2, rows_3,
    SOURCES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where a tile is: its source and first row there; that source's first row among the rows of
    all, and the one past its last; the tile's first column."""
    num_n = tl.cdiv(H, BLOCK_N)
    m = tile // num_n
    m_1 = tl.cdiv(rows_0, BLOCK_M)
    m_2 = m_1 + tl.cdiv(rows_1, BLOCK_M)
    m_3 = m_2 + tl.cdiv(rows_2, BLOCK_M)
    # Sources that are not there have no rows, hence no tiles.
    source = (m >= m_1).to(tl.int32) + (m >= m_2).to(tl.int32) + (m >= m_3).to(tl.int32)
    row = (m - _choose(source, m_1 * 0, m_1, m_2, m_3, SOURCES)) * BLOCK_M
    end_1 = rows_0 + rows_1
    base = _choose(source, rows_0 * 0, rows_0, end_1, end_1 + rows_2, SOURCES)
    end = base + _choose(source, rows_0, rows_1, rows_2, rows_3, SOURCES)
    return source, row, base, end, tile % num_n * BLOCK_N


@triton.jit
def _store_rows(
    acc,  # [ROWS, COLS] fp32
    dtype_ptr,  # any pointer of the weight's dtype
    destinations_ptr,
    out_ptr,
    rows,
    end,
    cols,
    H,
    INTERPRET: tl.constexpr,
):
    """Round, and write each row before ``end`` to its destination, if it has one."""
    # To the weight's dtype first, as a projector on its own would, then to the output's.
    values = round_to(acc, dtype_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    values = round_to(values, out_ptr.dtype.element_ty, INTERPRET)
    targets = tl.load(destinations_ptr + rows, mask=rows < end, other=-1).to(tl.int64)
    out_ptrs = out_ptr + targets[:, None] * H + cols[None, :]
    tl.store(out_ptrs, values, mask=(targets >= 0)[:, None] & (cols < H)[None, :])


@triton.jit
def _text_rows(text_ptr, positions, batch_size, stride_s, stride_b, WHOLE: tl.constexpr):
    """Where the text row of each position begins."""
    s = (positions // batch_size).to(tl.int64) * in_vectors(stride_s, WHOLE)
    return text_ptr + s + (positions % batch_size).to(tl.int64) * in_vectors(stride_b, WHOLE)


@triton.jit
def _place_rows(
    block,
    rows_ptr,  # [R, H] contiguous, read if PROJECTED: they are placed, too; else any pointer
    text_ptr,  # [S, B, H], any strides: read only for text rows
    row_at_ptr,  # [P] int32: the feature row of a position, or −1
    out_ptr,  # [P, H] contiguous
    H,
    stride_h,
    num_positions,
    batch_size,
    stride_s,
    stride_b,
    WHOLE: tl.constexpr,
    PROJECTED: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write the rows of a block of positions that hold text, or all."""
    positions = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = positions < num_positions
    row_at = tl.load(row_at_ptr + positions, mask=inside, other=0)
    is_text = (row_at < 0) & inside
    text_rows = _text_rows(text_ptr, positions, batch_size, stride_s, stride_b, WHOLE)
    for col in range(0, H, BLOCK_H):
        cols = col + tl.arange(0, BLOCK_H)
        in_width = (cols < H)[None, :]
        mask = is_text[:, None] & in_width
        text_ptrs = text_rows[:, None] + (cols.to(tl.int64) * stride_h)[None, :]
        values = tl.load(text_ptrs, mask=mask)
        if PROJECTED:
            mask = inside[:, None] & in_width
            rows_ptrs = rows_ptr + row_at.to(tl.int64)[:, None] * H + cols[None, :]
            rows = tl.load(rows_ptrs, mask=mask & (row_at >= 0)[:, None], other=0.0)
            rows = round_to(rows.to(tl.float32), out_ptr.dtype.element_ty, INTERPRET)
            values = tl.where(is_text[:, None], values, rows)
        out_ptrs = out_ptr + positions.to(tl.int64)[:, None] * H + cols[None, :]
        tl.store(out_ptrs, values, mask=mask)


@triton.jit(do_not_specialize=[*_ROWS, "whole", "tail", "parts", *_TEXT])
def project_insert_kernel(
    x_0,  # [rows_0, C]: descriptors of [TOP, BLOCK_K] blocks of the sources
    x_1,
    x_2,
    x_3,
    y_0,  # the same in [REST, BLOCK_K] blocks; not read if REST is 0
    y_1,
    y_2,
    y_3,
    weight,  # [H, C]: descriptor of [BLOCK_N, BLOCK_K] blocks
    bias_ptr,  # [H], read if HAS_BIAS; else any pointer of the weight's dtype
    destinations_ptr,  # [R] int32: position s * B + b, or −1
    live_ptr,  # [1] int32, read if HAS_LIVE: rows from this one on are not computed
    text_ptr,  # [S, B, H], any strides
    row_at_ptr,  # [P] int32: the feature row of a position, or −1
    out_ptr,  # [P, H] contiguous, out
    partial_ptr,  # [tail · parts, BLOCK_M, BLOCK_N] fp32, out: parts of the tail's tiles
    H,
    C,
    stride_h,
    rows_0,
    rows_1,
    rows_2,
    rows_3,
    whole,  # tiles with a program each: the first programs
    tail,  # tiles with ``parts`` programs each: the next ones; then text rows are copied
    parts,
    num_positions,
    batch_size,
    stride_s,
    stride_b,
    SOURCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,  # the kernel before, which may still run, writes destinations, row_at, live
    WHOLE: tl.constexpr,  # stride_s and stride_b are whole vectors
    INTERPRET: tl.constexpr,
    TOP: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COPY_P: tl.constexpr,
    COPY_H: tl.constexpr,
):
    program = tl.program_id(0)
    part = program - whole
    if part >= tail * parts:
        if PDL:
            tl.extra.cuda.gdc_wait()
        _place_rows(
            part - tail * parts, out_ptr, text_ptr, row_at_ptr, out_ptr, H, stride_h,
            num_positions, batch_size, stride_s, stride_b, WHOLE, False, INTERPRET, COPY_P, COPY_H,
        )  # fmt: skip
    else:
        tile = program
        first = 0
        last = tl.cdiv(C, BLOCK_K)
        if part >= 0:
            tile = whole + part // parts
            each = tl.cdiv(last, parts)
            first = part % parts * each
            last = tl.minimum(first + each, last)
        source, row, base, end, col = _tile_place(
            tile, H, rows_0, rows_1, rows_2, rows_3, SOURCES, TOP + REST, BLOCK_N
        )
        x = _choose(source, x_0, x_1, x_2, x_3, SOURCES)
        y = _choose(source, y_0, y_1, y_2, y_3, SOURCES)
        cols = col + tl.arange(0, BLOCK_N)
        alive = True
        if HAS_LIVE:
            if PDL:
                tl.extra.cuda.gdc_wait()
            alive = base + row < tl.load(live_ptr)
        if alive:
            acc = tl.zeros((TOP, BLOCK_N), dtype=tl.float32)
            if REST:
                rest = tl.zeros((REST, BLOCK_N), dtype=tl.float32)
            if HAS_BIAS:  # the sum begins with it: no registers are left for it at the end
                mask = cols < tl.where(first == 0, H, 0)
                bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
                acc += bias[None, :]
                if REST:
                    rest += bias[None, :]
            # Rows and columns past the end, which the copy engine fills with zeros, are not stored.
            for k in range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
                w = weight.load([col, k]).T
                acc = mma(x.load([row, k]), w, acc, "ieee", INTERPRET)
                if REST:
                    rest = mma(y.load([row + TOP, k]), w, rest, "ieee", INTERPRET)
            if PDL and not HAS_LIVE:
                # Not before: nothing above is the plan's. Not later: nothing is written earlier.
                tl.extra.cuda.gdc_wait()
            rows = base + row + tl.arange(0, TOP)
            if part < 0:
                if REST:  # first, which frees its registers
                    _store_rows(
                        rest, bias_ptr, destinations_ptr, out_ptr,
                        base + row + TOP + tl.arange(0, REST), end, cols, H, INTERPRET,
                    )  # fmt: skip
                _store_rows(acc, bias_ptr, destinations_ptr, out_ptr, rows, end, cols, H, INTERPRET)
            else:
                part_ptr = partial_ptr + part.to(tl.int64) * ((TOP + REST) * BLOCK_N)
                inner = tl.arange(0, BLOCK_N)[None, :]
                if REST:
                    below = TOP + tl.arange(0, REST)
                    tl.store(part_ptr + below[:, None] * BLOCK_N + inner, rest)
                tl.store(part_ptr + tl.arange(0, TOP)[:, None] * BLOCK_N + inner, acc)


@triton.jit(do_not_specialize=[*_ROWS, "whole", "parts"])
def sum_parts_kernel(
    partial_ptr,  # [tail · parts, BLOCK_M, BLOCK_N] fp32
    dtype_ptr,  # any pointer of the weight's dtype; not read
    destinations_ptr,
    out_ptr,
    H,
    rows_0,
    rows_1,
    rows_2,
    rows_3,
    whole,
    parts,
    SOURCES: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    MOST: tl.constexpr,
):
    """The parts of the tail's tiles are added in order, so two runs agree."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    STRIPS: tl.constexpr = BLOCK_M // ROWS
    number = tl.program_id(0) // STRIPS
    inner = tl.program_id(0) % STRIPS * ROWS + tl.arange(0, ROWS)
    _, row, base, end, col = _tile_place(
        whole + number, H, rows_0, rows_1, rows_2, rows_3, SOURCES, BLOCK_M, BLOCK_N
    )
    rows = base + row + inner
    part_ptrs = partial_ptr + (number * parts).to(tl.int64) * (BLOCK_M * BLOCK_N)
    part_ptrs += inner[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < end)[:, None]
    acc = tl.load(part_ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, MOST):  # unrolled: all are on their way at once
        part_ptrs += BLOCK_M * BLOCK_N
        there = rows < tl.where(part < parts, end, 0)
        acc += tl.load(part_ptrs, mask=there[:, None], other=0.0)
    cols = col + tl.arange(0, BLOCK_N)
    _store_rows(acc, dtype_ptr, destinations_ptr, out_ptr, rows, end, cols, H, INTERPRET)


@triton.jit(do_not_specialize=_TEXT)
def place_rows_kernel(
    rows_ptr,  # [R, H] contiguous, in the weight's dtype
    text_ptr,
    row_at_ptr,
    out_ptr,
    H,
    stride_h,
    num_positions,
    batch_size,
    stride_s,
    stride_b,
    WHOLE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Feature rows that the library projected, and text rows, each to its position."""
    _place_rows(
        tl.program_id(0), rows_ptr, text_ptr, row_at_ptr, out_ptr, H, stride_h, num_positions,
        batch_size, stride_s, stride_b, WHOLE, True, INTERPRET, BLOCK_P, BLOCK_H,
    )  # fmt: skip


def project_insert(
    text: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    row_at: Tensor,
    live_rows: Tensor | None = None,
    *,
    after_plan: bool = False,
) -> Tensor:
    """A new ``[S, B, H]``: feature rows ``x @ weightᵀ + bias`` at their positions, else text rows.

    One launch, or two where the last wave of tiles is split; of the library, one more than there
    are sources. Deterministic: parts are added in a fixed order.

    Args:
        text: ``[S, B, H]``, any strides, of any floating dtype: that of the output, to which
            feature rows are rounded from the weight's. Only text rows are read.
        sources: one to :data:`MAX_SOURCES` contiguous ``[R_i, C]``, R_i > 0, in the weight's dtype
            (:func:`contiguous_rows`). Their rows are numbered through, 0 … R − 1.
        weight: ``[H, C]`` contiguous.
        bias: ``[H]`` contiguous, in the weight's dtype, or None.
        destinations: ``[R]`` int32: position ``s * B + b`` of each row, or −1.
        row_at: ``[S, B]`` int32 contiguous: the row of each position, or −1: its text row.
        live_rows: ``[1]`` int32, how many rows from the first on have a destination at all; None
            where they may be anywhere.
        after_plan: the last launch on this stream made the plan, and what it wrote may be waited
            for as late as it is needed, by GPUs of capability 90 and later.
    """
    out = torch.empty(text.shape, dtype=text.dtype, device=text.device)
    tile = insert_tile(sources, weight)
    with device_of(text):
        if tile.library:
            _by_library(sources, weight, bias, text, row_at, out)
        else:
            _by_tiles(
                tile, sources, weight, bias, destinations, live_rows, text, row_at, out,
                pdl=after_plan and not INTERPRETED,
            )  # fmt: skip
    return out


def _text_arguments(text: Tensor) -> tuple[dict[str, Any], int]:
    """The arguments that say where text rows are, and the programs that copy them."""
    seq_len, batch_size, _ = text.shape
    stride_s, stride_b, stride_h = text.stride()
    arguments = {
        "text_ptr": text,
        "stride_h": stride_h,
        "num_positions": seq_len * batch_size,
        "batch_size": batch_size,
        "stride_s": stride_s,
        "stride_b": stride_b,
        "WHOLE": whole_vectors(stride_s, stride_b),
        "INTERPRET": INTERPRETED,
    }
    return arguments, ceil_div(seq_len * batch_size, COPY_BLOCK_P)


def _by_library(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor,
    row_at: Tensor,
    out: Tensor,
) -> None:
    num_rows, hidden = sum(map(len, sources)), weight.shape[0]
    projected = torch.empty(num_rows, hidden, dtype=weight.dtype, device=weight.device)
    for x, rows in zip(sources, projected.split([len(x) for x in sources]), strict=True):
        if bias is None:
            torch.mm(x, weight.T, out=rows)
        else:
            torch.addmm(bias, x, weight.T, out=rows)
    arguments, programs = _text_arguments(text)
    launch(
        place_rows_kernel,
        (programs,),
        rows_ptr=projected,
        row_at_ptr=row_at,
        out_ptr=out,
        H=out.shape[2],
        BLOCK_P=COPY_BLOCK_P,
        BLOCK_H=COPY_BLOCK_H,
        num_warps=COPY_WARPS,
        **arguments,
    )


def _by_tiles(
    tile: Tile,
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    live_rows: Tensor | None,
    text: Tensor,
    row_at: Tensor,
    out: Tensor,
    *,
    pdl: bool,
) -> None:
    hidden, width = weight.shape
    counts = [len(x) for x in sources]
    plan = schedule(tile, counts, hidden, width, _processors(weight.device))
    size = plan.partials * tile.block_m * tile.block_n
    partial = torch.empty(size, dtype=torch.float32, device=out.device)
    top = 1 << tile.block_m.bit_length() - 1
    rest = tile.block_m - top

    def blocks(matrix: Tensor, rows: int) -> TensorDescriptor:
        # Not the tensor's own strides: that of an only row may be anything, and is never used.
        return TensorDescriptor(matrix, matrix.shape, (width, 1), [rows, tile.block_k])

    absent = MAX_SOURCES - len(sources)
    tops = [blocks(x, top) for x in sources]
    rests = [blocks(x, rest) for x in sources] if rest else tops
    shared = {
        "destinations_ptr": destinations,
        "out_ptr": out,
        "H": hidden,
        "partial_ptr": partial,
        "whole": plan.whole,
        "parts": plan.parts,
        "SOURCES": len(sources),
        "PDL": pdl,
        **dict(zip(_ROWS, [*counts, *[0] * absent], strict=True)),
        **({"launch_pdl": True} if pdl else {}),
    }
    arguments, copies = _text_arguments(text)
    launch(
        project_insert_kernel,
        (plan.programs + copies,),
        *tops,
        *tops[:1] * absent,
        *rests,
        *rests[:1] * absent,
        weight=blocks(weight, tile.block_n),
        bias_ptr=weight if bias is None else bias,
        live_ptr=destinations if live_rows is None else live_rows,
        row_at_ptr=row_at,
        C=width,
        tail=plan.tail,
        HAS_BIAS=bias is not None,
        HAS_LIVE=live_rows is not None,
        TOP=top,
        REST=rest,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        COPY_P=COPY_BLOCK_P,
        COPY_H=COPY_BLOCK_H,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **arguments,
        **shared,
    )
    if plan.partials:
        launch(
            sum_parts_kernel,
            (plan.tail * (tile.block_m // SUM_ROWS),),
            dtype_ptr=weight,
            INTERPRET=INTERPRETED,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            ROWS=SUM_ROWS,
            MOST=MAX_PARTS,
            **shared,
        )
