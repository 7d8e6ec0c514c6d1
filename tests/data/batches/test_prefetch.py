"""The prefetcher: order, errors, end, resumption, and that it does run ahead."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from step37_data import prefetch
from step37_data.images.decode import BrokenImages
from step37_data.prefetch import PackError, Prefetcher, ReadAhead, _cuda_tensors
from step37_data.preprocess import preprocess_packed_batch
from tests.limits import HANGS_AFTER_S

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IM_START = 128000


class Packs(Dataset):
    """Packs of one sample with one image each, as ``pack_samples`` gives them."""

    def __init__(self, paths, bad=()):
        self.paths = paths
        self.bad = set(bad)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        if index in self.bad:
            raise KeyError(f"no sample {index}")
        tokens = torch.tensor([index, IM_START, 5, 6])
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_masks": torch.ones(4),
            "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
            "position_id": torch.arange(4),
            "image_paths": [(self.paths[index], 0)],
        }


@pytest.fixture
def packs(tmp_path):
    paths = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (9 + i, 20 - i), (i, 10 * i, 30 * i)).save(path)
        paths.append(str(path))
    return Packs(paths)


prepare = functools.partial(
    preprocess_packed_batch,
    img_start_token_id=IM_START,
    patch_start_token_id=128003,
    image_size=28,
    patch_image_size=14,
    encoder_patch_size=14,
    device=DEVICE,
)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("step37-prefetch")]


def indices(model_inputs):
    return [int(one["input_ids"][0, 0]) for one in model_inputs]


@pytest.mark.parametrize("depth", [1, 2, 5, 30])
def test_every_pack_comes_once_in_order_as_prepared_alone(packs, depth):
    with Prefetcher(packs, prepare, depth=depth) as prefetcher:
        got = list(prefetcher)
    assert indices(got) == list(range(7))
    for pack, one in zip(packs, got, strict=True):
        alone = prepare(pack)
        assert torch.equal(one["images"][0].images, alone["images"][0].images)
        assert torch.equal(one["loss_masks"], alone["loss_masks"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_serves_as_well(packs, workers):
    loader = DataLoader(packs, batch_size=None, num_workers=workers)
    with Prefetcher(loader, prepare, start=2) as prefetcher:
        assert indices(prefetcher) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("wrap", [lambda packs: packs, iter], ids=["dataset", "iterable"])
@pytest.mark.parametrize("done", [0, 1, 4, 7])
def test_it_goes_on_where_the_state_says(packs, wrap, done):
    first = Prefetcher(wrap([packs[i] for i in range(7)]), prepare, depth=3)
    given = [next(first) for _ in range(done)]
    state = first.state_dict()
    assert state == {"next_pack": done}
    first.close()
    with Prefetcher(wrap([packs[i] for i in range(7)]), prepare, start=state["next_pack"]) as rest:
        assert indices(given) + indices(rest) == list(range(7))


def test_an_error_carries_the_index_of_its_pack_and_the_next_one_follows(packs):
    packs.bad = {2}
    with Prefetcher(packs, prepare, depth=3) as prefetcher:
        assert indices([next(prefetcher), next(prefetcher)]) == [0, 1]
        with pytest.raises(PackError, match="pack 2: KeyError: 'no sample 2'") as info:
            next(prefetcher)
        assert info.value.pack == 2
        assert isinstance(info.value.__cause__, KeyError)
        assert prefetcher.state_dict() == {"next_pack": 3}
        assert indices(prefetcher) == [3, 4, 5, 6]


class FailingIterable:
    """0 to 9; reading 1 fails, and an iteration can go on behind it."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.next += 1
        if self.next == 2:
            raise ValueError("1 is bad")
        if self.next > 10:
            raise StopIteration
        return self.next - 1


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_an_error_while_skipping_has_its_own_index_and_leaves_the_state_exact(depth):
    with Prefetcher(FailingIterable(), int, start=3, depth=depth, device="cpu") as prefetcher:
        with pytest.raises(PackError, match="pack 1: ValueError: 1 is bad") as info:
            next(prefetcher)
        assert info.value.pack == 1
        assert isinstance(info.value.__cause__, ValueError)
        assert prefetcher.state_dict() == {"next_pack": 3}
        for pack in range(3, 10):
            assert next(prefetcher) == pack
            assert prefetcher.state_dict() == {"next_pack": pack + 1}
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_an_error_in_preparing_is_passed_on_with_the_index(packs, tmp_path):
    packs.paths[4] = str(tmp_path / "missing.jpg")
    raising = functools.partial(prepare, on_broken="raise")
    with Prefetcher(packs, raising, start=3) as prefetcher:
        next(prefetcher)
        with pytest.raises(PackError, match=r"pack 4: BrokenImageError: image .*missing\.jpg"):
            next(prefetcher)


def test_after_the_end_it_stays_ended_and_the_thread_is_gone(packs):
    prefetcher = Prefetcher(packs, prepare)
    assert len(list(prefetcher)) == 7
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


def test_closing_early_ends_the_thread(packs):
    with Prefetcher(packs, prepare, depth=3) as prefetcher:
        next(prefetcher)
        assert prefetch_threads()
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_forgetting_it_ends_the_thread(packs):
    prefetcher = Prefetcher(packs, prepare)
    next(prefetcher)
    del prefetcher
    deadline = time.monotonic() + HANGS_AFTER_S
    while prefetch_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not prefetch_threads()


def test_no_more_than_depth_packs_are_ahead():
    started = []
    gate = threading.Semaphore(0)

    def slow(pack):
        started.append(pack)
        gate.release()
        return pack

    with Prefetcher(range(50), slow, depth=3, device="cpu") as prefetcher:
        for _ in range(3):
            assert gate.acquire(timeout=HANGS_AFTER_S)
        time.sleep(0.05)
        assert started == [0, 1, 2]
        assert next(prefetcher) == 0
        assert gate.acquire(timeout=HANGS_AFTER_S)
        time.sleep(0.05)
        assert started == [0, 1, 2, 3]


def test_the_next_pack_is_made_while_this_one_is_used():
    """Preparing waits for the consumer to be at work: alone, neither could go on."""
    in_step = threading.Event()
    made = threading.Event()

    def slow(pack):
        if pack == 1:
            assert in_step.wait(HANGS_AFTER_S)
            made.set()
        return pack

    with Prefetcher(range(2), slow, depth=1, device="cpu") as prefetcher:
        assert next(prefetcher) == 0
        in_step.set()
        assert made.wait(HANGS_AFTER_S)
        assert next(prefetcher) == 1
        assert prefetcher.waited_s < 10


def test_the_broken_images_are_reported_behind_the_last_pack(packs, tmp_path, caplog):
    packs.paths[1] = packs.paths[5] = str(tmp_path / "missing.jpg")
    broken = BrokenImages()
    counting = functools.partial(prepare, broken=broken)
    with Prefetcher(packs, counting, broken=broken) as prefetcher:
        list(prefetcher)
    assert caplog.messages[-1].startswith("2 of 7 images could not be read (1 files)\n")
    assert broken.seen == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"start": -1}, "start: expected at least 0, got -1"),
        ({"start": 8}, "start: expected at most 7, the packs there are, got 8"),
    ],
)
def test_wrong_arguments_are_named(packs, options, message):
    with pytest.raises(ValueError, match=message):
        Prefetcher(packs, prepare, **options)
    assert not prefetch_threads()


class Stopping(Dataset):
    """Ten samples; the fourth raises what an iterator raises at its end."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            next(iter(()))
        return [0] * (index + 1)


def test_a_stop_iteration_out_of_a_data_set_is_an_error_and_not_the_end():
    with Prefetcher(Stopping(), len, device="cpu") as prefetcher:
        assert [next(prefetcher) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(PackError, match=r"pack 3: .*StopIteration") as info:
            next(prefetcher)
        assert info.value.pack == 3
        assert list(prefetcher) == [5, 6, 7, 8, 9, 10]


def test_a_stop_iteration_out_of_preparing_is_an_error_and_not_the_end():
    with Prefetcher(range(3), lambda pack: next(iter(()), pack) if pack else next(iter(())),
                    device="cpu") as prefetcher:  # fmt: skip
        with pytest.raises(PackError, match="pack 0: StopIteration"):
            next(prefetcher)
        assert list(prefetcher) == [1, 2]


def test_two_threads_get_every_pack_once():
    got, turns = [], threading.Barrier(4)

    def take():
        turns.wait()
        for pack in prefetcher:
            got.append(pack)
            time.sleep(0)

    with Prefetcher(range(400), lambda pack: time.sleep(0) or pack, device="cpu") as prefetcher:
        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS_AFTER_S)
        assert prefetcher.state_dict() == {"next_pack": 400}
    assert sorted(got) == list(range(400))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_is_told_to_make_its_own():
    with Prefetcher(range(9), int, device="cpu") as prefetcher:
        assert next(prefetcher) == 0
        with warnings.catch_warnings():
            # Python warns of forks beside threads: that is what this test is about.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            signal.alarm(20)  # in place of hanging
            try:
                next(prefetcher)
            except RuntimeError as error:
                os._exit(0 if "forked" in str(error) else 2)
            os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert next(prefetcher) == 1


AT_THE_END = """
import threading, time
from step37_data.prefetch import Prefetcher
from step37_data.common.threads import map_threads

began = threading.Event()

def prepare(pack):
    began.set()
    {work}
    print("prepared", pack, flush=True)
    return pack

prefetcher = Prefetcher(range(9), prepare, depth=8, device="cpu")
began.wait()
print("leaving", time.monotonic(), flush=True)
"""


@pytest.mark.parametrize(
    ("work", "prepared"),
    [
        ("threading.Event().wait()", 0),
        ("map_threads(lambda _: threading.Event().wait(), [1, 2], 2)", 0),
        ("time.sleep(0.3)", 1),
    ],
    ids=["stuck", "stuck in decoding", "busy"],
)
def test_leaving_the_interpreter_waits_for_one_pack_and_a_second_at_most(work, prepared):
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END.format(work=work)],
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        check=False,
    )
    left = time.monotonic() - float(re.search(r"leaving ([\d.]+)", done.stdout)[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prepared") == prepared, done.stdout
    assert left < 60  # a second, and what a busy machine takes to end a process with torch in it


def test_an_error_leaves_the_block_though_a_pack_is_stuck():
    began, go = threading.Event(), threading.Event()

    def stuck(pack):
        began.set()
        assert go.wait(HANGS_AFTER_S)
        return pack

    def fail():
        with Prefetcher(range(9), stuck, device="cpu"):
            assert began.wait(HANGS_AFTER_S)
            raise KeyError

    start = time.monotonic()
    with pytest.raises(KeyError):
        fail()
    assert time.monotonic() - start < HANGS_AFTER_S
    go.set()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: streams")
def test_inputs_are_ready_for_the_callers_stream_and_live_as_long_as_it_needs_them(packs):
    expected = [prepare(pack)["images"][0].images.float().sum() for pack in packs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    sums = []
    with torch.cuda.stream(side), Prefetcher(packs, prepare, depth=3) as prefetcher:
        for one in prefetcher:
            torch.cuda._sleep(5_000_000)
            sums.append(one["images"][0].images.float().sum())
            del one
    side.synchronize()
    assert [float(s) for s in sums] == [float(e) for e in expected]


def test_closing_prepares_nothing_that_had_not_begun():
    made, began, go = [], threading.Event(), threading.Event()

    def prepare_slowly(pack):
        made.append(pack)
        began.set()
        assert go.wait(HANGS_AFTER_S)
        return pack

    prefetcher = Prefetcher(list(range(9)), prepare_slowly, depth=4, device="cpu")
    assert began.wait(HANGS_AFTER_S)
    threading.Timer(0.1, go.set).start()
    prefetcher.close()
    assert made == [0]
    with pytest.raises(StopIteration):
        next(prefetcher)


# ---- in the place of an iterator


@given(
    actions=st.lists(st.sampled_from(["use", "skip", "use twice", "close"]), max_size=12),
    depth=st.integers(1, 4),
    broken=st.sets(st.integers(0, 15)),
)
def test_whoever_takes_packs_gets_them_in_order_whatever_is_read_ahead(actions, depth, broken):
    def prepare(pack: int) -> int:
        if pack in broken:
            raise ValueError(f"broken {pack}")
        return 10 * pack

    ahead = ReadAhead(iter(range(16)), prepare, depth=depth, device="cpu")
    expected = iter(range(16))
    for action in actions:
        if action == "close":
            ahead.close()
            continue
        pack = next(ahead)
        assert pack == next(expected)
        for _ in range({"use": 1, "use twice": 2, "skip": 0}[action]):
            if pack in broken:
                with pytest.raises((PackError, ValueError), match=f"broken {pack}"):
                    ahead.prepared(pack)
            else:
                assert ahead.prepared(pack) == 10 * pack
    ahead.close()
    assert list(ahead) == list(expected)


def test_what_the_replaced_iterator_raises_is_raised_as_it_is():
    def packs():
        yield 1
        raise OSError("disk")

    ahead = ReadAhead(packs(), str, depth=2, device="cpu")
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk"):
        next(ahead)
    ahead.close()


@pytest.mark.parametrize("kind", [Prefetcher, ReadAhead])
def test_an_unfinished_prefetcher_is_let_go_though_a_pack_that_waits_has_failed(kind):
    def prepare(pack):
        if pack == 1:
            raise ValueError("bad")
        return pack

    ahead = kind(iter([0, 1, 2, 3]), prepare, depth=2, device="cpu")
    next(ahead)
    time.sleep(0.1)
    gone = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None
    assert not any(thread.name == "step37-prefetch" for thread in threading.enumerate())


def test_what_a_failed_pack_held_is_let_go_with_its_error():
    held = []

    def prepare(pack):
        memory = torch.zeros(8)
        held.append(weakref.ref(memory))
        raise ValueError(f"bad {pack}")

    def met(prefetcher):
        with pytest.raises(PackError, match="bad"):
            next(prefetcher)

    gc.collect()
    gc.disable()
    try:
        with Prefetcher([0, 1, 2], prepare, depth=1, device="cpu") as prefetcher:
            for _ in range(3):
                met(prefetcher)
            assert [memory() for memory in held] == [None] * 3
    finally:
        gc.enable()


def test_an_error_of_the_device_costs_no_pack(monkeypatch):
    failures = iter([RuntimeError("CUDA error")] * 2)

    def current(stream):
        if error := next(failures, None):
            raise error
        return contextlib.nullcontext(stream)

    monkeypatch.setattr(prefetch, "_current", current)
    with Prefetcher([1, 2, 3], int, device="cpu") as prefetcher:
        for _ in range(2):
            with pytest.raises(PackError, match="pack 0: RuntimeError: CUDA error"):
                next(prefetcher)
        assert prefetcher.state_dict() == {"next_pack": 0}
        assert list(prefetcher) == [1, 2, 3]


class Saving:
    """Packs 0, 1, … with a state: how many of those that were read are used."""

    def __init__(self):
        self.read = 0
        self.used = lambda: self.read

    def __iter__(self):
        return self

    def __next__(self):
        self.read += 1
        return self.read - 1

    def read_ahead_by(self, count_used):
        self.used = count_used

    def save_state(self):
        return self.used()


def test_a_state_counts_the_packs_given_on_and_not_those_read_ahead():
    packs = Saving()
    ahead = ReadAhead(packs, str, depth=3, device="cpu")
    for pack in range(5):
        assert ahead.save_state() == pack
        assert next(ahead) == pack
    ahead.close()
    assert ahead.save_state() == 5
    assert not hasattr(ReadAhead(iter([1]), str, depth=1, device="cpu"), "save_state")


def test_one_that_counts_for_its_packs_is_let_go_with_its_thread():
    packs = Saving()
    ahead = ReadAhead(packs, str, depth=2, device="cpu")
    next(ahead)
    gone = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None
    assert not prefetch_threads()


def test_closing_wakes_a_thread_that_waits_for_a_stuck_pack():
    began, go, ended = threading.Event(), threading.Event(), threading.Event()

    def stuck(pack):
        began.set()
        assert go.wait(HANGS_AFTER_S)
        return pack

    def take():
        assert list(prefetcher) == []
        ended.set()

    prefetcher = Prefetcher(range(9), stuck, device="cpu")
    thread = threading.Thread(target=take)
    thread.start()
    assert began.wait(HANGS_AFTER_S)
    prefetcher.close(wait_s=0.01)
    assert ended.wait(HANGS_AFTER_S)
    go.set()
    thread.join(HANGS_AFTER_S)


def test_text_and_bytes_in_a_model_input_are_no_sequences_of_tensors():
    # A string is a sequence of strings: looked into, it would never end.
    model_input = {"name": "pack", "paths": ["a.jpg", b"bytes"], "input_ids": torch.zeros(1)}
    assert list(_cuda_tensors(model_input)) == []
