"""What the host does for a call, counted without a GPU."""

from __future__ import annotations

from pathlib import Path

from bench.subjects.host import Counts
from tests.kernels.checks import run_compiling


def rows(lines: list[str]) -> list[list[str]]:
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return cells[1:]  # without the head


def test_the_driver_that_launches_nothing_looks_at_arguments_only_while_it_counts() -> None:
    counts = Counts()
    counts.launch(1, 2)  # as while calls are timed
    assert counts.launches == 0
    assert counts.of(lambda: counts.launch(1, 2)) == (1, 0)
    assert counts.of(lambda: None) == (0, 0)


def test_launches_and_tensor_maps_are_counted_and_a_forward_is_taken_apart(tmp_path: Path) -> None:
    done = run_compiling("-m", "bench", "host", "--rounds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    calls, _, parts = done.stdout.partition("## Where the host's time goes")
    found = rows(calls.splitlines())
    # A tensor map of the features for each of the tile's two products, and one of the weight.
    assert [(name, int(launches), int(maps)) for name, launches, maps, *_ in found] == [
        ("module, forward, 1 picture", 3, 3),
        ("module, forward, 9 pictures", 2, 3),
        ("module, forward, 39 pictures", 3, 3),
        ("plan", 1, 0),
        ("project and insert", 2, 3),
        ("project and insert, channels-first", 3, 3),
        ("project and insert, and backward to the embeddings", 3, 3),
        ("embed, project and insert, and backward to the table", 5, 3),
    ]
    assert all(float(host_us) > 0 for *_, host_us in found)
    layers = {name: float(us) for name, us, _ in rows(parts.splitlines())}
    assert {"Triton's launcher", "descriptors for tensor maps", "autograd.Function"} < set(layers)
    assert all(us > 0 for us in layers.values())
