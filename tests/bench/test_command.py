from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import plan, report, shapes, step
from bench.harness import Settings
from bench.shapes import Shape


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


def test_rows_are_measured_written_and_compared(
    here: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = command.Subject("bench.plan")
    assert command.run_rows([subject], here, tmp_path, None)
    (path,) = tmp_path.glob("*.json")
    earlier = report.read(path)
    assert [row["implementation"] for row in earlier["rows"]] == [
        "step37",
        "stock (starts only)",
        "PyTorch operations",
    ]
    assert path.with_suffix(".md").read_text().startswith("# Benchmark")
    assert command.run_rows([subject], here, tmp_path, earlier)
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
    assert not command.run_rows([command.Subject("bench.plan")], here, tmp_path, None)
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
    subjects = [command.Subject("bench.step"), command.Subject("bench.plan")]
    assert not command.run_rows(subjects, here, tmp_path, None)
    assert "FAILED: bench.step: RuntimeError: illegal access" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert len(report.read(path)["rows"]) == 3
