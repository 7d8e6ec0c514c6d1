"""Pillow's BILINEAR on a ragged batch, to 8-bit pictures of any sizes: one launch for each pass.

The arithmetic is that of ``ops.resize``. What differs is the end: the result is interleaved pixels
in a buffer, of another size for every picture, to be resized again.
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
from step37_kernels.ops.filter import filter_pass, join_tables, needs_clamp, upload
from step37_kernels.ops.launch import launch

# Rows and columns of a program's tile, and rows at a time: as in the first pass of ops.resize.
TILE, LINES = (16, 256), 2

# The columns of a record: one pass over one picture, int64 each.
SOURCE = tl.constexpr(0)  # byte offset of the first value of the first channel
SOURCE_PITCH = tl.constexpr(1)  # bytes from one row to the next
SOURCE_CHANNEL = tl.constexpr(2)  # bytes from one channel to the next
TARGET = tl.constexpr(3)
TARGET_PITCH = tl.constexpr(4)
TARGET_CHANNEL = tl.constexpr(5)
HEIGHT = tl.constexpr(6)  # of the result of the pass
WIDTH = tl.constexpr(7)
VERTICAL = tl.constexpr(8)
TABLE = tl.constexpr(9)  # offset of the coefficients
TAPS = tl.constexpr(10)
LAST = tl.constexpr(11)  # last position of the source along the axis that is filtered
FIRST_TILE = tl.constexpr(12)  # first program that works on this picture
FIELDS = tl.constexpr(13)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uint8Job:
    """One picture to resize.

    Attributes:
        source, target: byte offsets of the first pixels in the two buffers.
        source_pitch, target_pitch: bytes from one row to the next.
        height, width: of the source, in pixels.
        out_height, out_width: of the result.
        vertical_first: filter the columns before the rows.
    """

    source: int
    source_pitch: int
    height: int
    width: int
    target: int
    target_pitch: int
    out_height: int
    out_width: int
    vertical_first: bool


@triton.jit(do_not_specialize_on_alignment=["source_ptr", "target_ptr"])
def filter_pass_kernel(
    source_ptr,
    jobs_ptr,
    tables_ptr,
    tile_jobs_ptr,
    target_ptr,
    SOURCE_STEP: tl.constexpr,
    TARGET_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """One pass over every picture, one program a tile; ``tile_jobs_ptr`` says of which.

    ``SOURCE_STEP``, ``TARGET_STEP``: bytes from one pixel to the next, 3 interleaved, 1 in planes.
    """
    job = jobs_ptr + tl.load(tile_jobs_ptr + tl.program_id(0)).to(tl.int64) * FIELDS
    tile = tl.program_id(0) - tl.load(job + FIRST_TILE).to(tl.int32)
    filter_pass(
        source_ptr + tl.load(job + SOURCE),
        tl.load(job + SOURCE_PITCH).to(tl.int32),
        tl.load(job + SOURCE_CHANNEL),
        SOURCE_STEP,
        target_ptr + tl.load(job + TARGET),
        tl.load(job + TARGET_PITCH).to(tl.int32),
        tl.load(job + TARGET_CHANNEL),
        TARGET_STEP,
        tables_ptr + tl.load(job + TABLE),
        tl.load(job + TAPS).to(tl.int32),
        tl.load(job + LAST).to(tl.int32),
        tl.load(job + VERTICAL) != 0,
        tile,
        tl.load(job + HEIGHT).to(tl.int32),
        tl.load(job + WIDTH).to(tl.int32),
        ROWS,
        COLUMNS,
        LINES,
        CLAMP,
    )


def resize(
    pixels: torch.Tensor,
    jobs: Sequence[Uint8Job],
    tables: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]],
    target: torch.Tensor,
) -> None:
    """Launch both passes.

    Args:
        pixels: uint8, flat: the buffer that the jobs read.
        jobs: what to resize, at least one.
        tables: per job, the coefficients of its rows and of its columns, int32 ``[1 + taps, n]``
            each, taps even. The same array object is uploaded once.
        target: uint8, flat: the buffer that the jobs write.
    """
    offsets, coefficients = join_tables(tables)
    records = np.empty((2, len(jobs), FIELDS.value), dtype=np.int64)
    tiles: tuple[list[int], list[int]] = ([], [])
    first_tile = [0, 0]
    middle_bytes = 0
    for i, (job, (rows, columns)) in enumerate(zip(jobs, tables, strict=True)):
        by_row, by_column = (rows, job.height - 1), (columns, job.width - 1)
        if job.vertical_first:
            height, width, axes = job.out_height, job.width, (by_row, by_column)
        else:
            height, width, axes = job.height, job.out_width, (by_column, by_row)
        middle = (middle_bytes, width, height * width)
        ends = (
            ((job.source, job.source_pitch, 1), middle, height, width),
            (middle, (job.target, job.target_pitch, 1), job.out_height, job.out_width),
        )
        for number, (source, result, out_height, out_width) in enumerate(ends):
            table, last = axes[number]
            records[number, i] = (
                *source,
                *result,
                out_height,
                out_width,
                job.vertical_first == (number == 0),
                offsets[id(table)],
                len(table) - 1,
                last,
                first_tile[number],
            )
            count = ceil_div(out_height, TILE[0]) * ceil_div(out_width, TILE[1])
            tiles[number].append(count)
            first_tile[number] += count
        middle_bytes += 3 * height * width

    job_numbers = np.arange(len(jobs), dtype=np.int32)
    first_tiles, second_tiles = (np.repeat(job_numbers, count) for count in tiles)
    first, second, device_tables, first_jobs, second_jobs = upload(
        [
            records[0],
            records[1],
            coefficients,
            first_tiles,
            second_tiles,
        ],
        pixels.device,
    )
    planes = torch.empty(middle_bytes, dtype=torch.uint8, device=pixels.device)
    clamp = needs_clamp(tables)
    options = {"ROWS": TILE[0], "COLUMNS": TILE[1], "LINES": LINES, "CLAMP": clamp}
    with device_of(pixels):
        launch(
            filter_pass_kernel,
            (len(first_tiles),),
            pixels,
            first,
            device_tables,
            first_jobs,
            planes,
            SOURCE_STEP=3,
            TARGET_STEP=1,
            **options,
        )
        launch(
            filter_pass_kernel,
            (len(second_tiles),),
            planes,
            second,
            device_tables,
            second_jobs,
            target,
            SOURCE_STEP=1,
            TARGET_STEP=3,
            **options,
        )
