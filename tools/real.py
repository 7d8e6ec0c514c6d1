"""``make real``: runs the tests on the real Megatron-Bridge and NeMo Automodel.

``.venv-real`` holds exactly the releases below. Both frameworks require Python 3.12 and dozens of
packages, many of which need CUDA. So they are installed without their requirements, and the
packages that the tested code imports are listed here. ``tests/real/stubs.py`` replaces modules that
cannot be imported on a CPU.

Another release is tried by changing its number here. ``make real-main`` tries checkouts: they go
before the installed releases, in every process of the tests. Either way, what no longer fits is
named by ``tests/real/test_names.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tools.bootstrap import CPU_TORCH, say
from tools.environment import Environment

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


CHECKOUTS = {
    # What is given as its path, where in it Python looks for packages, and what is found there.
    "bridge": ("Megatron-Bridge", "src", "megatron/bridge"),
    "megatron": ("Megatron-LM", ".", "megatron/core"),
    "automodel": ("NeMo Automodel", ".", "nemo_automodel"),
}


def import_paths(given: dict[str, str | None]) -> list[str]:
    """The folders that Python is to look in before the installed releases.

    Args:
        given: the path of a checkout, or None, by its name in ``CHECKOUTS``.

    Raises:
        SystemExit: a path is no checkout of what it is given for, or all are empty, as those of
            ``make real-main`` are where nobody sets them.
    """
    if set(given.values()) == {""}:
        raise SystemExit("name a checkout: make real-main BRIDGE=… MEGATRON=… AUTOMODEL=…")
    paths = []
    for name, (title, source, package) in CHECKOUTS.items():
        if path := given[name]:
            folder = Path(path).expanduser().resolve() / source
            if not (folder / package).is_dir():
                raise SystemExit(f"{name}: {path} is no checkout of {title}: no {folder / package}")
            say(f"{title} from {folder}, before the installed release")
            paths.append(str(folder))
    return paths


def main() -> int:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        say(f"Python {sys.version.split()[0]}: the frameworks need 3.11 to 3.13")
        return 1
    parser = argparse.ArgumentParser(prog="python -m tools.real", description=__doc__)
    for name, (title, *_) in CHECKOUTS.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=f"a checkout of {title}")
    given, arguments = parser.parse_known_args()
    paths = import_paths(vars(given))
    before = os.environ.get("PYTHONPATH")
    variables = {"PYTHONPATH": os.pathsep.join([*paths, before] if before else paths)}
    environment = Environment(
        folder=".venv-real",
        python=sys.executable,
        installs=(
            (CPU_TORCH, "--editable", ".[data]", *TOOLS, *NEEDS),
            ("--no-deps", "--ignore-requires-python", *BARE),
        ),
    )
    environment.set_up()
    began = time.perf_counter()
    selection = ["-m", "not slow and not gpu", "--dist", "loadscope"]  # a file's ranks start once
    failed = environment.pytest(
        *selection, *(arguments or ["tests/real"]), variables=variables if paths else None
    )
    say(f"{time.perf_counter() - began:.0f} s of tests")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
