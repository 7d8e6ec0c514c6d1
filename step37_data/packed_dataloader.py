"""Packs of samples from one or several data sets, as a map-style data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from step37_data.packing import OversizePolicy, pack
from step37_data.samplers import (
    LoopedSequentialSampler,
    LoopedShuffleSampler,
    WeightedRandomSampler,
)

logger = logging.getLogger(__name__)

Sampling = Literal["sequential", "random"]
_SEED = 1234


class MixedPackedDataloader(torch.utils.data.Dataset[Any]):
    """Map-style data set of packs; pack ``i mod n`` is the same on every call."""

    def __init__(
        self,
        datasets: Sequence[Any],
        epochs: Sequence[float],
        max_length: int,
        oversize_policy: OversizePolicy = "extend",
        transform: Callable[[list[Any]], Any] | None = None,
        dataset_sampling: Sampling | Sequence[Sampling] = "random",
    ) -> None:
        if len(datasets) == 0:
            raise ValueError("datasets: expected at least one, got none")
        if len(datasets) != len(epochs):
            raise ValueError(f"epochs: {len(epochs)} values for {len(datasets)} datasets")
        self.datasets = list(datasets)
        self.transform = transform
        strategies = _strategies(dataset_sampling, len(datasets))
        lengths = [
            np.array(
                [len(dataset[i]) for i in tqdm(range(len(dataset)), desc=f"Probing data set {d}")]
            )
            for d, dataset in enumerate(datasets)
        ]
        self.piece_domains, self.piece_indices = _draw(lengths, epochs, strategies)
        sizes = np.empty(len(self.piece_domains), dtype=np.int64)
        for domain, domain_lengths in enumerate(lengths):
            mine = self.piece_domains == domain
            sizes[mine] = domain_lengths[self.piece_indices[mine]]
        self.packing_result = pack(sizes, max_length, oversize_policy)
        self._ranges = self.packing_result.packed_sample_ranges
        if len(self._ranges) == 0:
            raise ValueError("nothing was packed: every sample is longer than max_length")

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, idx: int) -> Any:
        pieces = [self.datasets[d][i] for d, i in self.pieces(idx)]
        return self.transform(pieces) if self.transform else pieces

    def pieces(self, idx: int) -> list[tuple[int, int]]:
        """``(data set, index in it)`` of every sample of pack ``idx mod n``."""
        start, count = self._ranges[idx % len(self._ranges)]
        rows = slice(start, start + count)
        domains, indices = self.piece_domains[rows].tolist(), self.piece_indices[rows].tolist()
        return list(zip(domains, indices, strict=True))


def _strategies(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    strategies: list[Sampling] = [sampling] * count if isinstance(sampling, str) else list(sampling)
    if len(strategies) != count:
        raise ValueError(f"dataset_sampling: {len(strategies)} values for {count} datasets")
    for strategy in strategies:
        if strategy not in ("sequential", "random"):
            raise ValueError(
                f"dataset_sampling: expected 'sequential' or 'random', got {strategy!r}"
            )
    return strategies


def _draw(
    lengths: Sequence[np.ndarray], epochs: Sequence[float], strategies: Sequence[Sampling]
) -> tuple[np.ndarray, np.ndarray]:
    weights = []
    for number, (domain_lengths, epoch) in enumerate(zip(lengths, epochs, strict=True)):
        if len(domain_lengths) == 0:
            raise ValueError(f"datasets[{number}] is empty")
        if not float(epoch) > 0:
            raise ValueError(f"epochs[{number}]: expected more than 0, got {epoch}")
        weights.append(float(epoch) * float(len(domain_lengths)))
    draws = int(sum(weights))
    domains = WeightedRandomSampler(len(weights), _SEED, weights).take(draws)
    indices = np.empty(draws, dtype=np.int64)
    for number, strategy in enumerate(strategies):
        size = len(lengths[number])
        sampler = (
            LoopedShuffleSampler(size, _SEED + number)
            if strategy == "random"
            else LoopedSequentialSampler(size)
        )
        mine = np.flatnonzero(domains == number)
        indices[mine] = sampler.take(len(mine))
    return domains, indices
