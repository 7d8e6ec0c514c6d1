"""Copies feature rows of any strides, such as the channels-first view of a vision tower, into one
contiguous matrix.

Shape letters: ``N`` features, ``L`` rows of each, ``C`` encoder output width, ``R`` rows of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import ceil_div, device_of, in_vectors, whole_vectors
from step37_kernels.ops.launch import launch

MAX_SOURCES = 4
"""Tensors of feature rows that one launch reads."""
COPY_BLOCK_L = 64
COPY_BLOCK_C = 64


@triton.jit
def choose(index, a_0, a_1, a_2, a_3, SOURCES: tl.constexpr):
    """Select ``a_<index>``, for an index below SOURCES."""
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
    """Select ``a_<index>``, of numbers of which some fit into 32 bits and some do not."""
    a_2 = a_2.to(tl.int64)
    a_3 = a_3.to(tl.int64)
    return choose(index, a_0.to(tl.int64), a_1.to(tl.int64), a_2, a_3, SOURCES)


def _numbered(*names: str) -> list[str]:
    """List ``name_0``, ``name_1``, … for each name, one for each source."""
    return [f"{name}_{i}" for name in names for i in range(MAX_SOURCES)]


@triton.jit(
    do_not_specialize=_numbered("rows_each", "stride_n", "stride_l", "stride_c", "row", "program")
)
def copy_rows_kernel(
    source_0, source_1, source_2, source_3,  # [N, L, C], any strides
    rows_ptr,  # [R, C] contiguous, out
    C,
    rows_each_0, rows_each_1, rows_each_2, rows_each_3,  # L
    stride_n_0, stride_n_1, stride_n_2, stride_n_3,
    stride_l_0, stride_l_1, stride_l_2, stride_l_3,
    stride_c_0, stride_c_1, stride_c_2, stride_c_3,
    row_0, row_1, row_2, row_3,  # the first row of each source among all
    program_0, program_1, program_2, program_3,  # its first program along the first axis
    SOURCES: tl.constexpr,
    FASTEST: tl.constexpr,  # the axis whose stride is 1 in all sources: "L", "C", or ""
    ALIGNED: tl.constexpr,  # stride_n and stride_l are whole vectors
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Along L where the views are channels-first (stride_l = 1) loads are coalesced, along C stores:
    # the compiler exchanges the tile through shared memory between the two.
    program = tl.program_id(0)
    i = (program >= program_1).to(tl.int32) + (program >= program_2) + (program >= program_3)
    source = choose(i, source_0, source_1, source_2, source_3, SOURCES)
    each = choose(i, rows_each_0, rows_each_1, rows_each_2, rows_each_3, SOURCES)
    first_row = choose(i, row_0, row_1, row_2, row_3, SOURCES)
    program -= choose(i, program_0, program_1, program_2, program_3, SOURCES)
    stride_n = _choose_wide(i, stride_n_0, stride_n_1, stride_n_2, stride_n_3, SOURCES)
    blocks_l = tl.cdiv(each, BLOCK_L)
    n = (program // blocks_l).to(tl.int64)
    rows = (program % blocks_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < each)[:, None] & (cols < C)[None, :]
    row_offsets = rows.to(tl.int64)
    if FASTEST != "L":
        stride_l = _choose_wide(i, stride_l_0, stride_l_1, stride_l_2, stride_l_3, SOURCES)
        row_offsets *= in_vectors(stride_l, ALIGNED)
    col_offsets = cols.to(tl.int64)
    if FASTEST != "C":
        col_offsets *= _choose_wide(i, stride_c_0, stride_c_1, stride_c_2, stride_c_3, SOURCES)
    source += n * in_vectors(stride_n, ALIGNED)
    values = tl.load(source + row_offsets[:, None] + col_offsets[None, :], mask=inside)
    target = (first_row + n * each + rows)[:, None] * C + cols[None, :]
    tl.store(rows_ptr + target, values, mask=inside)


def copy_rows(features: Sequence[Tensor]) -> Tensor:
    """Copy non-empty ``[N, L, C]`` tensors of any strides into one contiguous ``[R, C]``."""
    width = features[0].shape[2]
    num_rows = sum(each.shape[:2].numel() for each in features)
    copied = torch.empty(num_rows, width, dtype=features[0].dtype, device=features[0].device)
    row = 0
    for first in range(0, len(features), MAX_SOURCES):
        some = list(features[first : first + MAX_SOURCES])
        values: list[tuple[int, ...]] = []
        programs = 0
        for each in some:
            n, rows_each, _ = each.shape
            values.append((rows_each, *each.stride(), row, programs))
            row += n * rows_each
            programs += n * ceil_div(rows_each, COPY_BLOCK_L)
        # The first programs of unused sources are set past the last program.
        values += [(*values[0][:-1], programs)] * (MAX_SOURCES - len(some))
        unit = [all(each.stride(axis) == 1 for each in some) for axis in (1, 2)]
        with device_of(copied):
            launch(
                copy_rows_kernel,
                (programs, ceil_div(width, COPY_BLOCK_C)),
                *some,
                *some[:1] * (MAX_SOURCES - len(some)),
                copied,
                width,
                *itertools.chain.from_iterable(zip(*values, strict=True)),
                SOURCES=len(some),
                FASTEST="L" if unit[0] else "C" if unit[1] else "",
                ALIGNED=whole_vectors(*[s for each in some for s in each.stride()[:2]]),
                BLOCK_L=COPY_BLOCK_L,
                BLOCK_C=COPY_BLOCK_C,
            )
    return copied
