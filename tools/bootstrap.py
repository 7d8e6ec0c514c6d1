"""Prepares ``.venv`` for ``make demo``, ``make test``, ``make lint`` and ``make bench``.

It needs only the standard library of Python 3.10 to 3.13. There are three cases:

* A package index can be reached: this project is installed with its ``dev`` extra. Without an
  NVIDIA GPU it installs the torch release in ``CPU_TORCH`` (if an index or a local wheel folder has
  a CPU build of it, pip takes that one); with a GPU, the index's current CUDA build.
* The interpreter that runs this already has torch and the test tools, as in a GPU image: its
  packages are made available through a ``.pth`` file, and nothing is installed.
* Neither: it says what is missing and exits with 1.

A second run compares a stamp (``pyproject.toml``, this file, the interpreter) and returns at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "step37.stamp"
CPU_TORCH = "torch==2.13.0"
BORROWABLE = ("torch", "triton", "numpy", "PIL", "pytest", "hypothesis")


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def fingerprint() -> str:
    """Return a fingerprint of everything that decides the content of the environment."""
    parts = [
        (ROOT / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        f"{sys.version} {sys.executable} {os.environ.get('STEP37_TORCH', '')}".encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    probe = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return probe.returncode == 0 and "GPU" in probe.stdout


def venv_python() -> Path:
    return VENV / "bin" / "python"


def create_venv(*, with_pip: bool) -> None:
    say(f"creating {VENV.name} with Python {sys.version.split()[0]}")
    venv.EnvBuilder(clear=True, with_pip=with_pip).create(VENV)


def borrow_interpreter_packages() -> None:
    """Create an environment with this interpreter's site-packages and the checkout on its path.

    It has no pip, since not every Python can install that (Debian's needs a package for it).
    """
    create_venv(with_pip=False)
    purelib = subprocess.run(
        [str(venv_python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    own = list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    Path(purelib, "step37_borrowed.pth").write_text("\n".join([str(ROOT), *own]) + "\n")


def pip_install() -> bool:
    """Create an environment with the project and its requirements; False if pip failed."""
    torch = os.environ.get("STEP37_TORCH") or ("torch" if has_nvidia_gpu() else CPU_TORCH)
    create_venv(with_pip=True)
    say(f"installing {torch} and the project's dependencies (a few minutes on a first run)")
    command = [str(venv_python()), "-m", "pip", "install", "--quiet", "--retries", "2"]
    command += ["--disable-pip-version-check", torch, "--editable", f"{ROOT}[dev]"]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        say(f"Python {sys.version.split()[0]} is outside 3.10 to 3.13; run: make PYTHON=python3.12")
        return 1
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted and venv_python().exists():
        return 0
    missing = [name for name in BORROWABLE if importlib.util.find_spec(name) is None]
    if not missing and has_nvidia_gpu():
        say("this interpreter has torch and the test tools: using them, installing nothing")
        borrow_interpreter_packages()
    elif not pip_install():
        if missing:
            say(f"pip failed, and {sys.executable} lacks {', '.join(missing)}: nothing to run with")
            return 1
        say("pip failed: using this interpreter's own torch and test tools instead")
        borrow_interpreter_packages()
    STAMP.write_text(wanted)
    say("ready")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
