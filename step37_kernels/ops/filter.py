"""What both resizing kernels share: an axis filtered by Pillow's coefficients, and their tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

PRECISION_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)


@triton.jit
def _load(source_ptr, place, channel, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(source_ptr + place + channel, mask=inside, other=0).to(tl.int32)
    # Places that gather look the same along either axis, and Triton 3.6 then gives the threads of
    # a warp the rows, many cache lines apart. Flat, they are neighbours in a row.
    flat = tl.reshape(place, (place.shape[0] * place.shape[1],))
    return tl.reshape(tl.load(source_ptr + flat + channel), place.shape).to(tl.int32)


@triton.jit
def _add_taps(
    red, green, blue, source_ptr, line, pair, channel_stride, inside, MASKED: tl.constexpr
):  # fmt: skip
    """The sums of the three channels with two more taps, whose loads are on the way together."""
    offset_0, weight_0, offset_1, weight_1 = pair
    place_0 = line + offset_0
    place_1 = line + offset_1
    red += _load(source_ptr, place_0, 0, inside, MASKED) * weight_0
    red += _load(source_ptr, place_1, 0, inside, MASKED) * weight_1
    green += _load(source_ptr, place_0, channel_stride, inside, MASKED) * weight_0
    green += _load(source_ptr, place_1, channel_stride, inside, MASKED) * weight_1
    blue += _load(source_ptr, place_0, 2 * channel_stride, inside, MASKED) * weight_0
    blue += _load(source_ptr, place_1, 2 * channel_stride, inside, MASKED) * weight_1
    return red, green, blue


@triton.jit
def _to_byte(total, CLAMP: tl.constexpr):
    value = total >> PRECISION_BITS
    if CLAMP:
        value = tl.minimum(value, 255)
    return value


@triton.jit
def two_taps(table_ptr, first, at, step, last, size, stride):
    """Where the taps ``step`` and ``step + 1`` read, in bytes, and their coefficients."""
    weight_0 = tl.load(table_ptr + (1 + step) * size + at)
    weight_1 = tl.load(table_ptr + (2 + step) * size + at)
    # Past the last one the coefficient is zero. Clamping the position, where a mask would do,
    # keeps the load there from waiting for this one.
    offset_0 = tl.minimum(first + step, last).to(tl.int64) * stride
    offset_1 = tl.minimum(first + step + 1, last).to(tl.int64) * stride
    return offset_0, weight_0, offset_1, weight_1


@triton.jit
def first_taps(table_ptr, at, last, size, stride):
    """The first positions, and the :func:`two_taps` of step 0."""
    first = tl.load(table_ptr + at)
    return first, two_taps(table_ptr, first, at, 0, last, size, stride)


@triton.jit
def filter_tile(
    source_ptr, line, channel_stride, stride, table_ptr, at, first, pair, taps, last, size, inside,
    MASKED: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """A tile of the result, filtered along one axis: int32 0…255 of the three channels.

    The channels go together: coefficients and addresses are the same for all. ``line`` has the
    tile's shape but for a 1 along the axis that is filtered; ``at``, ``first`` and ``pair`` but
    for a 1 along the other.

    Args:
        source_ptr: the first channel, uint8.
        line: bytes from there to position 0.
        channel_stride, stride: bytes from one channel, one position to the next.
        table_ptr: ``[1 + taps, size]``: first positions, then coefficients, zero past the last.
        at: where in the table.
        first, pair: :func:`first_taps`. Enlarging takes no more, and no turn of the loop.
        taps: even, at least 2.
        last: the last position.
        inside: mask of what may be read, if MASKED.
        CLAMP: see :func:`needs_clamp`.
    """
    half = tl.full(inside.shape, HALF, tl.int32)
    red, green, blue = _add_taps(
        half, half, half, source_ptr, line, pair, channel_stride, inside, MASKED
    )
    for step in range(2, taps, 2):
        pair = two_taps(table_ptr, first, at, step, last, size, stride)
        red, green, blue = _add_taps(
            red, green, blue, source_ptr, line, pair, channel_stride, inside, MASKED
        )
    return _to_byte(red, CLAMP), _to_byte(green, CLAMP), _to_byte(blue, CLAMP)


@triton.jit
def _store_bytes(target, channel_stride, red, green, blue, inside):
    tl.store(target, red.to(tl.uint8), mask=inside)
    tl.store(target + channel_stride, green.to(tl.uint8), mask=inside)
    tl.store(target + 2 * channel_stride, blue.to(tl.uint8), mask=inside)


@triton.jit
def filter_pass(
    source_ptr, source_pitch, source_channel, source_step, target_ptr, target_pitch,
    target_channel, target_step, table_ptr, taps, last, vertical, tile, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Program ``tile`` of a pass over one picture, uint8 to uint8, LINES rows at a time.

    Args:
        source_ptr, target_ptr: the first value of the first channel.
        source_pitch, source_channel, source_step: bytes from one row, channel, pixel to the next.
        target_pitch, target_channel, target_step: the same.
        table_ptr, taps, last: see :func:`filter_tile`.
        vertical: rows are made from rows.
        height, width: of the result.
    """
    tiles_across = tl.cdiv(width, COLUMNS)
    begin = (tile // tiles_across) * ROWS
    end = tl.minimum(begin + ROWS, height)
    column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
    target = target_ptr + (column * target_step)[None, :]
    within = (column < width)[None, :]
    # Nobody stores what is read past the last row or column: reading that one again needs no mask.
    column = tl.minimum(column, width - 1)[None, :]
    if vertical:
        line = column * source_step
        for top in range(begin, end, LINES):
            row = (top + tl.arange(0, LINES))[:, None]
            inside = within & (row < height)
            at = tl.minimum(row, height - 1)
            first, pair = first_taps(table_ptr, at, last, height, source_pitch)
            red, green, blue = filter_tile(
                source_ptr, line, source_channel, source_pitch, table_ptr, at, first, pair, taps,
                last, height, inside, False, CLAMP,
            )  # fmt: skip
            place = target + row.to(tl.int64) * target_pitch
            _store_bytes(place, target_channel, red, green, blue, inside)
    else:
        first, pair = first_taps(table_ptr, column, last, width, source_step)
        for top in range(begin, end, LINES):
            row = (top + tl.arange(0, LINES))[:, None]
            inside = within & (row < height)
            line = tl.minimum(row, height - 1).to(tl.int64) * source_pitch
            red, green, blue = filter_tile(
                source_ptr, line, source_channel, source_step, table_ptr, column, first, pair,
                taps, last, width, inside, False, CLAMP,
            )  # fmt: skip
            place = target + row.to(tl.int64) * target_pitch
            _store_bytes(place, target_channel, red, green, blue, inside)


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
