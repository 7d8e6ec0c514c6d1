"""Puts the positions of a batch in order by token id; positions of one id stay in their order.

The place of a position is the number of positions that come before it: those with a smaller id, and
those with its own id that stand earlier. Up to :data:`MOST_COUNTED` positions, they are counted:
each program takes a block of positions and compares each of them with all others. This work grows
with the square of the number of positions, so more of them are left to the library's sort.

:mod:`step37_kernels.ops.gradient` counts in the launch that gathers gradient rows;
:func:`order_by_id` does it in a launch of its own.

Shape letters: ``P`` positions, ``V`` rows of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import ceil_div, device_of
from step37_kernels.ops.launch import launch

MOST_COUNTED = 8192
"""The most positions that are counted; for more, the library's sort has less work."""
COUNT_BLOCK = 8
"""Positions of a program."""
COUNT_LANES, COUNT_PARTS = 128, 4
"""How many positions a program compares its own with at once, one for each thread of four warps,
and how many times it does so in a turn of its loop, so that their loads need not wait for another.
"""


@triton.jit
def _keys(ids_ptr, row_at_ptr, positions, num_positions, num_rows):
    """Make one number of id and position, so that the order of the numbers is that of both.

    Ids outside the table count as −1 or V, and ids under feature rows as −1. Past the end the
    largest number is returned.
    """
    inside = positions < num_positions
    ids = tl.load(ids_ptr + positions, mask=inside, other=0)
    if row_at_ptr is not None:
        row_at = tl.load(row_at_ptr + positions, mask=inside, other=0)
        ids = tl.where(row_at < 0, ids, -1)
    ids = tl.minimum(tl.maximum(ids.to(tl.int64), -1), num_rows).to(tl.int32)
    return tl.where(inside, (ids + 1) * num_positions + positions, 0x7FFFFFFF)


@triton.jit
def count_positions(
    program,
    ids_ptr,  # [P] int32 or int64
    row_at_ptr,  # [P] int32: ≥ 0 where a feature row overwrote the text; None: nowhere
    sorted_ptr,  # [P] in the dtype of the ids, out: the ids in order, −1 or V where not looked up
    order_ptr,  # [P] int64, out: the position of each of these
    num_positions,
    num_rows,  # V
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Put the positions of one block in their places."""
    mine = program * BLOCK_P + tl.arange(0, BLOCK_P)
    keys = _keys(ids_ptr, row_at_ptr, mine, num_positions, num_rows)
    before = tl.zeros((BLOCK_P, LANES), tl.int32)
    for begin in range(0, num_positions, LANES * PARTS):
        for part in tl.static_range(PARTS):
            others = begin + part * LANES + tl.arange(0, LANES)[None, :]
            their_keys = _keys(ids_ptr, row_at_ptr, others, num_positions, num_rows)
            before += (their_keys < keys[:, None]).to(tl.int32)
    places = tl.sum(before, axis=1)
    inside = mine < num_positions
    ids = (keys // num_positions - 1).to(sorted_ptr.dtype.element_ty)
    tl.store(sorted_ptr + places, ids, mask=inside)
    tl.store(order_ptr + places, mine.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["num_positions", "num_rows"])
def order_kernel(
    ids_ptr,
    sorted_ptr,
    order_ptr,
    num_positions,
    num_rows,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Put the positions in order, all of which are text; arguments: :func:`count_positions`."""
    count_positions(
        tl.program_id(0), ids_ptr, None, sorted_ptr, order_ptr, num_positions, num_rows, BLOCK_P,
        LANES, PARTS,
    )  # fmt: skip


def is_counted(num_positions: int, num_rows: int) -> bool:
    """Whether so many positions, of ids in a table of so many rows, are counted.

    Pairs of id and position are numbered in 32 bits.
    """
    return num_positions <= MOST_COUNTED and (num_rows + 2) * num_positions < 2**31


def room_for_order(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate what :func:`order_by_id` returns for these ids."""
    order = torch.empty(ids.numel(), dtype=torch.int64, device=ids.device)
    return torch.empty_like(order, dtype=ids.dtype), order


def order_by_id(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Put positions in order by id, in one launch or by the library's sort.

    Args:
        ids: int32 or int64, of any shape, P in all.
        num_rows: V.

    Returns:
        The ids in order, ``[P]`` in their dtype. Where they are counted, ids that are negative, or
        not below V, have become −1, or V. Then the position of each, ``[P]`` int64.
    """
    ids = ids.reshape(-1).contiguous()
    (num_positions,) = ids.shape
    if not is_counted(num_positions, num_rows):
        in_order, order = torch.sort(ids, stable=True)
        return in_order, order
    in_order, order = room_for_order(ids)
    if num_positions:
        with device_of(ids):
            launch(
                order_kernel,
                (ceil_div(num_positions, COUNT_BLOCK),),
                *(ids, in_order, order, num_positions, num_rows),
                *(COUNT_BLOCK, COUNT_LANES, COUNT_PARTS),
            )
    return in_order, order
