"""Global memory as a launch sees it, and the copy engine's view of a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.program import PtxError

_NOBODY, _SEVERAL = -1, -2
_SPAN = {0: 1 << 20, 1: 32, 2: 64, 3: 128}


@dataclass(slots=True)
class _Segment:
    """The memory behind one tensor; ``wrote`` and ``read`` name the block that did, by byte."""

    base: int
    data: np.ndarray
    wrote: np.ndarray
    read: np.ndarray


class GlobalMemory:
    """The tensors given to one launch, and nothing else.

    Any access past them or not aligned to its size is a :class:`PtxError`; so is a byte that one
    block writes and another touches: blocks of a launch have no order. Where a block may start
    before the launch before it has ended (:attr:`early`), it may neither touch what that one wrote
    nor write anything.
    """

    def __init__(self, tensors: dict[int, np.ndarray], fresh: frozenset[int] = frozenset()) -> None:
        """``tensors``: the bytes behind each address; ``fresh``: written by the launch before."""
        self.early = False
        """Set while a block that waits by ``griddepcontrol`` has not done so."""
        self._fresh = fresh
        self._segments = [
            _Segment(base, data, *(np.full(data.nbytes, _NOBODY, np.int32) for _ in range(2)))
            for base, data in sorted(tensors.items())
        ]
        self._bases = np.array([segment.base for segment in self._segments], np.int64)

    @property
    def written(self) -> frozenset[int]:
        """Addresses of the tensors that the launch wrote to."""
        return frozenset(each.base for each in self._segments if (each.wrote != _NOBODY).any())

    def load(self, addresses: np.ndarray, size: int, blocks: np.ndarray) -> np.ndarray:
        """``size`` bytes at each address, ``[N, size]`` uint8, for block ``blocks[n]``."""
        out = np.empty((len(addresses), size), np.uint8)
        for segment, where, at in self._pieces(addresses, size, "load"):
            block = blocks[where][:, None]
            if _foreign(segment.wrote[at], block).any():
                raise PtxError("race: a block reads what another block of the launch wrote")
            out[where] = segment.data[at]
            before = segment.read[at]
            segment.read[at] = np.where((before == _NOBODY) | (before == block), block, _SEVERAL)
            crowded = (segment.read[at] != block) & (segment.read[at] != _SEVERAL)
            if crowded.any():  # several blocks in this very instruction
                segment.read[at] = np.where(crowded, _SEVERAL, segment.read[at])
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray, blocks: np.ndarray) -> None:
        """Write ``data[n]`` (uint8) to each address for block ``blocks[n]``."""
        for segment, where, at in self._pieces(addresses, data.shape[1], "store"):
            block = blocks[where][:, None]
            if _foreign(segment.wrote[at], block).any():
                raise PtxError("race: two blocks of the launch write one byte")
            if _foreign(segment.read[at], block).any():
                raise PtxError("race: a block writes what another block of the launch read")
            segment.data[at] = data[where]
            segment.wrote[at] = np.broadcast_to(block, at.shape)
            if (segment.wrote[at] != block).any():
                raise PtxError("race: two blocks of the launch write one byte")
            if (segment.data[at] != data[where]).any():
                raise PtxError("two threads write different values to one byte")

    def _pieces(
        self, addresses: np.ndarray, size: int, what: str
    ) -> Iterator[tuple[_Segment, np.ndarray | slice, np.ndarray]]:
        """``(segment, which of the addresses, [n, size] offsets)`` of each tensor touched."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise PtxError(f"{what} of {size} bytes at an address that is no multiple of them")
        owner = np.searchsorted(self._bases, addresses, side="right") - 1
        for index in np.unique(owner):
            segment = self._segments[index]
            where = slice(None) if (owner == index).all() else np.nonzero(owner == index)[0]
            offsets = addresses[where] - segment.base
            if index < 0 or (offsets + size > segment.data.nbytes).any():
                raise PtxError(f"{what} of {size} bytes outside the tensors of the launch")
            if self.early and (what == "store" or segment.base in self._fresh):
                raise PtxError(f"race: {what} before the wait for the launch before")
            yield segment, where, offsets[:, None] + np.arange(size)


def _foreign(owner: np.ndarray, block: np.ndarray) -> np.ndarray:
    return (owner != _NOBODY) & (owner != block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A matrix as the copy engine takes it; refuses what the driver's encoder refuses."""

    base: int
    itemsize: int
    shape: Sequence[int]
    strides: Sequence[int]
    """In elements."""
    box: Sequence[int]
    """Rows and columns of one copy."""
    swizzle: int
    """0: none; 1, 2, 3: among 32, 64, 128 bytes."""

    def __post_init__(self) -> None:
        inner = self.box[1] * self.itemsize
        fits = {
            "base": self.base % 16 == 0,
            "stride": self.strides[0] * self.itemsize % 16 == 0 and self.strides[1] == 1,
            "shape": all(0 < size < 2**32 for size in self.shape),
            "box": all(0 < size <= 256 for size in self.box) and inner % 16 == 0,
            "swizzle": inner <= _SPAN[self.swizzle],
        }
        if not all(fits.values()):
            wrong = ", ".join(name for name, fit in fits.items() if not fit)
            raise PtxError(f"the copy engine does not take this {wrong}: {self}")

    @property
    def nbytes(self) -> int:
        return self.box[0] * self.box[1] * self.itemsize

    def load(self, memory: GlobalMemory, row: int, col: int, block: int) -> np.ndarray:
        """The box at (row, col), flat; zeros outside the matrix."""
        rows, cols = row + np.arange(self.box[0]), col + np.arange(self.box[1])
        out = np.zeros((*self.box, self.itemsize), np.uint8)
        inside = np.ix_((rows >= 0) & (rows < self.shape[0]), (cols >= 0) & (cols < self.shape[1]))
        rows, cols = rows[inside[0].ravel()], cols[inside[1].ravel()]
        if len(rows) and len(cols):
            elements = rows[:, None].astype(np.int64) * self.strides[0] + cols
            addresses = self.base + elements.ravel() * self.itemsize
            blocks = np.full(addresses.size, block, np.int32)
            values = memory.load(addresses, self.itemsize, blocks)
            out[inside] = values.reshape(len(rows), len(cols), self.itemsize)
        return out.ravel()


@dataclass(slots=True)
class Accesses:
    """Loads, or stores, of one width."""

    requests: int = 0
    """Instructions, once for each warp."""
    lines: int = 0
    """Of 128 bytes, once for each request that touches them."""

    def add(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """``size`` bytes at ``addresses[n]`` by a thread of ``warps[n]``."""
        ends = np.concatenate([addresses, addresses + np.uint64(size - 1)]) >> np.uint64(7)
        pairs = np.stack([np.tile(warps.astype(np.uint64), 2), ends])
        self.requests += len(np.unique(warps))
        self.lines += np.unique(pairs, axis=1).shape[1]


@dataclass(slots=True)
class Traffic:
    """What one launch asked of the caches, by the bytes of a thread's access."""

    kernel: str
    loads: dict[int, Accesses] = field(default_factory=dict)
    stores: dict[int, Accesses] = field(default_factory=dict)


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """Where shared memory keeps a byte: 16-byte units exchanged within 128 bytes times 8."""
    return address ^ (((address >> 7) & ((1 << swizzle) - 1)) << 4)
