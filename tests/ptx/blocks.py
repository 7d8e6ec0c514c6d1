"""Some blocks of a launch, run in lockstep: one NumPy element for each thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.memory import Accesses, Descriptor, GlobalMemory, Traffic
from tests.ptx.program import PARAMETER_SPACE, Program, PtxError

WARP = 32
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# What a register or a shared byte holds that nobody has written.
_GARBAGE = {1: True, 16: 0xDEAD, 32: 0xDEADBEEF, 64: 0xDEADBEEFDEADBEEF}
_GARBAGE_BYTE = 0xA5

Mask = np.ndarray | None
"""Which threads execute an instruction; None: all."""
Run = Callable[["Blocks", Mask], None]
Job = Callable[[], None]


@dataclass(slots=True)
class Barrier:
    """An ``mbarrier``: a phase ends when all have arrived and all expected bytes are there."""

    count: int
    pending: int
    expected_bytes: int = 0
    phase: int = 0
    copies: list[Job] = field(default_factory=list)
    """Copies that will arrive as late as they may: when somebody waits."""

    def settle(self) -> None:
        if self.pending == 0 and self.expected_bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass(slots=True)
class Groups:
    """Asynchronous work in groups; each is done when it is waited for, not before."""

    open: list[Job] = field(default_factory=list)
    committed: list[list[Job]] = field(default_factory=list)

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, allowed: int) -> None:
        while len(self.committed) > allowed:
            for job in self.committed.pop(0):
                job()

    @property
    def empty(self) -> bool:
        return not self.open and not any(self.committed)


@dataclass(slots=True, kw_only=True)
class Launch:
    """What all blocks of a launch have in common."""

    program: Program
    runs: list[Run | None]
    """What each instruction does; None for control flow."""
    grid: tuple[int, int, int]
    parameters: np.ndarray
    """uint8"""
    descriptors: Mapping[int, Descriptor]
    """By the address of the parameter."""
    memory: GlobalMemory
    shared_bytes: int
    traffic: Traffic | None = None
    """Where to count loads and stores."""


class Blocks:
    """Registers, shared memory and program counters of the blocks ``numbers`` of a launch."""

    def __init__(self, launch: Launch, numbers: np.ndarray) -> None:
        threads = launch.program.threads
        self.launch = launch
        self.threads = threads
        self.lanes = len(numbers) * threads
        self.tid = np.tile(np.arange(threads, dtype=np.uint32), len(numbers))
        self.local = np.repeat(np.arange(len(numbers)), threads)
        """Which row of ``shared`` is a thread's."""
        self.block = np.repeat(numbers, threads).astype(np.int32)
        width, height, _ = launch.grid
        axes = (numbers % width, numbers // width % height, numbers // (width * height))
        self.ctaid = [np.repeat(axis, threads).astype(np.uint32) for axis in axes]
        self.shared = np.full((len(numbers), launch.shared_bytes), _GARBAGE_BYTE, np.uint8)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.copies = Groups()
        self.products = Groups()
        self._registers: dict[str, np.ndarray] = {}

    # Registers hold unsigned integers of their width (bool: a predicate), one for each thread or
    # one for all.

    def get(self, register: str) -> np.ndarray:
        if register not in self._registers:
            bits = self.launch.program.registers[register]
            return np.asarray(_GARBAGE[bits], UNSIGNED[bits])
        return self._registers[register]

    def put(self, register: str, value: np.ndarray, mask: Mask) -> None:
        expected = UNSIGNED[self.launch.program.registers[register]]
        value = np.asarray(value)
        if value.dtype != expected:
            raise PtxError(f"{register} holds {expected.__name__}, not {value.dtype}")
        if mask is not None:
            value = np.where(mask, value, self.get(register))
        self._registers[register] = value

    def each(self, value: np.ndarray) -> np.ndarray:
        """One element for each thread."""
        return np.broadcast_to(value, (self.lanes,))

    def active(self, mask: Mask) -> np.ndarray:
        """Indices of the threads in ``mask``."""
        return np.arange(self.lanes) if mask is None else np.nonzero(mask)[0]

    # Checks

    def whole_warps(self, mask: Mask) -> None:
        if mask is not None:
            lanes = mask.reshape(-1, WARP)
            if (lanes.any(1) != lanes.all(1)).any():
                raise PtxError("part of a warp at an instruction for the whole warp")

    def whole_block(self, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("part of a block at an instruction for the whole warpgroup")

    @property
    def early(self) -> tuple[bool, bool]:
        """Whether copies and products are done when issued, or as late as they may be.

        The hardware may do either; blocks take turns in all four combinations.
        """
        number = int(self.block[0])
        return number % 2 == 0, number // 2 % 2 == 1

    # Memory

    def parameters(self, addresses: np.ndarray, size: int) -> np.ndarray:
        at = addresses.astype(np.int64) - PARAMETER_SPACE
        data = self.launch.parameters
        if ((at < 0) | (at + size > data.size) | (at % size != 0)).any():
            raise PtxError("load of a parameter that is not there")
        return data[at[:, None] + np.arange(size)]

    def load_global(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        """``[len(lanes), size]`` uint8"""
        if self.launch.traffic is not None:
            entry = self.launch.traffic.loads.setdefault(size, Accesses())
            entry.add(addresses, size, lanes // WARP)
        return self.launch.memory.load(addresses, size, self.block[lanes])

    def store_global(self, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        size = data.shape[1]
        if self.launch.traffic is not None:
            entry = self.launch.traffic.stores.setdefault(size, Accesses())
            entry.add(addresses, size, lanes // WARP)
        self.launch.memory.store(addresses, data, self.block[lanes])

    def load_shared(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        """``[len(lanes), size]`` uint8"""
        return self.shared[self.local[lanes][:, None], self._shared_at(addresses, size)]

    def store_shared(self, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        at = self._shared_at(addresses, data.shape[1])
        self.shared[self.local[lanes][:, None], at] = data

    def _shared_at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise PtxError(
                f"{size} bytes of shared memory at an address that is no multiple of them"
            )
        if (addresses + size > self.shared.shape[1]).any():
            raise PtxError(f"{size} bytes past the {self.shared.shape[1]} of shared memory")
        return addresses[:, None] + np.arange(size)

    def barrier(self, address: np.ndarray, lane: int) -> Barrier:
        key = (int(self.local[lane]), int(self.each(address)[lane]))
        if key not in self.barriers:
            raise PtxError("an mbarrier that was not initialised")
        return self.barriers[key]

    # Running

    def run(self) -> None:
        """Until every thread has returned: always the threads that are furthest behind."""
        self.launch.memory.early = self.launch.program.waits
        instructions = self.launch.program.instructions
        end = len(instructions)
        counter = np.zeros(self.lanes, np.int64)
        waiting = np.zeros(self.lanes, bool)
        while (counter < end).any():
            ready = (counter < end) & ~waiting
            if not ready.any():
                self._open_barriers(waiting, counter < end)
                continue
            at = int(counter[ready].min())
            mask = ready & (counter == at)
            others = counter[ready & ~mask]
            stop = int(others.min()) if len(others) else end
            counter[mask] = self._straight(at, stop, mask)
            at = int(counter[mask][0])
            if at < stop and at < end:
                self._control(at, mask, counter, waiting)
        leftovers = self.barriers or not self.copies.empty or not self.products.empty
        if leftovers:
            raise PtxError("asynchronous work that nobody waited for")

    def _straight(self, at: int, stop: int, mask: np.ndarray) -> int:
        """Run up to the next control flow, or to where other threads are; give its place."""
        runs = self.launch.runs
        everybody = None if mask.all() else mask
        while at < stop:
            run = runs[at]
            if run is None:
                break
            try:
                run(self, everybody)
            except PtxError as fault:
                text = self.launch.program.instructions[at].text
                raise PtxError(f"{fault}, in: {text[:200]}") from fault
            at += 1
        return at

    def _control(self, at: int, mask: np.ndarray, counter: np.ndarray, waiting: np.ndarray) -> None:
        """A branch, a return or a barrier."""
        instruction = self.launch.program.instructions[at]
        taken = mask
        if instruction.guard is not None:
            name = instruction.guard.removeprefix("!")
            taken = mask & (self.get(name) ^ instruction.guard.startswith("!"))
        counter[mask] = at + 1
        if instruction.parts[0] == "bra":
            counter[taken] = self.launch.program.labels[instruction.operands[0]]
        elif instruction.parts[0] == "ret":
            counter[taken] = len(self.launch.program.instructions)
        else:
            waiting[taken] = True

    def _open_barriers(self, waiting: np.ndarray, alive: np.ndarray) -> None:
        complete = (waiting == alive).reshape(-1, self.threads).all(1)
        opened = waiting & np.repeat(complete, self.threads)
        if not opened.any():
            raise PtxError("threads wait at a barrier that others never reach")
        waiting &= ~opened
