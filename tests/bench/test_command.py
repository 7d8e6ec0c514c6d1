from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import report, shapes
from bench.harness import Settings
from bench.report import Column, Table
from bench.shapes import Shape
from bench.subjects import SUBJECTS, pixels, plan, step

ROOT = Path(__file__).parents[2]


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
def test_a_subject_that_lacks_a_package_says_which_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    found = command.runnable(["step", "data", "host"], torch.device("cpu"))
    assert list(found) == ["host"]
    assert capsys.readouterr().out.splitlines() == [
        "step: not run, not installed here: pillow",
        "data: not run, not installed here: pillow, tqdm",
    ]


def test_every_subject_can_be_loaded_and_needs_no_package_that_it_does_not_name() -> None:
    optional = {name for subject in SUBJECTS.values() for name in subject.needs}
    by_needs: dict[tuple[str, ...], list[str]] = {}
    for name, subject in SUBJECTS.items():
        if not subject.missing():
            by_needs.setdefault(subject.needs, []).append(name)
    for needs, names in by_needs.items():
        blocked = optional - set(needs) - {name.partition(".")[0] for name in needs}
        code = (
            "import sys\n"
            f"sys.modules.update(dict.fromkeys({sorted(blocked)}))\n"
            "from bench.subjects import SUBJECTS\n"
            f"for name in {names}: SUBJECTS[name].load()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_plan_is_measured_where_pillow_tqdm_and_transformers_are_missing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['PIL', 'tqdm', 'transformers', 'jinja2']))\n"
        "from bench import __main__ as command\n"
        f"sys.exit(command.main(['plan', '--out', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or done.stdout.startswith("plan: needs a CUDA device")


def table_of_two(settings: Settings) -> Iterator[Table]:
    columns = (Column("what"), Column("µs", "{:.1f} ({:.0f})"))
    lines = [("a | b", (1.25, settings.options["steps"])), ("none", None)]
    yield Table(title="Two", text="Of nothing.", columns=columns, lines=lines)


@pytest.mark.usefixtures("no_gpu")
def test_a_table_is_printed_and_kept_with_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = command.SUBJECTS["pixels"]
    monkeypatch.setattr(pixels, "run_pixels", table_of_two)
    options = command.parse(["pixels", "--quick"])
    settings = command.settings_of(subject, options, torch.device("cpu"), 9.0)
    assert (settings.row_seconds, settings.deadline) == (pytest.approx(0.4), 9.0)
    results = command.measure_here({"pixels": (subject, settings)})
    shown = [
        "## Two", "", "Of nothing.", "", "| what | µs |", "|---|---|", "| a \\| b | 1.2 (5) |",
        "| none |  |",
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == shown
    assert command.finish(results, tmp_path, None)
    (path,) = tmp_path.glob("*.json")
    assert report.read(path)["tables"][0]["lines"][0] == ["a | b", [1.25, 5]]
    written = path.with_suffix(".md").read_text()
    assert written.endswith("\n".join(["", *shown, ""]))
    assert "copy:" not in written  # what rows are compared with, and there are none
    assert capsys.readouterr().out == ""


def test_options_of_a_subject_reach_it_and_are_refused_without_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    subject = command.SUBJECTS["shards"]
    options = command.parse(["shards", "--samples", "7", "--budget", "3"])
    settings = command.settings_of(subject, options, torch.device("cpu"), 1.0)
    assert settings.options == {"samples": 7, "workers": 2}
    assert settings.row_seconds == 3
    (process,) = command.processes({"shards": subject}, options)
    given = process.command(options, Path("part.json"), 5.0)
    assert command.parse(given[3:]).samples == 7
    with pytest.raises(SystemExit):
        command.parse(["plan", "--samples", "7"])
    said = capsys.readouterr().err
    assert "--samples is an option of the subject shards, which is not named" in said


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


def measured_here(*names: str, settings: Settings) -> report.Record:
    return command.measure_here({name: (SUBJECTS[name], settings) for name in names})


def test_rows_are_measured_written_and_compared(
    here: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.finish(measured_here("plan", settings=here), tmp_path, None)
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
    assert command.finish(measured_here("plan", settings=here), tmp_path, earlier)
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
    assert not command.finish(measured_here("plan", settings=here), tmp_path, None)
    assert "FAILED: step37" in capsys.readouterr().err
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
    results = measured_here("step", "plan", settings=here)
    assert not command.finish(results, tmp_path, None)
    assert "FAILED: step: RuntimeError: illegal access" in capsys.readouterr().err
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
        results = measured_here("plan", settings=here)
        options.part.write_text(json.dumps(results))
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    subjects = {name: command.SUBJECTS[name] for name in ("plan", "step", "normalize")}
    options = command.parse(["--no-compile", "--limit", "60"])
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
    assert "FAILED: plan, step, long: the process ended with -11" in capsys.readouterr().err


def test_a_process_without_a_part_of_its_own_measures_what_it_is_told(tmp_path: Path) -> None:
    part = tmp_path / "part.json"
    assert command.main(["plan", "--part", str(part), "--shapes", "one-image"]) == 0
    made = json.loads(part.read_text())
    assert made["rows"] == []  # no GPU; the device is this one's
    assert made["errors"] == []
