"""``make demo`` and ``make test`` share one environment: what it holds, and what is said of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bootstrap

ROOT = Path(__file__).parents[2]
CALLS = list[list[str]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CALLS:
    """The commands that are run, in place of running them; no GPU, an environment elsewhere."""
    found: CALLS = []

    def create(*, with_pip: bool) -> None:
        found.append(["create"])
        (bootstrap.VENV / "bin").mkdir(parents=True)
        bootstrap.venv_python().touch()
        if with_pip:
            (bootstrap.VENV / "lib" / "python3" / "site-packages" / "pip").mkdir(parents=True)

    monkeypatch.setattr(bootstrap, "VENV", tmp_path / "env")
    monkeypatch.setattr(bootstrap, "create_venv", create)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(bootstrap, "cpu_index", list)
    monkeypatch.setattr(bootstrap, "run_pip", lambda command: found.append(command) or True)
    monkeypatch.delenv("STEP37_TORCH", raising=False)
    return found


def prepare(monkeypatch: pytest.MonkeyPatch, *extra: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", *extra])
    return bootstrap.main()


def test_the_tests_add_to_what_the_demo_installed_and_a_second_run_does_nothing(
    calls: CALLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(monkeypatch, "demo") == 0
    assert calls[0] == ["create"]
    assert calls[1][-1] == f"{ROOT}[demo]"
    assert prepare(monkeypatch, "demo") == 0
    assert len(calls) == 2
    assert prepare(monkeypatch) == 0
    assert [call[-1] for call in calls[2:]] == [f"{ROOT}[dev]"]
    assert prepare(monkeypatch, "demo") == prepare(monkeypatch, "dev") == 0
    assert len(calls) == 3


def test_what_the_tests_need_holds_what_the_demo_needs(
    calls: CALLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(monkeypatch, "dev") == prepare(monkeypatch, "demo") == 0
    assert [call[-1] for call in calls] == ["create", f"{ROOT}[dev]"]


def test_an_environment_of_another_project_file_is_made_anew(
    calls: CALLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(monkeypatch, "demo") == 0
    bootstrap.stamp("demo").write_text("of another day")
    monkeypatch.setattr(bootstrap, "create_venv", lambda **_: calls.append(["create"]))
    assert prepare(monkeypatch, "demo") == 0
    assert calls[2] == ["create"]


def test_without_a_gpu_torch_comes_from_pytorchs_cpu_index_where_pip_has_no_wheels_of_its_own(
    calls: CALLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "cpu_index", lambda: ["--extra-index-url", bootstrap.CPU_INDEX])
    assert prepare(monkeypatch, "demo") == 0
    torch = calls[1]
    assert torch[-3:] == ["--extra-index-url", bootstrap.CPU_INDEX, bootstrap.CPU_TORCH]
    assert bootstrap.CPU_INDEX not in calls[2]


def test_the_folder_of_wheels_that_pip_is_configured_with_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def no_answer(address: str, timeout: float) -> None:
        del timeout
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr(bootstrap.urllib.request, "urlopen", no_answer)
    for told, requests in (("global.find-links='/wheels'\n", 0), ("global.timeout='9'\n", 1)):
        done = subprocess.CompletedProcess([], 0, stdout=told)
        monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, done=done, **__: done)
        assert bootstrap.cpu_index() == []
        assert len(asked) == requests


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "starting"),
        ("Looking in links: /a\nProcessing /wheels/torch-2.whl\n", "processing torch"),
        ("Collecting numpy>=1.26 (from step37)\n  Using cached\n", "collecting numpy>=1.26"),
        ("Collecting x\nInstalling collected packages: a, b, c\n", "unpacking 3"),
    ],
)
def test_what_pip_is_at_is_said_in_a_few_words(log: str, said: str) -> None:
    assert bootstrap.doing(log) == said


def test_pips_own_words_are_shown_where_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert not bootstrap.run_pip([sys.executable, "-c", "import sys; sys.exit('no such package')"])
    assert "no such package" in capfd.readouterr().err
    assert bootstrap.run_pip([sys.executable, "-c", "print('fine')"])
    assert capfd.readouterr() == ("", "")


def test_the_demo_asks_for_less_than_the_tests() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "demo: setup-demo\n" in makefile
    assert "tools/bootstrap.py demo\n" in makefile
    assert "\ntest: setup\n" in makefile


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_byte_code_is_kept_though_the_callers_environment_says_otherwise() -> None:
    """pip compiles none: else every process would compile what it imports."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-f", "Makefile", "-f", "-", "told"],
        cwd=ROOT, input="told:\n\t@env\n", capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "1"},
    )  # fmt: skip
    told = [line.partition("=")[0] for line in done.stdout.splitlines()]
    assert "KEPT" in told
    assert "PYTHONDONTWRITEBYTECODE" not in told
