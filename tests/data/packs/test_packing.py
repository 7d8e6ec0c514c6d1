"""Next-fit is the contract's, pack by pack; best-fit is deterministic and never fills worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step37_data.packing import pack, pack_best_fit

SIZES = st.lists(st.integers(0, 14), max_size=40)
MAX_LEN = st.integers(1, 12)
POLICY = st.sampled_from(["drop", "extend"])


def next_fit(sizes: list[int], max_len: int, policy: str) -> tuple[list[tuple[int, int]], int]:
    packs: list[tuple[int, int]] = []
    members: list[int] = []
    dropped = 0

    def close() -> None:
        if members:
            packs.append((members[0], len(members)))
            members.clear()

    for index, size in enumerate(sizes):
        if size > max_len:
            close()
            if policy == "extend":
                packs.append((index, 1))
            else:
                dropped += 1
            continue
        if sum(sizes[i] for i in members) + size > max_len:
            close()
        members.append(index)
        if sum(sizes[i] for i in members) == max_len:
            close()
    close()
    return packs, dropped


def test_the_example_of_the_documentation_packs_as_it_says() -> None:
    dropped = pack([4, 3, 9, 2], 8, "drop")
    assert dropped.packed_sample_ranges == [(0, 2), (3, 1)]
    assert (dropped.num_packed_samples, dropped.num_droped) == (2, 1)
    extended = pack([4, 3, 9, 2], 8, "extend")
    assert extended.packed_sample_ranges == [(0, 2), (2, 1), (3, 1)]
    assert (extended.num_packed_samples, extended.num_droped) == (3, 0)


@given(sizes=SIZES, max_len=MAX_LEN, policy=POLICY)
def test_packing_equals_greedy_next_fit(sizes: list[int], max_len: int, policy: str) -> None:
    ranges, dropped = next_fit(sizes, max_len, policy)
    result = pack(sizes, max_len, policy)
    assert result.packed_sample_ranges == ranges
    assert result.num_droped == dropped
    assert result.num_packed_samples == len(ranges)


def test_an_exactly_full_pack_closes_even_before_an_empty_sample() -> None:
    assert pack([5, 3, 0, 8, 0], 8, "drop").packed_sample_ranges == [(0, 2), (2, 2), (4, 1)]


def test_packing_works_block_by_block_on_more_samples_than_a_block() -> None:
    sizes = np.random.default_rng(0).integers(0, 3000, 600_000)
    result = pack(sizes, 2048, "extend")
    ranges, dropped = next_fit(sizes[:3000].tolist(), 2048, "extend")
    assert result.packed_sample_ranges[: len(ranges) - 1] == ranges[:-1]
    assert dropped == 0
    assert int(result.counts.sum()) == len(sizes)
    totals = np.add.reduceat(sizes, result.starts)
    assert np.all((totals <= 2048) | (result.counts == 1))


@given(sizes=SIZES, max_len=MAX_LEN, policy=POLICY, window=st.integers(1, 50))
def test_best_fit_loses_no_sample_doubles_none_and_overfills_no_pack(
    sizes: list[int], max_len: int, policy: str, window: int
) -> None:
    order, result = pack_best_fit(sizes, max_len, policy, window)
    kept = [i for i, size in enumerate(sizes) if size <= max_len or policy == "extend"]
    assert sorted(order.tolist()) == kept
    assert result.num_droped == len(sizes) - len(kept)
    covered = []
    for first, count in result.packed_sample_ranges:
        members = order[first : first + count].tolist()
        covered += members
        assert members == sorted(members)
        assert len({index // window for index in members}) == 1
        assert sum(sizes[i] for i in members) <= max_len or len(members) == 1
    assert covered == order.tolist()


def best_fit_decreasing(sizes: list[int], max_len: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        room = [max_len - sum(sizes[i] for i in members) for members in packs]
        # A full pack is closed, so that an empty sample does not join it: as in next-fit.
        fits = [p for p, free in enumerate(room) if free >= sizes[index] and free > 0]
        if fits:
            packs[min(fits, key=lambda p: (room[p], p))].append(index)
        else:
            packs.append([index])
    return sorted(sorted(members) for members in packs)


@given(sizes=st.lists(st.integers(0, 12), max_size=30))
def test_best_fit_puts_the_longest_sample_first_into_the_fullest_pack_that_holds_it(
    sizes: list[int],
) -> None:
    order, result = pack_best_fit(sizes, 12, "drop")
    packs = [order[f : f + n].tolist() for f, n in result.packed_sample_ranges]
    assert packs == best_fit_decreasing(sizes, 12)


def test_best_fit_fills_long_tailed_lengths_much_better_than_next_fit() -> None:
    lengths = np.random.default_rng(0).lognormal(6.6, 0.8, 8192).clip(180, 4096).astype(int)
    greedy = pack(lengths, 4096, "drop").num_packed_samples
    _, best = pack_best_fit(lengths, 4096, "drop")
    lower_bound = int(np.ceil(lengths.sum() / 4096))
    assert best.num_packed_samples < 0.9 * greedy
    assert best.num_packed_samples <= 1.02 * lower_bound + 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="oversize_policy: expected one of drop, extend, got"):
        pack([1], 8, "cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_len: expected at least 1, got 0"):
        pack([1], 0, "drop")
    with pytest.raises(ValueError, match="sample 1 has the negative length -2"):
        pack([1, -2], 8, "drop")
    with pytest.raises(ValueError, match=r"sizes: expected \[N\] integers, got float64 \[2\]"):
        pack([4.9, 4.9], 8, "drop")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        pack_best_fit([1], 8, "drop", 0)

    with pytest.raises(ValueError, match=r"sizes: expected \[N\] integers, got int64 \[1, 2\]"):
        pack([[1, 2]], 8, "drop")  # type: ignore[list-item]


def test_the_ranges_are_a_list_of_tuples_over_two_arrays() -> None:
    result = pack([4, 3, 9, 2], 8, "extend")
    assert result.packed_sample_ranges == [(0, 2), (2, 1), (3, 1)]
    assert (result.starts.tolist(), result.counts.tolist()) == ([0, 2, 3], [2, 1, 1])
    assert result.starts.dtype == result.counts.dtype == np.int64


def test_no_samples_make_no_packs() -> None:
    assert pack([], 8, "drop").num_packed_samples == 0
