"""Two gloo processes on loopback run real schedules: loss and gradients as without a pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.limits import HANGS_AFTER_S

SCRIPT = Path(__file__).with_name("pp_media_pipeline.py")
REPOSITORY = SCRIPT.parents[3]
SCHEDULES = ("gpipe", "1f1b", "interleaved")
LAYOUTS = ("grid", "step3")
WORLD_SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Run all cases once; returns both ranks' results and those of the unsplit model."""
    folder = tmp_path_factory.mktemp("pipeline")
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, SCRIPT, str(rank), str(WORLD_SIZE), folder]
                processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
        codes = [process.wait(timeout=HANGS_AFTER_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    tails = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)
    assert codes == [0] * WORLD_SIZE, tails
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_and_gradients_of_uneven_batches_are_those_of_the_unsplit_model(
    results: dict, schedule: str, layout: str
) -> None:
    expected = results["unsplit"][layout]
    ranks = [results[f"rank{rank}"][schedule, layout] for rank in range(WORLD_SIZE)]
    assert len(expected["losses"]) == 3
    for step, loss in enumerate(expected["losses"]):
        grads = {name: grad for rank in ranks for name, grad in rank["grads"][step].items()}
        assert grads.keys() == expected["grads"][step].keys()
        assert grads["0.vision.weight"].abs().max() > 0
        torch.testing.assert_close(ranks[-1]["losses"][step], loss)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected["grads"][step][name], msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_that_raises_in_its_second_microbatch_leaves_nothing_on_the_first_stage(
    results: dict, schedule: str, layout: str
) -> None:
    first = results["rank0"][schedule, layout]
    assert first["error"] == "poisoned microbatch"
    assert first["left"] == []
