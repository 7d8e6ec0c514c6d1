"""Instructions that compute a register from registers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from tests.ptx.blocks import UNSIGNED, Blocks, Mask, Run
from tests.ptx.operands import (
    FLOAT,
    SIGNED,
    Read,
    element,
    instruction,
    predicate,
    read,
    read_as,
    unknown,
    vector,
    write,
)
from tests.ptx.program import Instruction, Program

_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_PLAIN: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    **_LOGIC,
}


def _compute(
    program: Program, found: Instruction, function: Callable[..., np.ndarray], *sources: Read
) -> Run:
    """Destination = function(sources)."""
    put = write(program, found.operands[0])

    def run(blocks: Blocks, mask: Mask) -> None:
        put(blocks, function(*[source(blocks) for source in sources]), mask)

    return run


@instruction("add", "sub", "min", "max", "neg", "abs", "and", "or", "xor", "not")
def _plain(program: Program, found: Instruction) -> Run:
    name, *modifiers, type_name = found.parts
    if type_name.removesuffix("x2") in ("bf16", "f16") and name == "add":
        return _half_add(program, found, type_name.removesuffix("x2"))
    if modifiers not in ([], ["rn"]):
        raise unknown(found)
    sources = found.operands[1:]
    if type_name == "pred":
        function = np.logical_not if name == "not" else _LOGIC[name]
        return _compute(program, found, function, *map(predicate, sources))
    function = np.invert if name == "not" else _PLAIN[name]
    return _compute(program, found, function, *[read_as(program, s, type_name) for s in sources])


def _half_add(program: Program, found: Instruction, half: str) -> Run:
    """16-bit numbers, one or two to a register: ``add``, or ``fma`` with a factor of 1.

    The latter is how bf16 numbers are added where no instruction is for that.
    """

    def add(*sources: np.ndarray) -> np.ndarray:
        halves = [widened(each[..., None].view(np.uint16), half) for each in sources]
        if any((factor != 1).any() for factor in halves[1:-1]):
            raise unknown(found)
        # The sum in fp32, which has more than twice the bits: rounding that once more is harmless.
        sums = np.ascontiguousarray(rounded(halves[0] + halves[-1], half))
        return sums.view(UNSIGNED[found.bits])[..., 0]

    return _compute(
        program, found, add, *[read(program, each, found.bits) for each in found.operands[1:]]
    )


def widened(values: np.ndarray, half: str) -> np.ndarray:
    """uint16 bits of ``bf16`` or ``f16`` as float32."""
    if half == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.view(np.float16).astype(np.float32)


def rounded(values: np.ndarray, half: str) -> np.ndarray:
    """float32 to the nearest ``bf16`` or ``f16``, ties to even, as uint16 bits."""
    if half == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(values), np.uint16(0x7FFF), nearest)


def _product(a: np.ndarray, b: np.ndarray, part: str) -> np.ndarray:
    """The low or the high half of an integer product, or all of it."""
    if part == "lo":
        return a * b
    bits = 8 * a.dtype.itemsize
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits]
    full = a.astype(wide) * b.astype(wide)
    return full if part == "wide" else (full >> wide(bits)).astype(a.dtype)


@instruction("mul")
def _mul(program: Program, found: Instruction) -> Run:
    part, type_name = found.parts[1], found.parts[-1]
    sources = [read_as(program, source, type_name) for source in found.operands[1:]]
    if type_name.startswith("f"):
        if found.parts[1:-1] not in ((), ("rn",)):
            raise unknown(found)
        return _compute(program, found, np.multiply, *sources)
    return _compute(program, found, functools.partial(_product, part=part), *sources)


@instruction("mad")
def _mad(program: Program, found: Instruction) -> Run:
    _, part, type_name = found.parts
    a, b = (read_as(program, source, type_name) for source in found.operands[1:3])
    wide = f"{type_name[0]}{found.bits * (2 if part == 'wide' else 1)}"
    c = read_as(program, found.operands[3], wide)
    return _compute(program, found, lambda x, y, z: _product(x, y, part) + z, a, b, c)


@instruction("fma")
def _fma(program: Program, found: Instruction) -> Run:
    if found.parts[:2] == ("fma", "rn") and found.parts[2:] in (("bf16",), ("bf16x2",)):
        return _half_add(program, found, "bf16")
    if found.parts != ("fma", "rn", "f32"):
        raise unknown(found)
    return _compute(
        program, found, fused, *[read_as(program, s, "f32") for s in found.operands[1:]]
    )


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32 with one rounding.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, 2008),
    so that the rounding to float32 is the only one that counts.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = total.view(np.uint64) & np.uint64(1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    inexact = np.isfinite(total) & (error != 0) & even
    return np.where(inexact, odd, total).astype(np.float32)


@instruction("div", "rem")
def _div(program: Program, found: Instruction) -> Run:
    name, *modifiers, type_name = found.parts
    sources = [read_as(program, source, type_name) for source in found.operands[1:]]
    if type_name.startswith("f"):
        if name == "rem" or modifiers != ["rn"]:
            raise unknown(found)
        return _compute(program, found, np.divide, *sources)

    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Towards zero. What a division by zero gives is unspecified."""
        b = np.where(b == 0, b.dtype.type(1), b)
        remainder = np.fmod(a, b)
        return remainder if name == "rem" else (a - remainder) // b

    return _compute(program, found, divide, *sources)


@instruction("shl", "shr")
def _shift(program: Program, found: Instruction) -> Run:
    left = found.parts[0] == "shl"
    numpy_type = element(found.parts[-1])
    signed = found.parts[-1].startswith("s")
    value = read_as(program, found.operands[1], found.parts[-1])
    amount = read(program, found.operands[2], 32)

    def shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        most = np.minimum(by, found.bits - 1).astype(numpy_type)
        result = x << most if left else x >> most
        # Past the end an arithmetic shift leaves the sign, any other one nothing.
        return result if signed else np.where(by < found.bits, result, numpy_type(0))

    return _compute(program, found, shift, value, amount)


@instruction("shf")
def _funnel(program: Program, found: Instruction) -> Run:
    if found.parts[1:3] != ("l", "wrap"):
        raise unknown(found)

    def shift(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << (by & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)

    return _compute(program, found, shift, *[read(program, s, 32) for s in found.operands[1:]])


@instruction("bfe")
def _bit_field(program: Program, found: Instruction) -> Run:
    position, length = int(found.operands[2]), int(found.operands[3])
    value = read_as(program, found.operands[1], found.parts[-1])
    rest = found.bits - length

    def extract(x: np.ndarray) -> np.ndarray:
        return (x << x.dtype.type(rest - position)) >> x.dtype.type(rest)

    return _compute(program, found, extract, value)


@instruction("popc")
def _count_ones(program: Program, found: Instruction) -> Run:
    def count(x: np.ndarray) -> np.ndarray:
        return np.unpackbits(x[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint32)

    return _compute(program, found, count, read(program, found.operands[1], found.bits))


@instruction("prmt")
def _permute(program: Program, found: Instruction) -> Run:
    """Four bytes out of eight; a selector's top bit asks for the byte's sign instead."""
    if found.parts != ("prmt", "b32"):
        raise unknown(found)

    def permute(low: np.ndarray, high: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        out = np.zeros((), np.uint32)
        for i in range(4):
            selector = (selectors >> np.uint32(4 * i)) & np.uint32(15)
            shift = (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = (both >> shift) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(selector & np.uint32(8), sign, byte).astype(np.uint32)
            out = out | (byte << np.uint32(8 * i))
        return out

    return _compute(program, found, permute, *[read(program, s, 32) for s in found.operands[1:]])


@instruction("mov", "cvta")
def _mov(program: Program, found: Instruction) -> Run:
    destination, source = found.operands
    if found.parts[-1] == "pred":
        return _compute(program, found, lambda x: x, predicate(source))
    if destination.startswith("{"):
        return _unpack(program, vector(destination), source, found.bits)
    if source.startswith("{"):
        return _pack(program, found, vector(source))
    return _compute(program, found, lambda x: x, read(program, source, found.bits))


def _unpack(program: Program, registers: list[str], source: str, bits: int) -> Run:
    part = bits // len(registers)
    get, puts = read(program, source, bits), [write(program, register) for register in registers]

    def run(blocks: Blocks, mask: Mask) -> None:
        value = get(blocks)
        for i, put in enumerate(puts):
            put(blocks, (value >> value.dtype.type(i * part)).astype(UNSIGNED[part]), mask)

    return run


def _pack(program: Program, found: Instruction, registers: list[str]) -> Run:
    part, whole = found.bits // len(registers), UNSIGNED[found.bits]

    def join(*parts: np.ndarray) -> np.ndarray:
        shifted = [each.astype(whole) << whole(i * part) for i, each in enumerate(parts)]
        return functools.reduce(np.bitwise_or, shifted)

    return _compute(program, found, join, *[read(program, r, part) for r in registers])


@instruction("selp")
def _select(program: Program, found: Instruction) -> Run:
    _, a, b, condition = found.operands
    first, second = read(program, a, found.bits), read(program, b, found.bits)
    return _compute(program, found, np.where, predicate(condition), first, second)


@instruction("setp")
def _compare(program: Program, found: Instruction) -> Run:
    if len(found.parts) != 3:
        raise unknown(found)
    _, comparison, type_name = found.parts
    sources = [read_as(program, source, type_name) for source in found.operands[1:]]
    return _compute(program, found, _COMPARISONS[comparison], *sources)


@instruction("cvt")
def _convert(program: Program, found: Instruction) -> Run:
    *modifiers, to, of = found.parts[1:]
    half = to.removesuffix("x2")
    if half in ("bf16", "f16"):
        if modifiers != ["rn"] or of != "f32":
            raise unknown(found)
        return _to_half(program, found, half)
    if of == "bf16":
        values = read(program, found.operands[1], 16)
        return _compute(program, found, functools.partial(widened, half="bf16"), values)
    integers = to[0] in "su" and of[0] in "su"
    widening = of == "f16" and to == "f32"
    if modifiers != ([] if integers or widening else ["rn"]) or to.startswith("f") > (to == "f32"):
        raise unknown(found)
    target = element(to)
    # A register wider than the type is filled by the type's sign.
    width = program.registers[found.operands[0]]
    family = FLOAT if to.startswith("f") else SIGNED if to.startswith("s") else UNSIGNED
    value = read_as(program, found.operands[1], of)
    return _compute(program, found, lambda x: x.astype(target).astype(family[width]), value)


def _to_half(program: Program, found: Instruction, half: str) -> Run:
    def convert(*values: np.ndarray) -> np.ndarray:
        bits = [rounded(value, half) for value in values]
        if len(bits) == 1:
            return bits[0]
        high, low = (each.astype(np.uint32) for each in bits)
        return (high << np.uint32(16)) | low

    return _compute(
        program, found, convert, *[read_as(program, s, "f32") for s in found.operands[1:]]
    )
