"""Draws the pictures of the documentation again: ``make pictures``. Needs Matplotlib.

It uses the photographs and the tokenizer of ``examples/flickr8k_mini``, and writes to ``docs/``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from examples.row_map import draw_row_map
from step37_data.flickr8k_loader import pack_captions, read_flickr8k_metadata
from step37_data.template import Step37MultimodalTemplate
from step37_inspect import style
from step37_inspect.cli import main as step37_data
from step37_kernels import plan_insert

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT / "examples" / "flickr8k_mini"
TOKENIZER = str(ROOT / "examples" / "tokenizer")

_LOOKS: dict[str, dict[str, Any]] = {
    "host works": {"facecolor": "#a6c8e4"},
    "host waits for the device": {"facecolor": "white", "edgecolor": style.BROKEN, "hatch": "////"},
    "device": {"facecolor": "#9fd8c5"},
    "device copies [S, B, H]": {"facecolor": "#f2cf8d", "edgecolor": "#8a6a1f"},
}
# (lane, start, width, look, text); not to scale.
_WAIT = "host waits for the device"
_STOCK = (
    ("host", 0.0, 1.7, "host works", "resize, normalise"),
    ("host", 1.7, 0.8, "host works", "launch"),
    ("device", 2.2, 0.7, "device", "look up"),
    ("device", 2.9, 0.9, "device", "project"),
    ("host", 2.5, 1.4, _WAIT, ""),  # waits for the positions of the start tokens
    ("host", 3.9, 0.25, "host works", ""),
    ("device", 4.05, 0.75, "device copies [S, B, H]", "clone"),
    *(
        piece
        for k in range(3)
        for piece in (
            ("host", 4.15 + 1.7 * k, 0.7, _WAIT, ""),
            ("host", 4.85 + 1.7 * k, 0.15, "host works", ""),
            ("host", 5.0 + 1.7 * k, 0.6, _WAIT, ""),
            ("host", 5.6 + 1.7 * k, 0.25, "host works", ""),
            ("device", 5.75 + 1.7 * k, 0.5, "device", str(k)),
        )
    ),
)
_OURS = (
    ("threads", 0.0, 3.2, "host works", "decode the packs to come"),
    ("threads", 3.2, 3.2, "host works", "…"),
    ("host", 0.0, 0.6, "host works", "launch"),
    ("host", 0.6, 2.6, "host works", "goes on with the decoder's launches"),
    ("device", 0.5, 0.8, "device", "pixels"),
    ("device", 1.3, 0.7, "device", "look up"),
    ("device", 2.0, 0.5, "device", "plan"),
    ("device", 2.5, 1.6, "device", "project + insert"),
)


def draw_step() -> Any:
    """Draw how long the host waits in the embedding of a step with three images: stock and ours."""
    width, left, lane = 11.0, 1.15, 0.34
    title = "The embedding of one step, three images: what the host waits for"
    sheet, axes = style.figure(width, 4.05, title)
    style.legend(axes, (0.2, 0.62), _LOOKS)
    y = 1.0
    for name, told, pieces, lanes in (
        ("stock", "two waits an image, a copy a group, pixels within the step", _STOCK,
         ("host", "device")),
        ("step37", "no wait; each row of the output is written in one pass", _OURS,
         ("threads", "host", "device")),
    ):  # fmt: skip
        style.label(axes, (0.2, y), name, size=11, weight="bold")
        style.label(axes, (left, y), told)
        y += 0.22
        for number, lane_name in enumerate(lanes):
            top = y + number * (lane + 0.08)
            style.label(axes, (0.2, top + lane / 2), lane_name)
            style.box(axes, (left, top, width - left - 0.2, lane), facecolor="#f6f6f7")
            for of, start, length, look, text in pieces:
                if of == lane_name:
                    looks = {"edgecolor": style.FRAME, "linewidth": 0.6, **_LOOKS[look]}
                    x = left + start * (width - left - 0.2) / 10.1
                    span = length * (width - left - 0.2) / 10.1
                    style.box(axes, (x, top, span, lane), **looks)
                    style.label(axes, (x + 0.05, top + lane / 2), text, size=8, width=span - 0.08)
        y += len(lanes) * (lane + 0.08) + 0.25
    told = "Order and overlap only; the lengths are not to scale."
    style.label(axes, (left, y - 0.08), told, size=8)
    return sheet


_OURS_LOOK, _YOURS_LOOK = {"facecolor": "#9fd8c5"}, {"facecolor": "#f6f6f7"}
# x, y, width, height, title, what is below it, whether it is ours.
_PARTS = (
    (0.2, 1.05, 1.4, 2.15, "packs", ("step37_data or", "step37_energon"), True),
    (2.95, 1.05, 1.4, 0.8, "plan", ("where rows go",), True),
    (2.2, 2.25, 1.2, 0.95, "pixels", ("resized,", "normalised"), True),
    (3.8, 2.25, 1.25, 0.95, "vision tower", (), False),
    (
        6.05,
        1.05,
        1.65,
        2.15,
        "project + insert",
        ("rows of pictures", "and words go to", "their places"),
        True,
    ),
    (8.45, 1.05, 1.05, 2.15, "decoder", (), False),
    (6.05, 3.8, 1.65, 0.8, "gradient rows", ("read it once",), True),
)
# Corners of an arrow, its text and where that stands, whether a gradient takes it.
_ARROWS = (
    (((1.6, 1.45), (2.95, 1.45)), "input_ids [B, S]", (1.68, 1.3), False),
    (((4.35, 1.45), (6.05, 1.45)), "destinations", (4.75, 1.3), False),
    (((1.6, 2.72), (2.2, 2.72)), "uint8", (1.66, 2.57), False),
    (((3.4, 2.72), (3.8, 2.72)), "", (0, 0), False),
    (((5.05, 2.72), (6.05, 2.72)), "features", (5.12, 2.57), False),
    (((5.05, 2.72), (6.05, 2.72)), "[N, L, C]", (5.12, 2.9), False),
    (((7.7, 2.12), (8.45, 2.12)), "[S, B, H]", (7.73, 1.97), False),
    (((8.97, 3.2), (8.97, 4.2), (7.7, 4.2)), "of the output", (7.82, 4.05), True),
    (((6.05, 4.2), (4.42, 4.2), (4.42, 3.2)), "of the features", (4.55, 4.05), True),
    (((6.87, 3.8), (6.87, 3.2)), "of projector, table", (6.97, 3.5), True),
)


def draw_architecture() -> Any:
    """Where ids, features, plan, rows and gradients go in a step."""
    sheet, axes = style.figure(9.7, 4.8, "One step: where ids, pictures and gradients go")
    looks = {"step37": _OURS_LOOK, "the model": _YOURS_LOOK}
    style.legend(axes, (0.2, 0.68), looks)
    style.label(axes, (2.5, 0.68), "- - -  gradients", color=style.BROKEN)
    edge = {"edgecolor": style.FRAME, "linewidth": 0.8}
    for x, y, width, height, title, below, ours in _PARTS:
        style.box(axes, (x, y, width, height), **edge, **(_OURS_LOOK if ours else _YOURS_LOOK))
        room = {"width": width - 0.2}
        style.label(axes, (x + 0.1, y + 0.24), title, size=11, weight="bold", **room)
        for number, text in enumerate(below):
            style.label(axes, (x + 0.1, y + 0.54 + 0.2 * number), text, size=9.5, **room)
    for corners, text, at, gradient in _ARROWS:
        color = style.BROKEN if gradient else style.INK
        lines: dict[str, Any] = {
            "color": color,
            "linewidth": 1.3,
            "linestyle": "--" if gradient else "-",
        }
        axes.plot(*zip(*corners, strict=True), **lines)
        head = {"arrowstyle": "-|>", "color": color, "linewidth": 0, "shrinkA": 0, "shrinkB": 0}
        (x, y), (x_before, y_before) = corners[-1], corners[-2]
        behind = (x - 0.1 * (x > x_before) + 0.1 * (x < x_before), y + 0.1 * (y < y_before))
        axes.annotate("", (x, y), behind, arrowprops={**head, "mutation_scale": 13})
        style.label(axes, at, text, size=9.5, color=color)
    return sheet


_AT_NIGHT = {
    "#ffffff": "#1e2129",  # the page of the dark scheme
    style.INK: "#e8e8ea",
    "#f6f6f7": "#2c303b",
    "#a6c8e4": "#2c5a80",
    "#9fd8c5": "#1d6651",
    "#f2cf8d": "#7a5a1c",
    "#8a6a1f": "#d9ae57",
    style.BROKEN: "#f0803c",
}


def save_for_day_and_night(sheet: Any, out: Path, name: str) -> None:
    """Write ``name``-light.svg, and ``name``-dark.svg, which differs in its colours."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        sheet.savefig(file, format="svg", dpi=style.DPI, metadata={"Date": None})
    # Whitespace at line ends is of no use to anybody.
    light = "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
    dark = light.replace("<svg ", '<svg fill="#e8e8ea" ', 1)  # of letters that name no colour
    for day, night in _AT_NIGHT.items():
        dark = dark.replace(day, night)
    (out / f"{name}-light.svg").write_text(light, encoding="utf-8")
    (out / f"{name}-dark.svg").write_text(dark, encoding="utf-8")


def draw_demo_row_map() -> Any:
    """Draw the row map of the demo's first pack: images of 112 pixels, 16 rows each."""
    samples = read_flickr8k_metadata(PHOTOGRAPHS / "train" / "metadata.csv", "caption_0", None)
    template = Step37MultimodalTemplate(
        tokenizer_path=TOKENIZER, max_sequence_length=192, image_token_count=16
    )
    packs = pack_captions(
        samples, template, max_length=192, oversize_policy="drop", dataset_sampling="sequential",
        progress=False,
    )  # fmt: skip
    ids = packs[0]["tokens"][None]
    plan = plan_insert(
        ids, [(template.img_start_token_id, [16] * len(packs[0]["image_paths"]))], impl="torch"
    )
    return draw_row_map(packs[0], plan, template.tokenizer)


@contextlib.contextmanager
def larger_data_set() -> Iterator[Path]:
    """Write 80 samples of eight photographs: some large, one broken, captions of many lengths."""
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "photographs" / "train"
        train.mkdir(parents=True)
        rows = read_flickr8k_metadata(PHOTOGRAPHS / "train" / "metadata.csv", "caption_0", None)
        lines = ["file_name,caption_0"]
        for number in range(80):
            row = rows[number % len(rows)]
            file = train / f"{number:02d}-{Path(row.image_path).name}"
            shutil.copyfile(row.image_path, file)
            if number % 5 == 0:
                with Image.open(row.image_path) as photograph:
                    photograph.resize((1100 + 4 * number, 800)).save(file)
            times = 180 if number == 37 else 1 + number * number % 23
            lines.append(f'{file.name},"{" ".join([row.caption] * times)}"')
        (train / "07-rocket.jpg").write_bytes(b"no picture")
        (train / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield train.parent


def draw_all(out: Path) -> None:
    """Write every picture into ``out``."""
    style.save(draw_step(), out / "step.png")
    save_for_day_and_night(draw_step(), out, "step")
    save_for_day_and_night(draw_architecture(), out, "architecture")
    style.save(draw_demo_row_map(), out / "row_map.png")
    out, here = out.resolve(), Path.cwd()
    with larger_data_set() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder.parent)
        common = ["inspect", folder.name, "--tokenizer", TOKENIZER, "--quiet", "--multicrop"]
        assert step37_data([*common, "--out", str(out / "data_set.png")]) == 0
        pack = ["--pack", "0", "--packing", "best_fit", "--skip-images"]
        assert step37_data([*common, *pack, "--out", str(out / "pack.png")]) == 0
        picture = str(folder / "train" / "15-rocket.jpg")
        crops = ["inspect", "--picture", picture, "--out", str(out / "crops.png")]
        assert step37_data(crops) == 0
        os.chdir(here)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the documentation's pictures.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    draw_all(parser.parse_args().out)


if __name__ == "__main__":
    main()
