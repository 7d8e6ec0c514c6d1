"""``make lanes``: the tests on the newest PyTorch and on that of older GPU images.

Each lane has an environment of its own with exactly the releases below, and a Python that is looked
for on the path; ``PYTHON313`` and ``PYTHON312`` name another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from tools.bootstrap import say
from tools.environment import Environment


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A Python and releases on which the tests pass."""

    folder: str
    """Of its environment, in the checkout."""
    python: tuple[int, int]
    """Version of the interpreter."""
    releases: tuple[str, ...]
    """What pip installs; everything else is the newest that goes with it."""
    compiled_for: str | None
    """Architecture for which the kernels are compiled, too, and their PTX tested; None for none."""


LANES = {
    "newest": Lane(
        folder=".venv-newest",
        python=(3, 13),
        releases=("torch==2.15.0", "triton==3.9.0"),
        compiled_for=None,
    ),
    "gpu": Lane(
        folder=".venv-gpu",
        python=(3, 12),
        # The interpreter of Triton 3.6 converts arrays to integers as NumPy 2.4 no longer does.
        releases=("torch==2.11.0", "triton==3.6.0", "numpy<2.4"),
        compiled_for="sm_90",
    ),
}


def find_python(version: tuple[int, int]) -> str:
    """The path of an interpreter of this version.

    Raises:
        SystemExit: there is none, or the one that the variable names is of another version.
    """
    major, minor = version
    variable, name = f"PYTHON{major}{minor}", f"python{major}.{minor}"
    given = os.environ.get(variable) or name
    path = shutil.which(given)
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    if path is not None:
        told = subprocess.run([path, "-c", ask], capture_output=True, text=True, check=False)
        # A shim of pyenv is there for every version, and runs only those that are switched on.
        if told.stdout.strip() == f"{major}.{minor}":
            return path
    raise SystemExit(
        f"this lane needs Python {major}.{minor}, and {given} is none; install it, or name it: "
        f"make {variable}=/path/to/{name} …"
    )


def run(name: str, arguments: list[str]) -> int:
    """Set the lane's environment up and run the tests in it.

    Args:
        name: of the lane.
        arguments: for pytest, in place of those for all tests.

    Returns:
        0 where all passed.
    """
    lane = LANES[name]
    environment = Environment(
        folder=lane.folder,
        python=find_python(lane.python),
        installs=((*lane.releases, "--editable", ".[dev]"),),
    )
    environment.set_up()
    began = time.perf_counter()
    selection = ["-m", "not slow"]
    failed = environment.pytest(*selection, *arguments)
    if lane.compiled_for is not None and not arguments:
        say(f"lane {name}: the kernels once more, compiled for {lane.compiled_for}")
        compiled = {"STEP37_TEST_PTX": lane.compiled_for}
        failed |= environment.pytest(*selection, "tests/kernels", variables=compiled)
    verdict = "failed" if failed else "passed"
    say(f"lane {name} ({', '.join(lane.releases)}): {verdict}, {time.perf_counter() - began:.0f} s")
    return int(failed != 0)


def main() -> int:
    name, *arguments = sys.argv[1:] or [""]
    if name not in LANES:
        say(f"usage: python -m tools.lanes {'|'.join(LANES)} [arguments of pytest]")
        return 2
    return run(name, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
