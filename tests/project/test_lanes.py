"""The environments of ``make lanes`` and ``make real``, and who runs them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools import environment, lanes, real
from tools.environment import Environment

ROOT = Path(__file__).parents[2]

# Says its version, makes an "environment" of a copy of itself, and notes what pip is to install.
INTERPRETER = f"""#!{sys.executable}
import pathlib, shutil, sys
here = pathlib.Path(__file__)
if sys.argv[1] == "-c":
    print("9.9")
elif sys.argv[2] == "venv":
    (pathlib.Path(sys.argv[3]) / "bin").mkdir(parents=True)
    shutil.copy(here, pathlib.Path(sys.argv[3]) / "bin" / "python")
elif sys.argv[-1] == "missing":
    sys.exit("no such release")
else:
    with open(here.parents[1] / "installed", "a") as notes:
        print(*sys.argv[7:], file=notes)
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A stand-in for an interpreter of version 9.9."""
    path = tmp_path / "python9.9"
    path.write_text(INTERPRETER)
    path.chmod(0o755)
    return str(path)


def installed(folder: Path) -> list[str]:
    return (folder / "installed").read_text().splitlines()


def test_an_environment_is_made_once_and_again_when_what_it_holds_changes(tmp_path, python):
    folder = tmp_path / "env"
    wanted = {"folder": str(folder), "python": python}
    installs = (("torch==1", "--editable", "."), ("--no-deps", "other"))
    for _ in range(2):
        Environment(**wanted, installs=installs).set_up()
        assert installed(folder) == ["torch==1 --editable .", "--no-deps other"]
    Environment(**wanted, installs=(("torch==2",),)).set_up()
    assert installed(folder) == ["torch==2"]


def test_an_environment_that_pip_could_not_fill_is_not_taken_for_one(tmp_path, python, capsys):
    broken = Environment(folder=str(tmp_path / "env"), python=python, installs=(("missing",),))
    for _ in range(2):
        with pytest.raises(SystemExit, match="pip install missing failed"):
            broken.set_up()
        assert "no such release" in capsys.readouterr().err


def test_a_lanes_python_is_the_one_that_is_named(python, monkeypatch):
    monkeypatch.setenv("PYTHON99", python)
    assert lanes.find_python((9, 9)) == python


@pytest.mark.parametrize("given", [None, "absent", sys.executable])
def test_a_python_that_is_missing_or_of_another_version_is_one_line(given, monkeypatch):
    monkeypatch.delenv("PYTHON99", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHON99", given)
    with pytest.raises(SystemExit, match=r"needs Python 9\.9, and .* is none; .* make PYTHON99=/"):
        lanes.find_python((9, 9))


@pytest.mark.parametrize("name", lanes.LANES)
def test_a_lane_runs_all_tests_and_the_kernels_on_ptx_where_it_says_so(name, monkeypatch):
    runs = []
    monkeypatch.setattr(lanes, "find_python", lambda _: "python")
    monkeypatch.setattr(environment.Environment, "set_up", lambda _: None)

    def pytest_fails(_: object, *arguments: str, variables: dict[str, str] | None = None) -> int:
        runs.append((arguments, variables))
        return 1

    monkeypatch.setattr(environment.Environment, "pytest", pytest_fails)
    assert lanes.run(name, []) == 1
    everything = (("-m", "not slow"), None)
    ptx = (("-m", "not slow", "tests/kernels"), {"STEP37_TEST_PTX": "sm_90"})
    assert runs == ([everything, ptx] if name == "gpu" else [everything])
    assert lanes.run(name, ["tests/data"]) == 1
    assert runs[-1] == (("-m", "not slow", "tests/data"), None)


def test_makefile_and_workflow_run_every_lane() -> None:
    makefile = (ROOT / "Makefile").read_text()
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    targets = [f"lane-{name}" for name in lanes.LANES]
    assert re.search(r"^lanes: (.*)$", makefile, re.MULTILINE)[1].split() == targets
    assert re.findall(r"lane: (.*)", workflow) == targets
    pythons = ["{}.{}".format(*lane.python) for lane in lanes.LANES.values()]
    assert re.findall(r'python: "(.*)"', workflow) == pythons
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for lane in lanes.LANES.values():
        assert f"{lane.folder}/" in ignored
        assert re.search(rf"^\trm -rf .* {re.escape(lane.folder)} ", makefile, re.MULTILINE)


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    targets = re.search(r"target: \[(.*)\]", workflow)[1].split(", ")
    assert set(re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text(), re.M)) <= {*targets}


def test_checkouts_go_before_the_installed_releases_where_their_packages_are(tmp_path):
    for package in ("b/src/megatron/bridge", "m/megatron/core"):
        (tmp_path / package).mkdir(parents=True)
    given = {"bridge": str(tmp_path / "b"), "megatron": str(tmp_path / "m"), "automodel": ""}
    assert real.import_paths(given) == [str(tmp_path / "b" / "src"), str(tmp_path / "m")]
    assert real.import_paths(dict.fromkeys(given)) == []


def test_a_folder_that_is_no_checkout_and_no_folder_at_all_are_one_line(tmp_path):
    given = dict.fromkeys(real.CHECKOUTS, "")
    with pytest.raises(SystemExit, match="name a checkout: make real-main BRIDGE="):
        real.import_paths(given)
    with pytest.raises(SystemExit, match=r"is no checkout of NeMo Automodel: no .*nemo_automodel"):
        real.import_paths({**given, "automodel": str(tmp_path)})
