"""The documentation: it builds, its links lead somewhere, it quotes what the code says."""

from __future__ import annotations

import ast
import functools
import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs_api import public_names

ROOT = Path(__file__).parents[2]
PACKAGES = ("step37_kernels", "step37_data")
PAGES = sorted((ROOT / "docs").glob("*.md"))
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


def text_of(node: ast.expr) -> str | None:
    """A string of the source, with … for what it fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srd]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return None


@functools.cache
def strings() -> tuple[frozenset[str], frozenset[str]]:
    """All strings of both packages, and those that are logged as warnings."""
    all_of_them, warnings = set(), set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.expr) and (text := text_of(node)):
                    all_of_them.add(text)
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ("warning", "warn")
                    and node.args
                    and (text := text_of(node.args[0])) not in (None, "…")
                ):
                    warnings.add(text)
    return frozenset(all_of_them), frozenset(warnings)


TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def quoted() -> list[str]:
    """The messages: each a line of its own, below a heading."""
    return re.findall(r"^### .*\n\n`(.*)`$", TROUBLESHOOTING, re.MULTILINE)


def says(quote: str, message: str) -> bool:
    """Whether a message holds the quote's fragments in order."""
    pattern = ".*".join(re.escape(part) for part in re.split("…+", quote))
    return re.search(pattern, message, re.DOTALL) is not None


def test_every_message_that_troubleshooting_quotes_is_one_of_the_code() -> None:
    assert len(quoted()) > 40
    known = strings()[0]
    assert [q for q in quoted() if not any(says(q, message) for message in known)] == []


def test_the_headings_of_troubleshooting_fit_a_menu_and_have_their_message_below() -> None:
    messages = TROUBLESHOOTING.partition("\n## Speed\n")[0]
    headings = re.findall(r"^### (.*)$", messages, re.MULTILINE)
    assert len(headings) == len(set(headings)) == len(quoted())
    assert [text for text in headings if len(text) > 45 or "`" in text or "…" in text] == []


def test_every_warning_that_a_user_can_meet_has_a_section_in_troubleshooting() -> None:
    warnings = strings()[1]
    assert len(warnings) > 10
    assert [w for w in warnings if not any(says(q, w) for q in quoted())] == []


def test_local_links_of_what_is_read_on_the_repositorys_page_lead_somewhere() -> None:
    missing = []
    for page in READ:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = page.parent / path if path else page
            if not file.exists():
                missing.append(f"{page.name}: {target}")
            elif anchor and file.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [
                    re.sub(r"[^\w\s-]", "", t.lower()).strip().replace(" ", "-") for t in titles
                ]
                if anchor not in slugs:
                    missing.append(f"{page.name}: {target}")
    assert missing == []


def rows_of(page: str, heading: str = "") -> list[list[str]]:
    """The cells of all lines of tables below a heading (the first that begins so) of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n## {heading}")[2]
    text = text.partition("\n## ")[0] if heading else text
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_summary_of_the_data_pages_is_what_they_say() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    kernels = [row for row in rows_of("resources.md") if row[0].endswith("_kernel")]
    assert len(kernels) > 300
    registers, stack, shared = (max(int(row[i]) for row in kernels) for i in (2, 3, 4))
    assert stack == 0
    assert f"none uses more than {registers} registers" in text
    assert f"up to {shared} bytes of shared memory" in text
    forward = rows_of("predicted.md", "H100, forward, predicted")
    ratios = {int(row[0][7:]): float(row[4].split()[0]) for row in forward if "images-" in row[0]}
    assert len(ratios) == 16
    for pictures, ratio in ratios.items():
        assert ratio <= (1.1 if pictures >= 5 else 1.25)
    whole = rows_of("predicted.md", "H100, the whole embedding")
    (nine,) = [row for row in whole if row[0] == "flickr8k"]
    assert float(nine[4]) >= 6


def named_tests(text: str) -> list[tuple[str, str]]:
    """Files and names, which may be within a class, of all tests that a page names."""
    named = re.findall(r"`(tests/[^`]+\.py)::([^`]+)`", text)
    assert text.count("::") == sum(1 + name.count("::") for _, name in named)
    return named


def is_there(file: str, name: str) -> bool:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("::"):
        found = [
            node
            for node in body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part
        ]
        if not found:
            return False
        body = found[0].body
    return True


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    promises = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [line for line in promises if "::" not in line] == ["| fault | promise | test |"] * 5
    assert [test for test in named_tests(text) if not is_there(*test)] == []


# What each framework's page has to say of itself, by the beginning of a line of its table.
TOGETHER = (
    "tensor parallelism", "context parallelism", "pipeline stages", "expert parallelism", "DDP",
    "distributed optimizer", "Megatron-FSDP", "FSDP2", "LoRA, DoRA", "freezing", "recompute",
    "CUDA graphs", "fp8 recipes", "multi-token prediction", "`torch.compile`", "checkpoints",
    "export to Hugging Face",
)  # fmt: skip


@pytest.mark.parametrize("page", ["megatron-bridge.md", "nemo-automodel.md"])
def test_a_page_of_a_framework_says_what_goes_together_and_names_tests_that_exist(
    page: str,
) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition("\n## What goes together\n")[2].partition("\n## ")[0]
    title, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    assert title == "| with | what happens | option | shown by |"
    for name in TOGETHER:
        assert [line for line in lines if line.startswith(f"| {name}")], name
    tests = named_tests(section)
    assert [test for test in tests if not is_there(*test)] == []
    listed = re.findall(r"^(\d+)\. `tests/.*`$", section, re.MULTILINE)
    assert listed == [str(number) for number in range(1, len(tests) + 1)]
    # Each line has the number of a test, or says that there is none; no test is listed for nothing.
    shown = [re.sub(r"`[^`]*`|\([^)]*\)", "", line.rsplit(" | ", 1)[1]) for line in lines]
    assert [line for line in shown if not re.search(r"\d|no test", line)] == []
    assert {number for line in shown for number in re.findall(r"\d+", line)} == set(listed)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (extra docs)")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_no_line_of_code_on_a_page_is_wider_than_a_window_of_1280_pixels_shows() -> None:
    wide = []
    for page in PAGES:
        blocks = re.findall(
            r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
        lines = [line for block in blocks for line in block.splitlines()]
        wide += [f"{page.name}: {line}" for line in lines if len(line) > 90]
    assert wide == []


def test_the_site_builds_strictly_with_every_page(site: Path) -> None:
    for page in PAGES:
        assert (site / f"{page.stem}.html").exists(), f"{page.name} is not in mkdocs.yml"
    for kind in ("*.png", "*.svg"):
        for picture in (ROOT / "docs").glob(kind):
            assert (site / picture.name).exists()


def test_the_site_follows_the_colours_of_the_system_and_has_drawings_for_both(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    for media in ("", ": light", ": dark"):
        assert f'data-md-color-media="(prefers-color-scheme{media})"' in first
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        drawn = {scheme: set(re.findall(rf"\((\w+)-{scheme}\.svg#only-{scheme}\)", text))
                 for scheme in ("light", "dark")}  # fmt: skip
        assert drawn["light"] == drawn["dark"]
        assert text.count(".svg") == 2 * len(drawn["light"])


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = {
        "step37_kernels": "api-kernels",
        "step37_kernels.megatron": "api-kernels",
        "step37_kernels.automodel": "api-kernels",
        "step37_kernels.reference": "api-kernels",
        "step37_data": "api-data",
    }
    texts = {page: (site / f"{page}.html").read_text(encoding="utf-8") for page in pages.values()}
    anchors = {anchor for text in texts.values() for anchor in re.findall(r'id="([\w.]+)"', text)}
    for module, page in pages.items():
        names = public_names(module)
        assert set(names.values()) - anchors == set()
        assert [name for name in names if f">{name}<" not in texts[page].replace("\n", "")] == []
        assert ":func:" not in texts[page]
        assert "<code>.InsertOptions" not in texts[page]
        assert "<!-- api" not in texts[page]


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        fetched += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="([^"]+)"', text)
        assert [f for f in map(html.unescape, fetched) if re.match(r"(https?:)?//", f)] == [], page
