"""Matrix products, and copies that run beside the threads.

Neither ``cp.async`` nor the copy engine nor ``wgmma`` says when it touches shared memory, only by
when: :attr:`Blocks.early` lets blocks take both extremes, so that a missing wait or a buffer
filled again too soon shows in the result.
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.arithmetic import widened
from tests.ptx.blocks import WARP, Barrier, Blocks, Job, Mask, Run
from tests.ptx.memory import swizzled
from tests.ptx.operands import address, instruction, predicate, read, unknown, vector, write
from tests.ptx.program import Instruction, Program, PtxError

WARPGROUP = 4 * WARP
# Rows and columns that a thread holds of a 16×8 block: of the result, two in a register pair.
_ROW, _COL = np.arange(WARP) // 4, np.arange(WARP) % 4 * 2


@instruction("fence")
def _fence(_: Program, __: Instruction) -> Run:
    return lambda *_: None


@instruction("griddepcontrol")
def _order_of_launches(_: Program, found: Instruction) -> Run:
    """Launches run to their end, one after another; memory knows who should have waited."""
    if found.parts[1] == "wait":
        return lambda blocks, _: setattr(blocks.launch.memory, "early", False)
    if found.parts[1] != "launch_dependents":
        raise unknown(found)
    return lambda *_: None


def _start(early: bool, group: list[Job], job: Job) -> None:
    if early:
        job()
    else:
        group.append(job)


@instruction("cp")
def _copy(program: Program, found: Instruction) -> Run:
    kind = found.parts[2]
    if kind == "commit_group":
        return lambda blocks, mask: (blocks.whole_block(mask), blocks.copies.commit())[0]
    if kind == "wait_group":
        allowed = int(found.operands[0], 0)
        return lambda blocks, mask: (blocks.whole_block(mask), blocks.copies.wait(allowed))[0]
    if kind == "bulk" and found.parts[3:5] == ("tensor", "2d"):
        return _copy_box(program, found)
    if kind in ("ca", "cg"):
        return _copy_each(program, found)
    raise unknown(found)


def _copy_each(program: Program, found: Instruction) -> Run:
    """Every thread brings a few bytes, or zeros where its last operand is 0."""
    size = int(found.operands[2], 0)
    to, of = (address(program, each) for each in found.operands[:2])
    given = read(program, found.operands[3] if len(found.operands) > 3 else str(size), 32)

    def run(blocks: Blocks, mask: Mask) -> None:
        lanes = blocks.active(mask)
        target, source, count = (blocks.each(each(blocks))[lanes] for each in (to, of, given))
        wanted = count == size
        if (~wanted & (count != 0)).any():
            raise unknown(found)

        def job() -> None:
            data = np.zeros((len(lanes), size), np.uint8)
            chosen = blocks.block[lanes][wanted]
            data[wanted] = blocks.launch.memory.load(source[wanted], size, chosen)
            blocks.store_shared(target, data, lanes)

        _start(blocks.early[0], blocks.copies.open, job)

    return run


def _copy_box(program: Program, found: Instruction) -> Run:
    """The copy engine brings a box of a matrix, counted by an mbarrier."""
    to, signal = address(program, found.operands[0]), address(program, found.operands[2])
    source = re.fullmatch(r"\[(\S+), \{(\S+), (\S+)\}\]", found.operands[1])
    if source is None:
        raise unknown(found)
    matrix = read(program, source[1], 64)
    col, row = read(program, source[2], 32), read(program, source[3], 32)

    def run(blocks: Blocks, mask: Mask) -> None:
        for lane in blocks.active(mask):
            target, tensor, x, y = (
                int(blocks.each(each(blocks))[lane]) for each in (to, matrix, col, row)
            )
            barrier = blocks.barrier(signal(blocks), lane)
            job = _box_job(blocks, lane, barrier, target, tensor, _signed(y), _signed(x))
            _start(blocks.early[0], barrier.copies, job)

    return run


def _signed(value: int) -> int:
    return value - (value >> 31 << 32)


def _box_job(
    blocks: Blocks, lane: int, barrier: Barrier, target: int, tensor: int, row: int, col: int
) -> Job:
    descriptor = blocks.launch.descriptors[tensor]
    if target % (1024 if descriptor.swizzle else 128):
        raise PtxError("the copy engine's target is not aligned")

    def job() -> None:
        data = descriptor.load(blocks.launch.memory, row, col, int(blocks.block[lane]))
        where = swizzled(target + np.arange(descriptor.nbytes), descriptor.swizzle)
        blocks.store_shared(where, data[:, None], np.full(len(where), lane))
        barrier.expected_bytes -= descriptor.nbytes
        barrier.settle()

    return job


@instruction("mbarrier")
def _mbarrier(program: Program, found: Instruction) -> Run:
    kind = found.parts[1]
    if kind == "try_wait":
        return _await(program, found)
    at = address(program, found.operands[1 if kind == "arrive" else 0])
    number = read(program, found.operands[-1], 32) if kind in ("init", "arrive") else None

    def run(blocks: Blocks, mask: Mask) -> None:
        for lane in blocks.active(mask):
            key = int(blocks.local[lane]), int(blocks.each(at(blocks))[lane])
            if kind == "init":
                count = int(number(blocks))
                blocks.barriers[key] = Barrier(count, count)
                continue
            barrier = blocks.barrier(at(blocks), lane)
            if kind == "inval":
                if barrier.expected_bytes or barrier.copies:
                    raise PtxError("an mbarrier ends while copies are under way")
                del blocks.barriers[key]
            elif found.parts[2] == "expect_tx":
                barrier.expected_bytes += int(blocks.each(number(blocks))[lane])
                barrier.pending -= 1
                barrier.settle()
            else:
                raise unknown(found)

    return run


def _await(program: Program, found: Instruction) -> Run:
    put = write(program, found.operands[0])
    at, parity = address(program, found.operands[1]), read(program, found.operands[2], 32)

    def run(blocks: Blocks, mask: Mask) -> None:
        done = np.zeros(blocks.lanes, np.bool_)
        for lane in blocks.active(mask):
            barrier = blocks.barrier(at(blocks), lane)
            while barrier.copies:
                barrier.copies.pop(0)()
            done[lane] = barrier.phase != int(blocks.each(parity(blocks))[lane]) % 2
        if not done[blocks.active(mask)].all():
            # Whatever could complete it is issued before, by the threads that wait.
            raise PtxError("an mbarrier that never completes")
        put(blocks, done, mask)

    return run


@instruction("mma")
def _multiply(program: Program, found: Instruction) -> Run:
    """``m16n8k16`` by each warp, all operands in registers."""
    half = found.parts[-3]
    if "m16n8k16" not in found.parts or found.parts[-1] != "f32" or found.parts[-4] != "f32":
        raise unknown(found)
    results, *sources = (vector(operand) for operand in found.operands)
    puts = [write(program, register) for register in results]
    a_regs, b_regs, c_regs = ([read(program, each, 32) for each in regs] for regs in sources)

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_warps(mask)

        def warps(get) -> np.ndarray:
            return np.ascontiguousarray(blocks.each(get(blocks))).reshape(-1, WARP)

        a = np.zeros((blocks.lanes // WARP, 16, 16), np.float64)
        for i, get in enumerate(a_regs):
            pairs = widened(warps(get)[..., None].view(np.uint16), half)
            for j in range(2):
                a[:, _ROW + i % 2 * 8, _COL + i // 2 * 8 + j] = pairs[..., j]
        b = np.zeros((blocks.lanes // WARP, 16, 8), np.float64)
        for i, get in enumerate(b_regs):
            pairs = widened(warps(get)[..., None].view(np.uint16), half)
            for j in range(2):
                b[:, _COL + i * 8 + j, _ROW] = pairs[..., j]
        products = a @ b
        for i, (put, get) in enumerate(zip(puts, c_regs, strict=True)):
            summed = warps(get).view(np.float32) + products[:, _ROW + i // 2 * 8, _COL + i % 2]
            put(blocks, summed.astype(np.float32).ravel(), mask)

    return run


@instruction("wgmma")
def _warpgroup(program: Program, found: Instruction) -> Run:
    kind = found.parts[1]
    if kind == "fence":
        return lambda *_: None
    if kind == "commit_group":
        return lambda blocks, mask: (blocks.whole_block(mask), blocks.products.commit())[0]
    if kind == "wait_group":
        allowed = int(found.operands[0])
        return lambda blocks, mask: (blocks.whole_block(mask), blocks.products.wait(allowed))[0]
    shape = re.fullmatch(r"m64n(\d+)k16", found.parts[4])
    if shape is None or found.operands[4:6] != ("1", "1"):
        raise unknown(found)
    return _multiply_shared(program, found, int(shape[1]))


def _multiply_shared(program: Program, found: Instruction, columns: int) -> Run:
    """``m64nNk16`` by each warpgroup, both operands in shared memory."""
    half = found.parts[-1]
    results = vector(found.operands[0])
    gets = [read(program, register, 32) for register in results]
    puts = [write(program, register) for register in results]
    descriptors = [read(program, operand, 64) for operand in found.operands[1:3]]
    keeps = predicate(found.operands[3])
    by_column = [operand == "1" for operand in found.operands[6:8]]
    # Of the 64×N result, thread t of a warpgroup holds in register i:
    thread, index = np.arange(WARPGROUP), np.arange(columns // 2)[:, None]
    row = thread // WARP * 16 + _ROW[thread % WARP] + index // 2 % 2 * 8
    col = _COL[thread % WARP] + index // 4 * 8 + index % 2

    def run(blocks: Blocks, mask: Mask) -> None:
        blocks.whole_block(mask)
        where = [blocks.each(each(blocks)) for each in descriptors]
        keep = blocks.each(keeps(blocks))

        def job() -> None:
            sums = np.stack([blocks.each(get(blocks)) for get in gets]).view(np.float32)
            sums = np.where(keep, sums, np.float32(0)).astype(np.float64)
            for first in range(0, blocks.lanes, WARPGROUP):
                group = slice(first, first + WARPGROUP)
                a, b = (
                    _operand(blocks, each[group], size, transposed, half)
                    for each, size, transposed in zip(where, (64, columns), by_column, strict=True)
                )
                sums[:, group] += (a @ b.T)[row, col]
            for put, values in zip(puts, sums.astype(np.float32), strict=True):
                put(blocks, values, None)

        _start(blocks.early[1], blocks.products.open, job)

    return run


def _operand(
    blocks: Blocks, descriptors: np.ndarray, size: int, by_column: bool, half: str
) -> np.ndarray:
    """``[size, 16]`` of the matrix that a wgmma descriptor describes, float64.

    Start and strides are in units of 16 bytes. Rows of the reduction (or, by column, of the other
    dimension) lie side by side within the swizzle's span; the strides lead to the next eight.
    """
    descriptor = int(descriptors[0])
    if (descriptors != descriptor).any():
        raise PtxError("the threads of a warpgroup disagree about a wgmma descriptor")
    start, leading, stride = ((descriptor >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    swizzle = (0, 3, 2, 1)[descriptor >> 62]
    if swizzle == 0 or descriptor >> 49 & 7:
        raise PtxError(f"this interpreter does not know the wgmma descriptor {descriptor:#x}")
    span = 16 << swizzle
    outer, depth = np.arange(size)[:, None], np.arange(16)
    if by_column:
        per_span = span // 2
        at = outer % per_span * 2 + outer // per_span * leading + depth % 8 * span
        at = start + at + depth // 8 * stride
    else:
        at = start + outer // 8 * stride + outer % 8 * span + depth * 2
    at = swizzled(at, swizzle)
    data = blocks.load_shared(at.ravel(), 2, np.zeros(at.size, np.int64))
    return widened(data.view(np.uint16).reshape(at.shape), half).astype(np.float64)
