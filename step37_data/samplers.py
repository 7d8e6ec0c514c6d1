"""Draws the order of samples: sequential, shuffled, or weighted between data sets.

The draws decide the content of every pack, so each sampler draws exactly the same sequence as
Megatron-Bridge's sampler of the same name. ``take(n)`` returns the next ``n`` draws as one
array, at numpy speed; ``next()`` and ``take`` can be mixed freely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from step37_data.common.checks import checked_int, checked_state


class _Sampler(Iterator[int]):
    """Draws one index after the other; its position can be saved and loaded.

    Args:
        size: number of indices, at least 1.
    """

    _SETTINGS: tuple[str, ...] = ("size",)  # The attributes that decide the draws.

    def __init__(self, size: int) -> None:
        self.size = checked_int("size", size)
        self.data_idx = 0

    def __next__(self) -> int:
        value = self.get()
        self.update()
        return value

    def get(self) -> int:
        """The next draw, without consuming it."""
        raise NotImplementedError

    def update(self) -> None:
        """Consume one draw."""
        self.data_idx += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws made, and the settings that decide the draws."""
        return {**self._settings(), "data_idx": self.data_idx}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, also from one that Megatron-Bridge's sampler wrote.

        Megatron-Bridge's holds the size but no other settings.

        Raises:
            ValueError: a setting differs, or the position is missing or negative.
        """
        self.data_idx = self._checked_place(state_dict)

    def _settings(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in self._SETTINGS}
        return {"sampler": type(self).__name__, **named}

    def _checked_place(self, state_dict: dict[str, Any]) -> int:
        checked_state(state_dict, "data_idx")
        for key, own in self._settings().items():
            if (saved := state_dict.get(key, own)) != own:
                raise ValueError(
                    f"state_dict: it belongs to a sampler of {key} {saved}, this one has {own}"
                )
        return checked_int("state_dict: data_idx", state_dict["data_idx"], least=0)


class LoopedSequentialSampler(_Sampler):
    """Draws ``0, 1, … size − 1``, over and over.

    Args:
        size: number of samples, at least 1.
    """

    def get(self) -> int:
        """The next draw, without consuming it."""
        return self.data_idx % self.size

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` draws, int64 ``[count]``; consumes them."""
        checked_int("count", count, least=0)
        draws = np.arange(self.data_idx, self.data_idx + count) % self.size
        self.data_idx += count
        return draws


class LoopedShuffleSampler(_Sampler):
    """Draws every index once an epoch, in a new random order each epoch.

    The permutation of epoch ``e`` is ``torch.randperm`` under a ``torch.Generator`` seeded
    ``base_seed + e``; with ``same_order_for_each_epoch`` the seed is ``base_seed`` in all of them.

    Args:
        size: number of samples, at least 1.
        base_seed: seed of the first epoch.
        same_order_for_each_epoch: repeat the first epoch's order.
    """

    _SETTINGS = ("size", "base_seed", "same_order_for_each_epoch")

    def __init__(
        self, size: int = 0, base_seed: int = 1234, same_order_for_each_epoch: bool = False
    ) -> None:
        super().__init__(size)
        self.base_seed = base_seed
        self.same_order_for_each_epoch = same_order_for_each_epoch
        self._order = np.empty(0, dtype=np.int64)
        self._order_epoch = -1

    def get(self) -> int:
        """The next draw, without consuming it."""
        epoch, position = divmod(self.data_idx, self.size)
        return int(self._permutation(epoch)[position])

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` draws, int64 ``[count]``; consumes them."""
        draws = np.empty(checked_int("count", count, least=0), dtype=np.int64)
        left = draws
        while len(left):
            epoch, position = divmod(self.data_idx, self.size)
            part = self._permutation(epoch)[position : position + len(left)]
            left[: len(part)] = part
            left = left[len(part) :]
            self.data_idx += len(part)
        return draws

    def _permutation(self, epoch: int) -> np.ndarray:
        if self.same_order_for_each_epoch:
            epoch = 0
        if epoch != self._order_epoch:
            generator = torch.Generator().manual_seed(self.base_seed + epoch)
            self._order = torch.randperm(self.size, generator=generator).numpy()
            self._order_epoch = epoch
        return self._order


class WeightedRandomSampler(_Sampler):
    """Draws indices in proportion to their weights, deterministically.

    The next draw is the index with the least ``count / weight``. To find it, every index has a
    score that starts at 0 and grows by ``1 / weight`` with each draw of it; the lowest score is
    drawn, ties go to the lower index. Weights and their inverses are rounded to float32, the scores
    are summed in float64, one addition after the other.

    Args:
        size: number of indices, at least 1.
        base_seed: kept for compatibility; no draw depends on it.
        weights: one positive weight per index, all 1 when None.
    """

    _SETTINGS = ("size", "weights")  # without the seed, on which no draw depends

    def __init__(
        self,
        size: int = 0,
        base_seed: int = 1234,
        weights: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        super().__init__(size)
        self.base_seed = base_seed
        if weights is None:
            weights = torch.ones(self.size)
        rounded = torch.as_tensor(weights, dtype=torch.float32)
        usable = torch.isfinite(rounded) & (rounded > 0)
        if usable.shape != (self.size,) or not usable.all():
            raise ValueError(f"weights: expected {self.size} positive finite values, got {weights}")
        self.weights = rounded.tolist()
        self._steps = (1.0 / rounded).double().numpy()
        self._counts = np.zeros(self.size, dtype=np.int64)
        self._scores = np.zeros(self.size, dtype=np.float64)

    def get(self) -> int:
        """The next draw, without consuming it."""
        return int(np.argmin(self._scores))

    def update(self) -> None:
        """Consume one draw."""
        index = self.get()
        self._scores[index] += self._steps[index]
        self._counts[index] += 1
        super().update()

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` draws, int64 ``[count]``; consumes them.

        The draws of one index come at its scores ``s, s + step, (s + step) + step, …``; the next
        ``count`` draws over all indices are the ``count`` lowest of these scores in order.
        """
        if checked_int("count", count, least=0) == 0:
            return np.empty(0, dtype=np.int64)
        # A score no lower than that of the last draw: at this level the indices together have had
        # at least `count` draws. The extra draws cover rounding; the check below covers the rest.
        weights = 1.0 / self._steps
        level = (count + float(self._scores @ weights)) / float(weights.sum())
        ahead = np.ceil(np.maximum(level - self._scores, 0.0) * weights).astype(np.int64) + 1
        ahead = np.minimum(ahead, count)
        while True:
            ladders = [_ladder(*one) for one in zip(self._scores, self._steps, ahead, strict=True)]
            scores = np.concatenate(ladders)
            # A stable sort of scores in index order, so ties go to the lower index.
            order = np.argsort(scores, kind="stable")[:count]
            tops = np.array([ladder[-1] for ladder in ladders])
            short = (tops <= scores[order[-1]]) & (ahead < count)
            if not short.any():
                break
            ahead = np.where(short, np.minimum(ahead * 2, count), ahead)
        draws = np.repeat(np.arange(self.size), ahead + 1)[order]
        taken = np.bincount(draws, minlength=self.size)
        self._scores = np.array([ladder[n] for ladder, n in zip(ladders, taken, strict=True)])
        self._counts += taken
        self.data_idx += count
        return draws

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "counts": self._counts.tolist(),
            "scores": self._scores.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, also from one that Megatron-Bridge's sampler wrote.

        Megatron-Bridge's holds no scores; they are computed from the counts, addition by addition.

        Raises:
            ValueError: a setting differs, or position or counts are missing, negative or too few.
        """
        place = self._checked_place(state_dict)
        checked_state(state_dict, "counts")
        counts = np.array(state_dict["counts"], dtype=np.int64)
        if counts.shape != (self.size,) or (counts < 0).any():
            raise ValueError(f"state_dict: expected {self.size} counts of 0 or more, got {counts}")
        scores = state_dict.get("scores")
        if scores is None:
            scores = [_ladder(0.0, *one)[-1] for one in zip(self._steps, counts, strict=True)]
        if len(scores) != self.size:
            raise ValueError(f"state_dict: expected {self.size} scores, got {len(scores)}")
        self.data_idx = place
        self._counts = counts
        self._scores = np.array(scores, dtype=np.float64)


def _ladder(score: float, step: float, draws: int) -> np.ndarray:
    """Return the scores after 0, 1, … ``draws`` draws, summed one addition after the other."""
    return np.cumsum(np.concatenate(([score], np.full(draws, step))))
