"""Every Python snippet of the README and the pages runs as it stands, page by page.

A page is one script: later snippets see what earlier ones made. A snippet below a line
``<!-- needs: module -->`` runs where that module is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Snippet:
    line: int
    code: str
    needs: str | None


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    pattern = r"(?:<!-- needs: ([\w.]+) -->\n)?```python\n(.*?)^```$"
    return [
        Snippet(
            line=text[: match.start(2)].count("\n"),
            code=match[2],
            needs=match[1],
        )
        for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


def installed(module: str) -> bool:
    try:
        return importlib.import_module(module) is not None
    except ImportError:
        return False


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run_one_after_the_other(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    module = types.ModuleType("snippets")
    for snippet in snippets(page):
        if snippet.needs is None:
            # The line numbers of an error are those of the page.
            code = compile("\n" * snippet.line + snippet.code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, vars(module))


FRAMEWORK = [
    pytest.param(snippet, id=f"{page.name}-{snippet.line}")
    for page in WITH_SNIPPETS
    for snippet in snippets(page)
    if snippet.needs
]


@pytest.mark.parametrize("snippet", FRAMEWORK)
def test_a_snippet_for_a_framework_runs_where_it_is_installed(snippet: Snippet) -> None:
    assert snippet.needs is not None
    if not installed(snippet.needs):
        pytest.skip(f"{snippet.needs} is not installed here")
    done = subprocess.run(
        [sys.executable, "-c", snippet.code],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_readme_and_get_started_have_a_snippet_that_needs_no_framework() -> None:
    for name in ("README.md", "docs/index.md", "docs/data.md", "docs/row-map.md"):
        assert any(snippet.needs is None for snippet in snippets(ROOT / name)), name


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from step37_inspect.cli import _parser

    commands = re.findall(r"^step37-data ([^#\n]*?)\s*(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        _parser().parse_args(command.split())
