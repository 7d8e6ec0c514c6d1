"""Kernel that turns uint8 pixels into normalised planes.

A channel has 256 possible inputs, so the host can compute all 256 results before the launch. Where
one multiplication and one addition in fp32 give every one of them, fused or not (bf16 and fp16 with
CLIP's constants), the kernel does only that; elsewhere it divides in IEEE arithmetic. Both are
exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from step37_kernels.ops.common import (
    INTERPRETED,
    ceil_div,
    device_of,
    in_vectors,
    round_to,
    whole_vectors,
)
from step37_kernels.ops.launch import launch

Constants = tuple[bool, tuple[float, ...]]
"""MULTIPLY_ADD of :func:`normalized`, then scale and offset of red, of green and of blue."""

BLOCK_PIXELS = 1024


@triton.jit
def channel_of_words(word0, word1, word2, channel: tl.constexpr):
    """Extract one channel of groups of four pixels from the three words that hold each group.

    The words hold ``rgbr gbrg brgb`` (little-endian), so channel c of pixel i is byte ``3i + c``.

    Args:
        word0, word1, word2: int32 ``[groups]``.

    Returns:
        int32 ``[4 * groups]``, 0…255.
    """
    if channel == 0:
        pixel0, pixel1, pixel2, pixel3 = word0, word0 >> 24, word1 >> 16, word2 >> 8
    elif channel == 1:
        pixel0, pixel1, pixel2, pixel3 = word0 >> 8, word1, word1 >> 24, word2 >> 16
    else:
        pixel0, pixel1, pixel2, pixel3 = word0 >> 16, word1 >> 8, word2, word2 >> 24
    # A join adds a last dimension, the index of the operand: [group, pixel // 2, pixel % 2].
    pixels = tl.join(tl.join(pixel0, pixel2), tl.join(pixel1, pixel3))
    return pixels.reshape(pixels.numel) & 255


@triton.jit
def normalized(
    value, scale, offset, dtype: tl.constexpr, MULTIPLY_ADD: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """Normalise an int32 value of 0…255.

    If MULTIPLY_ADD, as ``value * scale + offset``; else by two divisions, with the standard
    deviation as scale and the mean as offset.
    """
    value = value.to(tl.float32)
    if MULTIPLY_ADD:
        result = value * scale + offset
    else:
        result = tl.div_rn(tl.div_rn(value, 255.0) - offset, scale)
    return round_to(result, dtype, INTERPRET)


@triton.jit(
    do_not_specialize=[
        "rows",
        "columns",
        "image_stride",
        "row_stride",
        "column_stride",
        "channel_stride",
    ],
    do_not_specialize_on_alignment=["pixels_ptr"],
)
def normalize_kernel(
    pixels_ptr,
    out_ptr,
    rows: tl.int64,
    columns: tl.int64,
    image_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    channel_stride: tl.int64,
    red_scale,
    red_offset,
    green_scale,
    green_offset,
    blue_scale,
    blue_offset,
    MULTIPLY_ADD: tl.constexpr,
    INTERPRET: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[n, c, r, x] = normalized(pixels[n, r, x, c])`` for one block of one row.

    ``WORDS`` is set for interleaved pixels without gaps, in rows that start at a multiple of four
    bytes and hold whole vectors of pixels. They are read in words and written in vectors; if they
    were read byte by byte, each thread of a warp would touch another cache line.
    """
    columns = in_vectors(columns, WORDS)
    # At most the number of programs, which fits into 32 bits; a 64-bit division is a function call.
    blocks = tl.cdiv(columns, BLOCK).to(tl.int32)
    pid = tl.program_id(0)
    block = (pid % blocks).to(tl.int64)
    pid = pid // blocks
    row = (pid % rows.to(tl.int32)).to(tl.int64)
    image = (pid // rows.to(tl.int32)).to(tl.int64)

    x = block * BLOCK + tl.arange(0, BLOCK)
    inside = x < columns
    source = pixels_ptr + image * image_stride + row * row_stride
    plane = rows * columns
    target = out_ptr + image * 3 * plane + row * columns + x
    if WORDS:
        group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        words = source.to(tl.pointer_type(tl.int32)) + group * 3
        whole = group < columns // 4
        word0 = tl.load(words, mask=whole, other=0)
        word1 = tl.load(words + 1, mask=whole, other=0)
        word2 = tl.load(words + 2, mask=whole, other=0)
    constants = (red_scale, red_offset, green_scale, green_offset, blue_scale, blue_offset)
    for channel in tl.static_range(3):
        if WORDS:
            value = channel_of_words(word0, word1, word2, channel)
        else:
            address = source + x * column_stride + channel * channel_stride
            value = tl.load(address, mask=inside, other=0).to(tl.int32)
        scale, offset = constants[2 * channel], constants[2 * channel + 1]
        result = normalized(value, scale, offset, out_ptr.dtype.element_ty, MULTIPLY_ADD, INTERPRET)
        tl.store(target + channel * plane, result, mask=inside)


def normalize(pixels: torch.Tensor, constants: Constants, dtype: torch.dtype) -> torch.Tensor:
    """Launch :func:`normalize_kernel`.

    Args:
        pixels: uint8 ``[N, H, W, 3]``, any strides.
        constants: constants of the normalisation to ``dtype``.
        dtype: of the result.

    Returns:
        ``[N, 3, H, W]`` contiguous.
    """
    n, height, width, _ = pixels.shape
    out = torch.empty((n, 3, height, width), dtype=dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    multiply_add, numbers = constants
    image_stride, row_stride, column_stride, channel_stride = pixels.stride()
    # Adjacent rows are treated as one long row, which makes fewer half-filled blocks.
    rows, columns = height, width
    if height == 1 or row_stride == width * column_stride:
        rows, columns = 1, height * width
    in_words = (
        (column_stride, channel_stride) == (3, 1)
        and whole_vectors(columns)
        and (rows == 1 or row_stride % 4 == 0)
        and (n == 1 or image_stride % 4 == 0)
        and pixels.data_ptr() % 4 == 0
    )
    grid = (n * rows * ceil_div(columns, BLOCK_PIXELS),)
    with device_of(pixels):
        launch(
            normalize_kernel,
            grid,
            pixels,
            out,
            rows,
            columns,
            image_stride,
            row_stride,
            column_stride,
            channel_stride,
            *numbers,
            MULTIPLY_ADD=multiply_add,
            INTERPRET=INTERPRETED,
            WORDS=in_words,
            BLOCK=BLOCK_PIXELS,
        )
    return out
