"""Decides which samples share a pack, from their lengths.

``pack`` is greedy next-fit over the order given and never splits a sample; ``pack_best_fit`` may
reorder samples inside a window and fills packs better; ``pack_balanced`` fills them equally
well and also gives them nearly equal work for the vision tower. All take lengths and return index
ranges; none reads a sample.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from step37_data.common.checks import checked_choice, checked_int

logger = logging.getLogger(__name__)

OversizePolicy = Literal["drop", "extend"]
Packing = Literal["next_fit", "best_fit", "balanced"]
Sampling = Literal["sequential", "random"]
Integers = Sequence[int] | np.ndarray
_Packs = list[list[int]]

# Samples processed at a time. This bounds the temporary arrays, the largest use of memory here.
_BLOCK = 1 << 18
# Balanced packing: weights of a tight fit, tried in turn until enough packs are full.
_TIGHTNESS = (0.0, 0.02, 0.1)
_MOST_PACKS = 1.01
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The settings of drawing, measuring and packing samples, with their defaults.

    Attributes:
        max_length: capacity of a pack in tokens, at least 1.
        oversize_policy: ``"drop"`` leaves out samples longer than that (counted and logged),
            ``"extend"`` gives each a pack of its own.
        dataset_sampling: ``"random"`` or ``"sequential"``, one for all or one per data set.
        packing: ``"next_fit"`` packs in the order drawn (see :func:`pack`); ``"best_fit"`` reorders
            samples within ``packing_window`` draws for fuller packs (see :func:`pack_best_fit`);
            ``"balanced"`` fills them equally well, and gives the packs of a step nearly the same
            number of vision tokens (see :func:`pack_balanced`).
        packing_window: samples that ``"best_fit"`` and ``"balanced"`` pack together, at least 1.
        balance_group: how many consecutive packs ``"balanced"`` makes similar, at least 1: the
            packs of a step over all data-parallel ranks, or a multiple.
        lengths_cache_dir: folder where lengths are kept between runs; None measures every time.
        probe_workers: processes that measure lengths; None decides by the size of the data set.
        progress: show a progress bar while measuring.
        together: set it if every rank of a process group makes this call: one rank measures, the
            others read.

    Raises:
        ValueError: a setting is none of the values that it may be. (The number of strategies in
            ``dataset_sampling`` is checked by :meth:`strategies`.)
    """

    max_length: int
    oversize_policy: OversizePolicy = "extend"
    dataset_sampling: Sampling | Sequence[Sampling] = "random"
    packing: Packing = "next_fit"
    packing_window: int = 4096
    balance_group: int = 64
    lengths_cache_dir: str | Path | None = None
    probe_workers: int | None = None
    progress: bool = True
    together: bool = False

    def __post_init__(self) -> None:
        checked_choice("oversize_policy", self.oversize_policy, OversizePolicy)
        checked_choice("packing", self.packing, Packing)
        one_for_all = isinstance(self.dataset_sampling, str)
        for strategy in [self.dataset_sampling] if one_for_all else self.dataset_sampling:
            checked_choice("dataset_sampling", strategy, Sampling)
        for name in ("max_length", "packing_window", "balance_group"):
            checked_int(name, getattr(self, name))

    def strategies(self, count: int) -> list[Sampling]:
        """Return the ``dataset_sampling`` of each of ``count`` data sets.

        Raises:
            ValueError: there is another number of strategies.
        """
        given = self.dataset_sampling
        strategies: list[Sampling] = [given] * count if isinstance(given, str) else list(given)
        if len(strategies) != count:
            raise ValueError(f"dataset_sampling: {len(strategies)} values for {count} datasets")
        return strategies


@dataclass(frozen=True, slots=True, eq=False)
class PackingResult:
    """Which samples share a pack, and how many were left out.

    Attributes:
        num_droped: oversize samples left out (the spelling is Megatron-Bridge's).
        starts: int64 ``[P]``, first index of each pack.
        counts: int64 ``[P]``, number of samples of each pack, all at least 1.
    """

    num_droped: int
    starts: np.ndarray
    counts: np.ndarray

    @property
    def packed_sample_ranges(self) -> list[tuple[int, int]]:
        """``(first index, count)`` of every pack, in Megatron-Bridge's form; a new list."""
        return list(zip(self.starts.tolist(), self.counts.tolist(), strict=True))

    @property
    def num_packed_samples(self) -> int:
        """Number of packs (the name is Megatron-Bridge's)."""
        return len(self.starts)


def pack_as(
    settings: ScheduleSettings, sizes: Integers, loads: Integers = ()
) -> tuple[np.ndarray | slice, PackingResult]:
    """Pack by the method that ``settings.packing`` names, and log how many samples are dropped.

    Args:
        settings: ``"next_fit"`` is :func:`pack`, ``"best_fit"`` :func:`pack_best_fit`,
            ``"balanced"`` :func:`pack_balanced`.
        sizes: ``[N]`` lengths in tokens.
        loads: ``[N]``, needed for ``"balanced"`` only.

    Returns:
        The order into which the samples have to be brought, and the ranges of packs in that order.
    """
    limits = (settings.max_length, settings.oversize_policy)
    order: np.ndarray | slice = slice(None)
    if settings.packing == "next_fit":
        result = pack(sizes, *limits)
    elif settings.packing == "best_fit":
        order, result = pack_best_fit(sizes, *limits, settings.packing_window)
    else:
        order, result = pack_balanced(
            sizes, loads, *limits, window=settings.packing_window, group=settings.balance_group
        )
    if result.num_droped:
        logger.warning(
            f"{result.num_droped} of {len(sizes)} samples were dropped: longer than the "
            f"{settings.max_length} tokens of a pack"
        )
    return order, result


def pack(sizes: Integers, max_len: int, oversize_policy: OversizePolicy) -> PackingResult:
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
    kept = (lengths[starts] <= max_len) | (oversize_policy == "extend")
    return PackingResult(int(np.count_nonzero(~kept)), starts[kept], counts[kept])


def _following_starts(lengths: np.ndarray, max_len: int) -> np.ndarray:
    """Return, for every sample, where the next pack begins if one begins with this sample."""
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
    sizes: Integers,
    max_len: int,
    oversize_policy: OversizePolicy,
    window: int = ScheduleSettings.packing_window,
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
        ``order``, int64 ``[M]``: indices into ``sizes``, pack after pack, without dropped samples;
        and the ranges of packs in ``order``. Inside a pack indices rise; the packs of a window are
        ordered by their first index.

    Raises:
        ValueError: as for :func:`pack`, or ``window`` below 1.
    """
    lengths = _checked_lengths(sizes, max_len, oversize_policy)
    windows = _best_fit_windows(lengths, max_len, oversize_policy, window)
    return _as_result(itertools.chain.from_iterable(windows), len(lengths))


def _as_result(packs: Iterable[list[int]], total: int) -> tuple[np.ndarray, PackingResult]:
    packs = list(packs)
    counts = np.array([len(members) for members in packs], dtype=np.int64)
    order = np.array([index for members in packs for index in members], dtype=np.int64)
    return order, PackingResult(total - len(order), np.cumsum(counts) - counts, counts)


def _best_fit_windows(
    lengths: np.ndarray, max_len: int, oversize_policy: OversizePolicy, window: int
) -> Iterator[_Packs]:
    for first in range(0, len(lengths), checked_int("window", window)):
        yield _best_fit(lengths[first : first + window], max_len, oversize_policy, first)


def _best_fit(lengths: np.ndarray, max_len: int, policy: OversizePolicy, first: int) -> _Packs:
    packs: _Packs = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[index])
        if size > max_len:
            if policy == "extend":
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


def pack_balanced(
    sizes: Integers,
    loads: Integers,
    max_len: int,
    oversize_policy: OversizePolicy,
    *,
    window: int = ScheduleSettings.packing_window,
    group: int = ScheduleSettings.balance_group,
) -> tuple[np.ndarray, PackingResult]:
    """Pack as tightly as best-fit, with nearly the same load in all packs of a step.

    The ranks of a step wait for the slowest one, whose pack has the most load. In each window of
    ``window`` samples the longest sample goes first, into the pack whose ratio of load to length
    then comes nearest to that of the whole window. If that needs over one percent more packs than
    best-fit, the window is packed by best-fit. Some packs cannot be balanced, such as a picture
    that fills a whole pack. So the packs of a window are also sorted by load and divided into
    groups of ``group`` packs with similar loads. Deterministic.

    Args:
        sizes, max_len, oversize_policy, window: as for :func:`pack_best_fit`.
        loads: ``[N]``, what to spread evenly over the packs, such as vision tokens.
        group: the packs of a step, or a multiple; it suits any data-parallel size that divides it.
            The remaining packs of each window, fewer than a group, are grouped at the end. With 1
            the packs of a window stay in the order of their first samples.

    Returns:
        As :func:`pack_best_fit`.

    Raises:
        ValueError: as for :func:`pack_best_fit`, ``loads`` of another length than ``sizes``, or
            ``group`` below 1.
    """
    lengths = _checked_lengths(sizes, max_len, oversize_policy)
    work = np.asarray(loads, dtype=np.int64)
    if work.shape != lengths.shape:
        raise ValueError(f"loads: expected {lengths.shape[0]} values, got shape {work.shape}")
    checked_int("group", group)
    packs: _Packs = []
    rest: _Packs = []
    for of_window in _best_fit_windows(lengths, max_len, oversize_policy, window):
        of_window = _balance_window(of_window, lengths, work, max_len)
        if group > 1:
            of_window, left = _alike(of_window, work, group)
            rest += left
        packs += of_window
    return _as_result(itertools.chain(packs, *_alike(rest, work, group)), len(lengths))


def _alike(packs: _Packs, loads: np.ndarray, group: int) -> tuple[_Packs, _Packs]:
    """Divide packs into groups of similar load; returns these, and the packs left over."""
    packs = sorted(packs, key=lambda members: (int(loads[members].sum()), members))
    groups = len(packs) // group
    # Multiples of the golden ratio mix the groups, so that loads neither rise nor are random.
    numbers = np.argsort(np.arange(groups) * _GOLDEN % 1.0).tolist()
    dealt = [packs[number * group + i] for number in numbers for i in range(group)]
    return dealt, packs[groups * group :]


def _balance_window(packs: _Packs, lengths: np.ndarray, loads: np.ndarray, max_len: int) -> _Packs:
    """Distribute the samples of ``packs`` again, by load, if that needs hardly more packs."""
    alone = [members for members in packs if lengths[members[0]] > max_len]
    shared = np.sort(np.concatenate([[], *packs]).astype(np.int64))
    shared = shared[lengths[shared] <= max_len]
    sizes = lengths[shared].astype(np.float64)
    surplus = loads[shared] - loads[shared].sum() / max(sizes.sum(), 1.0) * sizes
    for tightness in _TIGHTNESS:
        dealt = _deal(
            sizes, surplus, max_len=max_len, count=len(packs) - len(alone), tightness=tightness
        )
        if dealt is not None:
            return sorted([*alone, *(shared[members].tolist() for members in dealt)])
    return packs


def _deal(
    sizes: np.ndarray, surplus: np.ndarray, *, max_len: int, count: int, tightness: float
) -> _Packs | None:
    """Distribute samples over ``count`` packs, or a few more, so that their loads even out."""
    packs: _Packs = [[] for _ in range(count)]
    room = np.full(count, float(max_len))
    deviation = np.zeros(count)
    left = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = sizes[index]
        cost = deviation * surplus[index] + tightness * size * room
        place = int(np.where(room >= size, cost, np.inf).argmin())
        if room[place] < size:
            left.append(index)
            continue
        packs[place].append(index)
        room[place] -= size
        deviation[place] += surplus[index]
    spilled = _best_fit(sizes[left], max_len, "drop", 0)
    packs += [[left[i] for i in members] for members in spilled]
    packs = [sorted(members) for members in packs if members]
    return packs if len(packs) <= _MOST_PACKS * count else None


def _checked_lengths(sizes: Integers, max_len: int, oversize_policy: str) -> np.ndarray:
    checked_choice("oversize_policy", oversize_policy, OversizePolicy)
    checked_int("max_len", max_len)
    given = np.asarray(sizes)
    # NumPy makes a float array of an empty list.
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"sizes: expected [N] integers, got {given.dtype} {list(given.shape)}")
    lengths = given.astype(np.int64, copy=False)
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"sizes: sample {lengths.argmin()} has the negative length {min(lengths)}")
    return lengths
