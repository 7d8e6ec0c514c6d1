"""The demo says in few lines what it does, and nothing that other packages have to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("megatron.core", reason="the demo's word embedding is megatron-core's")


def test_the_demo_is_quiet_and_ends_with_its_picture_and_the_next_command(tmp_path: Path) -> None:
    # Too few steps to learn: how the loss falls is for `make demo` itself.
    command = [sys.executable, "-m", "examples.demo", "--steps", "6", "--impl", "torch"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    # A full run prints six more lines of training.
    assert 10 < len(lines) <= 34, done.stdout
    assert any("agree with the reference" in line for line in lines), done.stdout + done.stderr
    assert any(line.startswith("Next: step37-data inspect") for line in lines[-3:])
    # Our own progress bar, what six steps come to, and PyTorch's build for CUDA beside no GPU.
    expected = ("Probing data set", "FAILED: the loss fell only", "No CUDA runtime is found")
    told = [line for line in done.stderr.splitlines() if not any(text in line for text in expected)]
    assert "".join(told).strip() == ""
    picture = tmp_path / "pack.png"
    assert any(str(picture) in line or "needs matplotlib" in line for line in lines)
