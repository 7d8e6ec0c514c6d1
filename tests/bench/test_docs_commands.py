"""What the pages say of the benchmarks is true: command lines, shapes, subjects and rows exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import peers, report
from bench.harness import Settings
from bench.shapes import AUTOMODEL, SHAPES, Shape, make_batch, make_case, shapes_named
from bench.subjects import SUBJECTS, insert, pixel_kernels

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def commands(text: str) -> Iterator[str]:
    """What follows ``python -m bench`` in the code of a page, up to a comment, ``;`` or pipe."""
    code = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in code for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        for arguments in re.findall(r"python3? -m bench\b(?!\.)([^#;|>&]*)", line):
            yield arguments.strip()


def table(column: str) -> list[list[str]]:
    """The lines of the page's table whose first column has this title."""
    found = re.search(rf"^\| {column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found is not None, column
    return [line.strip("| ").split(" | ") for line in found[1].splitlines()]


def names_of(column: str) -> list[str]:
    return [name for first, *_ in table(column) for name in re.findall(r"`([^`]+)`", first)]


def test_every_command_line_of_the_pages_is_understood(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [(page, line) for page in PAGES for line in commands(page.read_text("utf-8"))]
    assert len(found) > 10
    for page, line in found:
        status = 0
        try:
            command.parse(shlex.split(line))
        except SystemExit as end:  # 0 after --help
            status = end.code
        assert status == 0, (page.name, line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("`python -m bench insert --quick`", ["insert --quick"]),
        ("```\npython -m bench plan   # a comment\n```\n", ["plan"]),
        ("by `python -m bench predict > docs/predicted.md`", ["predict"]),
        ("`python -m bench.resources --arch sm_90`, `python -m benchmark`", []),
        ("`python -m bench inserts`", ["inserts"]),
    ],
)
def test_command_lines_are_found_in_pages(text: str, wanted: list[str]) -> None:
    assert list(commands(text)) == wanted


def test_every_shape_that_a_page_names_exists() -> None:
    texts = [page.read_text("utf-8") for page in PAGES]
    named = [name for text in texts for name in re.findall(r"`(images-\d+)`", text)]
    assert len(named) > 3
    shapes_named(named)


def test_the_table_of_shapes_lists_them_all_with_their_sizes() -> None:
    every = [*SHAPES.values(), AUTOMODEL]
    assert names_of("shape") == [*(shape.name for shape in every), "images-N"]
    for shape, (_, positions, rows, what) in zip(every, table("shape"), strict=False):
        assert (int(positions), int(rows)) == (shape.seq_len, shape.num_rows)
        numbers = [int(number) for number in re.findall(r"\d+", what)]
        counts = [count for count in (shape.images, shape.crops) if count]
        assert numbers == ([] if counts == [1] else counts)
    (images,) = shapes_named(["images-4"])
    assert images.num_rows == 4 * 169
    assert images.seq_len == 4 * 224


def test_the_tables_of_subjects_list_them_all() -> None:
    assert set(names_of("subject")) == SUBJECTS.keys()
    without = PAGE.partition("## Without a GPU")[2]
    named = set(re.findall(r"^\| `.*?\|", without, re.MULTILINE))
    assert named
    for name in re.findall(r"`(\w+)`", "".join(named)):
        assert not SUBJECTS[name].needs_gpu
    tuned = PAGE.partition("## Tune")[2]
    assert re.findall(r"`([\w-]+)`", tuned) == list(SUBJECTS["tune"].shapes)


def test_every_row_that_the_page_explains_exists(settings: Settings, tiny: Shape) -> None:
    settings = dataclasses.replace(settings, compile_backend="aot_eager")
    batch = make_batch(tiny, torch.device("cpu"))
    found = {pixel_kernels.COPY, "Megatron-Bridge"}  # the class is not installed everywhere
    every = peers.peers(tiny.hidden, tiny.width, "torch", "aot_eager")
    for layout in insert.LAYOUTS:
        case = make_case(batch, dtype=torch.float32, layout=layout, seed=0)
        inputs = insert.Inputs(batch, [case])
        for operation in insert.OPERATIONS:
            compared = insert.implementations(
                operation, inputs, layout, insertions=every, settings=settings
            )
            found |= {one.name for one in compared}
            found.add(insert.replay(compared[0]).name)
    assert set(names_of("row")) == found


def test_every_column_is_explained() -> None:
    named = [name for first, *_ in table("column") for name in first.split(", ")]
    assert tuple(named) == report.COLUMNS[report.NAMES :]


def test_the_page_of_kernels_names_subjects_that_exist() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    rows = re.findall(r"^\| \[.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert rows
    for name in re.findall(r"`(\w+)`", "".join(rows)):
        assert name in SUBJECTS
