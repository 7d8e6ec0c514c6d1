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
