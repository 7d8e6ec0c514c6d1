from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import harness
from bench.harness import (
    LATE,
    MIN_SAMPLES,
    CpuClock,
    CudaClock,
    Implementation,
    Key,
    Kind,
    Settings,
    Work,
    clock_for,
    device_state,
    environment,
    measure,
    measure_ceilings,
)

KEY = Key(subject="s", operation="o", shape="x", variant="", dtype="fp32")
WORK = Work(flops=10, bytes=100, rows=1)


def implementation(
    name: str, run: Any = lambda state: state, kind: Kind = "peer", prepare: Any = int
) -> Implementation:
    return Implementation(name=name, kind=kind, prepare=prepare, run=run)


def accept(_: Implementation, __: object) -> None:
    return None


def test_every_implementation_is_timed_and_its_spread_is_ordered(settings: Settings) -> None:
    rows = measure(
        KEY, WORK, [implementation("a"), implementation("b")], check=accept, settings=settings
    )
    assert [row.implementation for row in rows] == ["a", "b"]
    for row in rows:
        assert row.problem is None
        assert row.samples >= MIN_SAMPLES
        assert 0 <= row.p20_us <= row.median_us <= row.p80_us


def test_a_slower_call_measures_slower(settings: Settings) -> None:
    pause = implementation("pause", lambda _: time.sleep(0.002))
    quick, slow = measure(
        KEY, WORK, [implementation("quick"), pause], check=accept, settings=settings
    )
    assert quick.median_us < 2000 <= slow.median_us


def test_samples_of_the_implementations_alternate_and_inputs_rotate(settings: Settings) -> None:
    calls: list[tuple[str, int]] = []

    def recording(name: str) -> Implementation:
        return implementation(name, lambda i: calls.append((name, i)))

    measure(KEY, WORK, [recording("a"), recording("b")], check=accept, settings=settings)
    rounds = calls[-2 * MIN_SAMPLES :]
    assert [name for name, _ in rounds] == ["a", "b"] * MIN_SAMPLES
    numbers = [i for name, i in rounds if name == "a"]
    assert numbers == list(range(numbers[0], numbers[0] + MIN_SAMPLES))


def test_a_row_that_fails_its_gate_is_reported_and_not_timed(settings: Settings) -> None:
    calls = []

    def check(one: Implementation, _: object) -> str | None:
        return "wrong by 3" if one.name == "wrong" else None

    wrong = implementation("wrong", calls.append, kind="ours")
    rows = measure(KEY, WORK, [wrong, implementation("right")], check=check, settings=settings)
    assert rows[0].problem == "failed the gate: wrong by 3"
    assert rows[0].median_us is None
    assert calls == [0]
    assert rows[1].median_us is not None


def test_an_error_of_a_competitor_is_its_rows_problem(settings: Settings) -> None:
    def crash(_: object) -> None:
        raise torch.OutOfMemoryError("no memory left\nand more")

    rows = measure(
        KEY,
        WORK,
        [implementation("x", crash), implementation("y")],
        check=accept,
        settings=settings,
    )
    assert rows[0].problem == "OutOfMemoryError: no memory left"
    assert rows[1].problem is None


def test_any_error_of_a_competitor_is_its_rows_problem(settings: Settings) -> None:
    def give_up(_: object) -> None:
        raise AssertionError

    rows = measure(
        KEY,
        WORK,
        [implementation("x", give_up), implementation("y")],
        check=accept,
        settings=settings,
    )
    assert rows[0].problem == "AssertionError: "
    assert rows[1].problem is None


def test_an_error_of_ours_ends_the_run(settings: Settings) -> None:
    def crash(_: object) -> None:
        raise RuntimeError("illegal access")

    with pytest.raises(RuntimeError, match="illegal access"):
        measure(
            KEY, WORK, [implementation("x", crash, kind="ours")], check=accept, settings=settings
        )


def test_host_time_is_taken_on_a_settled_device(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(CpuClock):
        """A device that is busy from a sample on until somebody waits for it."""

        busy = False

        def sample(self, one: Implementation, i: int) -> Callable[[], float]:
            Busy.busy = True
            return super().sample(one, i)

        def settle(self) -> None:
            Busy.busy = False

    def wait(_: object) -> None:
        if Busy.busy:
            time.sleep(0.01)

    monkeypatch.setattr(harness, "clock_for", lambda _: Busy())
    (row,) = measure(KEY, WORK, [implementation("stock", wait)], check=accept, settings=settings)
    assert row.host_us is not None
    assert row.median_us is not None
    assert row.host_us < 5000 < row.median_us


def test_preparation_is_not_timed(settings: Settings) -> None:
    def prepare(i: int) -> int:
        time.sleep(0.002)
        return i

    (row,) = measure(
        KEY, WORK, [implementation("a", prepare=prepare)], check=accept, settings=settings
    )
    assert row.median_us < 2000


def test_past_the_deadline_nothing_runs(settings: Settings) -> None:
    late = dataclasses.replace(settings, deadline=time.perf_counter() - 1)
    calls: list[int] = []
    (row,) = measure(KEY, WORK, [implementation("a", calls.append)], check=accept, settings=late)
    assert row.problem == LATE
    assert calls == []


@pytest.mark.parametrize(
    ("times", "wanted"), [([3.0], [3.0, 3.0, 3.0]), ([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], [2, 3.5, 5])]
)
def test_the_spread_is_that_of_the_times_in_order(times, wanted) -> None:
    assert harness.spread(times) == wanted


def test_ceilings_and_environment_are_measured_and_named(settings: Settings) -> None:
    ceilings = measure_ceilings(settings)
    assert ceilings.copy_bytes_per_s > 0
    assert ceilings.flops_per_s.keys() == {"fp32"}
    found = environment(settings.device)
    assert found["torch"] == torch.__version__
    assert {"device", "commit", "driver", "cuda", "triton", "python", "date"} <= found.keys()


def test_clocks_and_power_that_nobody_reports_are_said_to_be_so() -> None:
    state = device_state(torch.device("cpu"))
    assert {"clocks.sm", "power.draw", "temperature.gpu"} <= state.keys()
    assert set(state.values()) == {"not reported"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clocks_and_power_are_reported_while_the_gpu_works() -> None:
    state = device_state(torch.device("cuda"))
    if shutil.which("nvidia-smi"):
        assert int(state["clocks.sm"].removesuffix(" MHz")) > 300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_on_the_gpu_are_those_of_the_call() -> None:
    clock = clock_for(torch.device("cuda"))
    assert isinstance(clock, CudaClock)
    x = torch.rand(2**20, device="cuda")
    counts = clock.count(implementation("add", lambda _: x + 1))
    assert counts == {
        "host_syncs": 0,
        "launches": 1,
        "peak_bytes": x.nbytes,
        "kept_bytes": x.nbytes,
    }
    counts = clock.count(implementation("twice", lambda _: x.exp().sum()))
    assert counts["peak_bytes"] - counts["kept_bytes"] >= x.nbytes
    counts = clock.count(implementation("item", lambda _: (x.sum().item(), x[0].item())))
    assert counts["host_syncs"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_on_the_gpu_takes_the_time_of_its_bytes() -> None:
    settings = Settings(device=torch.device("cuda"), row_seconds=0.05)
    ceilings = measure_ceilings(settings)
    source = torch.rand(2**27, device="cuda")
    target = torch.empty_like(source)
    copy = implementation("copy", lambda _: target.copy_(source))
    (row,) = measure(KEY, WORK, [copy], check=accept, settings=settings)
    assert row.median_us == pytest.approx(2e6 * source.nbytes / ceilings.copy_bytes_per_s, rel=0.1)
