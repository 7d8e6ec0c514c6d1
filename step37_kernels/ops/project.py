"""Projects feature rows and writes feature and text rows to their positions, in one launch.

Text rows come from embeddings ``[S, B, H]``, or are looked up in the table ``[V, H]``.

``project_insert`` writes every row of a new ``[S, B, H]`` once: programs with a tile of the product
write feature rows, further programs of the same launch copy text rows. If the last wave of tiles
is split along the reduction, a second launch adds the parts, in order. Without tuned tiles for the
GPU or the operands, the library multiplies, and one kernel writes its rows and the text rows.

Shape letters: ``R`` feature rows of all sources, ``C`` encoder output width, ``H`` hidden size,
``P = S · B`` positions of the ``[S, B, H]`` output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from step37_kernels.ops.common import (
    INTERPRETED,
    ceil_div,
    device_of,
    in_vectors,
    round_to,
    whole_vectors,
)
from step37_kernels.ops.copy_rows import MAX_SOURCES, choose
from step37_kernels.ops.launch import launch
from step37_kernels.ops.tiles import MAX_PARTS, Tile, insert_tile, processors, schedule

COPY_BLOCK_P = 8
COPY_BLOCK_H = 2048
COPY_WARPS = 8
SUM_ROWS = 8
_ROWS = [f"rows_{i}" for i in range(MAX_SOURCES)]
_TEXT = ["num_positions", "batch_size", "stride_s", "stride_b", "vocabulary"]


@triton.jit
def _tile_place(
    tile, H, rows_0, rows_1, rows_2, rows_3,
    SOURCES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Find where a tile is.

    Returns:
        Its source; its first row in that source; the source's first row among the rows of all
        sources, and the one past its last; the tile's first column.
    """
    num_n = tl.cdiv(H, BLOCK_N)
    m = tile // num_n
    m_1 = tl.cdiv(rows_0, BLOCK_M)
    m_2 = m_1 + tl.cdiv(rows_1, BLOCK_M)
    m_3 = m_2 + tl.cdiv(rows_2, BLOCK_M)
    # Unused sources have no rows, hence no tiles.
    source = (m >= m_1).to(tl.int32) + (m >= m_2).to(tl.int32) + (m >= m_3).to(tl.int32)
    row = (m - choose(source, m_1 * 0, m_1, m_2, m_3, SOURCES)) * BLOCK_M
    end_1 = rows_0 + rows_1
    base = choose(source, rows_0 * 0, rows_0, end_1, end_1 + rows_2, SOURCES)
    end = base + choose(source, rows_0, rows_1, rows_2, rows_3, SOURCES)
    return source, row, base, end, tile % num_n * BLOCK_N


@triton.jit
def _mma(a, b, acc, INTERPRET: tl.constexpr):
    """``acc + a @ b`` with fp32 accumulation."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")  # fp32 comes here only in the interpreter


@triton.jit
def _store_rows(
    acc, dtype_ptr, destinations_ptr, out_ptr, rows, end, cols, H, INTERPRET: tl.constexpr
):
    """Round the rows before ``end`` and write each to its destination, if it has one."""
    # Round to the weight's dtype first, as nn.Linear would, then to the output's.
    values = round_to(acc, dtype_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    values = round_to(values, out_ptr.dtype.element_ty, INTERPRET)
    targets = tl.load(destinations_ptr + rows, mask=rows < end, other=-1).to(tl.int64)
    out_ptrs = out_ptr + targets[:, None] * H + cols[None, :]
    tl.store(out_ptrs, values, mask=(targets >= 0)[:, None] & (cols < H)[None, :])


@triton.jit
def _text_rows(
    text_ptr, ids_ptr, positions, is_text, H, batch_size, stride_s, stride_b, vocabulary,
    LOOKUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Find the address of each position's text row, and whether it has one."""
    s = (positions // batch_size).to(tl.int64) * in_vectors(stride_s, ALIGNED)
    b = (positions % batch_size).to(tl.int64) * in_vectors(stride_b, ALIGNED)
    exists = is_text
    if LOOKUP:
        ids = tl.load(ids_ptr + s + b, mask=is_text, other=0).to(tl.int64)
        exists = is_text & (ids >= 0) & (ids < vocabulary)
        rows = text_ptr + ids * H
    else:
        rows = text_ptr + s + b
    return rows, exists


@triton.jit
def _place_rows(
    block, rows_ptr, text_ptr, ids_ptr, row_at_ptr, out_ptr, H, stride_h, num_positions, batch_size,
    stride_s, stride_b, vocabulary, LOOKUP: tl.constexpr, ALIGNED: tl.constexpr,
    PROJECTED: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write a block of positions: text rows, and if PROJECTED the feature rows of ``rows_ptr``.

    A text row whose id is outside the table is NaN.
    """
    positions = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = positions < num_positions
    row_at = tl.load(row_at_ptr + positions, mask=inside, other=0)
    is_text = (row_at < 0) & inside
    text_rows, exists = _text_rows(
        text_ptr, ids_ptr, positions, is_text, H, batch_size, stride_s, stride_b, vocabulary,
        LOOKUP, ALIGNED,
    )  # fmt: skip
    for col in range(0, H, BLOCK_H):
        cols = col + tl.arange(0, BLOCK_H)
        in_width = (cols < H)[None, :]
        mask = is_text[:, None] & in_width
        text_ptrs = text_rows[:, None] + (cols.to(tl.int64) * stride_h)[None, :]
        values = tl.load(text_ptrs, mask=exists[:, None] & in_width, other=float("nan"))
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
    x_0, x_1, x_2, x_3,  # [rows_i, C]: descriptors of [TOP, BLOCK_K] blocks of the sources, or None
    y_0, y_1, y_2, y_3,  # the same in [REST, BLOCK_K] blocks, None if REST is 0
    weight,  # [H, C]: descriptor of [BLOCK_N, BLOCK_K] blocks
    bias_ptr,  # [H], read if HAS_BIAS; else any pointer of the weight's dtype
    destinations_ptr,  # [R] int32: position s * B + b, or −1
    live_ptr,  # [1] int32, read if HAS_LIVE: rows from this one on are not computed
    text_ptr,  # [S, B, H], any strides, or if LOOKUP the table [V, H]: read only for text rows
    ids_ptr,  # [S, B] int32 or int64, any strides, read if LOOKUP
    row_at_ptr,  # [P] int32: the feature row of a position, or −1
    out_ptr,  # [P, H] contiguous, out
    partial_ptr,  # [tail · parts, TOP + REST, BLOCK_N] fp32, out: parts of the tail's tiles
    H,
    C,
    stride_h,
    rows_0, rows_1, rows_2, rows_3,
    whole,  # tiles with a program each: the first programs
    tail,  # tiles with ``parts`` programs each: the next ones; then text rows are copied
    parts,
    num_positions, batch_size, stride_s, stride_b,  # strides of the text, or if LOOKUP of the ids
    vocabulary,  # V
    LOOKUP: tl.constexpr,
    ALIGNED: tl.constexpr,  # stride_s and stride_b are whole vectors
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SOURCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,  # the kernel before, which may still run, writes destinations, row_at, live
    TOP: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program - whole
    if part >= tail * parts:
        if PDL:
            tl.extra.cuda.gdc_wait()
        _place_rows(
            part - tail * parts, out_ptr, text_ptr, ids_ptr, row_at_ptr, out_ptr, H, stride_h,
            num_positions, batch_size, stride_s, stride_b, vocabulary, LOOKUP, ALIGNED, False,
            INTERPRET, BLOCK_P, BLOCK_H,
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
        x = choose(source, x_0, x_1, x_2, x_3, SOURCES)
        if REST:
            y = choose(source, y_0, y_1, y_2, y_3, SOURCES)
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
            if HAS_BIAS:  # start the sum with the bias: at the end no registers are left for it
                mask = cols < tl.where(first == 0, H, 0)
                bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
                acc += bias[None, :]
                if REST:
                    rest += bias[None, :]
            # The copy engine fills rows and columns past the end with zeros; they are not stored.
            for k in range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
                w = weight.load([col, k]).T
                acc = _mma(x.load([row, k]), w, acc, INTERPRET)
                if REST:
                    rest = _mma(y.load([row + TOP, k]), w, rest, INTERPRET)
            if PDL and not HAS_LIVE:
                # Wait for the plan here: nothing above reads it or writes the output.
                tl.extra.cuda.gdc_wait()
            rows = base + row + tl.arange(0, TOP)
            if part < 0:
                if REST:  # stored first, which frees its registers
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
    bias_ptr,  # any pointer of the weight's dtype; not read
    destinations_ptr,
    out_ptr,
    H,
    rows_0, rows_1, rows_2, rows_3,
    whole,
    parts,
    SOURCES: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Add the parts of the split tiles in a fixed order, so that two runs agree."""
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
    acc = tl.load(part_ptrs, mask=(rows < end)[:, None], other=0.0)
    for part in tl.static_range(1, MOST):  # unrolled, so that all loads are issued at once
        part_ptrs += BLOCK_M * BLOCK_N
        here = rows < tl.where(part < parts, end, 0)
        acc += tl.load(part_ptrs, mask=here[:, None], other=0.0)
    cols = col + tl.arange(0, BLOCK_N)
    _store_rows(acc, bias_ptr, destinations_ptr, out_ptr, rows, end, cols, H, INTERPRET)


@triton.jit(do_not_specialize=_TEXT)
def place_rows_kernel(
    rows_ptr,  # [R, H] contiguous, in the weight's dtype, read if PROJECTED
    text_ptr, ids_ptr, row_at_ptr, out_ptr, H, stride_h, num_positions, batch_size, stride_s,
    stride_b, vocabulary,
    LOOKUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROJECTED: tl.constexpr,
):  # fmt: skip
    """Write text rows, and the feature rows that the library projected, to their positions."""
    _place_rows(
        tl.program_id(0), rows_ptr, text_ptr, ids_ptr, row_at_ptr, out_ptr, H, stride_h,
        num_positions, batch_size, stride_s, stride_b, vocabulary, LOOKUP, ALIGNED, PROJECTED,
        INTERPRET, BLOCK_P, BLOCK_H,
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
    input_ids: Tensor | None = None,
    after_plan: bool = False,
) -> Tensor:
    """Make ``[S, B, H]`` with ``x @ weightᵀ + bias`` at the destinations and text rows elsewhere.

    It takes one launch, or two if the last wave of tiles is split. If the library multiplies, it
    takes one product for each source and one launch that writes the rows. Two runs are bit-equal:
    parts are added in a fixed order.

    Args:
        text: ``[S, B, H]``, any strides, or with ``input_ids`` the table ``[V, H]``, contiguous.
            Its floating dtype is that of the output; feature rows are rounded to the weight's dtype
            and then to this one. Only text rows are read.
        sources: one to :data:`MAX_SOURCES` contiguous ``[R_i, C]``, R_i > 0, in the weight's dtype
            (:func:`contiguous_rows`). Their rows are numbered 0 … R − 1 in this order.
        weight: ``[H, C]`` contiguous.
        bias: ``[H]`` contiguous, in the weight's dtype, or None.
        destinations: ``[R]`` int32: position ``s * B + b`` of each row, or −1.
        row_at: ``[S, B]`` int32 contiguous: the feature row of each position; −1 for text.
        live_rows: ``[1]`` int32: no row from this one on has a destination. None: any row may have
            one.
        input_ids: ``[S, B]`` int32 or int64, any strides: text rows are looked up by these ids. A
            row whose id is outside the table is NaN.
        after_plan: whether the last launch on this stream made the plan. GPUs of capability 90 and
            later then start this launch beside it, and wait for it only before they read it.
    """
    placing = _placing(text, input_ids, row_at)
    tile = insert_tile(sources, weight)
    with device_of(text):
        if tile.library:
            _place(_by_library(sources, weight, bias), placing, projected=True)
        else:
            pdl = after_plan and not INTERPRETED
            _by_tiles(tile, sources, weight, bias, destinations, live_rows, placing, pdl)
    return placing.out


def look_up(table: Tensor, input_ids: Tensor, row_at: Tensor) -> Tensor:
    """Look up ``[S, B, H]`` rows of the table; a row whose id is outside the table is NaN.

    Args:
        table: ``[V, H]`` contiguous.
        input_ids: ``[S, B]`` int32 or int64, any strides.
        row_at: ``[S, B]`` int32 contiguous, −1 everywhere: there are no feature rows.
    """
    placing = _placing(table, input_ids, row_at)
    with device_of(table):
        _place(placing.out, placing, projected=False)
    return placing.out


class _Placing(NamedTuple):
    """What programs that place or copy rows are told, in the kernels' order of parameters."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Text, ids, row_at, out."""
    hidden: int
    stride_h: int
    positions: tuple[int, int, int, int, int]
    """How many, the batch size, stride_s, stride_b, and the table's rows."""
    constants: tuple[bool, bool, bool, int, int]
    """From LOOKUP to BLOCK_H."""

    @property
    def out(self) -> Tensor:
        return self.tensors[3]

    @property
    def programs(self) -> int:
        return ceil_div(self.positions[0], COPY_BLOCK_P)


def _placing(text: Tensor, input_ids: Tensor | None, row_at: Tensor) -> _Placing:
    hidden = text.shape[-1]
    seq_len, batch_size = row_at.shape
    out = torch.empty(seq_len, batch_size, hidden, dtype=text.dtype, device=text.device)
    lookup = input_ids is not None
    stride_s, stride_b, *_ = text.stride() if input_ids is None else input_ids.stride()
    vocabulary = text.shape[0] if lookup else 0
    aligned = not lookup and whole_vectors(stride_s, stride_b)
    return _Placing(
        tensors=(text, row_at if input_ids is None else input_ids, row_at, out),
        hidden=hidden,
        stride_h=text.stride(-1),
        positions=(seq_len * batch_size, batch_size, stride_s, stride_b, vocabulary),
        constants=(lookup, aligned, INTERPRETED, COPY_BLOCK_P, COPY_BLOCK_H),
    )


def _place(rows: Tensor, placing: _Placing, *, projected: bool) -> None:
    """Write every row of the output: text, and if ``projected`` the feature rows ``rows``."""
    launch(
        place_rows_kernel,
        (placing.programs,),
        *(rows, *placing.tensors, placing.hidden, placing.stride_h),
        *(*placing.positions, *placing.constants, projected),
        num_warps=COPY_WARPS,
    )


def _by_library(sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project the rows of all sources by the library, ``[R, H]``."""
    counts = [len(x) for x in sources]
    projected = torch.empty(sum(counts), weight.shape[0], dtype=weight.dtype, device=weight.device)
    for x, rows in zip(sources, projected.split(counts), strict=True):
        if bias is None:
            torch.mm(x, weight.T, out=rows)
        else:
            torch.addmm(bias, x, weight.T, out=rows)
    return projected


def _by_tiles(
    tile: Tile,
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    destinations: Tensor,
    live_rows: Tensor | None,
    placing: _Placing,
    pdl: bool,
) -> None:
    hidden, width = weight.shape
    counts = [x.shape[0] for x in sources]
    split = schedule(tile, counts, hidden, width, processors(weight.device))
    size = split.partials * tile.block_m * tile.block_n
    top = 1 << tile.block_m.bit_length() - 1
    rest = tile.block_m - top
    # Every descriptor costs the host a tensor map: of what is not there, there is none.
    absent = MAX_SOURCES - len(sources)

    def blocks(matrix: Tensor, height: int) -> TensorDescriptor:
        # Not the tensor's own strides: the stride of a single row may have any value.
        return TensorDescriptor(matrix, matrix.shape, (width, 1), [height, tile.block_k])

    any_bias = weight if bias is None else bias
    partial = torch.empty(size, dtype=torch.float32, device=weight.device)
    rows = (*counts, *(0,) * absent)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    # Arguments by position: Triton's binder takes a third longer for those by name.
    launch(
        project_insert_kernel,
        (split.programs + placing.programs,),
        *(blocks(x, top) for x in sources),
        *(None,) * absent,
        *(blocks(x, rest) if rest else None for x in sources),
        *(None,) * absent,
        *(blocks(weight, tile.block_n), any_bias, destinations),
        *(destinations if live_rows is None else live_rows, *placing.tensors, partial),
        *(hidden, width, placing.stride_h, *rows, split.whole, split.tail, split.parts),
        *(*placing.positions, *placing.constants),
        *(len(sources), bias is not None, live_rows is not None, pdl),
        *(top, rest, tile.block_n, tile.block_k),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )
    if split.partials:
        launch(
            sum_parts_kernel,
            (split.tail * (tile.block_m // SUM_ROWS),),
            *(partial, any_bias, destinations, placing.out, hidden),
            *(*rows, split.whole, split.parts, len(sources), pdl, INTERPRETED),
            *(tile.block_m, tile.block_n, SUM_ROWS, MAX_PARTS),
            **options,
        )
