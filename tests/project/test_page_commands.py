"""Every line of shell on the pages runs here, or is named with the reason why it cannot.

The lines of Python run in ``test_snippets.py``. Blocks of shell have no language, or ``shell``.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from step37_bridge import __main__ as launcher
from step37_bridge import recipe
from step37_inspect.cli import main as step37_data
from tests.project.test_snippets import PAGES, snippets

ROOT = Path(__file__).parents[2]
LANGUAGES = {"", "shell", "python", "text", "yaml", "json", "csv"}
# What a command begins with, and why no test of pages can run it; what is checked instead.
NOT_RUN = {
    "pip install": "needs a package index: its extras exist, the wheel is in test_package.py",
    "hf download": "needs the network",
    "export": "is for the reader's machine: only its syntax is checked",
    "make": "sets up an environment for minutes: the target exists",
    "torchrun": "needs GPUs, Megatron-Bridge and weights: our part of the line is parsed",
    "srun": "needs Slurm, too: our part of the line is parsed",
    "nsys profile": "needs Nsight Systems and GPUs: our part of the line is parsed",
    "python -m bench": "measures for minutes: tests/bench/test_docs_commands.py parses it",
    ".venv-real/bin/python -m pytest": "needs the frameworks: make real runs the file",
}


@dataclass(frozen=True)
class Command:
    page: Path
    line: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.name}-{self.line}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def reason(self) -> str | None:
        """Why it is not run; None where it is."""
        found = [why for start, why in NOT_RUN.items() if self.text.startswith(f"{start} ")]
        return found[0] if found else None


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """The line number, language and text of each block of code of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start(2)].count("\n") + 1, match[1], match[2])
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def commands(page: Path) -> list[Command]:
    found = []
    for line, language, text in blocks(page):
        if language in ("", "shell"):
            # A command goes on where a line ends in a backslash.
            for match in re.finditer(r"^(?:.*\\\n)*.*$", text, re.MULTILINE):
                command = match[0].replace("\\\n", "").strip()
                if command and not command.startswith("#"):
                    found.append(Command(page, line + text[: match.start()].count("\n"), command))
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]


def starting(*starts: str, holding: str = "") -> list[object]:
    """The commands that begin so and hold a text, as parameters of a test."""
    found = [c for c in COMMANDS if c.text.startswith(starts) and holding in c.text]
    assert found, starts
    return [pytest.param(command, id=command.id) for command in found]


def test_every_block_of_the_pages_is_of_a_known_language_and_found_by_the_tests() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), f"{page.name}: a block that is indented"
        assert {language for _, language, _ in blocks(page)} <= LANGUAGES, page.name
        python = [text for _, language, text in blocks(page) if language == "python"]
        assert [snippet.code for snippet in snippets(page)] == python


def test_every_command_is_run_by_a_test_or_named_with_the_reason() -> None:
    unknown = [f"{c.id}: {c.text}" for c in COMMANDS if not c.reason]
    assert [line for line in unknown if ": step37-data " not in line] == []
    used = {c.reason for c in COMMANDS}
    assert [start for start, reason in NOT_RUN.items() if reason not in used] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_shell_understands_every_block(page: Path) -> None:
    for line, language, text in blocks(page):
        if language in ("", "shell"):
            done = subprocess.run(
                ["bash", "-n"], input=text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{page.name}, line {line}: {done.stderr}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``my_pictures`` of the pages is, as the page on data has it."""
    here = tmp_path_factory.mktemp("reader")
    pictures = here / "my_pictures"
    shutil.copytree(ROOT / "examples" / "flickr8k_mini", pictures)
    train = pictures / "train"
    shutil.copy(train / "coffee.jpg", train / "beach.jpg")
    with (train / "metadata.csv").open("a", encoding="utf-8") as metadata:
        metadata.write("beach.jpg" + ",A cup stands on a table." * 5 + "\n")
    return here


@pytest.mark.parametrize("command", starting("step37-data "))
def test_a_command_on_data_does_what_the_page_says(
    command: Command,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needs = "megatron.energon" if command.words[1] == "shard" else "matplotlib"
    for package in ("transformers", needs.partition(".")[0]):
        pytest.importorskip(package)
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    names = {
        "FOLDER": "my_pictures",
        "FILE": "my_pictures/train/beach.jpg",
        "TOKENIZER": str(ROOT / "examples" / "tokenizer"),
    }
    monkeypatch.chdir(folder)
    arguments = [names.get(word, word) for word in command.words[1:]]
    assert step37_data(arguments) == 0, capsys.readouterr().err
    written = [arguments[i + 1] for i, word in enumerate(arguments) if word in ("--out", "--html")]
    if arguments[0] == "shard":
        written.append(arguments[2])
    for name in written:
        assert (folder / name).exists()


@pytest.mark.parametrize("command", starting("pip install"))
def test_the_extras_that_a_line_of_pip_names_exist(command: Command) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in command.words[2:]:
        for extra in re.findall(r"^(?:step37|\.)\[(.*)\]$", word):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", project, re.MULTILINE), name


@pytest.mark.parametrize("command", starting("make "))
def test_the_target_exists(command: Command) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    line = ["make", "--dry-run", *command.words[1:]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", starting(".venv-real/bin/python -m pytest"))
def test_the_file_that_make_real_runs_is_there(command: Command) -> None:
    for word in command.words[3:]:
        assert (ROOT / word).is_file()


@pytest.mark.parametrize(
    "command", starting("torchrun", "srun", "nsys profile", holding="-m step37_bridge")
)
def test_our_part_of_a_line_that_starts_a_job_is_understood(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command.words
    if "-m" not in words:
        assert words[-1] == "train.py"  # a script of the reader's
        return
    at = words.index("-m")
    module, arguments = words[at + 1], words[at + 2 :]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    if module == "step37_bridge":
        # It gets as far as the script of Bridge's, which is not there.
        with pytest.raises(SystemExit, match=r"there is no file /\S+/run_recipe\.py"):
            launcher.main()
        return
    assert module == "step37_bridge.recipe"
    options, _ = recipe._parse()
    ranks = 1
    for word in words[:at]:
        for number in re.findall(r"^--(?:nnodes|nproc-per-node)=(\d+)$", word):
            ranks *= int(number)
    assert ranks % options.parallel_sizes.ranks_needed() == 0
