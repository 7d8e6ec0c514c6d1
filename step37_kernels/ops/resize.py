"""Pillow's BILINEAR on a ragged batch: a launch for the first pass, one or two for the second.

The passes of a picture are integer arithmetic with a rounding to 8 bits between them. So is this:
``first_pass_kernel`` filters one axis into an 8-bit intermediate in planes, whose rows are padded
to a multiple of 16 bytes so that the second pass reads whole vectors; ``second_pass_kernel``
filters the other axis and normalises. Which axis comes first is decided per
picture. Everything that varies with the pictures' sizes is a run-time value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from step37_kernels.ops.common import ceil_div, device_of, in_vectors, whole_vectors
from step37_kernels.ops.filter import (
    filter_pass,
    filter_tile,
    first_taps,
    join_tables,
    needs_clamp,
    upload,
)
from step37_kernels.ops.launch import launch
from step37_kernels.ops.normalize import ScaleAndOffset, line_arguments, normalized

# Rows and columns of a program's tile, and how many rows it works on at a time: the more, the more
# loads are on the way together. A warp of the second pass stores whole vectors, and its 256 columns
# leave little room to spare in the usual sizes.
FIRST_PASS_TILE, FIRST_PASS_LINES = (16, 256), 4
SECOND_PASS_TILE, SECOND_PASS_LINES, SECOND_PASS_WARPS = (16, 256), 2, 2
ROW_PAD = 16

# The columns of a job record, int64 each.
SOURCE = tl.constexpr(0)  # byte offset of the first pixel in the flat buffer
SOURCE_PITCH = tl.constexpr(1)  # bytes from one source row to the next
HEIGHT = tl.constexpr(2)
WIDTH = tl.constexpr(3)
VERTICAL_FIRST = tl.constexpr(4)
ROW_TABLE = tl.constexpr(5)  # offset of the coefficients that make rows from rows
ROW_TAPS = tl.constexpr(6)
COLUMN_TABLE = tl.constexpr(7)
COLUMN_TAPS = tl.constexpr(8)
MIDDLE = tl.constexpr(9)  # byte offset of the intermediate planes
FIRST_TILE = tl.constexpr(10)  # first program of the first pass that works on this job
FIELDS = tl.constexpr(11)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeJob:
    """One picture, or a rectangle of one, to resize to the common size.

    Attributes:
        source: byte offset of the first pixel in the flat buffer.
        pitch: bytes from one row to the next.
        height, width: of the rectangle, in pixels.
        vertical_first: filter the columns before the rows.
    """

    source: int
    pitch: int
    height: int
    width: int
    vertical_first: bool


@triton.jit
def _axis(
    job, tables_ptr, LENGTH: tl.constexpr, TABLE: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """Of one axis of a job: its coefficients, how many taps, the last position."""
    table = tables_ptr + tl.load(job + TABLE)
    return table, tl.load(job + TAPS).to(tl.int32), tl.load(job + LENGTH).to(tl.int32) - 1


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["pixels_ptr"])
def first_pass_kernel(
    pixels_ptr,
    jobs_ptr,
    tables_ptr,
    tile_jobs_ptr,
    middle_ptr,
    size: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
    PAD: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Interleaved source to planes: ``[3, height, size]``, or ``[3, size, width]`` vertical first.

    One program a tile; ``tile_jobs_ptr`` says which job it belongs to.
    """
    job = jobs_ptr + tl.load(tile_jobs_ptr + tl.program_id(0)).to(tl.int64) * FIELDS
    tile = tl.program_id(0) - tl.load(job + FIRST_TILE).to(tl.int32)
    height = tl.load(job + HEIGHT).to(tl.int32)
    width = tl.load(job + WIDTH).to(tl.int32)
    vertical = tl.load(job + VERTICAL_FIRST) != 0
    if vertical:
        rows = size
        columns = width
        table, taps, last = _axis(job, tables_ptr, HEIGHT, ROW_TABLE, ROW_TAPS)
    else:
        rows = height
        columns = size
        table, taps, last = _axis(job, tables_ptr, WIDTH, COLUMN_TABLE, COLUMN_TAPS)
    pitch = tl.cdiv(columns, PAD) * PAD
    # Nothing tells the compiler that the planes start aligned, and that is on purpose: vector
    # stores would give a thread adjacent columns, and the byte loads of a warp, which gather, many
    # cache lines instead of one or two.
    filter_pass(
        pixels_ptr + tl.load(job + SOURCE), tl.load(job + SOURCE_PITCH).to(tl.int32), 1, 3,
        middle_ptr + tl.load(job + MIDDLE), pitch, rows.to(tl.int64) * pitch, 1,
        table, taps, last, vertical, tile, rows, columns, ROWS, COLUMNS, LINES, CLAMP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["order_ptr"])
def second_pass_kernel(
    middle_ptr,
    jobs_ptr,
    order_ptr,
    tables_ptr,
    table_ptr,
    out_ptr,
    size: tl.int32,
    red_scale,
    red_offset,
    green_scale,
    green_offset,
    blue_scale,
    blue_offset,
    VERTICAL_DONE: tl.constexpr,
    LINE: tl.constexpr,
    INTERPRET: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
    PAD: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Planes to ``out[n, c]``: the other axis, then the normalisation. One program a tile.

    One launch for the pictures of each order: ``order_ptr`` lists the jobs that had their columns
    filtered first if VERTICAL_DONE, and the others, nearly always all, if not.

    ``WHOLE``: the side is whole vectors, so that rows of the result are written in them.
    """
    size = in_vectors(size, WHOLE)
    tiles_across = tl.cdiv(size, COLUMNS)
    tiles_down = tl.cdiv(size, ROWS)
    pid = tl.program_id(0)
    column = (pid % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    pid = pid // tiles_across
    begin = (pid % tiles_down) * ROWS
    end = tl.minimum(begin + ROWS, size)
    n = tl.load(order_ptr + pid // tiles_down).to(tl.int64)

    job = jobs_ptr + n * FIELDS
    planes = middle_ptr + tl.load(job + MIDDLE) // PAD * PAD
    plane = size.to(tl.int64) * size
    target = out_ptr + n * 3 * plane + column
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if VERTICAL_DONE:
        table, taps, last = _axis(job, tables_ptr, WIDTH, COLUMN_TABLE, COLUMN_TAPS)
        pitch = tl.cdiv(last + 1, PAD) * PAD
        channel = size.to(tl.int64) * pitch
        at = tl.minimum(column, size - 1)
        first, pair = first_taps(table, at, last, size, 1)
    else:
        table, taps, last = _axis(job, tables_ptr, HEIGHT, ROW_TABLE, ROW_TAPS)
        pitch = tl.cdiv(size, PAD) * PAD
        channel = (last + 1).to(tl.int64) * pitch
    for top in range(begin, end, LINES):
        row = (top + tl.arange(0, LINES))[:, None]
        inside = (row < size) & (column < size)
        if VERTICAL_DONE:
            line = tl.minimum(row, size - 1).to(tl.int64) * pitch
            red, green, blue = filter_tile(
                planes, line, channel, 1, table, at, first, pair, taps, last, size, inside, False,
                CLAMP,
            )  # fmt: skip
        else:
            at = tl.minimum(row, size - 1)
            first, pair = first_taps(table, at, last, size, pitch)
            # Up to the padding: a mask that ends inside a vector would split the loads.
            padded = (row < size) & (column < pitch)
            red, green, blue = filter_tile(
                planes, column, channel, pitch, table, at, first, pair, taps, last, size, padded,
                True, CLAMP,
            )  # fmt: skip
        place = target + row.to(tl.int64) * size
        red = normalized(red, table_ptr, red_scale, red_offset, dtype, LINE, INTERPRET)
        tl.store(place, red, mask=inside)
        green = normalized(
            green, table_ptr + 256, green_scale, green_offset, dtype, LINE, INTERPRET
        )
        tl.store(place + plane, green, mask=inside)
        blue = normalized(blue, table_ptr + 512, blue_scale, blue_offset, dtype, LINE, INTERPRET)
        tl.store(place + 2 * plane, blue, mask=inside)


def resize(
    pixels: torch.Tensor,
    jobs: Sequence[ResizeJob],
    tables: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]],
    results: torch.Tensor | ScaleAndOffset,
    dtype: torch.dtype,
    size: int,
) -> torch.Tensor:
    """Launch both passes.

    Args:
        pixels: uint8, flat: the buffer that the jobs point into.
        jobs: what to resize, at least one.
        tables: per job, the coefficients of its rows and of its columns, int32 ``[1 + taps, size]``
            each, taps even. The same array object is uploaded once.
        results: of the normalisation: ``[3, 256]`` in ``dtype``, or scales and offsets.
        dtype: of the result.
        size: side of the results.

    Returns:
        ``[N, 3, size, size]`` contiguous.
    """
    clamp = needs_clamp(tables)
    offsets, coefficients = join_tables(tables)
    records = np.empty((len(jobs), FIELDS.value), dtype=np.int64)
    middle_bytes, first_tile, tiles = 0, 0, []
    for record, job, (rows, columns) in zip(records, jobs, tables, strict=True):
        height, width = (size, job.width) if job.vertical_first else (job.height, size)
        record[:] = (
            job.source,
            job.pitch,
            job.height,
            job.width,
            job.vertical_first,
            offsets[id(rows)],
            len(rows) - 1,
            offsets[id(columns)],
            len(columns) - 1,
            middle_bytes,
            first_tile,
        )
        middle_bytes += 3 * height * ceil_div(width, ROW_PAD) * ROW_PAD
        tiles.append(_tiles(height, width, FIRST_PASS_TILE))
        first_tile += tiles[-1]
    tile_jobs = np.repeat(np.arange(len(jobs), dtype=np.int32), tiles)

    # False before True: pictures whose rows are filtered first, then the others.
    order = np.argsort([job.vertical_first for job in jobs], kind="stable").astype(np.int32)
    num_vertical = sum(job.vertical_first for job in jobs)

    device_records, device_tables, device_tile_jobs, device_order = upload(
        [records, coefficients, tile_jobs, order],
        pixels.device,
    )
    whole = whole_vectors(size)
    by_order = device_order.split([len(jobs) - num_vertical, num_vertical])
    middle = torch.empty(middle_bytes, dtype=torch.uint8, device=pixels.device)
    out = torch.empty((len(jobs), 3, size, size), dtype=dtype, device=pixels.device)
    with device_of(pixels):
        launch(
            first_pass_kernel,
            (len(tile_jobs),),
            pixels,
            device_records,
            device_tables,
            device_tile_jobs,
            middle,
            size,
            ROWS=FIRST_PASS_TILE[0],
            COLUMNS=FIRST_PASS_TILE[1],
            LINES=FIRST_PASS_LINES,
            PAD=ROW_PAD,
            CLAMP=clamp,
        )
        for vertical_done, members in enumerate(by_order):
            if not len(members):
                continue
            launch(
                second_pass_kernel,
                (len(members) * _tiles(size, size, SECOND_PASS_TILE),),
                middle,
                device_records,
                members,
                device_tables,
                results if isinstance(results, torch.Tensor) else out,
                out,
                size,
                **line_arguments(results),
                VERTICAL_DONE=bool(vertical_done),
                WHOLE=whole,
                ROWS=SECOND_PASS_TILE[0],
                COLUMNS=SECOND_PASS_TILE[1],
                LINES=SECOND_PASS_LINES,
                PAD=ROW_PAD,
                CLAMP=clamp,
                num_warps=SECOND_PASS_WARPS,
            )
    return out


def _tiles(rows: int, columns: int, tile: tuple[int, int]) -> int:
    return ceil_div(rows, tile[0]) * ceil_div(columns, tile[1])
