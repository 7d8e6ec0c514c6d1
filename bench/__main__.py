"""``python -m bench [subjects…]``: measure, print tables, keep JSON and Markdown.

Subjects: plan, step, insert, automodel, normalize, resize, host, pixels, multicrop, data; all of
them by default. Every shape is measured by a process of its own, so that a fault ends one shape.
On request only: tune, and predict and shards, which need no GPU. From host on they are programs;
one that is named alone takes options of its own (``python -m bench predict --help``).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import harness, report
from bench.harness import DTYPES, LATE, Ceilings, Row, Settings
from bench.shapes import SHAPES, shapes_named
from bench.subjects import step, tune


@dataclass(frozen=True, slots=True)
class Subject:
    """A module of rows, or a program that prints tables of its own."""

    module: str
    program: bool = False
    """Run as ``python -m module``; else ``module.run(settings)`` gives groups of rows."""
    shapes: tuple[str, ...] = ()
    """Measured by default, each in a process; empty where rows are not about shapes."""
    quick: tuple[str, ...] = ()  # options of a program for a short run
    needs_gpu: bool = False
    on_request: bool = False  # not among those that run by default


SUBJECTS = {
    "plan": Subject("bench.subjects.plan", shapes=tuple(SHAPES), needs_gpu=True),
    "step": Subject("bench.subjects.step", shapes=step.SHAPES, needs_gpu=True),
    "insert": Subject("bench.subjects.insert", shapes=tuple(SHAPES), needs_gpu=True),
    "automodel": Subject("bench.subjects.automodel", needs_gpu=True),
    "normalize": Subject("bench.subjects.pixel_kernels", needs_gpu=True),
    "resize": Subject("bench.subjects.pixel_kernels", needs_gpu=True),
    "host": Subject("bench.subjects.host", program=True, quick=("--rounds", "5")),
    "pixels": Subject(
        "bench.subjects.pixels", program=True, quick=("--budget", "0.5", "--steps", "5")
    ),
    "multicrop": Subject("bench.subjects.multicrop", program=True, quick=("--budget", "0.5")),
    "data": Subject("bench.subjects.data", program=True, quick=("--quick",)),
    "shards": Subject("bench.subjects.shards", program=True, on_request=True),
    "predict": Subject("bench.predict", program=True, on_request=True),
    "tune": Subject("bench.subjects.tune", shapes=tune.SHAPES, needs_gpu=True, on_request=True),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line → options, with what does not exist refused."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(SUBJECTS))
    names = ", ".join(SHAPES)

    def several(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    for option, default, text in (
        ("--shapes", [], f"{names}, images-N (default: the subject's own)"),
        ("--dtype", ["bf16"], "bf16, fp16, fp32"),
    ):
        parser.add_argument(option, type=several, default=default, help=f"comma-separated: {text}")
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run to compare with")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--quick", action="store_true", help="a fifth of the time; more noise")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile peers")
    text = "seconds after which no row is begun (360)"
    parser.add_argument("--budget", type=float, default=360, help=text)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for what, given, known in (
        ("subject", options.subjects, SUBJECTS), ("--dtype", options.dtype, DTYPES)
    ):  # fmt: skip
        for name in given:
            if name not in known:
                parser.error(f"{what} {name!r}: expected one of {', '.join(known)}")
    try:
        options.shapes = [shape.name for shape in shapes_named(options.shapes)]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    return options


def runnable(names: Sequence[str], device: torch.device) -> dict[str, Subject]:
    """The subjects that can run here, each module once; the others are named, with the reason."""
    found: dict[str, Subject] = {}
    for name in names or [name for name, one in SUBJECTS.items() if not one.on_request]:
        subject = SUBJECTS[name]
        if importlib.util.find_spec(subject.module) is None:
            print(f"{name}: not in this checkout ({subject.module} is missing)")
        elif subject.needs_gpu and device.type != "cuda":
            print(f"{name}: needs a CUDA device, and there is none here")
        elif all(subject.module != other.module for other in found.values()):
            found[name] = subject
    return found


def measure_here(subjects: Sequence[Subject], settings: Settings) -> report.Record:
    """Measure and show rows in this process. An error ends its subject, and is told."""
    rows: list[Row] = []
    errors: list[str] = []
    where = harness.environment(settings.device)
    ceilings = harness.measure_ceilings(settings)
    state = {", ".join(settings.shapes) or "no shape": harness.device_state(settings.device)}
    for subject in subjects:
        try:
            for group in importlib.import_module(subject.module).run(settings):
                rows += group
                print(report.console(group, ceilings), flush=True)
        except Exception as error:
            traceback.print_exc()
            errors.append(f"{subject.module}: {type(error).__name__}: {error}")
    return {**report.to_json(rows, ceilings, where), "state": state, "errors": errors}


def measure_apart(subjects: dict[str, Subject], options: argparse.Namespace) -> report.Record:
    """Measure each shape in a process of its own."""
    own: dict[str, list[str]] = {}
    for name, subject in subjects.items():
        for shape in (options.shapes or subject.shapes) if subject.shapes else [""]:
            own.setdefault(shape, []).append(name)
    here = harness.environment(torch.device("cpu"))
    nothing = report.to_json([], Ceilings(copy_bytes_per_s=0), here)
    results: report.Record = {**nothing, "state": {}, "errors": []}
    end = time.perf_counter() + options.budget
    for number, (shape, names) in enumerate(own.items()):
        left = max(end - time.perf_counter(), 0) / (len(own) - number)
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            command = [sys.executable, "-m", "bench", *names, f"--part={part}", f"--budget={left}"]
            command += [f"--shapes={shape}", f"--dtype={','.join(options.dtype)}"]
            command += ["--quick"] * options.quick + ["--no-compile"] * options.no_compile
            code = subprocess.run(command).returncode
            if not part.exists():
                where = ", ".join([*names, shape])
                results["errors"].append(f"{where}: the process ended with {code}")
                continue
            made = json.loads(part.read_text(encoding="utf-8"))
        results["rows"] += made["rows"]
        results["errors"] += made["errors"]
        results["state"].update(made["state"])
        results |= {name: made[name] for name in ("environment", "ceilings")}
    return results


def finish(results: report.Record, out: Path, earlier: report.Record | None) -> bool:
    """Write, judge and compare what was measured; whether all rows of ours passed their gate."""
    if results["rows"]:
        name = report.file_name(results["environment"]["device"])
        print("\nwritten:", *report.write(results, out / name))
    print("", *report.means(results), "", *report.targets(results), sep="\n")
    if earlier is not None:
        print(report.compare(earlier, results))
    failed = list(results["errors"])
    for row in results["rows"]:
        if row["kind"] == "ours" and row["problem"] and row["problem"] != LATE:
            failed.append(f"{row['implementation']}, {report.group_of(row)}: {row['problem']}")
    for line in failed:
        print(f"FAILED: {line}")
    return not failed


def run_program(subject: Subject, options: Sequence[str]) -> bool:
    """Run a subject that prints its own tables; whether it ended well."""
    return subprocess.run([sys.executable, "-m", subject.module, *options]).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subjects; 1 if a row of ours failed its gate or a program failed, else 0."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    alone = SUBJECTS.get(given[0]) if given else None
    if alone and alone.program and not set(given[1:]) & SUBJECTS.keys():
        return 0 if run_program(alone, given[1:]) else 1
    options = parse(given)
    try:
        earlier = report.read(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        print(f"--compare: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = runnable(options.subjects, device)
    measured = {name: subject for name, subject in subjects.items() if not subject.program}
    if options.part:
        settings = Settings(
            device=device,
            dtypes=tuple(DTYPES[name] for name in options.dtype),
            shapes=tuple(options.shapes),
            row_seconds=0.05 if options.quick else 0.25,
            deadline=time.perf_counter() + options.budget,
            compile_backend=None if options.no_compile else "inductor",
        )
        results = measure_here(list(measured.values()), settings)
        options.part.write_text(json.dumps(results), encoding="utf-8")
        return 0
    well = finish(measure_apart(measured, options), options.out, earlier) if measured else True
    # All subjects together have eight minutes: a program takes its time where it is asked for.
    quick = options.quick or not options.subjects
    for subject in subjects.values():
        if subject.program:
            print(f"\n{subject.module}", flush=True)
            well = run_program(subject, subject.quick if quick else ()) and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
