"""``python -m bench [subjects…]``: measure, print a table, keep JSON, Markdown and plots.

Subjects: plan, step, normalize, resize, insert, host, pixels, multicrop, data; all of them by
default. And tune, only if asked for: it proposes a tile table. Those that need a GPU say so where
there is none.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report
from bench.harness import DTYPES, LATE, Row, Settings, environment, measure_ceilings
from bench.shapes import SHAPES, shapes_named


@dataclass(frozen=True, slots=True)
class Subject:
    """A module of rows, or a program that prints tables of its own."""

    module: str
    program: bool = False
    """Run as ``python -m module``; else ``module.run(settings)`` gives groups of rows."""
    quick: tuple[str, ...] = ()
    """Options of a program for a short run."""
    needs_gpu: bool = False
    on_request: bool = False
    """Not among those that run by default."""
    takes: tuple[str, ...] = ()
    """Options of this command that a program takes as well."""


SUBJECTS = {
    "plan": Subject("bench.plan", needs_gpu=True),
    "step": Subject("bench.step", needs_gpu=True),
    "normalize": Subject("bench.pixel_kernels", needs_gpu=True),
    "resize": Subject("bench.pixel_kernels", needs_gpu=True),
    # Last of those that share the time: it can fill all of it.
    "insert": Subject("bench.insert", needs_gpu=True),
    "host": Subject("bench.host", program=True, quick=("--rounds", "5")),
    "pixels": Subject("bench.pixels", program=True, quick=("--budget", "0.5", "--steps", "5")),
    "multicrop": Subject("bench.multicrop", program=True, quick=("--budget", "0.5")),
    "data": Subject("bench.data", program=True, quick=("--quick",)),
    "tune": Subject(
        "bench.tune",
        program=True,
        quick=("--budget", "80"),
        needs_gpu=True,
        on_request=True,
        takes=("rows", "products", "dtype", "budget", "out"),
    ),
}


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line → options, with what does not exist refused."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(SUBJECTS))
    parser.add_argument(
        "--shapes",
        type=_names,
        default=[],
        help=f"comma-separated: {', '.join(SHAPES)}, images-N, sweep (default: the subject's own)",
    )
    parser.add_argument(
        "--dtype", type=_names, default=["bf16"], help="comma-separated: bf16, fp16, fp32"
    )
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run to compare with")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--quick", action="store_true", help="a fifth of the time; more noise")
    parser.add_argument(
        "--budget", type=float, default=360, help="seconds after which no row is begun (360)"
    )
    parser.add_argument("--rows", help="of tune: comma-separated numbers of feature rows")
    parser.add_argument("--products", help="of tune: comma-separated names of products")
    options = parser.parse_args(arguments)
    for subject in options.subjects:
        if subject not in SUBJECTS:
            parser.error(f"subject {subject!r}: expected one of {', '.join(SUBJECTS)}")
    for name in options.dtype:
        if name not in DTYPES:
            parser.error(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}")
    try:
        shapes_named(options.shapes)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    return options


def runnable(names: Sequence[str], device: torch.device) -> list[Subject]:
    """The subjects that can run here, each module once; the others are named, with the reason."""
    found: dict[str, Subject] = {}
    for name in names or [name for name, one in SUBJECTS.items() if not one.on_request]:
        subject = SUBJECTS[name]
        if importlib.util.find_spec(subject.module) is None:
            print(f"{name}: not in this checkout ({subject.module} is missing)")
        elif subject.needs_gpu and device.type != "cuda":
            print(f"{name}: needs a CUDA device, and there is none here")
        else:
            found.setdefault(subject.module, subject)
    return list(found.values())


def run_rows(
    subjects: Sequence[Subject], settings: Settings, out: Path, earlier: report.Record | None
) -> bool:
    """Measure, show, write and compare; whether all rows of ours passed their gate.

    An error ends its subject; the others are measured all the same.
    """
    where = environment(settings.device)
    ceilings = measure_ceilings(settings)
    rows: list[Row] = []
    errors: list[str] = []
    try:
        for subject in subjects:
            try:
                for group in importlib.import_module(subject.module).run(settings):
                    rows += group
                    print(report.console(group, ceilings), flush=True)
            except Exception as error:
                traceback.print_exc()
                errors.append(f"{subject.module}: {type(error).__name__}: {error}")
    finally:
        # Whatever ends the run early, what was measured is kept.
        results = report.to_json(rows, ceilings, where)
        if rows:
            name = report.file_name(where["device"])
            print("\nwritten:", *report.write(results, out / name))
    print("", *report.targets(results), sep="\n")
    if earlier is not None:
        print(report.compare(earlier, results))
    failed = [row for row in rows if row.kind == "ours" and row.problem and row.problem != LATE]
    for row in failed:
        print(f"FAILED: {row.implementation}, {row.key}: {row.problem}")
    for line in errors:
        print(f"FAILED: {line}")
    return not failed and not errors


def run_program(subject: Subject, quick: bool, given: argparse.Namespace) -> bool:
    """Run a subject that prints its own tables; whether it ended well."""
    options = []
    for name in subject.takes:
        value = getattr(given, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else str(value)
            options.append(f"--{name}={text}")
    options += subject.quick if quick else ()
    print(f"\n{subject.module}", flush=True)
    return subprocess.run([sys.executable, "-m", subject.module, *options]).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subjects; 1 if a row of ours failed its gate or a program failed, else 0."""
    options = parse(arguments)
    try:
        earlier = report.read(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        print(f"--compare: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(
        device=device,
        dtypes=tuple(DTYPES[name] for name in options.dtype),
        shapes=tuple(options.shapes),
        row_seconds=0.05 if options.quick else 0.25,
        deadline=time.perf_counter() + options.budget,
    )
    subjects = runnable(options.subjects, device)
    measured = [subject for subject in subjects if not subject.program]
    well = run_rows(measured, settings, options.out, earlier) if measured else True
    # All subjects together have eight minutes: a program takes its time where it is asked for.
    quick = options.quick or not options.subjects
    for subject in subjects:
        if subject.program:
            well = run_program(subject, quick, options) and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
