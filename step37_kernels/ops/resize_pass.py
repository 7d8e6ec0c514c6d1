"""Resizes pictures of different sizes as Pillow's BILINEAR does, one launch for each pass.

As in Pillow, both passes are integer arithmetic, and results are rounded to 8 bits between them.
The first pass filters one axis of interleaved pixels and writes 8-bit planes, whose rows are padded
so that the second can read whole vectors. The second pass filters the other axis, and either
interleaves the pixels again or normalises them. Which axis comes first is decided for each picture.
All values that depend on the pictures' sizes are run-time values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from step37_kernels.ops.common import (
    INTERPRETED,
    VECTOR,
    ceil_div,
    device_of,
    in_vectors,
    whole_vectors,
)
from step37_kernels.ops.launch import launch
from step37_kernels.ops.normalize_pixels import Constants, normalized

Table = npt.NDArray[np.int32]

# Rows and columns of a program's tile, and how many rows it works on at a time in each pass. With
# more rows more loads are issued together. In the second pass two warps are enough to store whole
# 16-byte vectors of 16-bit values, and 256 columns waste little at the usual sizes. Values that are
# divided, nearly always fp32, need the registers of four warps.
TILE = (16, 256)
ROWS_AT_ONCE = (4, 2)
WARPS, MULTIPLY_ADD_WARPS = 4, 2
ROW_PAD = 16

PRECISION_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)

# The columns of a record, int64 each: one pass over one picture.
SOURCE = tl.constexpr(0)  # offset of the first element of the first channel
SOURCE_PITCH = tl.constexpr(1)  # elements from one row to the next
SOURCE_CHANNEL = tl.constexpr(2)  # elements from one channel to the next
TARGET = tl.constexpr(3)
TARGET_PITCH = tl.constexpr(4)
TARGET_CHANNEL = tl.constexpr(5)
HEIGHT = tl.constexpr(6)  # of the result of the pass
WIDTH = tl.constexpr(7)
VERTICAL = tl.constexpr(8)  # whether the pass filters along the height
TABLE = tl.constexpr(9)  # offset of the coefficients
TAPS = tl.constexpr(10)
LAST = tl.constexpr(11)  # last position of the source along the axis that is filtered
FIELDS = tl.constexpr(12)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeJob:
    """One picture, or a rectangle of one, to resize.

    Attributes:
        source: offset of the first pixel and bytes from one row to the next.
        height, width: of the source, in pixels.
        target: offset of the first element, and elements from one row and channel to the next.
        passes: the two passes in order: whether it filters along the height, and its coefficients,
            int32 ``[1 + taps, n]``, taps even. An array object that occurs twice is uploaded once.
    """

    source: tuple[int, int]
    height: int
    width: int
    target: tuple[int, int, int]
    passes: tuple[tuple[bool, Table], tuple[bool, Table]]


@triton.jit
def _load(source_ptr, place, channel, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(source_ptr + place + channel, mask=inside, other=0).to(tl.int32)
    # Triton 3.6 cannot see which axis of gathered addresses is contiguous in memory, and would put
    # the threads of a warp on different rows, many cache lines apart. Flattened, they are on one.
    flat = tl.reshape(place, (place.shape[0] * place.shape[1],))
    return tl.reshape(tl.load(source_ptr + flat + channel), place.shape).to(tl.int32)


@triton.jit
def _add_taps(
    red, green, blue, source_ptr, start, pair, channel_stride, inside, MASKED: tl.constexpr
):  # fmt: skip
    """Add two taps to the sums of the three channels; the loads of both are issued together."""
    offset_0, weight_0, offset_1, weight_1 = pair
    place_0 = start + offset_0
    place_1 = start + offset_1
    red += _load(source_ptr, place_0, 0, inside, MASKED) * weight_0
    red += _load(source_ptr, place_1, 0, inside, MASKED) * weight_1
    green += _load(source_ptr, place_0, channel_stride, inside, MASKED) * weight_0
    green += _load(source_ptr, place_1, channel_stride, inside, MASKED) * weight_1
    blue += _load(source_ptr, place_0, 2 * channel_stride, inside, MASKED) * weight_0
    blue += _load(source_ptr, place_1, 2 * channel_stride, inside, MASKED) * weight_1
    return red, green, blue


@triton.jit
def _two_taps(table_ptr, first, at, step, last, size, stride):
    """Return the offsets that the taps ``step`` and ``step + 1`` read, and their coefficients."""
    weight_0 = tl.load(table_ptr + (1 + step) * size + at)
    weight_1 = tl.load(table_ptr + (2 + step) * size + at)
    # Past the last tap the coefficient is zero. The position is clamped, not masked, so that the
    # load of the pixel does not wait for this one.
    offset_0 = tl.minimum(first + step, last).to(tl.int64) * stride
    offset_1 = tl.minimum(first + step + 1, last).to(tl.int64) * stride
    return offset_0, weight_0, offset_1, weight_1


@triton.jit
def _filter_tile(
    job, tile, source_ptr, tables_ptr, target_ptr, constants, VERTICAL_PASS: tl.constexpr,
    SOURCE_STEP: tl.constexpr, TARGET_STEP: tl.constexpr, MULTIPLY_ADD: tl.constexpr,
    INTERPRET: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Filter one tile of one picture along one axis, ROWS_AT_ONCE rows at a time.

    All channels are done together: they have the same coefficients and addresses.
    """
    dtype: tl.constexpr = target_ptr.dtype.element_ty
    NORMALIZE: tl.constexpr = dtype != tl.uint8
    # Planes are read in vectors along their rows if the result can be written in the same order.
    MASKED: tl.constexpr = NORMALIZE and VERTICAL_PASS
    source = source_ptr + tl.load(job + SOURCE)
    source_pitch = in_vectors(tl.load(job + SOURCE_PITCH).to(tl.int32), NORMALIZE)
    source_channel = in_vectors(tl.load(job + SOURCE_CHANNEL), NORMALIZE)
    target = target_ptr + tl.load(job + TARGET)
    target_pitch = in_vectors(tl.load(job + TARGET_PITCH).to(tl.int32), ALIGNED)
    target_channel = in_vectors(tl.load(job + TARGET_CHANNEL), ALIGNED)
    if NORMALIZE:
        source = tl.multiple_of(source, VECTOR)
    if ALIGNED:
        target = tl.multiple_of(target, 2 * VECTOR)
    height = tl.load(job + HEIGHT).to(tl.int32)
    width = in_vectors(tl.load(job + WIDTH).to(tl.int32), ALIGNED)
    table = tables_ptr + tl.load(job + TABLE)
    taps = tl.load(job + TAPS).to(tl.int32)
    last = tl.load(job + LAST).to(tl.int32)

    tiles_across = tl.cdiv(width, COLUMNS)
    begin = (tile // tiles_across) * ROWS
    end = tl.minimum(begin + ROWS, height)
    column = ((tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    # Past the last row or column, read that one again: it needs no mask, and is not stored.
    last_column = tl.minimum(column, width - 1)
    if VERTICAL_PASS:
        size, stride = height, source_pitch
        start = (column if MASKED else last_column) * SOURCE_STEP
    else:
        # The first two taps, the same for all rows. Enlarging needs no others: no loop runs.
        size, stride, at = width, SOURCE_STEP, last_column
        first = tl.load(table + at)
        pair = _two_taps(table, first, at, 0, last, size, stride)
    for top in range(begin, end, ROWS_AT_ONCE):
        row = (top + tl.arange(0, ROWS_AT_ONCE))[:, None]
        inside = (row < height) & (column < width)
        last_row = tl.minimum(row, height - 1)
        if VERTICAL_PASS:
            at = last_row
            first = tl.load(table + at)
            pair = _two_taps(table, first, at, 0, last, size, stride)
        else:
            start = last_row.to(tl.int64) * source_pitch
        # Including the padding: a mask that ends inside a vector would split it.
        padded = (row < height) & (column < source_pitch)
        half = tl.full(inside.shape, HALF, tl.int32)
        sums = _add_taps(half, half, half, source, start, pair, source_channel, padded, MASKED)
        for step in range(2, taps, 2):
            more = _two_taps(table, first, at, step, last, size, stride)
            sums = _add_taps(*sums, source, start, more, source_channel, padded, MASKED)
        place = target + row.to(tl.int64) * target_pitch + column * TARGET_STEP
        for channel in tl.static_range(3):
            value = sums[channel] >> PRECISION_BITS
            if CLAMP:
                value = tl.minimum(value, 255)
            if NORMALIZE:
                scale, offset = constants[2 * channel], constants[2 * channel + 1]
                value = normalized(value, scale, offset, dtype, MULTIPLY_ADD, INTERPRET)
            tl.store(place + channel * target_channel, value.to(dtype), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["source_ptr", "target_ptr"])
def resize_pass_kernel(
    source_ptr,
    jobs_ptr,
    tables_ptr,
    tiles_ptr,
    target_ptr,
    red_scale,
    red_offset,
    green_scale,
    green_offset,
    blue_scale,
    blue_offset,
    VERTICAL_PASS: tl.constexpr,
    SOURCE_STEP: tl.constexpr,
    TARGET_STEP: tl.constexpr,
    MULTIPLY_ADD: tl.constexpr,
    INTERPRET: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Do one pass over many pictures; ``tiles_ptr`` holds each program's picture and tile.

    ``VERTICAL_PASS``: whether it filters along the height; None if pictures differ in that.
    ``SOURCE_STEP``, ``TARGET_STEP``: elements from one pixel to the next: 3 if interleaved, 1 in
    planes. ``ALIGNED``: rows of the result consist of whole vectors, and are written in them. The
    planes between the passes are deliberately not marked as whole vectors: that would give each
    thread adjacent columns and make the byte loads of a warp uncoalesced (many cache lines instead
    of one or two). ``CLAMP``: see :func:`needs_clamp`.
    """
    job = jobs_ptr + tl.load(tiles_ptr + 2 * tl.program_id(0)).to(tl.int64) * FIELDS
    tile = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    constants = (red_scale, red_offset, green_scale, green_offset, blue_scale, blue_offset)
    vertical = VERTICAL_PASS
    if VERTICAL_PASS is None:
        vertical = tl.load(job + VERTICAL) != 0
    if vertical:
        _filter_tile(
            job, tile, source_ptr, tables_ptr, target_ptr, constants, True, SOURCE_STEP,
            TARGET_STEP, MULTIPLY_ADD, INTERPRET, ALIGNED, ROWS, COLUMNS, ROWS_AT_ONCE, CLAMP,
        )  # fmt: skip
    else:
        _filter_tile(
            job, tile, source_ptr, tables_ptr, target_ptr, constants, False, SOURCE_STEP,
            TARGET_STEP, MULTIPLY_ADD, INTERPRET, ALIGNED, ROWS, COLUMNS, ROWS_AT_ONCE, CLAMP,
        )  # fmt: skip


def resize(
    pixels: torch.Tensor,
    jobs: Sequence[ResizeJob],
    out: torch.Tensor,
    constants: Constants | None = None,
) -> None:
    """Launch both passes.

    If the second pass normalises, it is launched once for each order of the passes that occurs.

    Args:
        pixels: uint8, flat: the buffer that the jobs read.
        jobs: what to resize, at least one.
        out: what they write: flat uint8, for interleaved pixels, or ``[N, 3, size, size]``.
        constants: constants of the normalisation; None leaves 8-bit pixels.
    """
    tables = {id(table): table for job in jobs for _, table in job.passes}
    sizes = (table.size for table in tables.values())
    offsets = dict(zip(tables, itertools.accumulate(sizes, initial=0), strict=False))
    records = np.empty((2, len(jobs), FIELDS.value), dtype=np.int64)
    middle_bytes = 0
    for i, job in enumerate(jobs):
        source, height, width = (*job.source, 1), job.height, job.width
        for number, (vertical, table) in enumerate(job.passes):
            last = (height if vertical else width) - 1
            height, width = (table.shape[1], width) if vertical else (height, table.shape[1])
            target = job.target
            if number == 0:
                pitch = ceil_div(width, ROW_PAD) * ROW_PAD
                target = middle_bytes, pitch, height * pitch
                middle_bytes += 3 * height * pitch
            axis = vertical, offsets[id(table)], len(table) - 1, last
            records[number, i] = *source, *target, height, width, *axis
            source = target

    every = np.arange(len(jobs))
    launches: list[tuple[int, bool | None, npt.NDArray[np.int64]]] = [(0, None, every)]
    if constants is None:
        launches.append((1, None, every))
    else:
        by_order = (
            (order, every[records[1, :, VERTICAL.value] == order]) for order in (True, False)
        )
        launches += [(1, order, members) for order, members in by_order if len(members)]
    device_records, device_tables, *device_tiles = _upload(
        [
            records,
            np.concatenate([table.reshape(-1) for table in tables.values()]),
            *(_tiles(records[number], members) for number, _, members in launches),
        ],
        pixels.device,
    )
    buffers = pixels, torch.empty(middle_bytes, dtype=torch.uint8, device=pixels.device), out
    clamp = needs_clamp(tables.values())
    with device_of(pixels):
        for (number, vertical_pass, _), tiles in zip(launches, device_tiles, strict=True):
            values = number == 1 and constants is not None
            multiply_add, numbers = constants if values and constants else (False, (0.0,) * 6)
            launch(
                resize_pass_kernel,
                (len(tiles),),
                buffers[number],
                device_records[number],
                device_tables,
                tiles,
                buffers[number + 1],
                *numbers,
                VERTICAL_PASS=vertical_pass,
                SOURCE_STEP=1 if number else 3,
                TARGET_STEP=3 if number and not values else 1,
                MULTIPLY_ADD=multiply_add,
                INTERPRET=INTERPRETED,
                ALIGNED=values and whole_vectors(out.shape[-1]),
                ROWS=TILE[0],
                COLUMNS=TILE[1],
                ROWS_AT_ONCE=ROWS_AT_ONCE[number],
                CLAMP=clamp,
                num_warps=MULTIPLY_ADD_WARPS if multiply_add else WARPS,
            )


def needs_clamp(tables: Iterable[Table]) -> bool:
    """Whether a filtered value can be above 255, so that it has to be clipped as Pillow clips it.

    Each coefficient is its weight, times 2²², plus at most ½; the weights of a position add up to
    1. So a sum is at most 255 · (2²² + taps / 2) + 2²¹, which is less than 256 · 2²² for up to
    16447 taps: for anything that shrinks an axis less than 8000 times.
    """
    return max(map(len, tables)) > 16_000


def _tiles(records: npt.NDArray[np.int64], members: npt.NDArray[np.int64]) -> Table:
    """Make ``[programs, 2]``: the picture of each program of a launch, and its tile."""
    height, width = records[members, HEIGHT.value], records[members, WIDTH.value]
    counts = -(-height // TILE[0]) * -(-width // TILE[1])
    pictures = np.repeat(members, counts)
    tiles = np.arange(len(pictures)) - np.repeat(counts.cumsum() - counts, counts)
    return np.stack([pictures, tiles], axis=1).astype(np.int32)


def _upload(
    arrays: Sequence[npt.NDArray[np.int64] | Table], device: torch.device
) -> list[torch.Tensor]:
    """Copy arrays to ``device`` in one transfer that the host does not wait for."""
    # Every array is aligned as an allocation of its own would be.
    lengths = [ceil_div(array.nbytes, 256) * 256 for array in arrays]
    pinned = device.type == "cuda"
    staging = torch.empty(sum(lengths), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for part, array in zip(staging.split(lengths), arrays, strict=True):
        part.numpy()[: array.nbytes] = array.reshape(-1).view(np.uint8)
    return [
        part[: array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for part, array in zip(
            staging.to(device, non_blocking=True).split(lengths), arrays, strict=True
        )
    ]
