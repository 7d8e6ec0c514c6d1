"""The text of a compiled kernel, taken apart: PTX as Triton 3.6 to 3.9 write it.

Source for the instructions: NVIDIA, *Parallel Thread Execution ISA*, versions 8 and 9.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

PARAMETER_SPACE = 0x5000_0000
"""Where the kernel's parameters seem to lie; far from any shared address."""

_PARAMETER = re.compile(
    r"\.param (?:\.align \d+ )?\.(\w+) (?:\.ptr )?(?:\.global )?(?:\.align \d+ )?(\w+)"
    r"(?:\[(\d+)\])?"
)


class PtxError(Exception):
    """The kernel did something a GPU may not do, or something this interpreter does not know."""


@dataclass(slots=True)
class Instruction:
    text: str
    parts: tuple[str, ...]
    """``add.s32`` is ("add", "s32")."""
    operands: tuple[str, ...]
    guard: str | None
    """The predicate before it, ``!`` in front where negated."""

    @property
    def bits(self) -> int:
        """Of the last type in its name."""
        return bits_of(self.parts[-1])


@dataclass(slots=True)
class Parameter:
    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Program:
    """One kernel."""

    threads: int
    """In a block."""
    parameters: list[Parameter]
    registers: dict[str, int]
    """Bits of each register; 1: a predicate."""
    instructions: list[Instruction]
    labels: dict[str, int]
    asynchronous: bool
    """It copies or multiplies asynchronously, so that its blocks have to run one by one."""
    waits: bool
    """It may start before the launch before it has ended, and waits for that itself."""

    @property
    def parameter_bytes(self) -> int:
        return self.parameters[-1].offset + self.parameters[-1].size

    def address_of(self, name: str) -> int | None:
        """Of a parameter or of the shared memory; None for other names."""
        if name == "global_smem":
            return 0
        for parameter in self.parameters:
            if parameter.name == name:
                return PARAMETER_SPACE + parameter.offset
        return None


def bits_of(type_name: str) -> int:
    """32 for ``s32``, ``f32``, ``bf16x2``; 1 for ``pred``."""
    if type_name == "pred":
        return 1
    return math.prod(int(number) for number in re.findall(r"\d+", type_name))


def parse(ptx: str) -> Program:
    """Take the one kernel of ``ptx`` apart."""
    lines = re.sub(r"//[^\n]*", "", ptx).split("\n")
    text = "\n".join(each for each in lines if not each.lstrip().startswith((".loc", ".pragma")))
    text = text[text.index(".entry") :]
    head, body = text[: text.index("\n{")], text[text.index("\n{") :]
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", head)
    if threads is None:
        raise PtxError("the kernel does not say how many threads it has")
    program = Program(
        threads=int(threads[1]),
        parameters=list(_parameters(head)),
        registers={},
        instructions=[],
        labels={},
        asynchronous="cp.async" in body or "wgmma" in body,
        waits="griddepcontrol.wait" in body,
    )
    _Body(program).read(body)
    return program


def _parameters(head: str) -> Iterator[Parameter]:
    end = 0
    for type_name, name, length in _PARAMETER.findall(head):
        size = int(length) if length else bits_of(type_name) // 8
        alignment = 64 if length else size
        offset = -(-end // alignment) * alignment
        end = offset + size
        yield Parameter(name, offset, size)


class _Body:
    """Reads statements; names declared in an inner ``{}`` are its own."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._scopes: list[dict[str, str]] = []
        self._serial = itertools.count()

    def read(self, body: str) -> None:
        for statement in _statements(body):
            if statement == "{":
                self._scopes.append({})
            elif statement == "}":
                self._scopes.pop()
                if not self._scopes:
                    return
            elif statement.endswith(":"):
                name = statement[:-1]
                if len(self._scopes) > 1:
                    name = self._declare(name)
                self._program.labels[name] = len(self._program.instructions)
            elif statement.startswith(".reg"):
                self._registers(statement)
            else:
                self._program.instructions.append(self._instruction(statement))
        raise PtxError("the kernel does not end")

    def _declare(self, name: str) -> str:
        self._scopes[-1][name] = f"{name}@{next(self._serial)}"
        return self._scopes[-1][name]

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def _registers(self, statement: str) -> None:
        _, type_name, names = statement.split(maxsplit=2)
        bits = bits_of(type_name[1:])
        for name in names.split(","):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
            if many:
                self._program.registers.update({f"{many[1]}{i}": bits for i in range(int(many[2]))})
            else:
                self._program.registers[self._declare(name.strip())] = bits

    def _instruction(self, statement: str) -> Instruction:
        guard = None
        guarded = re.fullmatch(r"@(!?)([%\w]+) (.*)", statement)
        if guarded:
            guard, statement = guarded[1] + self._resolve(guarded[2]), guarded[3]
        opcode, _, rest = statement.partition(" ")
        operands = tuple(self._resolve(operand) for operand in split(rest))
        return Instruction(statement, tuple(opcode.split(".")), operands, guard)


def _statements(body: str) -> Iterator[str]:
    """``{``, ``}``, ``label:`` and instructions without their ``;``."""
    at = 0
    label = re.compile(r"[$\w]+:(?!:)")
    while True:
        while body[at].isspace():
            at += 1
        found = label.match(body, at)
        if body[at] in "{}":
            yield body[at]
            at += 1
        elif found:
            yield found[0]
            at = found.end()
        else:
            end = body.index(";", at)
            yield " ".join(body[at:end].split())
            at = end + 1


def split(operands: str) -> list[str]:
    """At the commas outside brackets: ``{%r1, %r2}, [%rd3]`` are two."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[{])+", operands)
    return [part.strip() for part in parts]
