"""Loads and stores, and what the threads of a warp exchange."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.blocks import UNSIGNED, WARP, Blocks, Mask, Run
from tests.ptx.operands import (
    SIGNED,
    address,
    instruction,
    read,
    read_as,
    unknown,
    vector,
    write,
)
from tests.ptx.program import Instruction, Program

FULL_WARP = 0xFFFFFFFF


def _space(found: Instruction) -> str:
    for part in found.parts:
        if part.split("::")[0] in ("param", "global", "shared"):
            return part.split("::")[0]
    raise unknown(found)


@instruction("ld")
def _load(program: Program, found: Instruction) -> Run:
    space, type_name, bits = _space(found), found.parts[-1], found.bits
    registers = vector(found.operands[0])
    puts = [(write(program, each), program.registers[each]) for each in registers]
    size = len(registers) * bits // 8
    at = address(program, found.operands[1])

    def run(blocks: Blocks, mask: Mask) -> None:
        lanes = blocks.active(mask)
        addresses = blocks.each(at(blocks))[lanes]
        if space == "param":
            data = blocks.parameters(addresses, size)
        elif space == "shared":
            data = blocks.load_shared(addresses, size, lanes)
        else:
            data = blocks.load_global(addresses, size, lanes)
        values = np.ascontiguousarray(data).view(UNSIGNED[bits])
        for i, (put, width) in enumerate(puts):
            value = values[:, i]
            if type_name.startswith("s"):
                value = value.view(SIGNED[bits]).astype(SIGNED[width])
            _scatter(blocks, put, value.astype(UNSIGNED[width]), lanes, mask)

    return run


def _scatter(blocks: Blocks, put, value: np.ndarray, lanes: np.ndarray, mask: Mask) -> None:
    """Give ``value[i]`` to thread ``lanes[i]``."""
    if mask is not None:
        spread = np.zeros(blocks.lanes, value.dtype)
        spread[lanes] = value
        value = spread
    put(blocks, value, mask)


@instruction("st")
def _store(program: Program, found: Instruction) -> Run:
    space, bits = _space(found), found.bits
    values = [read(program, each, bits) for each in vector(found.operands[1])]
    at = address(program, found.operands[0])

    def run(blocks: Blocks, mask: Mask) -> None:
        lanes = blocks.active(mask)
        addresses = blocks.each(at(blocks))[lanes]
        data = np.stack([blocks.each(value(blocks))[lanes] for value in values], axis=1)
        data = data.view(np.uint8)
        if space == "shared":
            blocks.store_shared(addresses, data, lanes)
        else:
            blocks.store_global(addresses, data, lanes)

    return run


def _matrices(found: Instruction) -> int:
    return int(next(part for part in found.parts if re.fullmatch(r"x[124]", part))[1:])


def _rows(blocks: Blocks, at: np.ndarray, lanes: np.ndarray, matrix: int) -> tuple[np.ndarray, ...]:
    """Addresses of a matrix's eight rows in every warp, and who gave them."""
    givers = lanes.reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8].ravel()
    return blocks.each(at)[givers], givers


@instruction("ldmatrix")
def _load_matrices(program: Program, found: Instruction) -> Run:
    """8×8 matrices of 16 bits; thread ``t`` gets row ``t / 4``, columns ``t % 4 · 2`` and next."""
    count, transposed = _matrices(found), "trans" in found.parts
    puts = [write(program, register) for register in vector(found.operands[0])]
    at = address(program, found.operands[1])

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_warps(mask)
        lanes, addresses = blocks.active(mask), at(blocks)
        for i in range(count):
            rows, givers = _rows(blocks, addresses, lanes, i)
            data = blocks.load_shared(rows, 16, givers)
            matrices = data.view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            pairs = np.ascontiguousarray(matrices).reshape(-1, 2).view(np.uint32).ravel()
            _scatter(blocks, puts[i], pairs, lanes, mask)

    return run


@instruction("stmatrix")
def _store_matrices(program: Program, found: Instruction) -> Run:
    count, transposed = _matrices(found), "trans" in found.parts
    values = [read(program, register, 32) for register in vector(found.operands[1])]
    at = address(program, found.operands[0])

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_warps(mask)
        lanes, addresses = blocks.active(mask), at(blocks)
        for i in range(count):
            pairs = np.ascontiguousarray(blocks.each(values[i](blocks))[lanes])
            matrices = pairs.view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            rows, givers = _rows(blocks, addresses, lanes, i)
            data = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
            blocks.store_shared(rows, data, givers)

    return run


@instruction("shfl")
def _shuffle(program: Program, found: Instruction) -> Run:
    _, sync, mode, _ = found.parts
    destination, _, valid = found.operands[0].partition("|")
    value, offset = (read(program, each, 32) for each in found.operands[1:3])
    clamp, members = (int(each, 0) for each in found.operands[3:5])
    if sync != "sync" or members % (FULL_WARP + 1) != FULL_WARP:
        raise unknown(found)
    put = write(program, destination)
    put_valid = write(program, valid or "_")
    segment, last = clamp >> 8 & 31, clamp & 31

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_warps(mask)
        lane = blocks.tid.astype(np.int64) % WARP
        by = blocks.each(offset(blocks)).astype(np.int64) % WARP
        lowest = lane & segment
        highest = lowest | (last & ~segment)
        if mode == "up":
            source, inside = lane - by, lane - by >= highest
        else:
            source = {"down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
            inside = source <= highest
        source = np.arange(blocks.lanes) - lane + np.where(inside, source, lane)
        put(blocks, blocks.each(value(blocks))[source], mask)
        put_valid(blocks, inside, mask)

    return run


@instruction("redux")
def _reduce(program: Program, found: Instruction) -> Run:
    _, sync, operation, type_name = found.parts
    reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}.get(operation)
    if sync != "sync" or reduce is None:
        raise unknown(found)
    put = write(program, found.operands[0])
    value = read_as(program, found.operands[1], type_name)
    members = read(program, found.operands[2], 32)

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_warps(mask)
        if (blocks.each(members(blocks))[blocks.active(mask)] != FULL_WARP).any():
            raise unknown(found)
        warps = blocks.each(value(blocks)).reshape(-1, WARP)
        put(blocks, np.repeat(reduce.reduce(warps, axis=1, dtype=warps.dtype), WARP), mask)

    return run


@instruction("elect")
def _elect(program: Program, found: Instruction) -> Run:
    """One thread of each warp: the first."""
    leader, chosen = (write(program, each) for each in found.operands[0].split("|"))

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_warps(mask)
        leader(blocks, np.zeros((), np.uint32), mask)
        chosen(blocks, blocks.tid % np.uint32(WARP) == 0, mask)

    return run
