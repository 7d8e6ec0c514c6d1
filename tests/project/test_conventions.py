"""What CONTRIBUTING says of the repository is true: paths, hooks, version, changelog."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest

import step37_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_path_that_the_map_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:step37_\w+|bench|tests|docs|tools|examples)/[\w./]*)`", text)
    assert len(named) > 20
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


def test_the_hooks_run_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint: setup\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (.*)", hooks)
    tools = [entry.split()[0] for entry in entries]
    assert tools == ["ruff", "ruff", "mypy", "lint-imports"]
    for tool, lines in (("ruff", 2), ("mypy", 1), ("importlinter", 1)):
        assert recipe[1].count(f" {tool}") == lines, tool
    assert all("system" in line for line in re.findall(r"language: .*", hooks))


def test_the_version_is_written_once_and_can_be_read_without_torch() -> None:
    assert PROJECT["project"]["dynamic"] == ["version", "readme", "urls"]
    attribute = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "step37_kernels.__version__"
    source = (ROOT / "step37_kernels" / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE) == [
        step37_kernels.__version__
    ]


def test_the_changelog_has_a_dated_section_for_the_version_below_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[0] == "Unreleased"
    version, dash, date = titles[1].partition(" - ")
    assert (version, dash) == (step37_kernels.__version__, " - ")
    datetime.date.fromisoformat(date)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_a_warning_of_our_own_is_an_error_and_one_of_torch_is_not(tmp_path: Path) -> None:
    (tmp_path / "test_warns.py").write_text(
        "import warnings\n"
        "def warn(module):\n"
        "    warnings.warn_explicit('told', UserWarning, 'f.py', 1, module=module)\n"
        "def test_ours(): warn('step37_data.packing')\n"
        "def test_theirs(): warn('torch.nn.modules.module')\n"
        "def test_of_nobody_we_know(): warn('torchlike')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:xdist",
         "--rootdir", str(tmp_path), "-rA", str(tmp_path / "test_warns.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 2 passed, 1 warning" in done.stdout, done.stdout
    assert "FAILED" in done.stdout
    assert "test_ours" in done.stdout.partition("short test summary")[2]
