"""The example on megatron-core alone runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANGS_AFTER_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_example_trains_to_half_its_first_loss():
    for module in ("megatron.core", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "examples.train_megatron_core"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout
