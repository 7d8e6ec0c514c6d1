"""The provider gives packs without end; its saved state stands behind those that were used."""

from __future__ import annotations

import gc
import io
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.energon.conftest import SAMPLES, TOKENIZER
from tests.megatron.processes import run

energon = pytest.importorskip("megatron.energon", reason="the extra energon is not installed")

from step37_data.forward_step import ForwardStep
from step37_data.prefetch import Prefetcher
from step37_energon.provider import EnergonPacks, Step37EnergonSFTDataProvider


def packs_of(shards: Path, **fields: Any) -> EnergonPacks:
    defaults = {
        "path": str(shards),
        "tokenizer_path": TOKENIZER,
        "max_packing_seqlen": 500,
        "packing": "best_fit",
        "packing_buffer_size": 10,
        "num_workers": 0,
    }
    packs, valid, test = Step37EnergonSFTDataProvider(**(defaults | fields)).build_datasets(None)
    assert valid is None
    assert test is None
    return packs


def keys(packs: Any, count: int) -> list[list[str]]:
    return [next(packs)["__key__"] for _ in range(count)]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save({"dataloader_state_dict": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["dataloader_state_dict"]


def test_it_shuffles_without_end_and_the_start_tokens_come_from_the_tokenizer(
    shards: Path,
) -> None:
    provider = Step37EnergonSFTDataProvider(
        path=str(shards), tokenizer_path=TOKENIZER, num_workers=0
    )
    assert provider.dataloader_type == "external"
    packs, _, _ = provider.build_datasets(None)
    assert min(provider.img_start_token_id, provider.patch_start_token_id) >= 0
    drawn = Counter(key for of_pack in keys(packs, 40) for key in of_pack)
    assert len(drawn) == SAMPLES
    assert max(drawn.values()) - min(drawn.values()) <= 20
    first_keys = keys(packs_of(shards), 3)
    assert first_keys != sorted(first_keys)


def drawn_with_and_without_groups(_rank: int, path: str) -> list[list[list[str]]]:
    """Keys of packs of a provider that is given no groups, and of one that is given all ranks."""
    everyone = SimpleNamespace(pg_collection=SimpleNamespace(dp=dist.group.WORLD))
    drawn = []
    for context in (None, everyone):
        provider = Step37EnergonSFTDataProvider(
            path=path, tokenizer_path=TOKENIZER, max_packing_seqlen=500, num_workers=0
        )
        packs, _, _ = provider.build_datasets(context)
        drawn.append(keys(packs, 4))
    return drawn


def test_ranks_that_share_the_model_draw_the_same_unless_other_groups_are_given(
    shards: Path,
) -> None:
    pytest.importorskip("megatron.core", reason="the extra megatron is not installed")
    first, second = run(
        drawn_with_and_without_groups, str(shards), world=2, tensor_model_parallel_size=2
    )
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packs_that_were_read_ahead_of_their_use_are_given_again(
    shards: Path, num_workers: int
) -> None:
    whole = keys(packs_of(shards, num_workers=num_workers), 14)
    packs = packs_of(shards, num_workers=num_workers)
    used = 0
    packs.read_ahead_by(lambda: used)
    handed = keys(packs, 6)
    used = 4
    state = through_a_file(packs.save_state())
    assert len(state["unused"]) == 2
    resumed = packs_of(shards, num_workers=num_workers)
    resumed.restore_state(state)
    assert handed[:4] + keys(resumed, 10) == whole
    # Saved again before the packs that are given again were taken.
    again = packs_of(shards, num_workers=num_workers)
    again.restore_state(state)
    second = through_a_file(again.save_state())
    last = packs_of(shards, num_workers=num_workers)
    last.restore_state(second)
    assert keys(last, 10) == whole[4:]


def test_workers_end_at_once_when_their_packs_are_let_go(shards: Path) -> None:
    before = set(multiprocessing.active_children())
    packs = packs_of(shards, num_workers=2)
    keys(packs, 3)
    packs.save_state()
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    assert gc.isenabled()
    # Energon caught an exception while it read its configuration: that holds the packs by a frame.
    gc.collect()
    gc.disable()  # nothing else is left to it
    try:
        start = time.perf_counter()
        del packs
        # Torch waits for five seconds for a worker that was not told to end.
        assert time.perf_counter() - start < 5
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_a_pack_given_again_is_the_same_bit_for_bit(shards: Path) -> None:
    packs = packs_of(shards)
    packs.read_ahead_by(lambda: 0)
    first = next(packs)
    resumed = packs_of(shards)
    resumed.restore_state(packs.save_state())
    second = next(resumed)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name])
        elif name == "image_paths":  # torch's pinning makes lists of tuples
            assert list(map(list, value)) == list(map(list, second[name]))
        elif name not in ("skipped_samples", "dropped_samples", "__restore_key__"):
            assert value == second[name], name


@pytest.mark.parametrize(("saved_with", "resumed_with"), [(2, 3), (2, 1), (0, 2), (2, 0), (0, 1)])
def test_a_state_of_another_number_of_workers_is_refused_before_anything_is_read(
    shards: Path, saved_with: int, resumed_with: int
) -> None:
    packs = packs_of(shards, num_workers=saved_with)
    keys(packs, 2)
    state = through_a_file(packs.save_state())
    del packs
    resumed = packs_of(shards, num_workers=resumed_with)
    told = f"num_workers: the state was saved with {saved_with}, and this run has {resumed_with}"
    with pytest.raises(ValueError, match=told):
        resumed.restore_state(state)
    assert resumed._packs is None


def test_a_state_of_another_number_of_ranks_and_what_is_no_state_are_refused(shards: Path) -> None:
    packs = packs_of(shards)
    keys(packs, 2)
    state = {**packs.save_state(), "data-parallel size": 4}
    with pytest.raises(ValueError, match="size: the state was saved with 4, and this run has 1"):
        packs_of(shards).restore_state(state)
    for other in (None, {"unused": []}):
        with pytest.raises(ValueError, match="expected loader and unused, got"):
            packs_of(shards).restore_state(other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["seqlen_divisible_by", "max_packing_seqlen", "packing_buffer_size", "shuffle_buffer_size",
     "max_samples_per_sequence", "num_workers"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -64, 2.0, "64"])
def test_a_number_that_cannot_be_is_refused_by_its_name_before_anything_is_read(
    name: str, value: Any
) -> None:
    if (name, value) != ("num_workers", 0):
        with pytest.raises(ValueError, match=f"^{name}: expected a"):
            packs_of(Path("there are no shards here"), **{name: value})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pack_that_holds_none_of_the_samples_is_the_reason_given(
    shards: Path, num_workers: int
) -> None:
    packs = packs_of(shards, num_workers=num_workers, max_packing_seqlen=150)
    told = (
        r"no sample fits in a pack of 150 tokens \(max_packing_seqlen\); the shortest of .* has \d"
    )
    with pytest.raises(ValueError, match=told):
        next(packs)


def test_without_a_reader_ahead_every_pack_handed_out_counts_as_used(shards: Path) -> None:
    whole = keys(packs_of(shards), 9)
    packs = packs_of(shards)
    assert keys(packs, 5) == whole[:5]
    state = packs.save_state()
    assert state["unused"] == []
    resumed = packs_of(shards)
    resumed.restore_state(state)
    assert keys(resumed, 4) == whole[5:]


def test_the_forward_step_reads_ahead_and_bridge_saves_what_it_has_used(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun = pytest.importorskip(
        "megatron.core.rerun_state_machine", reason="megatron-core is not installed"
    )
    whole = keys(packs_of(shards), 8)
    module = "step37_data.forward_step"
    monkeypatch.setattr(f"{module}._stage_of", lambda _model, **_: None)
    monkeypatch.setattr(f"{module}.model_inputs", lambda batch, **_: batch["__key__"])
    provider = Step37EnergonSFTDataProvider(
        path=str(shards), tokenizer_path=TOKENIZER, img_start_token_id=1, patch_start_token_id=2
    )
    packs = packs_of(shards)
    step, iterator = ForwardStep(prefetch_depth=2, device="cpu"), rerun.RerunDataIterator(packs)
    assert [step._next(provider, iterator, None) for _ in range(2)] == whole[:2]
    assert iterator.iterable is not packs
    assert next(iterator)["__key__"] == whole[2]  # as Bridge skips a step
    state = iterator.iterable.save_state()
    step.close()
    assert [step._next(provider, iterator, None) for _ in range(2)] == whole[3:5]
    step.close()
    resumed = packs_of(shards)
    resumed.restore_state(state)
    assert keys(resumed, 5) == whole[3:]


def test_a_state_may_be_saved_while_a_thread_reads_ahead(shards: Path) -> None:
    whole = keys(packs_of(shards), 30)
    packs = packs_of(shards)
    made: list[Prefetcher[list[str]]] = []
    states = []
    packs.read_ahead_by(lambda: made[0].state_dict()["next_pack"] if made else 0)
    with Prefetcher(packs, lambda pack: pack["__key__"], device="cpu", depth=3) as prefetcher:
        made.append(prefetcher)
        for used in range(1, 12):
            assert next(prefetcher) == whole[used - 1]
            states.append(packs.save_state())
    # Energon reads with one loader at a time in a process.
    for used, state in enumerate(states, 1):
        resumed = packs_of(shards)
        resumed.restore_state(state)
        assert keys(resumed, 5) == whole[used : used + 5]


def test_a_state_saved_before_a_worker_has_begun_loses_none_of_its_packs(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keys(packs_of(shards, num_workers=2), 6)
    packs = packs_of(shards, num_workers=2)
    assert keys(packs, 1) == whole[:1]
    state = packs._loader.save_state_rank()
    # What Energon says if it is asked before the second worker has begun.
    state.worker_states[1] = type(state.worker_states[1])(state=None, offset=1)
    monkeypatch.setattr(packs._loader, "save_state_rank", lambda: state)
    resumed = packs_of(shards, num_workers=2)
    resumed.restore_state(packs.save_state())
    assert keys(resumed, 5) == whole[1:]
