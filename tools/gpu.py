"""``make gpu``: runs everything that needs a GPU, in one call of at most ten minutes.

``PYTHONPATH=. python3 tools/gpu.py`` needs torch, Triton, NumPy, Pillow and a C compiler with
Python's headers, and for the tests pytest and hypothesis. It needs no network and no .venv. Each
phase is a process with its own time limit and log, the most important first; a phase that fails or
takes too long does not end the others. All results are written to one folder, with a table at the
end.

``--rehearse`` runs as much of every phase as is possible without a GPU, to find errors early:
imports, command lines, collection of the tests, compiling for Hopper, and the benchmarks' checks at
small shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 590
RESERVE = 25
"""Seconds reserved for the comparison with the prediction."""
REHEARSAL_S = 150
"""The most seconds of a phase in a rehearsal."""
SYNCHRONOUS = {"CUDA_LAUNCH_BLOCKING": "1"}
"""Makes the host wait for every launch, so that an error is reported where it happens."""
INTERPRETED = {"TRITON_INTERPRET": "1"}
"""Makes kernels run in Triton's interpreter."""
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
GPU_TESTS = (
    "tests/bench/test_harness.py",
    "tests/bench/test_insert_subject.py",
    "tests/bench/test_pixel_kernels.py",
    "tests/data/batches/test_prefetch.py",
    "tests/data/batches/test_preprocess.py",
    "tests/data/images/test_multicrop_batches.py",
    "tests/kernels/compiled/test_cuda.py",
    "tests/kernels/pixels/test_pixels_normalize.py",
    "tests/kernels/pixels/test_pixels_resize.py",
    "tests/megatron/test_forward_step_waits.py",
)
"""The files with tests marked ``gpu``. Others import packages that may be missing."""

WHERE = """
import torch, triton
if not torch.cuda.is_available():
    raise SystemExit(f"no GPU: torch {torch.__version__} sees no CUDA device; nothing was run")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
"""
REHEARSED = """
import torch, triton
print("rehearsal, no GPU is used: torch", torch.__version__, "triton", triton.__version__)
"""
NEEDED = """
import importlib.util, os, shutil, subprocess, sys, sysconfig
for module, package in (("numpy", "NumPy"), ("PIL", "Pillow")):
    if importlib.util.find_spec(module) is None:
        sys.exit(f"{package} is not installed for {sys.executable}; nothing was run")
compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
if compiler is None:
    sys.exit("no C compiler, with which Triton builds its launcher: neither the variable CC nor "
             "gcc nor clang; nothing was run")
scheme = sysconfig.get_default_scheme()
if scheme == "posix_local":  # Debian's; Triton looks where this leads
    scheme = "posix_prefix"
folder = sysconfig.get_paths(scheme=scheme)["include"]
command = [compiler, "-x", "c", "-fsyntax-only", f"-I{folder}", "-"]
try:
    done = subprocess.run(command, input="#include <Python.h>", capture_output=True, text=True)
except OSError as error:
    sys.exit(f"the C compiler {compiler} does not start: {error}; nothing was run")
if done.returncode:
    reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
    sys.exit(f"{compiler} cannot compile with Python.h of {folder}, with which Triton builds its "
             f"launcher: {reason}; nothing was run")
"""
"""What Triton and the phases need beside torch and Triton: one line says what is missing."""

SMALL = """
import sys
import torch
from bench import shapes
shapes.SHAPES["small"] = shapes.Shape(
    name="small", seq_len=64, images=3, crops=4, image_rows=9, crop_rows=4, hidden=16, width=24
)
"""
SMALL_SMOKE = (
    SMALL
    + """
from tools import smoke
smoke.main(["small"], torch.device("cpu"), "triton")
"""
)
SMALL_BENCH = (
    SMALL
    + """
from bench import __main__ as command, harness
from bench.subjects import SUBJECTS, pixel_kernels, step
harness.MIN_SAMPLES = harness.WARM_UP_ROUNDS = 1
pixel_kernels.SIZE, pixel_kernels.BATCHES, pixel_kernels.FLICKR8K = 40, (1,), (30, 20)
pixel_kernels.LARGE, pixel_kernels.LARGE_PICTURES = (800, 600), 1
step.PICTURE = (40, 60)
impl, *names = sys.argv[1:]
settings = harness.Settings(
    device=torch.device("cpu"), impl=impl, shapes=("small",), row_seconds=0, compile_backend=None
)
results = command.measure_here({name: (SUBJECTS[name], settings) for name in names})
rows = [row for row in results["rows"] if row["kind"] == "ours"]
problems = [row["problem"] for row in rows if row["problem"]] + results["errors"]
sys.exit("\\n".join(problems) or (0 if rows else "no row of ours"))
"""
)
SMALL_TUNE = """
from bench.subjects import tune
if __name__ == "__main__":
    raise SystemExit(0 if tune.sound(tune.candidates(169)) else "no tile compiles")
"""


@dataclass(frozen=True)
class Phase:
    """Arguments of a Python process, and the seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    """Modules that it needs; if one is missing, the phase is not run."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that it has in addition to those of this process."""
    rehearsal: Phase | None = None
    """The phase to run instead in a rehearsal; None: the phase itself."""


@dataclass(frozen=True)
class Outcome:
    """The result of a phase."""

    phase: Phase
    result: str
    seconds: float = 0.0
    log: Path | None = None

    def line(self) -> str:
        """Write the line of the table."""
        log = self.log.name if self.log else ""
        seconds = f"{self.seconds:.0f} of {self.phase.seconds:.0f}"
        return f"| {self.phase.name} | {self.result} | {seconds} | {log} |"


def phases(out: Path) -> list[Phase]:
    """List the phases, the most important first; the last uses the remaining time."""
    pytest, needs = ("-m", "pytest", "-q", "-p", "no:cacheprovider"), ("pytest", "hypothesis")

    def small(code: str, *subjects: str) -> Phase:
        return Phase("", ("-c", code, *subjects), REHEARSAL_S, variables=INTERPRETED)

    def tests(name: str, seconds: float, *arguments: str) -> Phase:
        collect = Phase("", (*pytest, "--collect-only", *arguments), REHEARSAL_S, needs)
        return Phase(name, (*pytest, *arguments), seconds, needs, rehearsal=collect)

    def bench(name: str, seconds: float, *arguments: str, rehearsal: Phase | None = None) -> Phase:
        # It starts nothing in its last seconds, so that it can write its results.
        limit = f"--limit={seconds - 15:g}"
        command = ("-m", "bench", *arguments, limit, f"--out={out}", "--quick")
        return Phase(name, command, seconds, rehearsal=rehearsal)

    # Their kernels are in the smoke test: resizing takes minutes in the interpreter.
    pixels = ("normalize", "resize", "step")
    smoke = small(SMALL_SMOKE)
    return [
        Phase("smoke", ("-m", "tools.smoke"), 50, variables=SYNCHRONOUS, rehearsal=smoke),
        tests("GPU tests", 90, "-m", "gpu", *GPU_TESTS),
        bench(
            "insert flickr8k",
            90,
            *("plan", "insert", "--shapes=flickr8k"),
            rehearsal=small(SMALL_BENCH, "triton", "plan", "insert"),
        ),
        *(
            bench(f"insert {shape}", 40, "insert", f"--shapes={shape}", "--no-compile")
            for shape in ("one-image", "long", "huge", "multicrop")
        ),
        bench(
            "embedding",
            40,
            *("embedding", "--shapes=flickr8k,long", "--no-compile"),
            rehearsal=small(SMALL_BENCH, "triton", "embedding"),
        ),
        bench("tune", 60, "tune", rehearsal=Phase("", ("-c", SMALL_TUNE), REHEARSAL_S)),
        bench(
            "pixels", 60, *pixels, "--no-compile", rehearsal=small(SMALL_BENCH, "torch", *pixels)
        ),
        tests("kernel tests", LIMIT, "-m", "not slow and not gpu", "tests/kernels"),
    ]


def rehearsals(out: Path) -> list[Phase]:
    """List what a rehearsal runs: of each phase what needs no GPU, then, with the time that is
    left, the compilation of the other kernels."""
    found = [
        dataclasses.replace(phase.rehearsal or phase, name=phase.name) for phase in phases(out)
    ]
    compiling = ("-m", "bench.resources", "--arch", "sm_90", "--dtypes", "bf16", "fp32")
    found.append(Phase("compile for Hopper", compiling, LIMIT))
    return [
        dataclasses.replace(each, variables={**each.variables, **WITHOUT_GPU}) for each in found
    ]


def run(todo: Sequence[Phase], out: Path, python: str, limit: float) -> Iterator[Outcome]:
    """Run phases one after the other and yield their outcomes; none runs beyond ``limit``
    seconds from now."""
    end = time.monotonic() + limit
    for number, phase in enumerate(todo):
        left = end - time.monotonic()
        missing = [name for name in phase.needs if not importable(python, name)]
        if missing:
            yield Outcome(phase, f"not run: {', '.join(missing)} not installed")
        elif left < 1:
            yield Outcome(phase, "not run: no time left")
        else:
            log = out / f"{number:02}-{phase.name.replace(' ', '-')}.log"
            begin = time.monotonic()
            result = run_one(phase, python, log, min(phase.seconds, left))
            yield Outcome(phase, result, time.monotonic() - begin, log)


def environment(**more: str) -> dict[str, str]:
    """Make the environment of a phase: this checkout comes first, kernels are not interpreted."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**found, "PYTHONPATH": path, **more}


def importable(python: str, module: str) -> bool:
    """Say whether a Python can import these modules."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def run_one(phase: Phase, python: str, log: Path, seconds: float) -> str:
    """Run a phase, into its log; returns ``ok``, or how it ended."""
    command = [python, *phase.arguments]
    with log.open("w", encoding="utf-8") as file:
        print(shlex.join(command), file=file, flush=True)
        # In a new session, so that the processes it starts can be ended with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**phase.variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            end_session(process)
    return "ok" if code == 0 else f"FAILED ({code})"


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def compare(out: Path, python: str, seconds: float = RESERVE) -> None:
    """Write what was measured beside what was predicted: ``predicted.md``; or, if that takes
    longer than it may, the command for it."""
    measured = sorted(map(str, out.glob("*.json")))
    command = [python, "-m", "bench", "predict", f"--out={out}", "--measured", *measured]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds
        )
        text = done.stdout or done.stderr
    except subprocess.TimeoutExpired:
        text = f"not made within {seconds:.0f} s; to make it: {shlex.join(command)}\n"
    (out / "predicted.md").write_text(text, encoding="utf-8")


def report(where: str, outcomes: Sequence[Outcome], out: Path) -> str:
    """Make the table of all phases; it is also written to ``summary.md``."""
    lines = [where, "", "| phase | result | s, of at most | log |", "|---|---|---|---|"]
    lines += [outcome.line() for outcome in outcomes]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return f"{text}\neverything is in {out}"


def pick_python() -> str | None:
    """Find a Python with torch and Triton: this one, or that of the .venv."""
    for python in (sys.executable, str(ROOT / ".venv" / "bin" / "python")):
        if Path(python).exists() and importable(python, "torch, triton"):
            return python
    return None


def told(python: str, code: str) -> tuple[bool, str]:
    """Run code; returns whether it succeeded, and the last line that it printed."""
    done = subprocess.run([python, "-c", code], env=environment(), capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, (lines or [""])[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or rehearse all phases; returns 0 if every phase that ran succeeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds in all ({LIMIT})")
    parser.add_argument("--out", type=Path, help="folder (bench/results/gpu-DATE)")
    text = "go through all phases as far as it goes without a GPU"
    parser.add_argument("--rehearse", action="store_true", help=text)
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    python = pick_python()
    if python is None:
        print("neither this Python nor .venv has torch and Triton; nothing was run")
        return 1
    well, where = told(python, REHEARSED if options.rehearse else WHERE)
    complete, missing = told(python, NEEDED) if well else (False, where)
    if not complete:
        print(missing)
        return 1
    date = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    out = (options.out or ROOT / "bench" / "results" / f"gpu-{date}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = phases(out)
    if options.rehearse:
        for phase in todo:
            print(f"with a GPU: {phase.name}, at most {phase.seconds:.0f} s")
        todo = rehearsals(out)
    outcomes = []
    left = options.limit - RESERVE - (time.monotonic() - begin)
    for outcome in run(todo, out, python, left):
        print(outcome.line(), flush=True)
        outcomes.append(outcome)
    compare(out, python)
    print(report(where, outcomes, out))
    return int(any(outcome.result.startswith("FAILED") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
