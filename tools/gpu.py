"""``make gpu``: all that wants a GPU, in one call of at most ten minutes.

``PYTHONPATH=. python3 tools/gpu.py`` needs torch and Triton, no network and no .venv; phases that
need more say so. Each phase is a process with a limit and a log of its own, the most wanted first;
one that fails or takes too long ends only itself. Everything lies in one folder, a table last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 590
RESERVE = 25
"""Seconds kept for the comparison with what was predicted."""
WHERE = """
import torch, triton
if not torch.cuda.is_available():
    raise SystemExit(f"no GPU: torch {torch.__version__} sees no CUDA device; nothing was run")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
"""


@dataclass(frozen=True)
class Phase:
    """A command of Python's, and the seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    """Modules without which it is not run."""
    synchronous: bool = False
    """Every launch is waited for, so that an error is reported where it happens."""


@dataclass(frozen=True)
class Outcome:
    """What became of a phase."""

    phase: Phase
    result: str
    seconds: float = 0.0
    log: Path | None = None

    def line(self) -> str:
        log = self.log.name if self.log else ""
        return f"| {self.phase.name} | {self.result} | {self.seconds:.0f} | {log} |"


def phases(out: Path) -> list[Phase]:
    """The most wanted first; the last takes what time is left."""
    pytest, needs = ("-m", "pytest", "-q", "-p", "no:cacheprovider"), ("pytest", "hypothesis")

    def bench(name: str, seconds: float, *arguments: str) -> Phase:
        # It begins nothing in its last seconds, so that it can write what it has.
        limit = f"--limit={seconds - 15:g}"
        return Phase(name, ("-m", "bench", *arguments, limit, f"--out={out}", "--quick"), seconds)

    def insert(shape: str, seconds: float, *more: str) -> Phase:
        return bench(f"insert {shape}", seconds, "insert", f"--shapes={shape}", *more)

    left_over = (*pytest, "-m", "not slow and not gpu", "tests/kernels")
    return [
        Phase("smoke", ("-m", "tools.smoke"), 50, synchronous=True),
        Phase("GPU tests", (*pytest, "-m", "gpu"), 90, needs),
        insert("flickr8k", 90),
        *(
            insert(shape, 40, "--no-compile")
            for shape in ("one-image", "long", "huge", "multicrop")
        ),
        bench("tune", 80, "tune"),
        bench("pixels", 60, "normalize", "resize", "step", "--no-compile"),
        Phase("kernel tests", left_over, LIMIT, needs),
    ]


def run(todo: Sequence[Phase], out: Path, python: str, limit: float) -> Iterator[Outcome]:
    """Run phases one after the other, none beyond ``limit`` seconds from now."""
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
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**found, "PYTHONPATH": path, **more}


def importable(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def run_one(phase: Phase, python: str, log: Path, seconds: float) -> str:
    """``ok``, or how it ended."""
    command = [python, *phase.arguments]
    more = {"CUDA_LAUNCH_BLOCKING": "1"} if phase.synchronous else {}
    with log.open("w", encoding="utf-8") as file:
        print(shlex.join(command), file=file, flush=True)
        # A session of its own: what it starts ends with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**more),
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


def compare(out: Path, python: str) -> None:
    """What was measured beside what was predicted: ``predicted.md``."""
    measured = sorted(map(str, out.glob("*.json")))
    command = [python, "-m", "bench", "predict", f"--out={out}", "--measured", *measured]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=RESERVE
    )
    (out / "predicted.md").write_text(done.stdout or done.stderr, encoding="utf-8")


def report(where: str, outcomes: Sequence[Outcome], out: Path) -> str:
    """The table of all phases, in ``summary.md`` too."""
    lines = [where, "", "| phase | result | s | log |", "|---|---|---|---|"]
    lines += [outcome.line() for outcome in outcomes]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return f"{text}\neverything is in {out}"


def pick_python() -> str | None:
    """One that has torch and Triton: this one, or that of the .venv."""
    for python in (sys.executable, str(ROOT / ".venv" / "bin" / "python")):
        if Path(python).exists() and importable(python, "torch, triton"):
            return python
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every phase that ran is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds in all ({LIMIT})")
    parser.add_argument("--out", type=Path, help="folder (bench/results/gpu-DATE)")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    python = pick_python()
    if python is None:
        print("neither this Python nor .venv has torch and Triton; nothing was run")
        return 1
    looked = subprocess.run(
        [python, "-c", WHERE], env=environment(), capture_output=True, text=True
    )
    if looked.returncode:
        print((looked.stderr.strip().splitlines() or ["no GPU"])[-1])
        return 1
    date = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    out = (options.out or ROOT / "bench" / "results" / f"gpu-{date}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    left = options.limit - RESERVE - (time.monotonic() - begin)
    for outcome in run(phases(out), out, python, left):
        print(outcome.line(), flush=True)
        outcomes.append(outcome)
    compare(out, python)
    print(report(looked.stdout.strip(), outcomes, out))
    return int(any(outcome.result.startswith("FAILED") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
