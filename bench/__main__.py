"""``python -m bench [subjects…]``: measures, prints tables, and keeps JSON and Markdown.

Without names it measures plan, step, insert, embedding, automodel, normalize, resize, host, pixels,
multicrop and data, if this machine can run them; tune, predict and shards run only when named.
Every shape is measured in a separate process, and so is every module without shapes, so that a
crash ends nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import harness, report
from bench.harness import DTYPES, LATE, Ceilings, Row, Settings
from bench.report import Table
from bench.shapes import SHAPES, shapes_named
from bench.subjects import SUBJECTS, Option, Subject

NOTHING = Ceilings(copy_bytes_per_s=0)
"""The ceilings of runs without rows, which are not compared with any."""
PYPI_NAMES = {"PIL": "pillow", "megatron.energon": "megatron-energon"}
"""The names of packages on PyPI, where they differ from the name that is imported."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; unknown names and options end the program with a message."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(SUBJECTS))
    names = ", ".join(SHAPES)

    def several(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    for option, default, text in (
        ("--shapes", [], f"{names}, automodel, images-N (default: the subject's own)"),
        ("--dtype", ["bf16"], "bf16, fp16, fp32"),
    ):
        parser.add_argument(option, type=several, default=default, help=f"comma-separated: {text}")
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run to compare with")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder for results"
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the time; more noise")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile peers")
    text = "seconds of timing for each row or figure (default: the subject's own)"
    parser.add_argument("--budget", type=float, help=text)
    text = "seconds after which no group of rows is begun (360)"
    parser.add_argument("--limit", type=float, default=360, help=text)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    for subject, own in _own_options():
        many: dict[str, Any] = {"nargs": "*"} if own.several else {}
        text = f"{subject}: {own.help} ({own.default})" if own.default else f"{subject}: {own.help}"
        parser.add_argument(f"--{own.name}", type=own.type, help=text, **many)
    options = parser.parse_args(arguments)
    for what, given, known in (
        ("subject", options.subjects, SUBJECTS), ("--dtype", options.dtype, DTYPES)
    ):  # fmt: skip
        for name in given:
            if name not in known:
                parser.error(f"{what} {name!r}: expected one of {', '.join(known)}")
    for subject, own in _own_options():
        if getattr(options, own.name) is not None and subject not in wanted(options):
            parser.error(f"--{own.name} is an option of the subject {subject}, which is not named")
    try:
        options.shapes = [shape.name for shape in shapes_named(options.shapes)]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    return options


def _own_options() -> Iterator[tuple[str, Option]]:
    for name, subject in SUBJECTS.items():
        for option in subject.options:
            yield name, option


def wanted(options: argparse.Namespace) -> list[str]:
    """List the subjects that were asked for; without names, all that run by default."""
    default = [name for name, subject in SUBJECTS.items() if not subject.on_request]
    return options.subjects or default


def runnable(names: Sequence[str], device: torch.device) -> dict[str, Subject]:
    """Pick the subjects that can run here; for each of the others, print what it lacks."""
    found: dict[str, Subject] = {}
    for name in names:
        subject = SUBJECTS[name]
        missing = [PYPI_NAMES.get(package, package) for package in subject.missing()]
        if missing:
            print(f"{name}: not run, not installed here: {', '.join(missing)}", flush=True)
        elif subject.needs_gpu and device.type != "cuda":
            print(f"{name}: needs a CUDA device, and there is none here", flush=True)
        else:
            found[name] = subject
    return found


def settings_of(
    subject: Subject, options: argparse.Namespace, device: torch.device, deadline: float
) -> Settings:
    """Make the settings of a subject from the options of the command line."""
    own = {}
    for option in subject.options:
        given = getattr(options, option.name)
        default = option.quick if options.quick else option.default
        own[option.name] = default if given is None else given
    default_s = subject.row_seconds * (0.2 if options.quick else 1)
    return Settings(
        device=device,
        dtypes=tuple(DTYPES[name] for name in options.dtype),
        shapes=tuple(options.shapes) or subject.shapes,
        row_seconds=default_s if options.budget is None else options.budget,
        deadline=deadline,
        compile_backend=None if options.no_compile else "inductor",
        options=own,
    )


def measure_here(todo: Mapping[str, tuple[Subject, Settings]]) -> report.Record:
    """Measure subjects in this process, and print their tables.

    An error ends its subject; it is printed, and is among ``"errors"`` of the result.
    """
    rows: list[Row] = []
    tables: list[report.Record] = []
    errors: list[str] = []
    ceilings = NOTHING
    state: dict[str, dict[str, str]] = {}
    where: dict[str, str] = {}
    for name, (subject, settings) in todo.items():
        where = where or harness.environment(settings.device)
        if subject.rows and not state:
            ceilings = harness.measure_ceilings(settings)
            shape = ", ".join(settings.shapes) or "no shape"
            state = {shape: harness.device_state(settings.device)}
        try:
            for part in subject.load()(settings):
                if rows or tables:
                    print()
                if isinstance(part, Table):
                    tables.append(report.print_table(part))
                else:
                    rows += part
                    print(report.console(part, ceilings), flush=True)
        except Exception as error:
            traceback.print_exc()
            errors.append(f"{name}: {type(error).__name__}: {error}")
    found = {"tables": tables, "state": state, "errors": errors}
    return {**report.to_json(rows, ceilings, where), **found}


@dataclass(slots=True)
class Process:
    """Subjects that are measured together, by a process of their own."""

    shapes: list[str]
    subjects: dict[str, Subject] = field(default_factory=dict)

    def command(self, options: argparse.Namespace, part: Path, limit: float) -> list[str]:
        """Make the command of a process that measures ``limit`` seconds and writes ``part``."""
        command = [sys.executable, "-m", "bench", *self.subjects]
        command += [f"--part={part}", f"--limit={limit}", f"--shapes={','.join(self.shapes)}"]
        command += [f"--dtype={','.join(options.dtype)}"]
        if options.budget is not None:
            command.append(f"--budget={options.budget}")
        # All subjects together have eight minutes, so tables of the host are quick unless named.
        needs_gpu = any(subject.needs_gpu for subject in self.subjects.values())
        quick = options.quick or not (options.subjects or needs_gpu)
        command += ["--quick"] * quick + ["--no-compile"] * options.no_compile
        for subject in self.subjects.values():
            for own in subject.options:
                given = getattr(options, own.name)
                if given is not None:
                    several = given if own.several else [given]
                    command += [f"--{own.name}", *map(str, several)]
        return command


def processes(subjects: Mapping[str, Subject], options: argparse.Namespace) -> list[Process]:
    """Divide subjects among processes: one for each shape, and for each module without shapes."""
    found: dict[str, Process] = {}
    for name, subject in subjects.items():
        shapes = (options.shapes or [*subject.shapes]) if subject.shapes else []
        if subject.shapes and not subject.shapes_together:
            for shape in shapes:
                found.setdefault(shape, Process([shape])).subjects[name] = subject
        else:
            found.setdefault(subject.module, Process(shapes)).subjects[name] = subject
    return list(found.values())


def measure_apart(subjects: Mapping[str, Subject], options: argparse.Namespace) -> report.Record:
    """Measure subjects in separate processes; returns the results of all."""
    results = report.to_json([], NOTHING, harness.environment(torch.device("cpu")))
    todo = processes(subjects, options)
    end = time.perf_counter() + options.limit
    for number, process in enumerate(todo):
        left = max(end - time.perf_counter(), 0) / (len(todo) - number)
        if number:
            print(flush=True)
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            code = subprocess.run(process.command(options, part, left)).returncode
            if not part.exists():
                where = ", ".join([*process.subjects, *process.shapes])
                results["errors"].append(f"{where}: the process ended with {code}")
                continue
            made = json.loads(part.read_text(encoding="utf-8"))
        for name in ("rows", "tables", "errors"):
            results[name] += made[name]
        results["state"].update(made["state"])
        results["environment"] = made["environment"] or results["environment"]
        if made["rows"]:
            results["ceilings"] = made["ceilings"]
    return results


def finish(results: report.Record, out: Path, earlier: report.Record | None) -> bool:
    """Write the results, judge and compare them; returns True unless something of ours failed.

    Notices go to the standard error stream, so that the tables alone can be sent to a file.
    """
    if results["rows"] or results["tables"]:
        name = report.file_name(results["environment"]["device"])
        print("\nwritten:", *report.write(results, out / name), file=sys.stderr)
    for table in (report.means(results), report.targets(results)):
        if table:
            print("", *table, sep="\n")
    if earlier is not None:
        print(report.compare(earlier, results))
    failed = list(results["errors"])
    for row in results["rows"]:
        if row["kind"] == "ours" and row["problem"] and row["problem"] != LATE:
            failed.append(f"{row['implementation']}, {report.group_of(row)}: {row['problem']}")
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subjects; 1 if a row of ours failed its gate or a subject failed, else 0."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        earlier = report.read(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        print(f"--compare: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = runnable(wanted(options), device)
    if options.part:
        deadline = time.perf_counter() + options.limit
        results = measure_here(
            {
                name: (subject, settings_of(subject, options, device, deadline))
                for name, subject in subjects.items()
            }
        )
        options.part.write_text(json.dumps(results), encoding="utf-8")
        return 0
    if not subjects:
        return 0
    return 0 if finish(measure_apart(subjects, options), options.out, earlier) else 1


if __name__ == "__main__":
    sys.exit(main())
