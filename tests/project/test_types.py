"""A type checker sees the public names and their arguments, as a user's editor does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import step37_data
import step37_kernels

pytest.importorskip("mypy", reason="mypy is not installed (extra lint)")

ROOT = Path(__file__).parents[2]
PACKAGES = (step37_data, step37_kernels)

RIGHT = """
import step37_data
import step37_kernels
from step37_data import MixedPackedDataloader, Step37Flickr8kSFTDataProvider, pack
from step37_kernels import ImageForInsert, plan_insert

provider = Step37Flickr8kSFTDataProvider(tokenizer_path="folder", max_packing_seqlen=4096)
pack([4, 3], 8, "drop").num_droped + 1
packs: MixedPackedDataloader
group = ImageForInsert(insert_start_token=128000)
"""

WRONG = (
    "step37_data.NoSuchName",
    "step37_kernels.NoSuchName",
    "Step37Flickr8kSFTDataProvider(tokenizer_path=3)",
    'Step37Flickr8kSFTDataProvider(tokenizer_path="a", nonsense=1)',
    'pack("four", 8, "drop")',
)


def test_mypy_accepts_right_lines_of_a_user_and_refuses_each_wrong_one(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    # Every name that can be loaded, a type checker must know.
    names = [f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__]
    right = RIGHT + "\n".join(names) + "\n"
    script.write_text(right + "\n".join(WRONG) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"),
         str(script)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    first = right.count("\n") + 1
    lines = {int(line) for line in re.findall(r"user\.py:(\d+): error", done.stdout)}
    assert lines == set(range(first, first + len(WRONG))), done.stdout
