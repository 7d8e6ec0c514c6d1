"""A picture of a row map: a pack position by position, and the feature row that each received."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from step37_kernels import InsertPlan

COLUMNS = 32
CELL_W, CELL_H = 34, 30
MARGIN, THUMBNAIL = 24, 150
TEXT, LOSS, PADDING, MARKER = (232, 234, 240), (255, 214, 140), (250, 250, 250), (190, 196, 210)


def _hue(feature: int, features: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(feature / max(features, 1), 0.45, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def draw_row_map(pack: Mapping[str, Any], plan: InsertPlan, tokenizer: Any, path: Path) -> None:
    """Write a PNG: one cell a position, in reading order.

    A coloured cell holds a feature row, numbered as the plan numbers it, in the colour of its
    photograph's frame; an orange one is a label that counts in the loss; a bar on the left edge
    begins a sub-sequence. A feature row without a destination is listed below.

    Args:
        pack: packed dictionary of ``pack_samples``.
        plan: of the pack's tokens and images, B = 1.
        tokenizer: names the text tokens.
        path: of the PNG; its folder is made.
    """
    tokens = pack["tokens"].tolist()
    loss = pack["loss_masks"].tolist()
    bounds = pack["cu_seqlens"].tolist()
    row_at = plan.row_at[:, 0].tolist()
    counts = [count for rows in plan.row_counts for count in rows]
    feature_of_row = [k for k, count in enumerate(counts) for _ in range(count)]
    has_images = bool(pack["image_paths"])
    padded_from = bounds[-2] if len(bounds) - 1 > len(pack["image_paths"]) else bounds[-1]

    top = MARGIN + 56 + (THUMBNAIL + 40 if has_images else 0)
    lines = -(-len(tokens) // COLUMNS)
    width = 2 * MARGIN + COLUMNS * CELL_W
    picture = Image.new("RGB", (width, top + lines * (CELL_H + 8) + 70), "white")
    draw = ImageDraw.Draw(picture)
    small, normal, title = _font(9), _font(13), _font(18)
    placed = sum(row >= 0 for row in row_at)
    draw.text(
        (MARGIN, MARGIN),
        f"One pack: {len(tokens)} positions, {len(bounds) - 1} sub-sequences, "
        f"{len(counts)} photographs, {placed} of {plan.num_rows} feature rows placed",
        fill="black",
        font=title,
    )

    x = MARGIN
    for k, (file, _) in enumerate(pack["image_paths"]):
        with Image.open(file) as photograph:
            thumbnail = photograph.convert("RGB")
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        y = MARGIN + 44
        frame = (x, y, x + thumbnail.width + 8, y + thumbnail.height + 8)
        draw.rectangle(frame, fill=_hue(k, len(counts)))
        picture.paste(thumbnail, (x + 4, y + 4))
        draw.text((x, frame[3] + 2), f"{k}: {Path(file).name}", fill="black", font=normal)
        x = frame[2] + 16

    for position, token in enumerate(tokens):
        line, column = divmod(position, COLUMNS)
        left, upper = MARGIN + column * CELL_W, top + line * (CELL_H + 8)
        row = row_at[position]
        if row >= 0:
            colour, label = _hue(feature_of_row[row], len(counts)), str(row)
        elif position >= padded_from:
            colour, label = PADDING, "pad"
        else:
            label = tokenizer.decode([token]).replace("\n", "\\n")
            colour = LOSS if loss[position] else MARKER if label.startswith("<") else TEXT
        draw.rectangle((left, upper, left + CELL_W - 2, upper + CELL_H), fill=colour)
        draw.text((left + 2, upper + 9), label[:7], fill="black", font=small)
        if position in bounds[:-1]:
            draw.rectangle((left - 2, upper - 3, left, upper + CELL_H + 3), fill="black")

    y = top + lines * (CELL_H + 8) + 8
    lost = [r for r, d in enumerate(plan.destinations.tolist()) if d < 0]
    legend = (
        ("feature row", _hue(0, 8)),
        ("in the loss", LOSS),
        ("special", MARKER),
        ("text", TEXT),
    )
    x = MARGIN
    for name, colour in legend:
        draw.rectangle((x, y, x + 18, y + 18), fill=colour)
        draw.text((x + 24, y + 2), name, fill="black", font=normal)
        x += 130
    draw.text(
        (x, y + 2),
        f"rows without a destination: {lost or 'none'};  a black bar begins a sub-sequence",
        fill="black",
        font=normal,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
