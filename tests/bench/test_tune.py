"""``bench tune`` without a GPU: its candidates, its choice, and the whole of it in the interpreter
with a clock that makes its figures up."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.harness import LATE, CpuClock, Implementation
from bench.resources import SHARED_LIMIT
from bench.tune import __main__ as tune
from bench.tune.compile_pool import Usage, compile_all, request
from bench.tune.products import only
from bench.tune.table import Chip, Extents, accumulators, candidates, describe, propose, source
from step37_kernels.ops import project_backward, tiles
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.ops.tiles import Tile, _Buckets, _table

HOPPER = Chip(90, 132, SHARED_LIMIT["sm_90"])
CHIPS = (
    HOPPER,
    Chip(80, 108, SHARED_LIMIT["sm_80"]),
    Chip(89, 128, 99 * 1024),
    Chip(100, 148, SHARED_LIMIT["sm_100"]),
)
A, B, C = (Tile(64, 64, 64, 8, 4, stages) for stages in (3, 4, 5))


def values(table: dict[str, _Buckets]) -> dict[str, object]:
    """A table by value: tiles are compared by identity."""
    return {
        product: (buckets.bounds, [dataclasses.astuple(tile) for tile in buckets.tiles])
        for product, buckets in table.items()
    }


def considered(chip: Chip) -> list[tuple[str, int, Tile, list[Tile]]]:
    """Product, rows, present tile and candidates at everything timed by default."""
    found = []
    for product, buckets in _table(chip.capability, 2).items():
        for rows in tune.ROWS:
            extents = Extents.of(product, rows, 4096, 6144)
            present = buckets.pick(rows)
            found.append((product, rows, present, candidates(product, extents, chip, present)))
    return found


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.capability}")
def test_candidates_keep_to_the_limits_of_the_chip(chip: Chip) -> None:
    for product, rows, present, found in considered(chip):
        assert found[0] is present
        assert len({dataclasses.astuple(tile) for tile in found}) == len(found)
        assert len(found) <= 84
        for tile in found:
            block = (tile.block_m + tile.block_n) * tile.block_k * 2
            assert block * tile.num_stages <= chip.shared
            assert accumulators(tile) <= 128
            if chip.capability != 90:
                assert not tile.tma
                assert not tile.persistent
            if not product.endswith("weight"):
                assert tile.block_m < 2 * max(rows, 64)
            extents = Extents.of(product, rows, 4096, 6144)
            if tile.split_k > 1:
                assert not product.endswith("weight")
                assert extents.tiles(tile.block_m, tile.block_n) < chip.processors
            if tile.persistent and tile is not present:
                assert extents.tiles(tile.block_m, tile.block_n) > chip.processors


def test_candidates_vary_everything_and_every_tile_of_the_present_table_is_among_them() -> None:
    everything = considered(HOPPER)
    at_least = {rows: len(found) for product, rows, _, found in everything if product == "forward"}
    assert all(count >= (24 if rows <= 64 else 40) for rows, count in at_least.items())
    by_field = {
        field.name: {getattr(tile, field.name) for *_, found in everything for tile in found}
        for field in dataclasses.fields(Tile)
    }
    assert by_field == {
        "block_m": {64, 128, 256},
        "block_n": {64, 128, 256},
        "block_k": {32, 64, 128},
        "group_m": {4, 8, 16},
        "num_warps": {4, 8},
        "num_stages": {3, 4, 5},
        "tma": {False, True},
        "persistent": {False, True},
        "split_k": {1, 2, 3, 4},
        "subtiles": {1, 2},
    }
    for product, buckets in _table(90, 2).items():
        seen = {tile for other, _, _, found in everything if other == product for tile in found}
        assert set(buckets.tiles) <= seen


PRESENT = {"forward": _Buckets((100, 1000), (A, B, A))}


@pytest.mark.parametrize(
    ("times", "bounds", "chosen"),
    [
        pytest.param({}, (100, 1000), (A, B, A), id="nothing timed"),
        pytest.param(
            {64: {A: 10.0, C: 10.0}, 300: {B: 10.19, C: 10.0}},
            (100, 1000),
            (A, B, A),
            id="ties and gains under two percent leave the present tile",
        ),
        pytest.param(
            {64: {A: 10.2, C: 10.0}, 300: {B: 10.0, C: 9.0}},
            (1000,),
            (C, A),
            id="two percent change it, and equal neighbours are one bucket",
        ),
        pytest.param(
            {200: {A: 5.0, B: 9.0}, 800: {A: 9.0, B: 5.0}},
            (384, 1000),
            (A, B, A),
            id="within a bucket a bound lies between the row counts, at whole blocks",
        ),
        pytest.param(
            {210: {A: 9.0, B: 9.0}, 220: {B: 9.0, C: 5.0}},
            (100, 214, 1000),
            (A, B, C, A),
            id="or at their mean where no whole block lies between",
        ),
        pytest.param(
            {300: {C: 5.0}, 600: {A: 9.9, C: 10.0}, 2000: {A: 10.0}},
            (100, 1000),
            (A, C, A),
            id="where the present tile failed, the tile before is preferred to a small gain",
        ),
        pytest.param(
            {50: {C: 5.0, A: 9.0}, 3000: {C: 5.0, A: 9.0}},
            (100, 1000),
            (C, B, C),
            id="a bucket where nothing was timed stays",
        ),
    ],
)
def test_a_proposal_changes_tiles_only_for_a_gain(times, bounds, chosen) -> None:
    expected = {"forward": _Buckets(bounds, chosen)}
    assert values(propose({"forward": times}, PRESENT)) == values(expected)


def run_source(text: str) -> dict[str, dict[str, _Buckets]]:
    """What pasting a proposal into ops/tiles.py would define."""
    names = {name: getattr(tiles, name) for name in ("Product", "Tile", "_Buckets")}
    before = set(names) | {"__builtins__", "__annotations__"}
    exec(text, names)
    return {name: value for name, value in names.items() if name not in before}


@pytest.mark.parametrize("capability", [80, 90])
def test_printed_source_defines_the_table_it_was_printed_from(capability: int) -> None:
    table = _table(capability, 2)
    text = source("_NAME", table, ["word " * 60])
    assert max(map(len, text.splitlines())) <= 100
    ((name, defined),) = run_source(text).items()
    assert name == "_NAME"
    assert values(defined) == values(table)


def test_the_tile_is_the_tables_again_however_a_block_ends() -> None:
    table = tiles.pick
    with only(A):
        assert tiles.pick("forward", 1, torch.bfloat16, torch.device("cpu")) is A
    with pytest.raises(KeyError), only(A):
        raise KeyError
    assert tiles.pick is table


class MadeUp(CpuClock):
    """A clock that runs nothing."""

    def __init__(self, us: Callable[[str], float]) -> None:
        self._us = us
        super().__init__()
        self.sampled: list[str] = []

    def warm_up(self, implementation: Implementation) -> None:
        self.host_us[implementation.name] = 1.0

    def sample(self, implementation: Implementation, i: int) -> Callable[[], float]:
        implementation.prepare(i)
        self.sampled.append(implementation.name)
        return lambda: self._us(implementation.name)


def target(clock: CpuClock) -> tune.Target:
    chip = dataclasses.replace(HOPPER, processors=2)
    return tune.Target(device=torch.device("cpu"), chip=chip, clock=clock, hidden=72, width=136)


def few(product, extents, chip, present):
    """Candidates of each kind; all of them would take the interpreter half a minute."""
    found = candidates(product, extents, chip, present)
    kinds = {(t.tma, t.persistent, t.split_k > 1, t.subtiles): t for t in found[1:]}
    return [present, *kinds.values()]


interpreted = pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")


@interpreted
def test_the_command_times_every_product_and_prints_a_table_to_paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "candidates", few)
    monkeypatch.setattr(tune, "FINAL_SECONDS", 0)

    def us(name: str) -> float:
        return 5.0 if "persistent" in name else 8.0 if name == tune.CUBLAS else 10.0

    arguments = ["--rows", "169,90", "--out", str(tmp_path), "--dtype", "fp16"]
    assert tune.main(arguments, target(MadeUp(us))) == 0
    out = capsys.readouterr().out
    assert "forward, 90 rows, fp16" in out
    assert "accumulate_weight, 169 rows, fp16" in out
    assert out.index("90 rows") < out.index("169 rows")
    best = next(line for line in out.splitlines() if " persistent" in line)
    assert best.split()[0] == "5.0"
    assert best.split()[2:4] == ["0.625", "0.500"]
    start = out.index("# Proposed by")
    printed = out[start : out.index("written:")]
    ((name, proposed),) = run_source(printed).items()
    assert name == "_HOPPER"
    assert proposed.keys() == _table(90, 2).keys()
    for product, buckets in proposed.items():
        assert [buckets.pick(rows).persistent for rows in (90, 169)] == [True, True]
        # Beyond 169 rows nothing was timed.
        assert describe(buckets.tiles[-1]) == describe(_table(90, 2)[product].tiles[-1])
    (path,) = tmp_path.glob("*.json")
    assert str(path) in out
    record = json.loads(path.read_text())
    assert record["proposal"].strip() == printed.strip()
    assert {"device", "driver", "torch", "triton", "commit"} <= record["environment"].keys()
    assert {row["operation"] for row in record["rows"]} == set(tune.PRODUCTS)


@interpreted
def test_a_tile_that_is_wrong_or_does_not_run_is_reported_and_not_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = project_backward.grad_features

    def often_right(*arguments):
        tile = tiles.pick("grad_features", 1, torch.bfloat16, torch.device("cpu"))
        if tile.subtiles == 2:
            raise tune.TritonError("out of resources")
        result = right(*arguments)
        if tile.persistent:
            result[-1, -1] += 8
        return result

    def us(name: str) -> float:
        return 1.0 if "persistent" in name or "halves" in name else 10.0

    clock = MadeUp(us)
    monkeypatch.setattr(tune, "candidates", few)
    monkeypatch.setattr(tune, "FINAL_SECONDS", 0)
    monkeypatch.setattr(project_backward, "grad_features", often_right)
    arguments = ["--rows", "90", "--products", "grad_features", "--out", str(tmp_path)]
    assert tune.main(arguments, target(clock)) == 0
    out = capsys.readouterr().out
    refused = [line for line in out.splitlines() if "not proposed: " in line]
    assert any("persistent" in line and "failed the gate: off by " in line for line in refused)
    assert any("halves" in line and "TritonError: out of resources" in line for line in refused)
    assert not any("persistent" in name or "halves" in name for name in clock.sampled)
    printed = out[out.index("# Proposed by") : out.index("written:")]
    assert values(run_source(printed)["_HOPPER"]) == values(_table(90, 2))


@interpreted
def test_with_the_time_used_up_the_proposal_is_the_present_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rows", "64", "--budget", "0", "--out", str(tmp_path)]
    assert tune.main(arguments, target(CpuClock())) == 1
    out = capsys.readouterr().out
    assert f"grad_weight, 64 rows: {LATE}" in out
    printed = out[out.index("# Proposed by") : out.index("written:")]
    assert values(run_source(printed)["_HOPPER"]) == values(_table(90, 2))


def test_candidates_compile_without_a_gpu_and_one_that_cannot_is_told_apart() -> None:
    bf16 = torch.bfloat16
    good = Tile(128, 64, 64, 4, 4, 5, tma=True, split_k=2)
    big = Tile(256, 128, 64, 8, 8, 5, tma=True)
    odd = dataclasses.replace(good.by_pointers, block_k=48)
    requests = {
        "good": request("forward", good, bf16),
        "by pointers": request("grad_features", good.by_pointers, bf16),
        "odd": request("forward", odd, bf16),
        "the end of the compiler": json.dumps({"product": "forward", "dtype": "bf16"}),
        "big": request("grad_weight", big, bf16),
    }
    answers = compile_all(list(requests.values()), 90, time.perf_counter() + 120, workers=1)
    found = {name: answers[line] for name, line in requests.items()}
    assert isinstance(found["good"], Usage)
    assert found["good"].stack == 0
    assert 5 * (128 + 64) * 64 * 2 <= found["good"].shared <= HOPPER.shared
    assert isinstance(found["by pointers"], Usage)
    assert found["odd"].startswith("does not compile: CompilationError")
    assert found["the end of the compiler"] == "the compiler ended the process"
    assert found["big"].shared > HOPPER.shared


def test_past_the_deadline_nothing_is_compiled() -> None:
    line = request("forward", A, torch.bfloat16)
    begin = time.perf_counter()
    assert compile_all([line], 90, begin, workers=1) == {}
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, LATE),
        ("does not compile: why", "does not compile: why"),
        (Usage(255, 24, 1000), "spills 24 bytes a thread"),
        (Usage(128, 0, 232449), "needs 232449 bytes of shared memory"),
        (Usage(128, 0, 232448), None),
    ],
)
def test_what_a_kernel_takes_decides_whether_it_is_run(answer, problem) -> None:
    assert tune._problem(answer, HOPPER) == problem


def test_tune_runs_only_where_asked_for_and_takes_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda")
    assert "bench.tune" not in {one.module for one in command.runnable([], device)}
    (subject,) = command.runnable(["tune"], device)
    calls = []

    def run(arguments, **_):
        calls.append(arguments[1:])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(command.subprocess, "run", run)
    given = command.parse(["tune", "--rows", "64,81", "--dtype", "fp16", "--budget", "9"])
    assert command.run_program(subject, False, given)
    assert calls == [
        ["-m", "bench.tune", "--rows=64,81", "--dtype=fp16", "--budget=9.0", "--out=bench/results"]
    ]
    options = tune.parse(calls[0][2:])
    assert options.rows == [64, 81]
    assert options.products == list(tune.PRODUCTS)


def test_without_a_gpu_tune_says_that_it_needs_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 0
    assert command.main(["tune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "tune: needs an NVIDIA GPU, and there is none here",
        "tune: needs a CUDA device, and there is none here",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--products", "sideways"], "--products 'sideways': expected some of forward"),
        (["--rows", "0,64"], "--rows [0, 64]: expected numbers from 1 on"),
        (["--rows", "many"], "argument --rows: invalid"),
        (["--dtype", "fp32"], "--dtype 'fp32': expected one of bf16, fp16"),
    ],
)
def test_options_of_tune_that_do_not_exist_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_the_best_tile_is_described_whole() -> None:
    assert describe(Tile(64, 128, 64, 16, 4, 5, tma=True)) == (
        "64×128×64 TMA, 4 warps, 5 stages, group 16"
    )
