"""Pictures of benchmark results: every figure is in them, and every label can be read."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.harness import Ceilings, Key, Row, Work
from bench.report import read
from tests.inspect.test_inspect import check_lettering
from tools import bench_pictures

pytest.importorskip("matplotlib", reason="pictures need the extra plots")

# For trying the drawing; no device was measured.
NAMES = ("step37 triton", "stock", "torch eager", "torch.compile", "bare GEMM", "copy")
SHAPES = ("one-image", "flickr8k", "long", "huge", "multicrop")


def made_up() -> dict[str, Any]:
    rows = [
        {
            "subject": "insert", "operation": operation, "shape": shape, "variant": variant,
            "dtype": "bf16", "implementation": name, "rows": 169 * 4**i, "median_us": time,
            "p20_us": 0.9 * time, "p80_us": 1.2 * time, "flops": 8e9 * 4**i, "bytes": 6e7 * 2**i,
        }
        for operation in ("forward", "forward+backward")
        for variant in ("contiguous", "channels-first")
        for i, shape in enumerate(SHAPES)
        for j, name in enumerate(NAMES)
        for time in [20.0 * 4**i * (1 + j / 3)]
    ]  # fmt: skip
    rows[3] |= {"median_us": None}
    where = {"device": "a made-up device " * 4, "date": "2000-01-01", "commit": "0" * 40}
    ceilings = {"copy_bytes_per_s": 3e12, "flops_per_s": {"bf16": 7e14, "fp32": 5e13}}
    return {"environment": where, "ceilings": ceilings, "rows": rows}


def test_measured_rows_are_drawn_as_bars_and_a_roofline_with_legible_labels() -> None:
    drawn = dict(bench_pictures.pictures_of(made_up()))
    assert len(drawn) == 5
    for sheet in drawn.values():
        check_lettering(sheet)
    bars = drawn["insert-forward-contiguous-bf16"].axes[0]
    heights = [bar.get_height() for bar in bars.patches]
    assert len(heights) == len(SHAPES) * len(NAMES) - 1
    assert min(heights) == 20
    points = sum(len(group.get_offsets()) for group in drawn["roofline"].axes[0].collections)
    assert points == 4 * len(SHAPES) * len(NAMES) - 1


def test_the_fields_that_are_drawn_are_those_of_a_row() -> None:
    fields = {field.name for kind in (Row, Key, Work) for field in dataclasses.fields(kind)}
    assert set(made_up()["rows"][0]) <= fields
    assert set(made_up()["ceilings"]) == {field.name for field in dataclasses.fields(Ceilings)}


def test_predicted_rows_say_so_in_the_picture(tmp_path: Path) -> None:
    shapes = [f"images-{k}" for k in range(1, 5)]
    arguments = ["predict", f"--shapes={','.join(shapes)}", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    ((name, sheet),) = bench_pictures.pictures_of(read(path))
    assert name == "predicted"
    check_lettering(sheet)
    assert any("not measured" in text.get_text() for text in sheet.texts)
    assert [len(line.get_xdata()) for line in sheet.axes[0].lines[:4]] == [4] * 4


def test_the_command_writes_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made_up()))
    monkeypatch.setattr(sys, "argv", ["bench_pictures", str(path)])
    bench_pictures.main()
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert len(written) == 5
    assert all(file.parent == tmp_path and file.stat().st_size > 5000 for file in written)
