"""A saved position is taken by its own packs only, and a stream outlives a pack that fails."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import numpy as np
import pytest

from step37_data.caches.lengths import probe_lengths
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.prefetch import PackError, Prefetcher
from tests.data.packs.test_packed_dataloader import LENGTHS, Words, loader_of


class Captions(Words):
    """All samples of one length; their keys are those of their texts."""

    def __init__(self, texts: str) -> None:
        super().__init__([5] * len(texts))
        self.texts = texts

    def sample_keys(self) -> np.ndarray:
        return np.array([[ord(text), 0] for text in self.texts], dtype=np.uint64)


def test_a_state_of_other_samples_is_refused_where_the_data_set_can_tell_them_apart() -> None:
    state = loader_of([], datasets=[Captions("abcd")]).state_dict()
    for other in (Captions("dcba"), Captions("abce")):
        with pytest.raises(ValueError, match="saved with another schedule"):
            loader_of([], datasets=[other]).load_state_dict(state)
    loader_of([], datasets=[Captions("abcd")]).load_state_dict(state)


def test_a_state_of_other_lengths_is_refused_where_they_make_the_same_packs() -> None:
    def loader(lengths: list[int]) -> MixedPackedDataloader:
        return loader_of([], datasets=[[[0] * length for length in lengths]])

    state = loader([4, 4, 9]).state_dict()
    with pytest.raises(ValueError, match="saved with another schedule"):
        loader([3, 4, 9]).load_state_dict(state)
    loader([4, 4, 9]).load_state_dict(state)


def test_a_state_without_its_keys_or_with_a_negative_position_is_refused() -> None:
    loader = loader_of(LENGTHS)
    with pytest.raises(
        ValueError, match=r"state_dict: expected position and schedule, got only \[\]"
    ):
        loader.load_state_dict({})
    with pytest.raises(ValueError, match="expected position and schedule, got None"):
        loader.load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position: expected at least 0, got -5"):
        loader.load_state_dict({**loader.state_dict(), "position": -5})


class HasBadSample(Words):
    """The sample at ``fails_at`` cannot be read, or ends the process that reads it."""

    kills = False

    def __getitem__(self, idx: int) -> list[tuple[int, int]]:
        if idx == self.fails_at and self.kills:
            os._exit(1)
        return super().__getitem__(idx)


def loader_with_a_bad_pack() -> MixedPackedDataloader:
    dataset = HasBadSample([10] * 6)
    loader = loader_of([], datasets=[dataset], dataset_sampling="sequential")
    dataset.fails_at = 2
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_with_the_next_pack_after_one_that_fails(workers: int) -> None:
    loader = loader_with_a_bad_pack()
    before = set(multiprocessing.active_children())
    stream = loader.iterate(num_workers=workers)
    assert [next(stream)[0][0][1] for _ in range(2)] == [0, 1]
    with pytest.raises(KeyError, match="sample 2 cannot be read"):
        next(stream)
    assert loader.position == 3
    assert len(set(multiprocessing.active_children()) - before) == workers
    resumed = loader_with_a_bad_pack()
    resumed.load_state_dict(loader.state_dict())
    for _ in range(5):
        assert next(stream) == next(resumed.iterate())
        assert resumed.state_dict() == loader.state_dict()


def test_a_stream_loses_no_pack_of_a_worker_that_died() -> None:
    loader = loader_with_a_bad_pack()
    loader.datasets[0].kills = True
    stream = loader.iterate(num_workers=1, prefetch_factor=1, multiprocessing_context="fork")
    assert [next(stream)[0][0][1] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(stream)
    assert loader.position == 3
    assert [next(stream)[0][0][1] for _ in range(3)] == [3, 4, 5]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prefetched_stream_goes_on_after_a_pack_that_fails(workers: int) -> None:
    stream = loader_with_a_bad_pack().iterate(num_workers=workers)
    got: list[Any] = []
    with Prefetcher(stream, lambda pack: pack[0][0][1], device="cpu") as prefetcher:
        for _ in range(5):
            try:
                got.append(next(prefetcher))
            except PackError as error:
                got.append(f"pack {error.pack}")
        assert prefetcher.state_dict() == {"next_pack": 5}
    assert got == [0, 1, "pack 2", 3, 4]


def test_closing_a_stream_ends_its_workers() -> None:
    loader = loader_of(LENGTHS)
    before = set(multiprocessing.active_children())
    stream = loader.iterate(num_workers=2)
    given = [next(stream)]
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert not set(multiprocessing.active_children()) - before
    assert [*given, next(stream)] == [loader[0], loader[1]]


def test_an_interrupted_pack_is_given_by_the_next_call() -> None:
    class Interrupted(Words):
        def __getitem__(self, idx: int) -> list[tuple[int, int]]:
            if idx == self.fails_at:
                self.fails_at = None
                raise KeyboardInterrupt
            return super().__getitem__(idx)

    dataset = Interrupted([10] * 6)
    loader = loader_of([], datasets=[dataset], dataset_sampling="sequential")
    dataset.fails_at = 1
    stream = loader.iterate()
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert loader.position == 1
    assert next(stream) == loader[1]


class Stopping(Words):
    """The sample at ``fails_at`` raises what an iterator raises at its end."""

    def __getitem__(self, idx: int) -> list[tuple[int, int]]:
        if idx == self.fails_at:
            raise StopIteration
        return super().__getitem__(idx)


@pytest.mark.parametrize("loading", [{}, {"num_workers": 2, "multiprocessing_context": "fork"}])
def test_a_stop_iteration_out_of_a_data_set_does_not_end_the_stream(loading: Any) -> None:
    words = Stopping([4] * 6)
    loader = loader_of([], datasets=[words], max_length=4, dataset_sampling="sequential")
    words.fails_at = 2
    with pytest.raises(RuntimeError, match=r"datasets\[0\], sample 2: .* raised StopIteration"):
        list(loader)
    stream = loader.iterate(**loading)
    assert [len(next(stream)[0]) for _ in range(2)] == [4, 4]
    with pytest.raises(RuntimeError, match=r"datasets\[0\], sample 2: .* raised StopIteration"):
        next(stream)
    assert [len(next(stream)[0]) for _ in range(3)] == [4, 4, 4]
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_iteration_while_measuring_does_not_make_up_lengths(workers: int) -> None:
    words = Stopping([4] * 6)
    words.fails_at = 2
    with pytest.raises(RuntimeError, match=r"sample 2: the data set raised StopIteration"):
        probe_lengths(words, workers=workers, progress=False)
