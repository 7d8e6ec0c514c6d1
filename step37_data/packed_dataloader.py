"""Draws samples from one or several data sets and offers packs of them as one data set."""

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

# Megatron-Bridge's seeds: 1234 to choose the data set, 1234 + i inside data set i.
_SEED = 1234


@dataclass(frozen=True, slots=True)
class Fill:
    """Says how full packs are.

    Attributes:
        tokens: int64 ``[P]``, tokens of each pack, before padding.
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
        """Compute how full the packs of ``result`` are, from the samples' ``sizes``, ``[N]``."""
        bounds = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        tokens = bounds[result.starts + result.counts] - bounds[result.starts]
        return cls(tokens, int(result.counts.sum()), result.num_droped, capacity)

    @property
    def share(self) -> float:
        """The used part of the capacity, 0 to 1; a pack of an oversize sample counts as full."""
        return float(self.tokens.sum() / np.maximum(self.tokens, self.capacity).sum())

    def __str__(self) -> str:
        packs = f"{len(self.tokens)} packs of {self.capacity} tokens"
        told = f"{100 * self.share:.1f} % filled, {self.dropped} dropped"
        return f"{self.samples} samples in {packs}, {told}"


class MixedPackedDataloader(torch.utils.data.Dataset[Any]):
    """A data set of packs: item i is pack ``i mod n``, the same on every call and in every process.

    The schedule is made once: data set i is drawn in proportion to ``epochs[i] × len(datasets[i])``
    (``int`` of their sum draws in all), each data set in its own order, and the samples drawn are
    packed. By default the schedule equals that of Megatron-Bridge's class, sample for sample.

    Use it as a map-style data set under any sampler (Megatron's with its consumed samples, a torch
    ``DataLoader``), or iterate with :meth:`iterate`, which keeps the position.

    Args:
        datasets: map-style data sets; ``len(sample)`` is a sample's length in tokens.
        epochs: passes over each data set, above 0; fractions are allowed.
        max_length: capacity of a pack in tokens.
        oversize_policy: ``"drop"`` leaves out samples longer than that (counted and logged),
            ``"extend"`` gives each a pack of its own.
        transform: applied to the list of a pack's samples, such as ``pack_samples``.
        dataset_sampling: ``"random"`` or ``"sequential"``, one for all or one per data set.
        collate_fn: kept as an attribute; Megatron-Bridge passes it to its torch ``DataLoader``.
        settings: further keywords, the rest of :class:`~step37_data.packing.ScheduleSettings`:
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
        # The draws are reordered here, so that every pack is a slice of them.
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
        """Return the lengths of every data set; adds the keys of its samples to ``digest``."""
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
        """``(data set, sample)`` of every draw, in the replaced class's form; a new list."""
        return self._pairs(slice(None))

    def _pairs(self, rows: slice) -> list[tuple[int, int]]:
        domains, indices = self.piece_domains[rows].tolist(), self.piece_indices[rows].tolist()
        return list(zip(domains, indices, strict=True))

    def __len__(self) -> int:
        return self.packing_result.num_packed_samples

    def __iter__(self) -> Iterator[Any]:
        """Yield every pack once. Without this a ``for`` loop would not end: every index works."""
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
        """Return ``(data set, index in it)`` of every sample of pack ``idx mod n``."""
        return self._pairs(self._rows(idx))

    def pack_sizes(self) -> np.ndarray:
        """Return int64 ``[packs]``: tokens in each pack, before padding."""
        return Fill.of(self.piece_sizes, self.packing_result, self.max_length).tokens

    def iterate(self, *, dp_rank: int = 0, dp_size: int = 1, **loading: Any) -> _Stream:
        """Iterate over the packs of one data-parallel rank, from :attr:`position` on, without end.

        A step takes ``dp_size`` packs, and rank r gets the r-th of them, as from Megatron's sampler
        with a micro-batch size of 1. :attr:`position` counts packs of all ranks. It advances with
        every pack returned here, not with packs that workers have prefetched: a state saved between
        two steps continues with the next step, under any ``dp_size``.

        If a pack fails, the error of its data set is raised; the next call continues with the pack
        after it. Call ``close()`` on the returned iterator to end its workers.

        Args:
            dp_rank, dp_size: this data-parallel rank, and the number of ranks.
            loading: keywords of torch's ``DataLoader``, such as ``num_workers`` processes that
                prepare packs ahead (0: this process does), ``prefetch_factor`` packs for each, and
                ``multiprocessing_context``, how processes are started. Keywords that would choose
                samples or collate them are a ``TypeError``, since a pack is a batch already.
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank: expected 0 to {dp_size - 1}, got {dp_rank}")
        # torch's default conversion would turn the (path, item type) tuples into lists.
        whole: Any = {"sampler": None, "batch_size": None, "collate_fn": _as_it_is}
        load = functools.partial(torch.utils.data.DataLoader, self, **whole, **loading)
        return _Stream(self, load, self.position + dp_rank, dp_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of :meth:`iterate`, and the fingerprint of the schedule."""
        return {"position": self.position, "schedule": self.schedule_fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: the state belongs to another schedule (other data sets, epochs, sampling,
                lengths or packing), in which the position means other packs; or it is no state.
        """
        checked_state(state_dict, "position", "schedule")
        if state_dict["schedule"] != self.schedule_fingerprint():
            raise ValueError("state_dict: saved with another schedule, of other packs or samples")
        self.position = checked_int("state_dict: position", state_dict["position"], least=0)

    def schedule_fingerprint(self) -> str:
        """Return a hex digest of the schedule: which sample is where in which pack.

        A sample is identified by its index and length, and in a :class:`KeyedDataset` by its key.
        Keys of ``Step37Flickr8kDataset`` do not contain the path, so files may be moved.
        """
        return self._fingerprint


def draw_schedule(
    lengths: Sequence[np.ndarray], weights: Sequence[float], strategies: Sequence[Sampling]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw ``int(sum(weights))`` samples from several data sets.

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
    """The iterator of ``iterate``. Unlike a generator, it can be used again after an error."""

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
            # Start a new DataLoader: after an interrupt a pack may be lost, and the old one skips
            # the packs of a worker that died.
            self._loaded = None
            if isinstance(error, Exception):
                self._advance()
            raise
        self._advance()
        return packed

    def close(self) -> None:
        """End the worker processes; another ``next`` starts new ones."""
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
