"""What ``step37_bridge`` checks and says without Megatron-Bridge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from step37_bridge import __main__ as launcher
from step37_bridge import recipe
from step37_bridge.ranks import ParallelSizes
from step37_bridge.replacing import find

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The line with which the recipe ends."""
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    with pytest.raises(SystemExit) as error:
        recipe.main()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [
        (ParallelSizes(tensor=1, pipeline=8, expert=8), 64),
        (ParallelSizes(tensor=1, pipeline=4, expert=1), 4),
        # The ranks of tensor parallelism hold experts, too.
        (ParallelSizes(tensor=8, pipeline=2, expert=8), 16),
        (ParallelSizes(tensor=4, pipeline=2, expert=6), 24),
    ],
)
def test_the_ranks_needed_hold_every_stage_every_expert_and_every_part_of_a_tensor(sizes, needed):
    assert sizes.ranks_needed() == needed
    sizes.check(needed)
    sizes.check(3 * needed)
    with pytest.raises(ValueError, match=f"needs {needed} ranks .*; started: {needed + 1}"):
        sizes.check(needed + 1)


@pytest.mark.parametrize(("name", "value"), [("tensor", 0), ("pipeline", -1), ("expert", 1.5)])
def test_a_size_that_is_none_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        ParallelSizes(**{name: value})


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_too_few_ranks_are_one_line_before_bridge_is_looked_for(variable, monkeypatch):
    monkeypatch.setenv(variable, "8")
    message = told(monkeypatch)
    assert message.startswith("step37_bridge.recipe: pipeline 8 × expert 8 × tensor 1 needs 64 ")
    assert "started: 8" in message
    monkeypatch.setenv(variable, "6")
    assert "needs 4 ranks or a multiple of them; started: 6" in told(monkeypatch, "--smoke")


def test_torchruns_number_of_ranks_is_preferred_to_slurms_number_of_tasks(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "64")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "started: 8" in told(monkeypatch)


def test_other_sizes_need_other_ranks(monkeypatch):
    assert "needs 32 ranks" in told(monkeypatch, "--pipeline", "4")
    assert "needs 16 ranks" in told(monkeypatch, "--smoke", "--expert", "4", "--tensor", "2")


def test_a_missing_script_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "run_recipe.py"
    monkeypatch.setattr(sys, "argv", ["step37_bridge", str(path), "--recipe", "any"])
    with pytest.raises(SystemExit) as error:
        launcher.main()
    message = str(error.value)
    assert message.startswith(f"step37_bridge: there is no file {path}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the path of Megatron-Bridge's run_recipe.py is missing"),
        (["--stok", "run_recipe.py"], "unrecognized arguments: --stok"),
        (["--compare", "0", "run_recipe.py"], "argument --compare: expected at least 1, got 0"),
        (["--compare", "run_recipe.py"], "expected an integer, got 'run_recipe.py'"),
        (["--stock", "--compare", "3", "run_recipe.py"], "not allowed with argument --stock"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step37_bridge", *arguments])
    with pytest.raises(SystemExit, match="2"):
        launcher.main()
    assert message in capsys.readouterr().err


def test_under_torchrun_every_rank_runs_the_script_with_its_arguments(tmp_path):
    script = tmp_path / "run_recipe.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "rank = os.environ['RANK']\n"
        f"pathlib.Path({str(tmp_path)!r}, rank).write_text(' '.join([__name__, *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "step37_bridge", "--stock", str(script), "--recipe", "any", "train.x=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        assert (tmp_path / rank).read_text() == "__main__ --recipe any train.x=1"
    assert done.stderr.count("step37_bridge: --stock: nothing is replaced") == 1


def test_a_place_that_is_not_there_is_passed_over_and_one_that_lacks_a_package_is_not(
    tmp_path, monkeypatch
):
    (tmp_path / "place_that_imports.py").write_text("import package_nobody_has\n")
    (tmp_path / "place_that_has_it.py").write_text("name = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    last = ("place_that_has_it", "name")
    module, name = find([("place_that_is_not_there", "name"), last])
    assert (module.__name__, name) == last
    with pytest.raises(ModuleNotFoundError, match="package_nobody_has"):
        find([("place_that_imports", "name"), last])
