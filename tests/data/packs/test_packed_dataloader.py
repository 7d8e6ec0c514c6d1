"""The schedule is the contract's, lengths are measured once, and a resume is exact."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import inspect
import io
import itertools
import logging
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step37_data.caches import lengths as lengths_module
from step37_data.caches import rank_order
from step37_data.caches.lengths import LengthCache, probe_lengths, write_atomically
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.packing import ScheduleSettings, pack_balanced, pack_best_fit
from step37_data.provider import Step37Flickr8kSFTDataProvider as Provider
from step37_data.template import MultimodalSFTSample
from tests.data.ranks import in_ranks


class Words:
    """A data set of lists; its samples say what they are, its log says what was read."""

    def __init__(self, lengths: list[int], name: int = 0, log: Path | None = None) -> None:
        self.lengths, self.name, self.log = lengths, name, log
        self.tokenizer = "first"
        self.fails_at: int | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, idx: int) -> list[tuple[int, int]]:
        if idx == self.fails_at:
            raise KeyError(f"sample {idx} cannot be read")
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{idx}\n")
        return [(self.name, idx)] * self.lengths[idx]

    def fingerprint(self) -> str:
        return self.tokenizer

    def sample_keys(self) -> np.ndarray:
        digests = [hashlib.blake2b(f"{i} {n}".encode(), digest_size=16).digest()
                   for i, n in enumerate(self.lengths)]  # fmt: skip
        return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)

    def read_since_last_time(self) -> list[int]:
        assert self.log is not None
        if not self.log.exists():
            return []
        read = [int(line) for line in self.log.read_text().split()]
        self.log.unlink()
        return read


def scheduled_slowly(
    sizes: list[list[int]], epochs: list[float], strategies: list[str]
) -> list[tuple[int, int]]:
    weights = [epoch * len(domain) for epoch, domain in zip(epochs, sizes, strict=True)]
    steps = [float(np.float32(1) / np.float32(weight)) for weight in weights]
    scores = [0.0] * len(weights)
    drawn = [0] * len(weights)
    order = []
    for _ in range(int(sum(weights))):
        domain = scores.index(min(scores))
        scores[domain] += steps[domain]
        epoch, place = divmod(drawn[domain], len(sizes[domain]))
        drawn[domain] += 1
        if strategies[domain] == "random":
            generator = torch.Generator()
            generator.manual_seed(1234 + domain + epoch)
            place = torch.randperm(len(sizes[domain]), generator=generator).tolist()[place]
        order.append((domain, place))
    return order


def packed_slowly(
    order: list[tuple[int, int]], sizes: list[list[int]], max_length: int, policy: str
) -> list[list[tuple[int, int]]]:
    packs: list[list[tuple[int, int]]] = []
    pack: list[tuple[int, int]] = []
    held = 0
    for domain, index in order:
        size = sizes[domain][index]
        if held + size > max_length:
            packs.append(pack)
            pack, held = [], 0
        if size > max_length:
            packs.append([(domain, index)] if policy == "extend" else [])
            continue
        pack.append((domain, index))
        held += size
        if held == max_length:
            packs.append(pack)
            pack, held = [], 0
    return [members for members in [*packs, pack] if members]


DOMAINS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=7), min_size=1, max_size=3)


@given(
    sizes=DOMAINS,
    epochs=st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.7, 2.0, 3.0]), min_size=3, max_size=3),
    strategies=st.lists(st.sampled_from(["random", "sequential"]), min_size=3, max_size=3),
    max_length=st.integers(1, 20),
    policy=st.sampled_from(["drop", "extend"]),
)
def test_the_packs_are_those_of_the_contract(
    *,
    sizes: list[list[int]],
    epochs: list[float],
    strategies: list[str],
    max_length: int,
    policy: str,
) -> None:
    epochs, strategies = epochs[: len(sizes)], strategies[: len(sizes)]
    order = scheduled_slowly(sizes, epochs, strategies)
    expected = packed_slowly(order, sizes, max_length, policy)
    datasets = [Words(domain, name) for name, domain in enumerate(sizes)]
    arguments: Any = (datasets, epochs, max_length, policy, None, strategies)
    if not expected:
        with pytest.raises(ValueError, match="nothing was packed"):
            MixedPackedDataloader(*arguments, progress=False)
        return
    loader = MixedPackedDataloader(*arguments, progress=False)
    assert len(loader) == len(expected)
    assert [loader.pieces(i) for i in range(len(loader))] == expected
    for number, pack in enumerate(expected):
        assert loader[number] == [datasets[domain][index] for domain, index in pack]
    capacity = [sum(sizes[domain][index] for domain, index in pack) for pack in expected]
    assert loader.pack_sizes().tolist() == capacity


def loader_of(lengths: list[int], **options: Any) -> MixedPackedDataloader:
    settings = {"datasets": [Words(lengths)], "epochs": [1.0], "max_length": 10, "progress": False}
    return MixedPackedDataloader(**(settings | options))


def test_an_index_counts_modulo_the_number_of_packs() -> None:
    loader = loader_of([4, 5, 6, 7])
    count = len(loader)
    assert count > 1
    for index in range(count):
        assert loader[index + 3 * count] == loader[index - count] == loader[index]


def test_the_default_is_random_sampling_that_keeps_oversize_samples() -> None:
    loader = loader_of([4, 50, 6, 7, 3])
    order = scheduled_slowly([[4, 50, 6, 7, 3]], [1.0], ["random"])
    expected = packed_slowly(order, [[4, 50, 6, 7, 3]], 10, "extend")
    assert [loader.pieces(i) for i in range(len(loader))] == expected


def test_a_setting_has_one_default_wherever_it_can_be_given() -> None:
    own = {field.name: field.default for field in dataclasses.fields(ScheduleSettings)}
    provider = {field.name: field.default for field in dataclasses.fields(Provider)}
    # The provider of Megatron-Bridge drops what a loader by itself keeps.
    own_of_provider = {"oversize_policy": "drop"}
    shared = own.keys() & provider.keys() - {"lengths_cache_dir"}
    assert shared == {
        "oversize_policy", "dataset_sampling", "packing", "packing_window", "balance_group",
        "probe_workers",
    }  # fmt: skip
    for name in shared:
        assert provider[name] == own_of_provider.get(name, own[name]), name
    for function in (MixedPackedDataloader, pack_best_fit, pack_balanced):
        for name, parameter in inspect.signature(function).parameters.items():
            setting = {"window": "packing_window", "group": "balance_group"}.get(name, name)
            if parameter.default is not parameter.empty and setting in own:
                assert parameter.default == own[setting], (function, name)
    settings = loader_of([1, 2]).settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.packing = "balanced"  # type: ignore[misc]


def test_a_loop_over_the_packs_ends_behind_the_last_one() -> None:
    loader = loader_of([4, 5, 6, 7])
    assert list(itertools.islice(loader, 100)) == [loader[i] for i in range(len(loader))]


def test_the_transform_gets_the_samples_of_a_pack() -> None:
    loader = loader_of([4, 5], transform=lambda samples: sum(map(len, samples)))
    assert loader[0] == 9


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="datasets: expected at least one, got none"):
        loader_of([], datasets=[], epochs=[])
    with pytest.raises(ValueError, match="epochs: 2 values for 1 datasets"):
        loader_of([1], epochs=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"datasets\[0\]: expected at least one sample"):
        loader_of([])
    for epoch in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"epochs\[0\]: expected more than 0"):
            loader_of([1], epochs=[epoch])
    with pytest.raises(ValueError, match="expected one of sequential, random, got 'sorted'"):
        loader_of([1], dataset_sampling="sorted")
    with pytest.raises(ValueError, match="dataset_sampling: 2 values for 1 datasets"):
        loader_of([1], dataset_sampling=["random", "random"])
    with pytest.raises(ValueError, match=r"packing: expected one of next_fit, .*, got 'best'"):
        loader_of([1], packing="best")
    for name in ("packing_window", "balance_group", "max_length"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            loader_of([1], **{name: 0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'packing_windows'"):
        loader_of([1], packing_windows=8)
    with pytest.raises(
        ValueError, match="nothing was packed: no sample fits in a pack of 10 tokens"
    ):
        loader_of([11, 12], oversize_policy="drop")
    with pytest.raises(ValueError, match=r"epochs \[0.4\] of \[2\] samples draw 0"):
        loader_of([1, 1], epochs=[0.4])


def test_dropped_samples_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader = loader_of([4, 11, 6, 12], oversize_policy="drop")
    assert loader.packing_result.num_droped == 2
    assert "2 of 4 samples were dropped: longer than the 10 tokens of a pack" in caplog.text


def test_the_fill_of_either_packing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [6, 5, 4, 5]
    with caplog.at_level(logging.INFO):
        loader_of(lengths, dataset_sampling="sequential")
        loader_of(lengths, dataset_sampling="sequential", packing="best_fit")
    assert "next_fit: 4 samples in 3 packs of 10 tokens, 66.7 % filled" in caplog.text
    assert "best_fit: 4 samples in 2 packs of 10 tokens, 100.0 % filled" in caplog.text


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), window=st.integers(1, 50))
def test_best_fit_packs_every_sample_drawn_once(lengths: list[int], window: int) -> None:
    loader = loader_of(lengths, packing="best_fit", packing_window=window)
    pieces = [piece for i in range(len(loader)) for piece in loader.pieces(i)]
    assert sorted(pieces) == [(0, i) for i in range(len(lengths))]
    assert int(loader.pack_sizes().sum()) == sum(lengths)


class EndsEarly(Words):
    """Says it has more samples than it can give, with the exception that also ends iteration."""

    def __getitem__(self, idx: int) -> list[tuple[int, int]]:
        if idx == 2:
            raise IndexError("a bug inside sample 2")
        return super().__getitem__(idx)


def test_an_index_error_of_a_data_set_is_not_its_end() -> None:
    # `for sample in dataset` stops there without a word, and loses the rest of the data set.
    assert len(list(EndsEarly([1, 1, 1, 1]))) == 2  # type: ignore[call-overload]
    with pytest.raises(IndexError, match="a bug inside sample 2"):
        loader_of([], datasets=[EndsEarly([1, 1, 1, 1])])


def test_a_sample_whose_length_has_changed_since_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = loader_of([4, 5, 6], dataset_sampling="sequential")
    loader[0]
    assert "tokens now" not in caplog.text
    loader.datasets[0].lengths[1] = 8
    for _ in range(2):
        assert len(loader[0][1]) == 8
    assert caplog.text.count("datasets[0][1] has 8 tokens now and had 5 when packed") == 1


def test_a_loader_survives_pickling_with_its_position() -> None:
    loader = loader_of([4, 5, 6, 7])
    list(itertools.islice(loader.iterate(), 2))
    clone = pickle.loads(pickle.dumps(loader))
    assert [clone[i] for i in range(len(clone))] == [loader[i] for i in range(len(loader))]
    assert clone.state_dict() == loader.state_dict()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_give_the_same_packs(context: str) -> None:
    loader = loader_of([4, 5, 6, 7, 2, 9, 3])
    alone = list(itertools.islice(loader.iterate(), 6))
    loader.position = 0
    packs = loader.iterate(num_workers=1, multiprocessing_context=context)
    assert list(itertools.islice(packs, 6)) == alone


LENGTHS = [4, 5, 6, 7, 2, 9, 3, 8, 1, 5, 5, 4, 10, 2]


@given(
    before=st.integers(0, 9), old_size=st.integers(1, 4), new_size=st.integers(1, 4)
)  # fmt: skip
def test_a_resume_is_exact_also_with_another_number_of_ranks(
    before: int, old_size: int, new_size: int
) -> None:
    def steps(loader: MixedPackedDataloader, size: int, count: int) -> list[Any]:
        """What all ranks together see, step by step; every rank has a loader of its own."""
        ranks = [loader_of(LENGTHS) for _ in range(size)]
        for rank in ranks:
            rank.load_state_dict(loader.state_dict())
        streams = [r.iterate(dp_rank=i, dp_size=size) for i, r in enumerate(ranks)]
        seen = [pack for _ in range(count) for pack in map(next, streams)]
        assert len({rank.position for rank in ranks}) == 1
        loader.load_state_dict(ranks[0].state_dict())
        return seen

    loader = loader_of(LENGTHS)
    seen = steps(loader, old_size, before)
    saved = pickle.loads(pickle.dumps(loader.state_dict()))
    resumed = loader_of(LENGTHS)
    resumed.load_state_dict(saved)
    seen += steps(resumed, new_size, 5)
    assert seen == [loader[i] for i in range(len(seen))]


@pytest.mark.parametrize("workers", [1, 2])
def test_prefetched_packs_do_not_count_as_consumed(workers: int) -> None:
    loader = loader_of(LENGTHS)
    stream = loader.iterate(num_workers=workers, prefetch_factor=3)
    for consumed in range(1, 5):
        assert next(stream) == loader[consumed - 1]
        assert loader.position == consumed


def test_a_state_of_another_schedule_is_refused() -> None:
    state = loader_of(LENGTHS).state_dict()
    for other in (
        loader_of([9, *LENGTHS[1:]]),
        loader_of(LENGTHS, max_length=20),
        loader_of(LENGTHS, packing="best_fit"),
        loader_of(LENGTHS, dataset_sampling="sequential"),
    ):
        with pytest.raises(ValueError, match="saved with another schedule"):
            other.load_state_dict(state)


@pytest.mark.parametrize("name", ["sampler", "batch_size", "collate_fn"])
def test_loading_options_that_would_change_the_packs_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        loader_of(LENGTHS).iterate(**{name: None})


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="dp_rank: expected 0 to 1, got 2"):
        next(loader_of(LENGTHS).iterate(dp_rank=2, dp_size=2))


def test_a_second_start_measures_nothing(tmp_path: Path) -> None:
    dataset = Words(LENGTHS, log=tmp_path / "log")
    first = loader_of([], datasets=[dataset], lengths_cache_dir=tmp_path / "cache")
    assert sorted(dataset.read_since_last_time()) == list(range(len(LENGTHS)))
    second = loader_of([], datasets=[dataset], lengths_cache_dir=tmp_path / "cache")
    assert dataset.read_since_last_time() == []
    assert second.schedule_fingerprint() == first.schedule_fingerprint()


def test_only_a_changed_sample_is_measured_again(tmp_path: Path) -> None:
    dataset = Words(list(LENGTHS), log=tmp_path / "log")
    probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    dataset.read_since_last_time()
    dataset.lengths[3] = 77
    lengths = probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    assert dataset.read_since_last_time() == [3]
    assert lengths.tolist() == dataset.lengths


def test_another_tokenizer_starts_over(tmp_path: Path) -> None:
    dataset = Words(LENGTHS, log=tmp_path / "log")
    probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    dataset.read_since_last_time()
    dataset.tokenizer = "second"
    probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    assert len(dataset.read_since_last_time()) == len(LENGTHS)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_measurement_continues_where_it_stopped(
    tmp_path: Path, workers: int
) -> None:
    lengths = [1 + i % 9 for i in range(1500)]
    dataset = Words(lengths, log=tmp_path / "log")
    dataset.fails_at = 1200
    with pytest.raises(KeyError, match="sample 1200 cannot be read"):
        probe_lengths(dataset, cache_dir=tmp_path / "cache", workers=workers, progress=False)
    dataset.read_since_last_time()
    dataset.fails_at = None
    measured = probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    again = dataset.read_since_last_time()
    assert 1200 in again
    assert min(again) >= 1024  # four whole chunks of 256 were kept
    assert measured.tolist() == lengths


def test_equal_samples_are_measured_once(tmp_path: Path) -> None:
    class Equal(Words):
        def sample_keys(self) -> np.ndarray:
            return np.repeat(np.array([[1, 2]], dtype=np.uint64), len(self), axis=0)

    dataset = Equal([5, 5, 5], log=tmp_path / "log")
    lengths = probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    assert lengths.tolist() == [5, 5, 5]
    assert dataset.read_since_last_time() == [0]


@given(keys=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12))
def test_samples_that_share_half_of_their_key_keep_their_own_lengths(
    tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[int, int]]
) -> None:
    class Crowded(Words):
        def sample_keys(self) -> np.ndarray:
            return np.array(keys, dtype=np.uint64)

    cache = tmp_path_factory.mktemp("cache")
    dataset = Crowded([10 * high + low for high, low in keys])
    half = Crowded(dataset.lengths[::2])
    half.sample_keys = lambda: np.array(keys[::2], dtype=np.uint64)  # type: ignore[method-assign]
    for part in (half, dataset, dataset):
        lengths = probe_lengths(part, cache_dir=cache, progress=False)
        assert lengths.tolist() == part.lengths


def test_processes_measure_the_same_lengths(tmp_path: Path) -> None:
    lengths = [1 + (7 * i) % 50 for i in range(1000)]
    for cache in (None, tmp_path):
        measured = probe_lengths(Words(lengths), workers=2, cache_dir=cache, progress=False)
        assert measured.tolist() == lengths


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_whose_length_counts_its_keys_is_refused(workers: int) -> None:
    tokens = torch.zeros(200, dtype=torch.long)
    good = MultimodalSFTSample(tokens=tokens, loss_mask=tokens, image_paths=[])
    dataset = [good] * 300 + [dict(good)]
    with pytest.raises(ValueError, match=r"sample 300: len\(\) of the dict is 3, expected 199"):
        probe_lengths(dataset, workers=workers, progress=False)
    assert probe_lengths(dataset[:300], progress=False).tolist() == [199] * 300
    empty = MultimodalSFTSample(tokens=tokens[:0])
    assert probe_lengths([empty], progress=False).tolist() == [0]


def test_measuring_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    probe_lengths(Words(LENGTHS), description="Probing my data")
    assert "Probing my data: 100%" in capsys.readouterr().err


def test_a_damaged_cache_file_is_reported_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Words(LENGTHS, log=tmp_path / "log")
    probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
    (file,) = (tmp_path / "cache").rglob("*.npz")
    content = file.read_bytes()
    garbled = bytearray(content)
    # A length, behind the name of its array and the 128 bytes of its header.
    garbled[content.index(b"lengths.npy") + len("lengths.npy") + 180] ^= 1
    others = io.BytesIO()
    np.savez(others, keys=np.zeros((3, 2), dtype=np.uint64), lengths=np.zeros(3, dtype=np.int64))
    short = io.BytesIO()
    np.savez(short, keys=np.zeros(3, dtype="S16"), lengths=np.zeros(2, dtype=np.int64))
    for damaged in (
        bytes(garbled),
        content[:-5],
        content[:40],
        b"",
        others.getvalue(),
        short.getvalue(),
    ):
        file.write_bytes(damaged)
        dataset.read_since_last_time()
        with caplog.at_level(logging.WARNING):
            measured = probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
        assert "is damaged: ignored" in caplog.text
        assert measured.tolist() == LENGTHS
        assert len(dataset.read_since_last_time()) == len(LENGTHS)
        assert (LengthCache(tmp_path / "cache", dataset).look_up() == LENGTHS).all()


def test_the_lengths_are_two_arrays_that_numpy_reads(tmp_path: Path) -> None:
    dataset = Words(LENGTHS)
    probe_lengths(dataset, cache_dir=tmp_path, progress=False)
    with np.load(tmp_path / "first.npz") as arrays:
        known = dict(zip(arrays["keys"].tolist(), arrays["lengths"].tolist(), strict=True))
    keys = dataset.sample_keys().view("S16").reshape(-1).tolist()
    assert known == dict(zip(keys, LENGTHS, strict=True))


def test_lengths_that_an_earlier_version_has_kept_are_measured_anew(tmp_path: Path) -> None:
    old = tmp_path / "first" / "samples.lengths"
    old.parent.mkdir()
    old.write_bytes(b"\0" * 40)
    dataset = Words(LENGTHS, log=tmp_path / "log")
    assert probe_lengths(dataset, cache_dir=tmp_path, progress=False).tolist() == LENGTHS
    assert len(dataset.read_since_last_time()) == len(LENGTHS)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system that is mounted so refuses to write; permissions do not bind root."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("os.access", lambda *_: False)


def test_a_read_only_folder_is_warned_about_and_every_length_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Words([*LENGTHS, LENGTHS[0]], log=tmp_path / "log")
    read_only(monkeypatch)
    for _ in range(2):
        measured = probe_lengths(dataset, cache_dir=tmp_path / "cache", progress=False)
        assert measured.tolist() == dataset.lengths
        assert len(dataset.read_since_last_time()) == len(dataset)
    assert "first.npz cannot be written" in caplog.text
    assert "Read-only file system" in caplog.text


def measure_read_only(_rank: int, folder: Path) -> list[int]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        read_only(monkeypatch)
        cached = probe_lengths(Words(LENGTHS), cache_dir=folder, progress=False, together=True)
    return cached.tolist()


def test_ranks_that_share_a_read_only_folder_measure_for_themselves(tmp_path: Path) -> None:
    assert in_ranks(2, measure_read_only, tmp_path / "cache") == [LENGTHS, LENGTHS]


def measure_as_node(rank: int, folder: Path) -> tuple[list[int], list[int]]:
    """The lengths, and the samples that this rank itself has measured."""
    # Rank 0 has a disk of its own, ranks 1 and 2 share another: their host names are made up.
    node = "first" if rank == 0 else "second"
    rank_order.socket.gethostname = lambda: node  # type: ignore[assignment]
    dataset = Words(LENGTHS, log=folder / f"log{rank}")
    cached = probe_lengths(dataset, cache_dir=folder / node, progress=False, together=True)
    return cached.tolist(), dataset.read_since_last_time()


def test_on_every_disk_one_rank_measures_and_the_others_read(tmp_path: Path) -> None:
    everything = list(range(len(LENGTHS)))
    outcomes = in_ranks(3, measure_as_node, tmp_path)
    assert outcomes == [(LENGTHS, everything), (LENGTHS, everything), (LENGTHS, [])]


@pytest.mark.parametrize("what", ["folder", "circle of links"])
def test_what_is_no_file_in_the_place_of_the_lengths_is_told_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    dataset = Words(LENGTHS)
    probe_lengths(dataset, cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.rglob("*.npz")
    file.unlink()
    if what == "folder":
        (file / "mine").mkdir(parents=True)
    else:
        file.symlink_to(file)
    assert probe_lengths(dataset, cache_dir=tmp_path, progress=False).tolist() == LENGTHS
    assert f"{file} cannot be read" in caplog.text
    assert what != "folder" or (file / "mine").exists()
    assert not list(tmp_path.rglob(".*"))


def test_lengths_are_not_lost_where_another_writer_replaces_the_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_lengths(Words([9, 8]), cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.rglob("*.npz")
    others = file.read_bytes()

    def overtaken(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        path.write_bytes(others)

    monkeypatch.setattr(lengths_module, "write_atomically", overtaken)
    assert probe_lengths(Words(LENGTHS), cache_dir=tmp_path, progress=False).tolist() == LENGTHS


def test_two_writers_of_one_cache_lose_nothing_they_have_merged(tmp_path: Path) -> None:
    first, second = Words(LENGTHS), Words(LENGTHS[::-1])
    for dataset in (first, second, first):
        probe_lengths(dataset, cache_dir=tmp_path, progress=False)
    for dataset in (first, second):
        assert (LengthCache(tmp_path, dataset).look_up() == dataset.lengths).all()
    assert [path.name for path in tmp_path.rglob("*")] == ["first.npz"]


def test_a_cache_needs_a_data_set_with_keys(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"list has no fingerprint\(\) and sample_keys\(\)"):
        loader_of([], datasets=[[[1, 2], [3]]], lengths_cache_dir=tmp_path)

    class WrongKeys(Words):
        def sample_keys(self) -> np.ndarray:
            return np.zeros(3, dtype=np.uint64)

    with pytest.raises(ValueError, match=r"sample_keys: expected shape \(2, 2\), got \(3,\)"):
        probe_lengths(WrongKeys([1, 2]), cache_dir=tmp_path)


@settings(max_examples=3)
@given(epochs=st.integers(1, 3))
def test_every_token_of_an_epoch_is_in_exactly_one_pack(epochs: int) -> None:
    loader = loader_of(LENGTHS, epochs=[float(epochs)])
    tokens = [token for i in range(len(loader)) for sample in loader[i] for token in sample]
    expected = [(0, i) for i, length in enumerate(LENGTHS) for _ in range(length)]
    assert sorted(tokens) == sorted(expected * epochs)


SCHEDULE_SCRIPT = """
import pathlib, sys, time
import numpy as np
from step37_data.packed_dataloader import draw_schedule
from step37_data.packing import pack
lengths = np.random.default_rng(0).integers(190, 260, int(sys.argv[1]))
begin = time.perf_counter()
_, _, sizes = draw_schedule([lengths], [float(len(lengths))], ["random"])
pack(sizes, 2048, "drop")
# Not ru_maxrss, which counts the parent of a forked process too.
status = pathlib.Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(time.perf_counter() - begin, peak)
"""


@pytest.mark.slow
def test_ten_million_samples_are_scheduled_in_ten_seconds_and_one_gigabyte() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCHEDULE_SCRIPT, "10000000"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds, peak = map(float, run.stdout.split())
    assert seconds < 10
    assert peak < 1e9


def test_best_fit_that_drops_everything_says_that_nothing_was_packed() -> None:
    with pytest.raises(ValueError, match="nothing was packed: no sample fits"):
        loader_of([9, 10], max_length=8, oversize_policy="drop", packing="best_fit")


def test_schedules_that_differ_in_domains_alone_or_in_counts_alone_are_told_apart() -> None:
    def schedule(data_sets: list[list[int]], epochs: float, max_length: int) -> str:
        loader = MixedPackedDataloader(
            datasets=[[[0] * length for length in lengths] for lengths in data_sets],
            epochs=[epochs] * len(data_sets),
            max_length=max_length,
            oversize_policy="drop",
            dataset_sampling="sequential",
            progress=False,
        )
        return loader.schedule_fingerprint()

    assert schedule([[1]], 2.0, 8) != schedule([[1], [1]], 1.0, 8)
    # The last sample ends the second pack, or is dropped: the packs begin where they did.
    assert schedule([[2, 2, 1, 3]], 1.0, 4) != schedule([[2, 2, 1, 3]], 1.0, 3)


def test_a_lengths_file_can_be_read_by_others_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "kept", b"x")
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o644

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "kept", b"y")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"x"
