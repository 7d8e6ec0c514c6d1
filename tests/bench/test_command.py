from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import report, shapes
from bench.harness import Settings
from bench.shapes import Shape
from bench.subjects import plan, step


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def here(tiny: Shape, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """To measure the tiny shape only."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    return dataclasses.replace(settings, shapes=("tiny",))


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_subjects_that_need_one_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["insert", "plan", "step"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{name}: needs a CUDA device, and there is none here"
        for name in ("insert", "plan", "step")
    ]


@pytest.mark.usefixtures("no_gpu")
def test_programs_run_once_quickly_unless_asked_for_and_a_missing_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = command.Subject("calendar", program=True, quick=("--type", "text", "1999", "12"))
    subjects = {
        "one": program,
        "same": program,
        "none": command.Subject("bench.no_such_module", program=True),
    }
    monkeypatch.setattr(command, "SUBJECTS", subjects)
    assert command.main([]) == 0
    out = capfd.readouterr().out
    assert "none: not in this checkout (bench.no_such_module is missing)" in out
    assert out.count("December 1999") == 1
    assert command.main(["one"]) == 0
    assert "December 1999" not in capfd.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_a_program_that_fails_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = command.Subject("calendar", program=True, quick=("no year",))
    monkeypatch.setattr(command, "SUBJECTS", {"failing": failing})
    assert command.main(["--quick"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inserts"], "subject 'inserts': expected one of plan, step"),
        (["--dtype", "bf16,int8"], "--dtype 'int8': expected one of bf16, fp16, fp32"),
        (["--shapes", "tall"], "--shapes: shape 'tall': expected one of one-image"),
    ],
)
def test_what_does_not_exist_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("{", "results.json: not JSON"), ("{}", "not a file of benchmark")],
)
def test_what_cannot_be_compared_with_is_said_before_anything_is_measured(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    assert command.main(["plan", "--compare", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def measured_here(*modules: str, settings: Settings) -> report.Record:
    return command.measure_here([command.Subject(module) for module in modules], settings)


def test_rows_are_measured_written_and_compared(
    here: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.finish(measured_here("bench.subjects.plan", settings=here), tmp_path, None)
    (path,) = tmp_path.glob("*.json")
    earlier = report.read(path)
    assert [row["implementation"] for row in earlier["rows"]] == [
        "step37",
        "stock (starts only)",
        "PyTorch operations",
    ]
    table = path.with_suffix(".md").read_text()
    assert table.startswith("# Benchmark")
    assert "- while multiplying, before tiny: clocks.sm not reported, clocks.mem not" in table
    assert command.finish(measured_here("bench.subjects.plan", settings=here), tmp_path, earlier)
    assert "of 3 rows changed by more than 3%" in capsys.readouterr().out


def test_a_row_of_ours_that_fails_its_gate_fails_the_run(
    here: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = plan.plan_insert

    def wrong(*arguments, **options):
        made = right(*arguments, **options)
        return dataclasses.replace(made, destinations=made.destinations.flip(0))

    monkeypatch.setattr(plan, "plan_insert", wrong)
    assert not command.finish(measured_here("bench.subjects.plan", settings=here), tmp_path, None)
    out = capsys.readouterr().out
    assert "FAILED: step37" in out
    (path,) = tmp_path.glob("*.json")
    assert report.read(path)["rows"][0]["median_us"] is None


def test_an_error_ends_its_subject_and_no_other(
    here: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def crash(_: object) -> None:
        raise RuntimeError("illegal access")

    monkeypatch.setattr(step, "run", crash)
    results = measured_here("bench.subjects.step", "bench.subjects.plan", settings=here)
    assert not command.finish(results, tmp_path, None)
    assert "FAILED: bench.subjects.step: RuntimeError: illegal access" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert len(report.read(path)["rows"]) == 3


def test_each_shape_has_a_process_and_one_that_dies_costs_only_its_rows(
    here: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[list[str]] = []
    really = subprocess.run

    def run(arguments: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        if how:  # the commit is asked for, say
            return really(arguments, **how)
        calls.append(arguments[3:])
        options = command.parse(arguments[3:])
        assert options.no_compile
        if options.shapes == ["long"]:
            return subprocess.CompletedProcess(arguments, -11)
        results = measured_here("bench.subjects.plan", settings=here)
        options.part.write_text(json.dumps(results))
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    subjects = {name: command.SUBJECTS[name] for name in ("plan", "step", "normalize")}
    options = command.parse(["--no-compile", "--budget", "60"])
    results = command.measure_apart(subjects, options)
    assert [(call[:-5], call[-3]) for call in calls] == [
        (["plan"], "--shapes=one-image"),
        (["plan", "step"], "--shapes=flickr8k"),
        (["plan", "step"], "--shapes=long"),
        (["plan"], "--shapes=huge"),
        (["plan", "step"], "--shapes=multicrop"),
        (["normalize"], "--shapes="),
    ]
    assert len(results["rows"]) == 5 * 3
    assert not command.finish(results, tmp_path, None)
    assert "FAILED: plan, step, long: the process ended with -11" in capsys.readouterr().out


def test_a_process_without_a_part_of_its_own_measures_what_it_is_told(tmp_path: Path) -> None:
    part = tmp_path / "part.json"
    assert command.main(["plan", "--part", str(part), "--shapes", "one-image"]) == 0
    made = json.loads(part.read_text())
    assert made["rows"] == []  # no GPU; the device is this one's
    assert made["errors"] == []
