"""From the text of an operand to what reads or writes it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.blocks import UNSIGNED, WARP, Blocks, Mask, Run
from tests.ptx.program import Instruction, Program, PtxError

Read = Callable[[Blocks], np.ndarray]
Write = Callable[[Blocks, np.ndarray, Mask], None]
Builder = Callable[[Program, Instruction], Run]

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

BUILDERS: dict[str, Builder] = {}
"""By the first part of the instruction's name."""


def instruction(*names: str) -> Callable[[Builder], Builder]:
    """Register what turns these instructions into functions."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def unknown(found: Instruction) -> PtxError:
    return PtxError(f"this interpreter does not know {found.text[:200]!r}")


def element(type_name: str) -> type[np.generic]:
    """NumPy's type of ``s32``, ``u64``, ``b8``, ``f32``."""
    family = {"s": SIGNED, "f": FLOAT}.get(type_name[0], UNSIGNED)
    return family[int(type_name[1:])]


def read(program: Program, operand: str, bits: int) -> Read:
    """The operand's ``bits``, as unsigned integers: one for each thread, or one for all."""
    if operand in program.registers:
        width = program.registers[operand]
        if width < bits:
            raise PtxError(f"{operand} is narrower than {bits} bits")
        if width == bits:
            return lambda blocks: blocks.get(operand)
        return lambda blocks: blocks.get(operand).astype(UNSIGNED[bits])
    special = re.fullmatch(r"%(tid|ctaid|nctaid|laneid)(?:\.([xyz]))?", operand)
    if special:
        return _special(special[1], "xyz".index(special[2] or "x"))
    value = program.address_of(operand)
    if value is None:
        value = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand.rstrip("U"), 0)
    constant = np.asarray(value & ((1 << bits) - 1), UNSIGNED[bits])
    return lambda _: constant


def _special(name: str, axis: int) -> Read:
    if name == "tid":
        return lambda blocks: blocks.tid if axis == 0 else np.zeros((), np.uint32)
    if name == "laneid":
        return lambda blocks: blocks.tid % np.uint32(WARP)
    if name == "ctaid":
        return lambda blocks: blocks.ctaid[axis]
    return lambda blocks: np.asarray(blocks.launch.grid[axis], np.uint32)


def read_as(program: Program, operand: str, type_name: str) -> Read:
    """The operand as NumPy's type of the same width."""
    numpy_type = element(type_name)
    get = read(program, operand, int(type_name[1:]))
    return lambda blocks: get(blocks).view(numpy_type)


def predicate(operand: str) -> Read:
    """A predicate register, negated or not, or a constant."""
    if operand in ("0", "1", "-1"):
        constant = np.asarray(operand != "0")
        return lambda _: constant
    if operand.startswith("!"):
        return lambda blocks: ~blocks.get(operand[1:])
    return lambda blocks: blocks.get(operand)


def write(program: Program, operand: str) -> Write:
    """Store a value of the register's width, or of its width but another kind of number."""
    if operand == "_":
        return lambda *_: None
    expected = UNSIGNED[program.registers[operand]]

    def put(blocks: Blocks, value: np.ndarray, mask: Mask) -> None:
        value = np.asarray(value)
        blocks.put(operand, value if value.dtype == expected else value.view(expected), mask)

    return put


def vector(operand: str) -> list[str]:
    """``{%r1, %r2}`` or ``%r1`` as a list."""
    return [each.strip() for each in operand.strip("{} ").split(",")]


def address(program: Program, operand: str) -> Read:
    """``[%rd1+16]`` as integers."""
    base, _, offset = operand.strip("[] ").partition("+")
    base = base.strip()
    bits = program.registers.get(base, 32)
    get = read(program, base, bits)
    step = np.asarray(int(offset or 0) % (1 << bits), UNSIGNED[bits])
    return lambda blocks: get(blocks) + step


def guarded(found: Instruction, run: Run) -> Run:
    """``run`` for the threads whose guard holds."""
    if found.guard is None:
        return run
    holds = predicate(found.guard)

    def run_some(blocks: Blocks, mask: Mask) -> None:
        chosen = blocks.each(holds(blocks))
        if mask is not None:
            chosen = chosen & mask
        if chosen.all():
            run(blocks, None)
        elif chosen.any():
            run(blocks, chosen)

    return run_some
