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

from step37_kernels.ops.common import ceil_div, device_of
from step37_kernels.ops.pixels import Line, line_arguments, normalized

# Rows and columns of a program's tile. The first pass spends its registers on addresses.
FIRST_PASS_TILE = (4, 256)
SECOND_PASS_TILE = (8, 256)
ROW_PAD = 16

PRECISION_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)

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
def _load(address, inside, MASKED: tl.constexpr):
    if MASKED:
        value = tl.load(address, mask=inside, other=0)
    else:
        value = tl.load(address)
    return value.to(tl.int32)


@triton.jit
def _two_taps(
    red, green, blue, step, first,
    source_ptr, channel_stride, table_ptr, last, size, row, column, inside, row_stride,
    column_stride, VERTICAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums with the taps ``step`` and ``step + 1``, whose loads are on the way together."""
    if VERTICAL:
        along = row
    else:
        along = column
    for ahead in tl.static_range(2):
        tap = step + ahead
        weight = tl.load(table_ptr + (1 + tap) * size + along, mask=along < size, other=0)
        # Past the last one the coefficient is zero. Clamping the position, where a mask would do,
        # keeps this load from waiting for that one.
        position = tl.minimum(first + tap, last)
        if VERTICAL:
            weight = weight[:, None]
            address = source_ptr + (position.to(tl.int64) * row_stride)[:, None]
            address = address + (column * column_stride)[None, :]
        else:
            weight = weight[None, :]
            address = source_ptr + (row.to(tl.int64) * row_stride)[:, None]
            address = address + (position * column_stride)[None, :]
        red += _load(address, inside, MASKED) * weight
        address += channel_stride
        green += _load(address, inside, MASKED) * weight
        address += channel_stride
        blue += _load(address, inside, MASKED) * weight
    return red, green, blue


@triton.jit
def _to_byte(total, CLAMP: tl.constexpr):
    value = total >> PRECISION_BITS
    if CLAMP:
        value = tl.minimum(value, 255)
    return value


@triton.jit
def filter_tile(
    source_ptr,
    channel_stride,
    table_ptr,
    taps,
    last,
    size,
    row,
    column,
    inside,
    row_stride,
    column_stride,
    VERTICAL: tl.constexpr,
    MASKED: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """One tile, filtered along one axis: int32 ``[rows, columns]`` of 0…255 for each channel.

    The channels go together: coefficients and addresses are the same for all three.

    Args:
        source_ptr: the first channel of what is filtered, uint8.
        channel_stride: bytes, in the source.
        table_ptr: ``[1 + taps, size]``: first positions, then coefficients, zero past the last.
        taps: even, at least 2.
        row, column: int32, coordinates of the tile in the result; that of the axis that is not
            filtered must exist in the source, or be masked.
        inside: ``[rows, columns]`` mask of what may be read, if MASKED.
        row_stride, column_stride: bytes, in the source.
        CLAMP: see :func:`needs_clamp`.
    """
    if VERTICAL:
        along = row
    else:
        along = column
    first = tl.load(table_ptr + along, mask=along < size, other=0)
    half = tl.full(inside.shape, HALF, tl.int32)
    # Enlarging takes two taps, and no turn of the loop.
    red, green, blue = _two_taps(
        half, half, half, 0, first,
        source_ptr, channel_stride, table_ptr, last, size, row, column, inside, row_stride,
        column_stride, VERTICAL, MASKED,
    )  # fmt: skip
    for step in range(2, taps, 2):
        red, green, blue = _two_taps(
            red, green, blue, step, first,
            source_ptr, channel_stride, table_ptr, last, size, row, column, inside, row_stride,
            column_stride, VERTICAL, MASKED,
        )  # fmt: skip
    return _to_byte(red, CLAMP), _to_byte(green, CLAMP), _to_byte(blue, CLAMP)


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
    PAD: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Interleaved source to planes: ``[3, height, size]``, or ``[3, size, width]`` vertical first.

    One program a tile; ``tile_jobs_ptr`` says which job it belongs to.
    """
    job = jobs_ptr + tl.load(tile_jobs_ptr + tl.program_id(0)).to(tl.int64) * FIELDS
    source = pixels_ptr + tl.load(job + SOURCE)
    source_pitch = tl.load(job + SOURCE_PITCH)
    vertical = tl.load(job + VERTICAL_FIRST) != 0
    height = tl.load(job + HEIGHT).to(tl.int32)
    width = tl.load(job + WIDTH).to(tl.int32)
    if vertical:
        rows = size
        columns = width
        table = tables_ptr + tl.load(job + ROW_TABLE)
        taps = tl.load(job + ROW_TAPS).to(tl.int32)
    else:
        rows = height
        columns = size
        table = tables_ptr + tl.load(job + COLUMN_TABLE)
        taps = tl.load(job + COLUMN_TAPS).to(tl.int32)

    tile = tl.program_id(0) - tl.load(job + FIRST_TILE).to(tl.int32)
    tiles_across = tl.cdiv(columns, COLUMNS)
    row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]

    pitch = (tl.cdiv(columns, PAD) * PAD).to(tl.int64)
    # Nothing tells the compiler that the planes start aligned, and that is on purpose: vector
    # stores would give a thread adjacent columns, and the byte loads of a warp, which gather, many
    # cache lines instead of one or two.
    target = middle_ptr + tl.load(job + MIDDLE)
    target = target + row.to(tl.int64)[:, None] * pitch + column[None, :]
    plane = rows * pitch
    # Nobody stores what a tile reads past the last row or column: reading that one again needs no
    # mask.
    row = tl.minimum(row, rows - 1)
    if vertical:
        column = tl.minimum(column, columns - 1)
        red, green, blue = filter_tile(
            source, 1, table, taps, height - 1, size, row, column, inside, source_pitch, 3,
            True, False, CLAMP,
        )  # fmt: skip
    else:
        red, green, blue = filter_tile(
            source, 1, table, taps, width - 1, size, row, column, inside, source_pitch, 3,
            False, False, CLAMP,
        )  # fmt: skip
    tl.store(target, red.to(tl.uint8), mask=inside)
    tl.store(target + plane, green.to(tl.uint8), mask=inside)
    tl.store(target + 2 * plane, blue.to(tl.uint8), mask=inside)


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
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Planes to ``out[n, c]``: the other axis, then the normalisation. One program a tile.

    One launch for the pictures of each order: ``order_ptr`` lists the jobs that had their columns
    filtered first if VERTICAL_DONE, and the others, nearly always all, if not.

    ``ALIGNED``: the side is a multiple of eight, so that rows of the result are written in vectors.
    """
    if ALIGNED:
        size = size // 8 * 8
    tiles_across = tl.cdiv(size, COLUMNS)
    tiles_down = tl.cdiv(size, ROWS)
    pid = tl.program_id(0)
    column = (pid % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // tiles_across
    row = (pid % tiles_down) * ROWS + tl.arange(0, ROWS)
    pid = pid // tiles_down
    n = tl.load(order_ptr + pid).to(tl.int64)

    job = jobs_ptr + n * FIELDS
    planes = middle_ptr + tl.load(job + MIDDLE) // PAD * PAD
    exists = row < size
    if VERTICAL_DONE:
        width = tl.load(job + WIDTH)
        pitch = (tl.cdiv(width, PAD) * PAD).to(tl.int64)
        red, green, blue = filter_tile(
            planes,
            size * pitch,
            tables_ptr + tl.load(job + COLUMN_TABLE),
            tl.load(job + COLUMN_TAPS).to(tl.int32),
            width.to(tl.int32) - 1,
            size,
            tl.minimum(row, size - 1),
            column,
            exists[:, None] & (column < size)[None, :],
            pitch,
            1,
            False,
            False,
            CLAMP,
        )
    else:
        height = tl.load(job + HEIGHT)
        pitch = (tl.cdiv(size, PAD) * PAD).to(tl.int64)
        red, green, blue = filter_tile(
            planes,
            height * pitch,
            tables_ptr + tl.load(job + ROW_TABLE),
            tl.load(job + ROW_TAPS).to(tl.int32),
            height.to(tl.int32) - 1,
            size,
            row,
            column,
            # Up to the padding: a mask that ends inside a vector would split the loads.
            exists[:, None] & (column < pitch)[None, :],
            pitch,
            1,
            True,
            True,
            CLAMP,
        )
    plane = size.to(tl.int64) * size
    target = out_ptr + n * 3 * plane + row.to(tl.int64)[:, None] * size + column[None, :]
    inside = exists[:, None] & (column < size)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    red = normalized(red, table_ptr, red_scale, red_offset, dtype, LINE, INTERPRET)
    tl.store(target, red, mask=inside)
    green = normalized(green, table_ptr + 256, green_scale, green_offset, dtype, LINE, INTERPRET)
    tl.store(target + plane, green, mask=inside)
    blue = normalized(blue, table_ptr + 512, blue_scale, blue_offset, dtype, LINE, INTERPRET)
    tl.store(target + 2 * plane, blue, mask=inside)


def resize(
    pixels: torch.Tensor,
    jobs: Sequence[ResizeJob],
    tables: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]],
    results: torch.Tensor | Line,
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
    aligned = size % 8 == 0
    by_order = device_order.split([len(jobs) - num_vertical, num_vertical])
    middle = torch.empty(middle_bytes, dtype=torch.uint8, device=pixels.device)
    out = torch.empty((len(jobs), 3, size, size), dtype=dtype, device=pixels.device)
    with device_of(pixels):
        first_pass_kernel[(len(tile_jobs),)](
            pixels,
            device_records,
            device_tables,
            device_tile_jobs,
            middle,
            size,
            ROWS=FIRST_PASS_TILE[0],
            COLUMNS=FIRST_PASS_TILE[1],
            PAD=ROW_PAD,
            CLAMP=clamp,
        )
        for vertical_done, members in enumerate(by_order):
            if not len(members):
                continue
            second_pass_kernel[(len(members) * _tiles(size, size, SECOND_PASS_TILE),)](
                middle,
                device_records,
                members,
                device_tables,
                results if isinstance(results, torch.Tensor) else out,
                out,
                size,
                **line_arguments(results),
                VERTICAL_DONE=bool(vertical_done),
                ALIGNED=aligned,
                ROWS=SECOND_PASS_TILE[0],
                COLUMNS=SECOND_PASS_TILE[1],
                PAD=ROW_PAD,
                CLAMP=clamp,
                num_warps=4 if aligned else 8,  # single values need more registers than vectors
            )
    return out


def needs_clamp(tables: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]) -> bool:
    """Whether a filtered value can pass 255, as Pillow's clip allows for.

    Each coefficient is its weight, times 2²², plus at most ½; the weights of a position add up to
    1. So a sum is at most 255 · (2²² + taps / 2) + 2²¹, which is less than 256 · 2²² for up to
    16447 taps: for anything that shrinks an axis less than 8000 times.
    """
    return max(len(table) for pair in tables for table in pair) > 16_000


def join_tables(
    tables: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]],
) -> tuple[dict[int, int], npt.NDArray[np.int32]]:
    """Where each table begins, by ``id`` of the array, in the flat array of all, each once."""
    offsets: dict[int, int] = {}
    unique: list[npt.NDArray[np.int32]] = []
    end = 0
    for table in (table for pair in tables for table in pair):
        if id(table) not in offsets:
            offsets[id(table)] = end
            unique.append(table)
            end += table.size
    return offsets, np.concatenate([table.reshape(-1) for table in unique])


def _tiles(rows: int, columns: int, tile: tuple[int, int]) -> int:
    return ceil_div(rows, tile[0]) * ceil_div(columns, tile[1])


def upload(
    arrays: Sequence[npt.NDArray[np.int64] | npt.NDArray[np.int32]], device: torch.device
) -> list[torch.Tensor]:
    """Copy flat or 2-D arrays to ``device`` in one transfer that the host does not wait for."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        # Every array starts as aligned as an allocation of its own.
        end += -(-array.nbytes // 256) * 256
    staging = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    view = staging.numpy()
    for start, array in zip(starts, arrays, strict=True):
        view[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    buffer = staging.to(device, non_blocking=True)
    return [
        buffer[start : start + array.nbytes]
        .view(torch.int64 if array.dtype == np.int64 else torch.int32)
        .view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
