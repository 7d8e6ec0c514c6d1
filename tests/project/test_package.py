"""What `pip install step37` gives: built as for a release, installed, and used from there.

The clean environment borrows torch, numpy and Pillow from this one, by links in a folder of its
own: nothing else that is installed here can be seen from it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import step37_kernels
from tests.project.test_snippets import snippets

ROOT = Path(__file__).parents[2]
for tool in ("build", "twine", "setuptools"):
    pytest.importorskip(tool, reason=f"{tool} is not installed (extra test)")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # Of a copy: building writes beside the sources, and other processes build too.
    source = tmp_path_factory.mktemp("source") / "step37"
    names = (".git", ".venv*", ".*_cache", ".hypothesis", "*.egg-info", "__pycache__")
    ignore = shutil.ignore_patterns(*names, "build", "dist", "out")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    command.append(str(source))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the clean environment's Python, or a command of it, far from the checkout."""
    folder = tmp_path_factory.mktemp("clean")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder / "env")
    # pip of this interpreter installs there: a wheel alone needs no index.
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    pip += ["--no-index", "--disable-pip-version-check", "--quiet", *map(str, dist.glob("*.whl"))]
    try:
        subprocess.run(pip, capture_output=True, text=True, check=True, env=_environment())
    except subprocess.CalledProcessError as error:
        if "No module named pip" in error.stderr:
            pytest.skip("this environment has no pip to install the wheel with")
        raise AssertionError(error.stderr) from error
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for name in _needed("step37"):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "bin", "__pycache__") and not (borrowed / top).exists():
                (borrowed / top).symlink_to(
                    Path(str(file.locate())).parents[len(file.parts) - 1] / top
                )
    (next((folder / "env").glob("lib/python*/site-packages")) / "borrowed.pth").write_text(
        f"{borrowed}\n"
    )

    def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(folder / "env" / "bin" / command[0]), *command[1:]],
            cwd=folder, env=_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def _environment() -> dict[str, str]:
    """Ours, without what makes a Python look into the checkout."""
    ours = ("PYTHON", "TRITON", "COVERAGE")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _needed(name: str) -> set[str]:
    """The installed distributions that a plain installation of ``name`` brings, without itself."""
    found: set[str] = set()
    todo = {name}
    while todo:
        for line in importlib.metadata.requires(todo.pop()) or []:
            other = re.split(r"[^\w.-]", line, maxsplit=1)[0].lower()
            if "extra ==" in line or other in found:
                continue
            try:
                importlib.metadata.distribution(other)
            except importlib.metadata.PackageNotFoundError:
                continue
            found.add(other)
            todo.add(other)
    return found


def test_the_sdist_and_the_wheel_pass_twine(dist: Path) -> None:
    files = sorted(dist.iterdir())
    version = step37_kernels.__version__
    assert [file.name for file in files] == [
        f"step37-{version}-py3-none-any.whl",
        f"step37-{version}.tar.gz",
    ]
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sdist_holds_tests_docs_and_examples_and_the_wheel_only_the_packages(
    dist: Path,
) -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        name
        for name in tracked
        if not name.startswith((".ci/", ".github/", ".gitignore")) and (ROOT / name).exists()
    }
    assert wanted - held == set()
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        links = re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / page).read_text(encoding="utf-8"))
        assert links or page == "SECURITY.md"
        assert {link.rstrip("/") for link in links} - held == set()
    assert not [name for name in held if "__pycache__" in name or name.startswith((".venv", "out"))]
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        assert {"step37_kernels/py.typed", "step37_inspect/page.html"} <= held
        tops = {name.partition("/")[0] for name in held}
    assert tops == {
        "step37_bridge",
        "step37_data",
        "step37_energon",
        "step37_inspect",
        "step37_kernels",
        f"step37-{step37_kernels.__version__}.dist-info",
    }


def links(metadata: str) -> list[str]:
    """What the page on the index links to, shows or names as an address of the project."""
    text = re.sub(r"^ *```.*?^ *```$", "", metadata, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)]+)\)", text)
    found += re.findall(r'(?:src|href|srcset)="([^"]+)"', text)
    return found + re.findall(r"^Project-URL: \w+, (.*)$", text, re.MULTILINE)


def test_the_page_on_the_index_has_no_relative_link(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = wheel.read(name).decode()
    assert "## Adopt it" in metadata
    assert [link for link in links(metadata) if not link.startswith("https://")] == []


def test_links_and_pictures_of_that_page_lead_into_the_repository_that_citation_names(
    tmp_path: Path,
) -> None:
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, tmp_path)
    for folder in ("step37_kernels", "made"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "step37_kernels" / "__init__.py", tmp_path / "step37_kernels")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = re.sub(r"^(repository-code|url):.*\n", "", citation, flags=re.MULTILINE)
    site, repository = "https://site.example", "https://example.org/we/step37"
    (tmp_path / "CITATION.cff").write_text(
        f'{citation}url: "{site}/"\nrepository-code: {repository}\n', encoding="utf-8"
    )
    command = "from setuptools.build_meta import *; prepare_metadata_for_build_wheel('made')"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    metadata = next(tmp_path.glob("made/*/METADATA")).read_text(encoding="utf-8")
    version = step37_kernels.__version__
    in_readme = links((ROOT / "README.md").read_text(encoding="utf-8"))
    inside = [link for link in in_readme if not link.startswith("https://")]
    assert len(inside) > 10
    for link in inside:
        kind = "raw" if link.endswith(".png") else "blob"
        assert f"]({repository}/{kind}/v{version}/{link})" in metadata
    assert f"Project-URL: Documentation, {site}\n" in metadata
    for name, address in (
        ("Source", repository),
        ("Changelog", f"{repository}/blob/HEAD/CHANGELOG.md"),
        ("Issues", f"{repository}/issues"),
    ):
        assert f"Project-URL: {name}, {address}\n" in metadata
    assert [link for link in links(metadata) if not link.startswith("https://")] == []


def test_the_installed_kernels_and_module_work(installed: Run) -> None:
    script = """
        import sys, torch, step37_kernels, step37_data
        from step37_kernels import ImageForInsert, ImageInsertEmbedding
        assert "borrowed" not in step37_kernels.__file__, step37_kernels.__file__
        words = torch.nn.Embedding(9, 4)
        fuse = ImageInsertEmbedding(
            lambda input_ids, position_ids: words(input_ids).transpose(0, 1), 6, 4)
        ids = torch.tensor([[7, 1, 2, 3]])
        group = ImageForInsert(insert_start_token=7, image_features=torch.ones(1, 2, 6))
        fuse(ids, [group]).sum().backward()
        assert fuse.align_projector.weight.grad.abs().sum() > 0
        from step37_data import pack
        assert list(pack([4, 3, 9, 2], 8, "drop").packed_sample_ranges) == [(0, 2), (3, 1)]
        assert not {"transformers", "huggingface_hub", "megatron", "tqdm"} & set(sys.modules)
        print(step37_kernels.__file__, step37_kernels.__version__)
    """
    done = installed("python", "-c", textwrap.dedent(script))
    assert "site-packages" in done.stdout
    assert str(ROOT) not in done.stdout
    assert done.stdout.split()[-1] == step37_kernels.__version__


def test_the_first_snippet_of_the_readme_and_of_get_started_run_from_the_wheel(
    installed: Run,
) -> None:
    for page in ("README.md", "docs/index.md"):
        alone = next(s for s in snippets(ROOT / page) if s.needs is None)
        installed("python", "-W", "error", "-c", alone.code)


def test_the_command_helps_without_extras_and_names_the_one_that_it_needs(installed: Run) -> None:
    assert "inspect" in installed("step37-data", "--help").stdout
    assert "--html" in installed("step37-data", "inspect", "--help").stdout
    folder = str(ROOT / "examples" / "flickr8k_mini")
    tokenizer = str(ROOT / "examples" / "tokenizer")
    done = installed("step37-data", "inspect", folder, "--tokenizer", tokenizer, check=False)
    assert done.returncode == 1
    # Whichever of them is looked for first: each is in that extra.
    expected = r"step37-data: inspect needs \w+: pip install 'step37\[data\]'\n"
    assert re.fullmatch(expected, done.stderr), done.stderr


def test_bridges_launcher_and_recipe_help_without_bridge_and_say_that_it_is_missing(
    installed: Run, tmp_path: Path
) -> None:
    assert "--stock" in installed("python", "-m", "step37_bridge", "--help").stdout
    assert "--pipeline" in installed("python", "-m", "step37_bridge.recipe", "--help").stdout
    script = tmp_path / "run_recipe.py"
    script.write_text("print('the script ran')\n")
    stock = installed("python", "-m", "step37_bridge", "--stock", str(script))
    assert stock.stdout == "the script ran\n"
    done = installed("python", "-m", "step37_bridge", str(script), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    told = r"step37_bridge: there is no megatron\.bridge\..*installed: no megatron-bridge .*\n"
    assert re.fullmatch(told, done.stderr), done.stderr


def test_a_picture_needs_no_extra_until_it_is_drawn(installed: Run) -> None:
    photograph = str(ROOT / "examples" / "flickr8k_mini" / "train" / "rocket.jpg")
    done = installed("step37-data", "inspect", "--picture", photograph)
    assert "tokens    171: 0 crops" in done.stdout
    drawing = ("--out", "p.png")
    done = installed("step37-data", "inspect", "--picture", photograph, *drawing, check=False)
    assert done.stderr == "step37-data: inspect needs matplotlib: pip install 'step37[plots]'\n"


def test_a_name_of_the_door_that_needs_an_extra_says_which(installed: Run) -> None:
    done = installed("python", "-c", "from step37_data import MixedPackedDataloader", check=False)
    told = "ModuleNotFoundError: step37_data.MixedPackedDataloader needs tqdm: pip install"
    assert f"{told} 'step37[data]'" in done.stderr


def test_every_extra_that_a_message_names_exists() -> None:
    from step37_data.common.extras import EXTRA_OF

    extras = importlib.metadata.metadata("step37").get_all("Provides-Extra") or []
    text = (ROOT / "pyproject.toml").read_text()
    for extra in {*EXTRA_OF.values(), "all", "energon", "docs", "test", "lint", "bench", "dev"}:
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), (extra, extras)
