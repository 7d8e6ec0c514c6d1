"""What the host does for a call, counted without a GPU."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.checks import run_compiling


def test_launches_are_counted_and_every_operation_has_a_time(tmp_path: Path) -> None:
    done = run_compiling("-m", "bench", "host", "--rounds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[4:]]
    assert [(name, int(launches)) for name, launches, *_ in rows] == [
        ("plan", 1),
        ("project and insert", 1),
        ("project and insert, channels-first", 2),
        ("project and insert, and backward to the embeddings", 2),
    ]
    assert all(float(host_us) > 0 for *_, host_us in rows)
