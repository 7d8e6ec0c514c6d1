"""Balanced packs lose nothing, are as full as best-fit's, and the ranks of a step are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.packing import pack_balanced, pack_best_fit
from step37_data.provider import Step37Flickr8kSFTDataProvider
from tools.balance import CAPACITY, draw_mix, pack_loads, packings, wait

TOKENIZER = str(Path(__file__).parents[3] / "examples" / "tokenizer")
SAMPLES = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 9)), max_size=60)


@given(
    samples=SAMPLES,
    max_len=st.integers(1, 12),
    policy=st.sampled_from(["drop", "extend"]),
    window=st.integers(1, 70),
    group=st.integers(1, 9),
)
def test_no_sample_is_lost_or_doubled_no_pack_is_overfull_and_hardly_one_is_added(
    *, samples: list[tuple[int, int]], max_len: int, policy: Any, window: int, group: int
) -> None:
    sizes, loads = [size for size, _ in samples], [load for _, load in samples]
    order, result = pack_balanced(sizes, loads, max_len, policy, window=window, group=group)
    best_order, best = pack_best_fit(sizes, max_len, policy, window)
    assert sorted(order.tolist()) == sorted(best_order.tolist())
    assert result.num_droped == best.num_droped
    assert result.num_packed_samples <= 1.01 * best.num_packed_samples
    covered = 0
    for first, count in result.packed_sample_ranges:
        assert first == covered
        covered += count
        members = order[first : first + count].tolist()
        assert members == sorted(members)
        assert len({index // window for index in members}) == 1
        assert sum(sizes[i] for i in members) <= max_len or count == 1
    assert covered == len(order)
    again, _ = pack_balanced(
        np.array(sizes, dtype=np.int64), loads, max_len, policy, window=window, group=group
    )
    assert order.tolist() == again.tolist()


def test_the_packs_of_a_step_wait_for_each_other_a_tenth_as_long_as_best_fits() -> None:
    sizes, loads = draw_mix(12_000)
    ways = packings(window=4096, group=64)
    packed = {name: way(sizes, loads) for name, way in ways.items()}
    full = {name: sizes.sum() / CAPACITY / of[1].num_packed_samples for name, of in packed.items()}
    assert full["balanced"] > full["best_fit"] - 0.01
    work = {name: pack_loads(of, loads) for name, of in packed.items()}
    for ranks in (8, 24, 64):
        waited = {name: wait(of, ranks) for name, of in work.items()}
        assert waited["next_fit"] > waited["best_fit"] > 10 * 0.8 * waited["balanced"]
    # Not by order alone: the packs themselves are more alike.
    assert np.std(work["balanced"]) < 0.65 * np.std(work["best_fit"])


def test_steps_are_no_ramp_from_little_to_much() -> None:
    sizes, loads = draw_mix(12_000)
    work = pack_loads(packings(window=4096, group=8)["balanced"](sizes, loads), loads)
    steps = work[: len(work) // 8 * 8].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(np.arange(100), steps[:100])[0, 1]) < 0.3
    # Nor where a window has fewer packs than a group.
    work = pack_loads(packings(window=256, group=96)["balanced"](sizes, loads), loads)
    steps = work[: len(work) // 96 * 96].reshape(-1, 96)
    assert abs(np.corrcoef(np.arange(len(steps)), steps.mean(1))[0, 1]) < 0.3
    assert wait(work, 96) < 0.3


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loads: expected 2 values, got shape \(3,\)"):
        pack_balanced([1, 2], [1, 2, 3], 8, "drop")
    with pytest.raises(ValueError, match="group: expected at least 1, got 0"):
        pack_balanced([1, 2], [1, 2], 8, "drop", group=0)


class Samples:
    def __init__(self, sizes: np.ndarray, loads: np.ndarray) -> None:
        self.sizes, self.loads = sizes, loads

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> range:
        return range(self.sizes[index])

    def vision_tokens(self) -> np.ndarray:
        return self.loads


def test_the_folders_packs_are_balanced_by_what_their_samples_show() -> None:
    first, second = (Samples(*draw_mix(1500, seed)) for seed in (1, 2))

    def work(**options: Any) -> np.ndarray:
        packs = MixedPackedDataloader([first, second], [1.0, 1.0], CAPACITY, "drop", **options)
        loads = (first.loads, second.loads)
        return np.array(
            [sum(loads[d][i] for d, i in packs.pieces(number)) for number in range(len(packs))]
        )

    balanced, best = work(packing="balanced", balance_group=16), work(packing="best_fit")
    assert balanced.sum() == best.sum()
    assert wait(balanced, 8) < 0.2 * wait(best, 8)
    with pytest.raises(ValueError, match=r"'balanced' needs vision_tokens\(\) of datasets\[1\]"):
        MixedPackedDataloader([first, [range(3)]], [1.0, 1.0], 8, packing="balanced")


@pytest.mark.parametrize("multicrop", [False, True])
def test_the_providers_samples_know_their_vision_tokens(multicrop: bool, tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "examples" / "flickr8k_mini"
    provider = Step37Flickr8kSFTDataProvider(
        tokenizer_path=TOKENIZER,
        cache_dir=str(folder),
        multicrop=multicrop,
        packing="balanced",
        lengths_cache_dir=str(tmp_path),
    )
    (dataset,) = provider.build_datasets(None)[0].datasets
    rows = {0: 169, 1: 81}
    expected = [sum(rows[entry[1]] for entry in sample["image_paths"]) for sample in dataset]
    assert dataset.vision_tokens().tolist() == expected
