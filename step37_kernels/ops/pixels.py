"""uint8 pixels to normalised planes: one table look-up per value.

A channel has 256 possible inputs, so the kernel looks its results up instead of computing them.
That makes it exact by construction, whatever the compiler fuses and the interpreter rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from step37_kernels.ops.common import device_of

BLOCK_PIXELS = 1024


@triton.jit(
    do_not_specialize=[
        "rows",
        "column_units",
        "image_stride",
        "row_stride",
        "column_stride",
        "channel_stride",
    ],
    do_not_specialize_on_alignment=["pixels"],
)
def normalize_kernel(
    pixels,
    table,
    out,
    rows: tl.int64,
    column_units: tl.int64,
    image_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    channel_stride: tl.int64,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[n, c, r, x] = table[c, pixels[n, r, x, c]]`` for one block of one row.

    ``UNIT`` divides the columns: it is what tells the compiler that rows of ``out`` start aligned.
    """
    columns = column_units * UNIT
    blocks = tl.cdiv(columns, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    row = (pid // blocks) % rows
    image = pid // (blocks * rows)

    x = block * BLOCK + tl.arange(0, BLOCK)
    inside = x < columns
    source = pixels + image * image_stride + row * row_stride + x * column_stride
    plane = rows * columns
    target = out + image * 3 * plane + row * columns + x
    for channel in tl.static_range(3):
        value = tl.load(source + channel * channel_stride, mask=inside, other=0).to(tl.int32)
        normalized = tl.load(table + channel * 256 + value)
        tl.store(target + channel * plane, normalized, mask=inside)


def alignment_unit(columns: int) -> int:
    """The widest store, in elements, that every row of ``columns`` elements allows: 8 or 1."""
    return 8 if columns % 8 == 0 else 1


def normalize(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Launch :func:`normalize_kernel`.

    Args:
        pixels: uint8 ``[N, H, W, 3]``, any strides.
        table: ``[3, 256]`` contiguous, in the dtype of the result.

    Returns:
        ``[N, 3, H, W]`` contiguous.
    """
    n, height, width, _ = pixels.shape
    out = torch.empty((n, 3, height, width), dtype=table.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    image_stride, row_stride, column_stride, channel_stride = pixels.stride()
    # Rows that follow on from one another are one long row: fewer half-filled blocks.
    rows, columns = height, width
    if height == 1 or row_stride == width * column_stride:
        rows, columns = 1, height * width
    unit = alignment_unit(columns)
    grid = (n * rows * triton.cdiv(columns, BLOCK_PIXELS),)
    with device_of(pixels):
        normalize_kernel[grid](
            pixels,
            table,
            out,
            rows,
            columns // unit,
            image_stride,
            row_stride,
            column_stride,
            channel_stride,
            UNIT=unit,
            BLOCK=BLOCK_PIXELS,
        )
    return out
