"""Fixtures; and the promise that what is collected here runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from step37_kernels.megatron import unpatch_step37
from tests.megatron.conftest import megatron  # noqa: F401
from tests.real import INSTALLED

# Elsewhere than in the environment of ``make real`` there is nothing to test.
collect_ignore_glob = [] if INSTALLED else ["*test_*.py"]

_skipped: list[str] = []


@pytest.fixture
def bridge() -> Iterator[None]:
    """Megatron-Bridge with its Step-3.7 not imported yet; whatever is patched is undone."""
    from tests.real.bridge.bridge_model import PACKAGE

    before = _below(PACKAGE)
    for name in before:
        del sys.modules[name]
    yield
    unpatch_step37()
    for name in _below(PACKAGE):
        del sys.modules[name]
    sys.modules.update(before)


def _below(package: str) -> dict[str, Any]:
    return {n: m for n, m in sys.modules.items() if f"{n}.".startswith(f"{package}.")}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "tests/real/" in report.nodeid:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [r for r in terminalreporter.stats.get("passed", []) if "tests/real/" in r.nodeid]
    if ran or _skipped:
        terminalreporter.write_line(
            f"{len(ran)} tests passed on the real classes, {len(_skipped)} skipped"
        )
    for name in _skipped:
        terminalreporter.write_line(f"skipped, which counts as failed here: {name}")
