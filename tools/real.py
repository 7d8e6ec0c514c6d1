"""``make real``: runs the tests on the real Megatron-Bridge and NeMo Automodel.

``.venv-real`` holds exactly the releases below. Both frameworks require Python 3.12 and dozens of
packages, many of which need CUDA. So they are installed without their requirements, and the
packages that the tested code imports are listed here. ``tests/real/stubs.py`` replaces modules that
cannot be imported on a CPU.

To try another release, change its number here: ``tests/real/test_names.py`` then says which names
are missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from tools.bootstrap import CPU_TORCH, ROOT, say

VENV = ROOT / ".venv-real"
STAMP = VENV / "step37.stamp"
PYTHON = VENV / "bin" / "python"

FRAMEWORKS = ("megatron-bridge==0.6.2", "megatron-core==0.19.2", "nemo-automodel==0.7.0")
NEEDS = (
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "diffusers==0.36.0",  # imported by Bridge's recipes for other models
    "einops==0.8.2",
    "hydra-core==1.3.8",
    "megatron-energon==7.4.1",  # imported by Bridge's training configuration
    "nvidia-modelopt==0.47.0",  # imported by Bridge's training loop
    "omegaconf==2.3.1",
    "tensorboard==2.21.0",
    "torchdata==0.11.0",
    "transformers==5.18.0",  # required by Automodel 0.7.0; Bridge 0.6.2 works with it too
)
# Without their requirements: torchvision requires another torch.
BARE = (*FRAMEWORKS, "torchvision==0.28.0")

# Not the extra `test`, whose other packages may be newer than the frameworks allow.
TOOLS = ("hypothesis>=6.100", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6")


def fingerprint() -> str:
    parts = [
        (ROOT / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        f"{sys.version} {sys.executable} {CPU_TORCH}".encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # The frameworks' requirements are deliberately not installed; pip would warn about each.
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"pip install {' '.join(arguments)} failed")


def set_up() -> None:
    """Create the environment, unless its stamp shows that it is up to date."""
    if STAMP.exists() and STAMP.read_text() == fingerprint() and PYTHON.exists():
        return
    say(f"creating {VENV.name} with {', '.join(FRAMEWORKS)} (a few minutes on a first run)")
    shutil.rmtree(VENV, ignore_errors=True)
    venv.EnvBuilder(with_pip=True).create(VENV)
    pip(CPU_TORCH, "--editable", f"{ROOT}[data]", *TOOLS, *NEEDS)
    pip("--no-deps", "--ignore-requires-python", *BARE)
    STAMP.write_text(fingerprint())


def main() -> int:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        say(f"Python {sys.version.split()[0]}: the frameworks need 3.11 to 3.13")
        return 1
    set_up()
    began = time.perf_counter()
    jobs = os.environ.get("JOBS", "auto")
    command = [str(PYTHON), "-m", "pytest", "-n", jobs, "-m", "not slow and not gpu"]
    command += ["--dist", "loadscope"]  # so that the ranks of a file are started once
    arguments = sys.argv[1:] or ["tests/real"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, check=False)
    say(f"{time.perf_counter() - began:.0f} s of tests")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
