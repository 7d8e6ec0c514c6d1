from __future__ import annotations

from typing import Any

import pytest

from bench import report, targets
from bench.harness import Kind
from bench.shapes import SHAPES
from bench.subjects import pixel_kernels
from bench.subjects.pixel_kernels import BATCHES


def record(name: str, kind: Kind, microseconds: float, **fields: Any) -> report.Record:
    return {
        "subject": "insert",
        "operation": "forward",
        "shape": "flickr8k",
        "variant": "contiguous",
        "dtype": "bf16",
        "implementation": name,
        "kind": kind,
        "median_us": microseconds,
        "host_syncs": None,
        "peak_bytes": None,
        **fields,
    }


def judged(*records: report.Record) -> dict[str, tuple[float, str]]:
    groups = list(report.grouped(records))
    return {target.text: (worst, where) for target, worst, where in targets.judge(groups)}


def test_the_worst_group_speaks_for_a_target() -> None:
    found = judged(
        record("step37", "ours", 104.0),
        record("GEMM alone", "floor", 100.0),
        record("step37", "ours", 440.0, shape="long"),
        record("GEMM alone", "floor", 400.0, shape="long"),
        record("step37", "ours", 300.0, shape="multicrop"),
        record("GEMM alone", "floor", 100.0, shape="multicrop"),
    )
    text = "forward / GEMM alone, R ≥ 1521 (≤ 1.05 accepted)"
    assert found == {text: (pytest.approx(3.0), "multicrop, contiguous, bf16, forward")}


def test_the_fastest_peer_counts_whether_compiled_or_not() -> None:
    fields = {"operation": "forward+backward"}
    found = judged(
        record("step37", "ours", 100.0, **fields),
        record("stock", "stock", 400.0, **fields),
        record("torch.compile index_copy", "peer", 120.0, **fields),
        record("torch.compile masked_scatter", "peer", 200.0, **fields),
        record("index_copy", "peer", 250.0, **fields),
        record("GEMM alone", "floor", 80.0, **fields),
    )
    assert {text: worst for text, (worst, _) in found.items()} == {
        "forward + backward / stock, flickr8k": pytest.approx(0.25),
        "forward + backward / three GEMMs alone": pytest.approx(1.25),
        "fastest peer, torch.compile included": pytest.approx(100 / 120),
    }


def test_memory_is_compared_with_the_output_and_syncs_are_counted() -> None:
    shape = SHAPES["flickr8k"]
    output = 2 * shape.seq_len * shape.hidden
    found = judged(
        record("step37", "ours", 90.0, peak_bytes=1.25 * output, host_syncs=0),
        record("step37 kernel alone", "ours", 95.0, peak_bytes=output, host_syncs=2),
        record("stock", "stock", 100.0, peak_bytes=3 * output, host_syncs=18),
    )
    assert found["peak memory of forward / its output"][0] == pytest.approx(1.25)
    assert found["host synchronisations"][0] == 2
    assert found["fastest peer, torch.compile included"][0] == pytest.approx(0.9)


def test_pixels_are_held_to_a_copy_of_as_many_bytes() -> None:
    fields = {"variant": "", "subject": "resize", "operation": "resize+normalize"}
    found = judged(
        record("step37", "ours", 90.0, shape="64 × 500×375 → 728", **fields),
        record("copy of as many bytes", "floor", 60.0, shape="64 × 500×375 → 728", **fields),
        record("step37", "ours", 90.0, shape="9 × 500×375 → 728", **fields),
        record("copy of as many bytes", "floor", 9.0, shape="9 × 500×375 → 728", **fields),
    )
    text = "resize+normalize / copy of as many bytes"
    assert found == {text: (pytest.approx(1.5), "64 × 500×375 → 728, bf16, resize+normalize")}


def test_a_target_speaks_of_shapes_that_its_subject_has() -> None:
    sizes = {f"{count} × {pixel_kernels.SIZE}×{pixel_kernels.SIZE}" for count in BATCHES}
    width, height = pixel_kernels.FLICKR8K
    sizes |= {f"{count} × {width}×{height} → {pixel_kernels.SIZE}" for count in BATCHES}
    for target in targets.TARGETS:
        assert set(target.shapes) <= (SHAPES.keys() if target.subject == "insert" else sizes)


def test_a_run_of_other_subjects_speaks_to_no_target() -> None:
    assert judged(record("step37", "ours", 1.0, subject="step")) == {}


def test_the_report_says_which_targets_are_met() -> None:
    rows = [record("step37", "ours", 104.0), record("GEMM alone", "floor", 100.0)]

    def line() -> str:
        return report.targets({"rows": rows})[-1]

    assert line() == (
        "| forward / GEMM alone, R ≥ 1521 (≤ 1.05 accepted) | ≤ 1 | 1.04 "
        "| flickr8k, contiguous, bf16, forward | accepted |"
    )
    rows[0]["median_us"] = 106.0
    assert line().endswith("| missed |")
    rows[0]["median_us"] = 100.0
    assert line().endswith("| met |")
