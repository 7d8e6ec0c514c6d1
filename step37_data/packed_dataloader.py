"""Packs of samples from one or several data sets, as one map-style data set."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step37_data import samplers
from step37_data.caches.lengths import KeyedDataset, probe_lengths
from step37_data.common.checks import checked_int, checked_state, item_at
from step37_data.packing import (  # noqa: F401  Packing is offered here, too
    OversizePolicy,
    Packing,
    PackingResult,
    Sampling,
    ScheduleSettings,
    pack_as,
)

logger = logging.getLogger(__name__)

# Megatron-Bridge's seeds: 1234 between the data sets, 1234 + i inside data set i.
_SEED = 1234


@dataclass(frozen=True, slots=True)
class Fill:
    """How full the packs of a packing are.

    Attributes:
        tokens: int64 ``[P]``, tokens in each pack, before padding.
        samples: number of samples in the packs.
        dropped: samples left out because they are longer than a pack.
        capacity: tokens of a pack.
    """

    tokens: np.ndarray
    samples: int
    dropped: int
    capacity: int

    @classmethod
    def of(cls, sizes: np.ndarray, result: PackingResult, capacity: int) -> Fill:
        """How full the packs of ``result`` are with samples of these ``sizes``, ``[N]``."""
        bounds = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        tokens = bounds[result.starts + result.counts] - bounds[result.starts]
        return cls(tokens, int(result.counts.sum()), result.num_droped, capacity)

    @property
    def share(self) -> float:
        """Part of all packs' capacity in use, 0 to 1; an oversize sample's pack counts as full."""
        return float(self.tokens.sum() / np.maximum(self.tokens, self.capacity).sum())

    def __str__(self) -> str:
        packs = f"{len(self.tokens)} packs of {self.capacity} tokens"
        told = f"{100 * self.share:.1f} % filled, {self.dropped} dropped"
        return f"{self.samples} samples in {packs}, {told}"


class MixedPackedDataloader(torch.utils.data.Dataset[Any]):
    """Packs of samples; pack ``i mod n`` is the same on every call, in every process.

    The schedule is made once: data set i is drawn in proportion to ``epochs[i] × len(datasets[i])``
    (``int`` of their sum draws in all), each data set in its own order, and the samples drawn are
    packed. By default it is, sample for sample, the schedule of Megatron-Bridge's class.

    Use it as a map-style data set under any sampler (Megatron's with its consumed samples, a torch
    ``DataLoader``), or let :meth:`iterate` walk through it and keep the position.

    Args:
        datasets: map-style data sets; ``len(sample)`` is a sample's length in tokens.
        epochs: passes over each data set, above 0; fractions are allowed.
        max_length: capacity of a pack in tokens.
        oversize_policy: ``"drop"`` leaves out samples longer than that (counted and logged),
            ``"extend"`` gives each a pack of its own.
        transform: applied to the list of a pack's samples, such as ``pack_samples``.
        dataset_sampling: ``"random"`` or ``"sequential"``, one for all or one per data set.
        collate_fn: kept for whoever makes a torch ``DataLoader`` of this, as Megatron-Bridge does.
        settings: by keyword, the rest of :class:`~step37_data.packing.ScheduleSettings`:
            ``packing``, ``packing_window``, ``balance_group``, ``lengths_cache_dir``,
            ``probe_workers``, ``progress`` and ``together``. With ``packing="balanced"`` every data
            set has a ``vision_tokens()``, int64 ``[N]``.

    Raises:
        TypeError: a keyword is no setting.
        ValueError: no data sets, differing numbers of data sets and epochs or sampling strategies,
            an empty data set, an epoch that is not above 0 and finite, a setting that is none of
            the values it may be, a sample whose ``len()`` is not that of its ``tokens``, or nothing
            packed.
    """

    def __init__(  # noqa: PLR0917 - Megatron-Bridge's class takes the first six by position
        self,
        datasets: Sequence[Any],
        epochs: Sequence[float],
        max_length: int,
        oversize_policy: OversizePolicy = ScheduleSettings.oversize_policy,
        transform: Callable[[list[Any]], Any] | None = None,
        dataset_sampling: Sampling | Sequence[Sampling] = ScheduleSettings.dataset_sampling,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = ScheduleSettings(
            max_length=max_length,
            oversize_policy=oversize_policy,
            dataset_sampling=dataset_sampling,
            **settings,
        )
        if len(datasets) == 0:
            raise ValueError("datasets: expected at least one, got none")
        if len(datasets) != len(epochs):
            raise ValueError(f"epochs: {len(epochs)} values for {len(datasets)} datasets")
        strategies = self.settings.strategies(len(datasets))
        counts = [len(dataset) for dataset in datasets]
        weights = _weights(counts, epochs)
        if int(sum(weights)) == 0:
            raise ValueError(
                f"nothing was packed: epochs {list(epochs)} of {counts} samples draw 0"
            )
        self.datasets = list(datasets)
        self.ds_epochs, self.dataset_sampling = list(epochs), strategies
        self.transform = transform
        self.collate_fn = collate_fn
        self.max_length = max_length
        self.position = 0
        self._warned_about_lengths = False
        digest = hashlib.blake2b(digest_size=16)
        lengths = self._measure(digest)
        domains, indices, sizes = draw_schedule(lengths, weights, strategies)
        balanced = self.settings.packing == "balanced"
        loads = self._vision_tokens(domains, indices) if balanced else ()
        order, self.packing_result = pack_as(self.settings, sizes, loads)
        # Reordered in place of the draws, so that pack ranges are slices in every case.
        domains, indices, sizes = domains[order], indices[order], sizes[order]
        if self.packing_result.num_packed_samples == 0:
            raise ValueError(f"nothing was packed: no sample fits in a pack of {max_length} tokens")
        self.piece_domains, self.piece_indices, self.piece_sizes = domains, indices, sizes
        ranges = (self.packing_result.starts, self.packing_result.counts)
        for array in (domains, indices, sizes, *ranges):
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        self._fingerprint = digest.hexdigest()
        fill = Fill.of(sizes, self.packing_result, max_length)
        logger.info("%s: %s", self.settings.packing, fill)

    def _measure(self, digest: hashlib.blake2b) -> list[np.ndarray]:
        """The lengths of every data set; the keys of its samples go into ``digest``."""
        lengths = []
        for number, dataset in enumerate(self.datasets):
            keys = None
            if isinstance(dataset, KeyedDataset):
                keys = np.ascontiguousarray(dataset.sample_keys(), dtype="<u8")
                digest.update(keys.data)
            measured = probe_lengths(
                dataset,
                cache_dir=self.settings.lengths_cache_dir,
                workers=self.settings.probe_workers,
                progress=self.settings.progress,
                description=f"Probing data set {number}",
                together=self.settings.together,
                keys=keys,
            )
            lengths.append(measured)
        return lengths

    def _vision_tokens(self, domains: np.ndarray, indices: np.ndarray) -> np.ndarray:
        loads = np.empty(len(domains), dtype=np.int64)
        for number, dataset in enumerate(self.datasets):
            if not hasattr(dataset, "vision_tokens"):
                what = f"datasets[{number}], a {type(dataset).__name__}"
                raise ValueError(f"packing: 'balanced' needs vision_tokens() of {what}")
            places = domains == number
            loads[places] = dataset.vision_tokens()[indices[places]]
        return loads

    @property
    def piece_order(self) -> list[tuple[int, int]]:
        """``(data set, sample)`` of every draw, as the replaced class has it: made anew."""
        return self._pairs(slice(None))

    def _pairs(self, rows: slice) -> list[tuple[int, int]]:
        domains, indices = self.piece_domains[rows].tolist(), self.piece_indices[rows].tolist()
        return list(zip(domains, indices, strict=True))

    def __len__(self) -> int:
        return self.packing_result.num_packed_samples

    def __iter__(self) -> Iterator[Any]:
        """Every pack once. Without it a ``for`` loop would never end: indices count modulo."""
        return (self[idx] for idx in range(len(self)))

    def __getitem__(self, idx: int) -> Any:
        pieces = self.pieces(idx)
        samples = [
            item_at(self.datasets[i], index, f"datasets[{i}], sample") for i, index in pieces
        ]
        planned = self.piece_sizes[self._rows(idx)].tolist()
        for piece, sample, size in zip(pieces, samples, planned, strict=True):
            if len(sample) != size and not self._warned_about_lengths:
                self._warned_about_lengths = True
                logger.warning(
                    f"datasets[{piece[0]}][{piece[1]}] has {len(sample)} tokens now and had {size} "
                    f"when packed: packs can hold more than {self.max_length} tokens (said once)"
                )
        return self.transform(samples) if self.transform else samples

    def _rows(self, idx: int) -> slice:
        number = idx % len(self)
        start = int(self.packing_result.starts[number])
        return slice(start, start + int(self.packing_result.counts[number]))

    def pieces(self, idx: int) -> list[tuple[int, int]]:
        """``(data set, index in it)`` of every sample of pack ``idx mod n``."""
        return self._pairs(self._rows(idx))

    def pack_sizes(self) -> np.ndarray:
        """int64 ``[packs]``: tokens in each pack, before padding."""
        return Fill.of(self.piece_sizes, self.packing_result, self.max_length).tokens

    def iterate(self, *, dp_rank: int = 0, dp_size: int = 1, **loading: Any) -> _Stream:
        """Packs for one data-parallel rank, from :attr:`position` on, without end.

        A step takes ``dp_size`` packs, rank r the r-th of them, as Megatron's sampler deals out
        micro-batches of one. :attr:`position` counts the packs of all ranks and moves on with
        every pack handed out here, not with those that workers have prefetched: a state saved
        between two steps continues with the next step, under any ``dp_size``.

        A pack that fails raises what its data set raised and counts as handed out; the next call
        goes on with the pack after it. ``close()`` of what is returned ends the workers.

        Args:
            dp_rank, dp_size: which rank of how many.
            loading: of torch's ``DataLoader``: ``num_workers`` processes that prepare packs ahead,
                ``prefetch_factor`` packs each, how they start (``multiprocessing_context``) and so
                on; 0 workers prepare in this process. A pack is a batch: what would sample or
                collate others is a ``TypeError``.
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank: expected 0 to {dp_size - 1}, got {dp_rank}")
        # torch's own conversion would turn the (path, item type) tuples into lists.
        whole: Any = {"sampler": None, "batch_size": None, "collate_fn": _as_it_is}
        load = functools.partial(torch.utils.data.DataLoader, self, **whole, **loading)
        return _Stream(self, load, self.position + dp_rank, dp_size)

    def state_dict(self) -> dict[str, Any]:
        """Where :meth:`iterate` stands, and which schedule that is a position in."""
        return {"position": self.position, "schedule": self.schedule_fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: the state belongs to another schedule (other data sets, epochs, sampling,
                lengths or packing), where the position would mean other packs; or it is no state.
        """
        checked_state(state_dict, "position", "schedule")
        if state_dict["schedule"] != self.schedule_fingerprint():
            raise ValueError("state_dict: saved with another schedule, of other packs or samples")
        self.position = checked_int("state_dict: position", state_dict["position"], least=0)

    def schedule_fingerprint(self) -> str:
        """Hex digest of which sample stands where in which pack.

        A sample is known by its place and length, and in a :class:`KeyedDataset` by its key. Keys
        of ``Step37Flickr8kDataset`` leave out the path: files may move between two runs.
        """
        return self._fingerprint


def draw_schedule(
    lengths: Sequence[np.ndarray], weights: Sequence[float], strategies: Sequence[Sampling]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw ``int(sum(weights))`` samples.

    Args:
        lengths: per data set, int64 ``[N_i]``.
        weights: per data set, its share of the draws.
        strategies: per data set, ``"random"`` or ``"sequential"``.

    Returns:
        Per draw the data set, the index in it and the length: three arrays ``[draws]`` of the
        narrowest integer type that holds their values.
    """
    draws = int(sum(weights))
    domains = samplers.WeightedRandomSampler(len(weights), _SEED, weights).take(draws)
    domains = domains.astype(np.min_scalar_type(len(weights) - 1))
    indices = np.empty(draws, dtype=np.min_scalar_type(max(map(len, lengths)) - 1))
    sizes = np.empty(draws, dtype=np.min_scalar_type(max(int(part.max()) for part in lengths)))
    for number, strategy in enumerate(strategies):
        size = len(lengths[number])
        sampler: Any = samplers.LoopedSequentialSampler(size)
        if strategy == "random":
            sampler = samplers.LoopedShuffleSampler(size, _SEED + number)
        places = domains == number
        drawn = sampler.take(int(places.sum()))
        indices[places] = drawn
        sizes[places] = lengths[number][drawn]
    return domains, indices, sizes


def _as_it_is(pack: Any) -> Any:
    return pack


@dataclass(eq=False, repr=False)
class _Stream(Iterator[Any]):
    """What ``iterate`` gives: an error leaves it usable, which a generator would not be."""

    _packs: MixedPackedDataloader
    _load: Callable[..., torch.utils.data.DataLoader[Any]]
    _next: int
    _step: int
    _loaded: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._loaded is None:
            self._loaded = iter(self._load(sampler=itertools.count(self._next, self._step)))
        try:
            packed = next(self._loaded)
        except BaseException as error:
            # Loaded anew: after an interrupt the pack may be lost, and a DataLoader goes on
            # without the packs of a worker that died.
            self._loaded = None
            if isinstance(error, Exception):
                self._advance()
            raise
        self._advance()
        return packed

    def close(self) -> None:
        """End the worker processes; the next call would start others."""
        self._loaded = None

    def _advance(self) -> None:
        self._next += self._step
        self._packs.position += self._step


def _weights(sizes: Sequence[int], epochs: Sequence[float]) -> list[float]:
    for number, (size, epoch) in enumerate(zip(sizes, epochs, strict=True)):
        if size <= 0:
            raise ValueError(f"datasets[{number}]: expected at least one sample, it is empty")
        if not (float(epoch) > 0 and math.isfinite(epoch)):
            raise ValueError(f"epochs[{number}]: expected more than 0 and finite, got {epoch}")
    return [float(epoch) * float(size) for size, epoch in zip(sizes, epochs, strict=True)]
