"""Which samples share a pack.

``pack`` is greedy next-fit over the order given and never splits a sample; ``pack_best_fit`` may
reorder samples inside a window and fills packs better. Both take lengths and return index ranges;
neither touches a sample.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

OversizePolicy = Literal["drop", "extend"]

# Samples worked on at a time: bounds the temporary arrays, which would else be most of the memory.
_BLOCK = 1 << 18


class PackRanges(Sequence[tuple[int, int]]):
    """``(first index, count)`` of every pack: reads like a list of tuples, stored as two arrays.

    Attributes:
        starts: int64 ``[P]``, first index of each pack.
        counts: int64 ``[P]``, number of samples of each pack, all at least 1.
    """

    __slots__ = ("counts", "starts")

    def __init__(self, starts: np.ndarray, counts: np.ndarray) -> None:
        self.starts = starts
        self.counts = counts

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> PackRanges: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | PackRanges:
        if isinstance(index, slice):
            return PackRanges(self.starts[index], self.counts[index])
        return int(self.starts[index]), int(self.counts[index])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.counts.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackRanges):
            return np.array_equal(self.starts, other.starts) and np.array_equal(
                self.counts, other.counts
            )
        if isinstance(other, (list, tuple)):
            return list(self) == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # mutable arrays inside

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self[:4]))
        return f"PackRanges([{shown}{', …' if len(self) > 4 else ''}], packs={len(self)})"


@dataclass(frozen=True, slots=True)
class PackingResult:
    """What a packing decided.

    Attributes:
        num_packed_samples: number of packs.
        num_droped: oversize samples left out (the spelling is Megatron-Bridge's).
        packed_sample_ranges: ``(first index, count)`` per pack.
    """

    num_packed_samples: int
    num_droped: int
    packed_sample_ranges: PackRanges


def pack(
    sizes: Sequence[int] | np.ndarray, max_len: int, oversize_policy: OversizePolicy
) -> PackingResult:
    """Greedy next-fit packing that never splits a sample.

    Samples join the open pack in the order given while their sizes sum to at most ``max_len``; a
    pack that is exactly full closes at once; a sample that does not fit closes the pack and opens
    the next. A sample longer than ``max_len`` closes the open pack and is then left out
    (``"drop"``) or makes a pack of its own (``"extend"``).

    Args:
        sizes: ``[N]`` lengths in tokens, 0 or more.
        max_len: capacity of a pack in tokens, at least 1.
        oversize_policy: ``"drop"`` or ``"extend"``.

    Returns:
        The ranges over ``sizes``. ``pack([4, 3, 9, 2], 8, "drop")`` has ranges ``(0, 2), (3, 1)``
        and one dropped sample; ``"extend"`` gives ``(0, 2), (2, 1), (3, 1)``.

    Raises:
        ValueError: an unknown policy, sizes that are no integers or negative, or ``max_len``
            below 1.
    """
    lengths = _checked_lengths(sizes, max_len, oversize_policy)
    total = len(lengths)
    following = _following_starts(lengths, max_len)
    step = following.item
    firsts = []
    position = 0
    while position < total:
        firsts.append(position)
        position = step(position)
    starts = np.array(firsts, dtype=np.int64)
    counts = np.diff(np.append(starts, total))
    if oversize_policy == "drop":
        kept = lengths[starts] <= max_len
        starts, counts = starts[kept], counts[kept]
    return PackingResult(
        num_packed_samples=len(starts),
        num_droped=int(np.count_nonzero(lengths > max_len)) if oversize_policy == "drop" else 0,
        packed_sample_ranges=PackRanges(starts, counts),
    )


def _following_starts(lengths: np.ndarray, max_len: int) -> np.ndarray:
    """For every sample: where the next pack begins if a pack begins with this sample."""
    total = len(lengths)
    ends = np.cumsum(lengths)
    following = np.empty(total, dtype=np.int64)
    for first in range(0, total, _BLOCK):
        block = slice(first, first + _BLOCK)
        targets = ends[block] - lengths[block] + max_len
        # An exactly full pack includes the sample that fills it and nothing after it, not even an
        # empty sample: hence side="left", then one more where the fit is exact.
        places = np.searchsorted(ends, targets, side="left")
        places += (places < total) & (ends[np.minimum(places, total - 1)] == targets)
        alone = lengths[block] > max_len
        places[alone] = first + 1 + np.flatnonzero(alone)
        following[block] = places
    return following


def pack_best_fit(
    sizes: Sequence[int] | np.ndarray,
    max_len: int,
    oversize_policy: OversizePolicy,
    window: int = 4096,
) -> tuple[np.ndarray, PackingResult]:
    """Best-fit-decreasing packing inside consecutive windows.

    In each window of ``window`` samples the longest sample goes first, into the fullest pack that
    still holds it (the earlier sample and the earlier pack win ties). Samples move only inside
    their window, so the order of training keeps its large-scale shape. Deterministic. Work grows
    linearly with the number of samples for a fixed window.

    Args:
        sizes, max_len, oversize_policy: as for :func:`pack`.
        window: number of consecutive samples that are packed together, at least 1.

    Returns:
        ``order``, int64 ``[M]``: indices into ``sizes``, pack after pack, dropped ones left out;
        and the ranges, which are over ``order``. Inside a pack indices rise; the packs of a window
        are ordered by their first index.

    Raises:
        ValueError: as for :func:`pack`, or ``window`` below 1.
    """
    lengths = _checked_lengths(sizes, max_len, oversize_policy)
    if window < 1:
        raise ValueError(f"window: expected at least 1 sample, got {window}")
    packs: list[list[int]] = []
    for first in range(0, len(lengths), window):
        packs += _best_fit_window(lengths[first : first + window], max_len, oversize_policy, first)
    counts = np.array([len(members) for members in packs], dtype=np.int64)
    order = np.array([index for members in packs for index in members], dtype=np.int64)
    return order, PackingResult(
        num_packed_samples=len(packs),
        num_droped=len(lengths) - len(order),
        packed_sample_ranges=PackRanges(np.cumsum(counts) - counts, counts),
    )


def _best_fit_window(
    lengths: np.ndarray, max_len: int, oversize_policy: OversizePolicy, first: int
) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[index])
        if size > max_len:
            if oversize_policy == "extend":
                packs.append([first + index])
            continue
        place = bisect.bisect_left(room, (size, -1))
        if place < len(room):
            free, target = room.pop(place)
        else:
            free, target = max_len, len(packs)
            packs.append([])
        packs[target].append(first + index)
        if free > size:
            bisect.insort(room, (free - size, target))
    for members in packs:
        members.sort()
    return sorted(packs)


def _checked_lengths(
    sizes: Sequence[int] | np.ndarray, max_len: int, oversize_policy: str
) -> np.ndarray:
    if oversize_policy not in ("drop", "extend"):
        raise ValueError(f"oversize_policy: expected 'drop' or 'extend', got {oversize_policy!r}")
    if max_len < 1:
        raise ValueError(f"max_len: expected at least 1 token, got {max_len}")
    given = np.asarray(sizes)
    # An empty list is a float array for NumPy.
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"sizes: expected integers, got {given.dtype}")
    lengths = given.astype(np.int64, copy=False)
    if lengths.ndim != 1:
        raise ValueError(f"sizes: expected one dimension, got shape {lengths.shape}")
    if len(lengths) and int(lengths.min()) < 0:
        index = int(np.argmin(lengths))
        raise ValueError(f"sizes: sample {index} has the negative length {int(lengths[index])}")
    return lengths
