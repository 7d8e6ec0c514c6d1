"""``bench tune`` without a GPU: candidates, advice, and its rows in the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.harness import Key, Row, Settings, Work
from bench.resources import SHARED_LIMIT, only
from bench.shapes import Shape
from bench.subjects import tune
from step37_kernels.ops import project, tiles
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.ops.tiles import Tile

SMALL = Tile(16, 32, 32, 4, 2)


def test_the_family_keeps_to_the_limits_of_the_chip() -> None:
    family = list(tune.family())
    assert len({dataclasses.astuple(tile) for tile in family}) == len(family)
    for tile in family:
        stage = (tile.block_m + tile.block_n) * tile.block_k * 2
        assert stage * tile.num_stages <= SHARED_LIMIT["sm_90"]
        assert 32 <= tile.block_m * tile.block_n // (32 * tile.num_warps) <= 192
    values = {(tile.block_m, tile.block_n, tile.block_k) for tile in family}
    for rows in range(1, 8192, 64):
        entry = tiles.entry(rows, torch.bfloat16, 90)
        assert (entry.block_m, entry.block_n, entry.block_k) in values


@pytest.mark.parametrize("rows", [169, 1521, 6591])
def test_candidates_are_few_of_different_blocks_and_the_entrys_are_among_the_first(
    rows: int,
) -> None:
    found = tune.candidates(rows)
    assert len(found) == tune.TRIED
    blocks = [(tile.block_m, tile.block_n) for tile in found]
    assert len(set(blocks)) == len(blocks)
    entry = tiles.entry(rows, torch.bfloat16, 90)
    assert (entry.block_m, entry.block_n) in blocks[:4]


def test_the_tile_is_the_tables_again_however_a_block_ends() -> None:
    table = project.insert_tile
    with only(SMALL):
        assert project.insert_tile((), torch.empty(0)) is SMALL
    with pytest.raises(KeyError), only(SMALL):
        raise KeyError
    assert project.insert_tile is table


def test_a_tile_that_does_not_compile_is_left_out_and_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the processes compile
    good = Tile(64, 64, 64, 4, 3)
    odd = Tile(64, 64, 48, 4, 3)
    assert tune.sound([good, odd]) == [good]
    out = capsys.readouterr().out
    assert out.startswith("left out: 64×64×48, 4 warps, 3 stages: does not compile: ")


@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")
def test_each_tile_has_a_row_that_passes_the_gate_and_a_wrong_one_has_no_time(
    tiny: Shape, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "entry", lambda *_: SMALL)
    other, wrong = (dataclasses.replace(SMALL, num_warps=warps) for warps in (2, 8))
    right = project.project_insert

    def sometimes_wrong(*arguments: object) -> torch.Tensor:
        out = right(*arguments)
        if project.insert_tile((), torch.empty(0)) is wrong:
            out[-2] += 1
        return out

    monkeypatch.setattr(project, "project_insert", sometimes_wrong)
    shape = dataclasses.replace(tiny, hidden=64, width=64)
    rows = tune.run_shape(shape, [other, wrong], settings)
    assert [row.implementation for row in rows] == [
        "the table's 16×32×32, 4 warps, 2 stages",
        "16×32×32, 2 warps, 2 stages",
        "16×32×32, 8 warps, 2 stages",
        "GEMM alone",
    ]
    assert [row.median_us is not None for row in rows] == [True, True, False, True]
    assert rows[2].problem is not None
    assert rows[2].problem.startswith("failed the gate: output: ")


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ((100.0, 99.0, None), "the table's A stays, 100.0 µs; the fastest takes 99.0 µs"),
        ((100.0, 90.0, 95.0), "take B, 90.0 µs, for the table's A, 100.0 µs"),
        ((None, 90.0, 80.0), "take C, 80.0 µs, for the table's A, which failed"),
        ((None, None, None), "nothing was timed"),
    ],
)
def test_advice_changes_the_table_only_for_a_gain(times, text: str) -> None:
    key = Key(subject="tune", operation="forward", shape="", variant="", dtype="bf16")
    row = Row(key=key, work=Work(flops=1, bytes=1, rows=9), implementation="", kind="peer")
    names = ("the table's A", "B", "C")
    rows = [
        dataclasses.replace(row, implementation=name, median_us=us)
        for name, us in zip(names, times, strict=True)
    ]
    rows.append(dataclasses.replace(row, implementation="GEMM alone", kind="floor", median_us=1.0))
    assert tune.advice(rows) == text
