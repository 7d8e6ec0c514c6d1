"""Which pipeline stage loads images: two gloo processes with Megatron's own parallel state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANGS_AFTER_S

SCRIPT = Path(__file__).with_name("preprocess_pipeline.py")
ROOT = SCRIPT.parents[3]
PHOTO = ROOT / "examples" / "flickr8k_mini" / "train" / "coffee.jpg"
WHOLE, WITHOUT_SECOND = [1.0] * 6, [1.0] * 3 + [0.0] * 3


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    folder = tmp_path_factory.mktemp("stages")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder), str(PHOTO)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=HANGS_AFTER_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_only_the_first_stage_loads_images(stages):
    assert [stage["True zero"] for stage in stages] == [[2, WHOLE], [0, WHOLE]]


def test_every_stage_loads_them_if_asked_to(stages):
    assert [stage["False zero"] for stage in stages] == [[2, WHOLE], [2, WHOLE]]


def test_every_stage_knows_whose_loss_to_skip(stages):
    assert [stage["True skip-loss"] for stage in stages] == [
        [2, WITHOUT_SECOND],
        [0, WITHOUT_SECOND],
    ]
