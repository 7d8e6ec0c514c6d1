from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.harness import Ceilings, Key, Kind, Row, Work

CEILINGS = Ceilings(copy_bytes_per_s=1e12, flops_per_s={"bf16": 1e14})
ENVIRONMENT = {"device": "a device", "driver": "", "date": "2000-01-01 00:00 UTC"}
# Limit: 100 µs at 1e14 FLOP/s; its bytes take 10 µs.
WORK = Work(flops=10**10, bytes=10**7, rows=169)


def row(name: str, kind: Kind, microseconds: float | None, shape: str = "one-image") -> Row:
    key = Key(
        subject="insert", operation="forward", shape=shape, variant="contiguous", dtype="bf16"
    )
    if microseconds is None:
        return Row(key=key, work=WORK, implementation=name, kind=kind, problem="failed the gate")
    return Row(
        key=key,
        work=WORK,
        implementation=name,
        kind=kind,
        median_us=microseconds,
        p20_us=microseconds - 1,
        p80_us=microseconds + 1,
        host_us=7.0,
        samples=9,
        host_syncs=0,
        launches=4,
        peak_bytes=3 * 2**19,
        kept_bytes=2**20,
    )


def some_rows() -> list[Row]:
    return [
        row("step37", "ours", 200.0),
        row("stock", "stock", 800.0),
        row("index_copy", "peer", 300.0),
        row("wrong", "peer", None),
        row("GEMM alone", "floor", 160.0),
    ]


def results(rows: list[Row]) -> report.Record:
    return report.to_json(rows, CEILINGS, ENVIRONMENT)


def test_ratios_compare_medians_of_one_group() -> None:
    records = results(some_rows())["rows"]
    found = [report.ratios(record, records, results([])["ceilings"]) for record in records]
    ours, stock, peer, wrong, floor = found
    assert ours == report.Ratios(stock=4.0, best_peer=1.5, gemm=1.25, limit=2.0)
    # Itself is no peer of anybody, and neither is ours.
    assert (stock.stock, stock.best_peer) == (None, 300 / 800)
    assert peer.best_peer == 800 / 300
    assert (wrong.stock, wrong.gemm, wrong.limit) == (None, None, None)
    assert (floor.stock, floor.best_peer) == (None, None)
    assert floor.gemm == 1.0


def test_the_limit_is_the_slower_of_moving_and_multiplying() -> None:
    ceilings = results([])["ceilings"]
    record = results([row("a", "ours", 1.0)])["rows"][0]
    assert report.limit_us(record, ceilings) == pytest.approx(100)
    assert report.limit_us({**record, "flops": 10**8}, ceilings) == pytest.approx(10)
    assert report.limit_us({**record, "flops": 0}, ceilings) == pytest.approx(10)
    assert report.limit_us({**record, "dtype": "fp32"}, ceilings) is None


def test_the_table_has_the_figures_and_the_reasons_for_their_absence() -> None:
    text, _, rest = report.markdown(results(some_rows())).partition("## Means")
    _, _, targets = rest.partition("## Targets: worst groups")
    assert "| host synchronisations | ≤ 0 | 0 |" in targets
    assert "- device: a device" in text
    assert "driver" not in text
    ours = next(line for line in text.splitlines() if "| step37 |" in line)
    assert [cell.strip() for cell in ours.strip("|").split("|")] == [
        "one-image", "contiguous", "bf16", "step37", "200.0 (199.0–201.0)", "50.0", "50", "4.00",
        "1.50", "1.25", "2.00", "7", "0", "4", "1.5", "0.5",
    ]  # fmt: skip
    wrong = next(line for line in text.splitlines() if "| wrong |" in line)
    assert "failed the gate" in wrong
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(report.COLUMNS) + 1}


def test_the_console_shows_a_group_as_a_table() -> None:
    title, _, header, _, *lines = report.console(some_rows(), CEILINGS).strip().splitlines()
    assert title == "insert · forward · one-image · contiguous · bf16"
    assert header.startswith("| implementation | µs (p20–p80) |")
    assert lines[0].startswith("| step37 | 200.0 (199.0–201.0) | 50.0 |")
    assert lines[3].startswith("| wrong | failed the gate |")
    assert {line.count("|") for line in (header, *lines)} == {len(report.COLUMNS) - 2}


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = results(some_rows())
    written = report.write(made, tmp_path / "new" / "run.1")
    assert {"run.1.json", "run.1.md"} <= {path.name for path in written}
    assert report.read(tmp_path / "new" / "run.1.json") == made


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"other\.json: not a file of benchmark results"):
        report.read(path)


def test_comparison_marks_changes_above_three_percent() -> None:
    old = results([row(name, "peer", 100.0) for name in "abcd"])
    new = results(
        [
            row("a", "peer", 102.9),
            row("b", "peer", 103.1),
            row("c", "peer", 90.0),
            row("d", "peer", None),
            row("e", "peer", 1.0),
        ]
    )
    new["environment"] = {**ENVIRONMENT, "device": "another device"}
    *lines, last = report.compare(old, new).splitlines()
    assert lines[0] == "device: a device before, another device now"
    assert [line.split()[-1] for line in lines[1:]] == ["a", "slower", "faster"]
    assert "× 1.031" in lines[2]
    assert last == "2 of 3 rows changed by more than 3%"


def test_means_are_geometric_and_of_our_rows_alone() -> None:
    rows = some_rows()
    for name, kind, us in (("step37", "ours", 800.0), ("GEMM alone", "floor", 160.0)):
        rows.append(row(name, kind, us, "long"))
    header, _, line = report.means(results(rows))
    assert header == "| geometric mean | shapes | × stock | × best peer | × GEMM | × limit |"
    # 1.25 and 5 over the product; only one of the two has a competitor.
    assert line == "| insert forward contiguous bf16 | 2 | 4.00 | 1.50 | 2.50 | 4.00 |"
    assert report.means(results(rows[1:5])) == []
