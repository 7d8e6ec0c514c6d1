"""Make ``.venv`` ready: for ``make demo`` what the demo imports, else all development tools.

It needs only the standard library of Python 3.10 to 3.13. There are three cases:

* A package index answers: install this project with its extra ``demo`` or ``dev``. Without an
  NVIDIA GPU torch is the release in ``CPU_TORCH``, a CPU build: of the folder of wheels that pip is
  configured with, else of PyTorch's own index, else what pip finds. With a GPU it is pip's own.
* The interpreter that runs this has what is needed, and there is a GPU (an image of NVIDIA's, say):
  borrow its packages through a ``.pth`` file and install nothing.
* Neither: say what is missing, exit with 1.

A rerun compares a stamp (``pyproject.toml``, this file, the interpreter) and returns at once. What
``demo`` has installed stays where ``dev`` comes after it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEVELS = {
    "demo": ("torch", "triton", "numpy", "PIL", "transformers", "jinja2", "tqdm", "megatron"),
    "dev": ("torch", "triton", "numpy", "PIL", "pytest", "hypothesis"),
}
"""By extra, what an interpreter must have for its packages to be borrowed instead. The later level
holds the earlier one."""


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


def pip_install(extra: str) -> bool:
    """Install the project and what ``extra`` needs, into the environment that is there or a new
    one; False when pip could not."""
    gpu = has_nvidia_gpu()
    torch = os.environ.get("STEP37_TORCH") or ("torch" if gpu else CPU_TORCH)
    if not is_ready("demo") or not has_pip():
        create_venv(with_pip=True)
    say(f"installing {torch} and what the {extra} needs (a minute or more on a first run)")
    # Its byte code is compiled as it is imported: most of it never is.
    pip = [str(venv_python()), "-m", "pip", "install", "--retries", "2", "--no-compile"]
    pip += ["--disable-pip-version-check", "--no-input"]
    cpu = [] if gpu else cpu_index()
    return (not cpu or run_pip([*pip, *cpu, torch])) and run_pip(
        [*pip, torch, "--editable", f"{ROOT}[{extra}]"]
    )


def cpu_index() -> list[str]:
    """The options of pip for PyTorch's CPU builds, where its index is needed and answers."""
    command = [str(venv_python()), "-m", "pip", "config", "list"]
    if "find-links" in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except OSError as error:
        say(f"{CPU_INDEX} does not answer ({error}): torch comes from pip's own index")
        return []
    return ["--extra-index-url", CPU_INDEX]


def run_pip(command: list[str]) -> bool:
    """Run pip and say what it is at; its own words only where it fails."""
    start = told = time.monotonic()
    packages = venv_python().parent.parent / "lib"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                count = len(list(packages.glob("python*/site-packages/*.dist-info")))
                at = doing(log.read_text(errors="replace"))
                say(f"{told - start:3.0f} s, {count} packages installed, {at}")
        if process.returncode:
            print(log.read_text(errors="replace"), file=sys.stderr)
    return process.returncode == 0


def doing(log: str) -> str:
    """What pip is at, by the last of its lines that says so."""
    for line in reversed(log.splitlines()):
        words = line.split()
        if line.startswith("Installing collected packages"):
            return f"unpacking {line.count(',') + 1}"
        if words[:1] in (["Collecting"], ["Processing"], ["Downloading"]):
            return f"{words[0].lower()} {words[1].rpartition('/')[2].partition('-')[0]}"
    return "starting"


def stamp(extra: str) -> Path:
    return VENV / f"step37.{extra}.stamp"


def is_ready(extra: str) -> bool:
    """Whether the environment holds what this extra, or one that holds it too, asks for."""
    levels = list(LEVELS)
    return venv_python().exists() and any(
        stamp(level).exists() and stamp(level).read_text() == fingerprint()
        for level in levels[levels.index(extra) :]
    )


def has_pip() -> bool:
    return any(VENV.glob("lib/python*/site-packages/pip"))


def main() -> int:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        say(f"Python {sys.version.split()[0]} is outside 3.10 to 3.13; run: make PYTHON=python3.12")
        return 1
    parser = argparse.ArgumentParser(description="Make .venv ready.")
    parser.add_argument("extra", nargs="?", choices=LEVELS, default="dev")
    extra = parser.parse_args().extra
    if is_ready(extra):
        return 0
    missing = [name for name in LEVELS[extra] if importlib.util.find_spec(name) is None]
    if not missing and has_nvidia_gpu():
        say("this interpreter has all that is needed: using it, installing nothing")
        borrow_interpreter_packages()
    elif not pip_install(extra):
        if missing:
            say(f"pip failed, and {sys.executable} lacks {', '.join(missing)}: nothing to run with")
            return 1
        say("pip failed: using this interpreter's own packages instead")
        borrow_interpreter_packages()
    stamp(extra).write_text(fingerprint())
    say("ready")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
