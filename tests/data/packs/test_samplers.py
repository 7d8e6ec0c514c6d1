"""The samplers draw what the contract says, one by one or many at a time, and resume exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step37_data.samplers import (
    LoopedSequentialSampler,
    LoopedShuffleSampler,
    WeightedRandomSampler,
)

WEIGHTS = st.lists(st.floats(0.01, 1000.0), min_size=1, max_size=5)


def shuffled(size: int, base_seed: int, same_order: bool) -> Iterator[int]:
    for epoch in itertools.count():
        generator = torch.Generator()
        generator.manual_seed(base_seed if same_order else base_seed + epoch)
        yield from torch.randperm(size, generator=generator).tolist()


def weighted(weights: list[float]) -> Iterator[int]:
    rounded = [np.float32(weight) for weight in weights]
    steps = [float(np.float32(1.0) / weight) for weight in rounded]
    scores = [0.0] * len(weights)
    while True:
        least = min(scores)
        index = scores.index(least)
        yield index
        scores[index] = scores[index] + steps[index]


def take(draws: Any, count: int) -> list[int]:
    return list(itertools.islice(draws, count))


def test_the_sequential_sampler_loops_from_zero() -> None:
    assert take(LoopedSequentialSampler(3), 7) == [0, 1, 2, 0, 1, 2, 0]


@given(size=st.integers(1, 20), seed=st.integers(0, 5000), same=st.booleans())
def test_the_shuffle_sampler_draws_randperm_seeded_with_base_seed_plus_epoch(
    size: int, seed: int, same: bool
) -> None:
    sampler = LoopedShuffleSampler(size, seed, same_order_for_each_epoch=same)
    assert take(sampler, 3 * size + 1) == take(shuffled(size, seed, same), 3 * size + 1)


def test_the_shuffle_seed_defaults_to_1234() -> None:
    assert take(LoopedShuffleSampler(50), 50) == take(shuffled(50, 1234, False), 50)


@given(weights=WEIGHTS)
def test_the_weighted_sampler_draws_the_least_count_over_weight_and_ties_go_to_the_lower_index(
    weights: list[float],
) -> None:
    assert take(WeightedRandomSampler(len(weights), weights=weights), 200) == take(
        weighted(weights), 200
    )


def test_weights_are_rounded_to_float32_before_they_are_inverted() -> None:
    weights = [0.3, 0.1]
    float32_steps = [float(np.float32(1) / np.float32(weight)) for weight in weights]
    assert float32_steps != [1 / weight for weight in weights]
    sampler = WeightedRandomSampler(2, weights=weights)
    take(sampler, 5)
    expected = [0.0, 0.0]
    for index in take(weighted(weights), 5):
        expected[index] += float32_steps[index]
    assert sampler.state_dict()["scores"] == expected


@given(weights=WEIGHTS, chunks=st.lists(st.integers(0, 60), max_size=6))
def test_taking_many_draws_of_the_weighted_sampler_equals_drawing_one_by_one(
    weights: list[float], chunks: list[int]
) -> None:
    sampler = WeightedRandomSampler(len(weights), weights=weights)
    draws: list[int] = []
    for number, chunk in enumerate(chunks):
        draws += sampler.take(chunk).tolist()
        if number % 2:
            draws.append(next(sampler))
    assert draws == take(weighted(weights), len(draws))


def test_taking_draws_equals_drawing_one_by_one_for_very_unequal_weights() -> None:
    weights = [1e-3, 1e6, 5.0, 5.0, 1e6]
    assert WeightedRandomSampler(5, weights=weights).take(20_000).tolist() == take(
        weighted(weights), 20_000
    )


@given(size=st.integers(1, 9), chunks=st.lists(st.integers(0, 25), max_size=5))
def test_taking_many_draws_of_the_loops_equals_drawing_one_by_one(
    size: int, chunks: list[int]
) -> None:
    for make in (LoopedSequentialSampler, LoopedShuffleSampler):
        at_once, one_by_one = make(size), make(size)
        for chunk in chunks:
            assert at_once.take(chunk).tolist() == take(one_by_one, chunk)
            assert next(at_once) == next(one_by_one)


@given(size=st.integers(1, 6), before=st.integers(0, 40), data=st.data())
def test_every_sampler_resumes_exactly_from_its_state(
    size: int, before: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 9.0), min_size=size, max_size=size))
    makers = (
        lambda: LoopedSequentialSampler(size),
        lambda: LoopedShuffleSampler(size, 7),
        lambda: WeightedRandomSampler(size, weights=weights),
    )
    for make in makers:
        original, resumed = make(), make()
        take(original, before)
        resumed.load_state_dict(original.state_dict())
        assert take(resumed, 30) == take(original, 30)


def test_a_weighted_state_that_megatron_bridge_saved_resumes_exactly() -> None:
    weights = [0.3, 0.7, 1.1]
    original = WeightedRandomSampler(3, weights=weights)
    take(original, 999)
    state = original.state_dict()
    resumed = WeightedRandomSampler(3, weights=weights)
    resumed.load_state_dict(
        {
            "size": 3,
            "data_idx": 999,
            "counts": torch.tensor(state["counts"], dtype=torch.float32).tolist(),
            "rng_state": torch.Generator().get_state().tolist(),
        }
    )
    assert resumed.state_dict() == state
    assert take(resumed, 100) == take(original, 100)


def test_a_state_of_another_size_is_refused() -> None:
    for make in (LoopedSequentialSampler, LoopedShuffleSampler, WeightedRandomSampler):
        with pytest.raises(ValueError, match="sampler of size 3, this one has 4"):
            make(4).load_state_dict(make(3).state_dict())


def test_a_state_of_other_settings_is_refused() -> None:
    shuffle = LoopedShuffleSampler(5, 1234).state_dict()
    weighted = WeightedRandomSampler(5, weights=[5.0, 1.0, 1.0, 1.0, 1.0]).state_dict()
    for other, state, message in (
        (LoopedShuffleSampler(5, 99), shuffle, "of base_seed 1234, this one has 99"),
        (LoopedShuffleSampler(5, 1234, True), shuffle, "of same_order_for_each_epoch False, this"),
        (LoopedSequentialSampler(5), shuffle, "of sampler LoopedShuffleSampler, this one has Loop"),
        (WeightedRandomSampler(5), shuffle, "of sampler LoopedShuffleSampler, this one has Weigh"),
        (WeightedRandomSampler(5), weighted, r"of weights \[5.0, .*this one has \[1.0, "),
    ):
        with pytest.raises(ValueError, match=f"state_dict: it belongs to a sampler {message}"):
            other.load_state_dict(state)
    WeightedRandomSampler(5, 99, [5, 1, 1, 1, 1]).load_state_dict(weighted)


def test_a_state_without_settings_is_one_that_megatron_bridge_saved() -> None:
    for make in (LoopedSequentialSampler, LoopedShuffleSampler):
        original, resumed = make(5), make(5)
        take(original, 7)
        resumed.load_state_dict({"size": 5, "data_idx": 7})
        assert take(resumed, 9) == take(original, 9)


@pytest.mark.parametrize(
    "make", [LoopedSequentialSampler, LoopedShuffleSampler, WeightedRandomSampler]
)
def test_a_state_without_a_place_or_with_a_negative_one_is_refused(make: Any) -> None:
    state = make(3).state_dict()
    for place, message in (
        (-2, "data_idx: expected at least 0, got -2"),
        (2.9, "data_idx: expected an integer, got 2.9"),
    ):
        with pytest.raises(ValueError, match=f"state_dict: {message}"):
            make(3).load_state_dict({**state, "data_idx": place})
    with pytest.raises(ValueError, match=r"state_dict: expected data_idx, got only \[\]"):
        make(3).load_state_dict({})
    with pytest.raises(ValueError, match="state_dict: expected data_idx, got None"):
        make(3).load_state_dict(None)


def test_a_weighted_state_without_counts_or_with_negative_ones_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dict: expected counts, got only"):
        WeightedRandomSampler(3).load_state_dict({"size": 3, "data_idx": 7})
    with pytest.raises(ValueError, match="state_dict: expected 2 counts of 0 or more, got"):
        WeightedRandomSampler(2).load_state_dict({"size": 2, "data_idx": 0, "counts": [1, -1]})


def test_wrong_sizes_counts_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        LoopedShuffleSampler(0)
    with pytest.raises(ValueError, match=r"size: expected an integer, got 2\.7"):
        LoopedSequentialSampler(2.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count: expected at least 0, got -1"):
        LoopedSequentialSampler(2).take(-1)
    with pytest.raises(ValueError, match=r"weights: expected 2 positive .*, got \[1.0, 2.0, 3.0\]"):
        WeightedRandomSampler(2, weights=[1.0, 2.0, 3.0])
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive finite"):
            WeightedRandomSampler(2, weights=[1.0, bad])


def test_many_draws_at_once_leave_the_state_of_single_ones() -> None:
    at_once, singly = (WeightedRandomSampler(3, weights=[1.0, 2.5, 0.3]) for _ in range(2))
    at_once.take(7)
    for _ in range(7):
        next(singly)
    assert at_once.state_dict() == singly.state_dict()
    assert at_once.state_dict()["data_idx"] == sum(at_once.state_dict()["counts"]) == 7


def test_a_state_of_too_few_indices_is_refused_and_no_state_is_written_to() -> None:
    sampler = WeightedRandomSampler(2, weights=[1.0, 2.0])
    for counts, scores, message in (
        ([1], [1.0], r"expected 2 counts of 0 or more, got \[1\]"),
        ([1], None, r"expected 2 counts of 0 or more, got \[1\]"),
        ([1, 0], [1.0], "expected 2 scores, got 1"),
    ):
        wrong = {"size": 2, "data_idx": 1, "counts": counts, "scores": scores}
        with pytest.raises(ValueError, match=f"state_dict: {message}"):
            sampler.load_state_dict(wrong)
    assert sampler.state_dict() == WeightedRandomSampler(2, weights=[1.0, 2.0]).state_dict()
    state = {"data_idx": 0, "counts": np.zeros(2, dtype=np.int64), "scores": np.zeros(2)}
    sampler.load_state_dict(state)
    next(sampler)
    assert not state["counts"].any()
    assert not state["scores"].any()
