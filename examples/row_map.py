"""Draws a row map: each position of a pack, and the feature row that it received.

Needs Matplotlib (extra ``plots``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from step37_inspect import style
from step37_kernels import InsertPlan

COLUMNS = 24
# In inches.
CELL_W, CELL_H, GAP, MARGIN, THUMBNAIL = 0.45, 0.27, 0.07, 0.24, 1.3
# Light colours, so that letters are readable. Images use them in turn, and show their numbers.
IMAGES = ("#a6d4f2", "#f2c9a1", "#a5dcc6", "#e3b9d2", "#f3e89b", "#b9c4e8")
LOOKS: dict[str, dict[str, Any]] = {
    "feature row": {"facecolor": IMAGES[0]},
    "in the loss": {"facecolor": style.TRAINED},
    "special token": {"facecolor": "#b4bac6"},
    "text": {"facecolor": "#e8eaee"},
    "padding": {"facecolor": style.PADDING, "edgecolor": "#c9ccd2", "hatch": "////"},
}


def draw_row_map(pack: Mapping[str, Any], plan: InsertPlan, tokenizer: Any) -> Any:
    """Draw one cell for each position, in reading order.

    A coloured cell holds a feature row, with its number in the plan, in the colour of its
    photograph's frame. An amber cell is a label that counts in the loss. A bar on the left edge
    marks the beginning of a sub-sequence. The number of feature rows without a destination is at
    the bottom.

    Args:
        pack: packed dictionary of ``pack_samples``.
        plan: of the pack's tokens and images, B = 1.
        tokenizer: turns text tokens into text.

    Returns:
        The Matplotlib figure.
    """
    tokens, loss = pack["tokens"].tolist(), pack["loss_masks"].tolist()
    bounds = pack["cu_seqlens"].tolist()
    row_at = plan.row_at[:, 0].tolist()
    counts = [rows for _, group in plan.runs for n, rows in group for _ in range(n)]
    feature_of_row = [k for k, count in enumerate(counts) for _ in range(count)]
    photographs = [entry[0] for entry in pack["image_paths"]]
    # Padding is a sub-sequence that does not count in the loss.
    padded_from = bounds[-1] if any(loss[bounds[-2] :]) else bounds[-2]

    width = 2 * MARGIN + COLUMNS * CELL_W
    a_row = int((width - 2 * MARGIN) // (THUMBNAIL + 0.2))
    top = 0.7 + -(-len(photographs) // a_row) * (THUMBNAIL + 0.45)
    lines = -(-len(tokens) // COLUMNS)
    bottom = top + lines * (CELL_H + GAP)
    placed = sum(row >= 0 for row in row_at)
    title = (
        f"One pack: {len(tokens)} positions, {len(bounds) - 1} sub-sequences, {len(counts)} images,"
        f" {placed} of {plan.num_rows} feature rows placed"
    )
    sheet, axes = style.figure(width, bottom + 0.65, title)
    for k, file in enumerate(photographs):
        x = MARGIN + k % a_row * (THUMBNAIL + 0.2)
        y = 0.6 + k // a_row * (THUMBNAIL + 0.45)
        _photograph(axes, file, at=(x, y), frame=IMAGES[k % len(IMAGES)])
        name = f"{k}: {Path(file).name}"
        style.label(axes, (x, y + THUMBNAIL + 0.2), name, width=THUMBNAIL + 0.1)

    for position, token in enumerate(tokens):
        line, column = divmod(position, COLUMNS)
        x, y = MARGIN + column * CELL_W, top + line * (CELL_H + GAP)
        row = row_at[position]
        if row >= 0:
            text = str(row)
            looks = {"facecolor": IMAGES[feature_of_row[row] % len(IMAGES)]}
        elif position >= padded_from:
            text, looks = "", LOOKS["padding"]
        else:
            text = tokenizer.decode([token])
            kind = "in the loss" if loss[position] else "text"
            if text.startswith("<") and text.endswith(">"):
                text = text.strip("<|>")
                kind = kind if loss[position] else "special token"
            looks = LOOKS[kind]
        style.box(axes, (x, y, CELL_W - 0.02, CELL_H), **looks)
        style.label(axes, (x + 0.02, y + CELL_H / 2), text, size=6.5, width=CELL_W - 0.05)
        if position in bounds[:-1]:
            bar = {"facecolor": style.INK, "zorder": 2}
            style.box(axes, (x - 0.025, y - 0.03, 0.025, CELL_H + 0.06), **bar)
    style.legend(axes, (MARGIN, bottom + 0.15), LOOKS)
    lost = (plan.destinations < 0).sum().item()
    told = (
        f"a black bar begins a sub-sequence; feature rows without a destination: {lost or 'none'}"
    )
    style.label(axes, (MARGIN, bottom + 0.42), told)
    return sheet


def _photograph(axes: Any, file: str, *, at: tuple[float, float], frame: str) -> None:
    with Image.open(file) as photograph:
        small = photograph.convert("RGB")
    small.thumbnail((180, 180))
    style.show(axes, ImageOps.expand(small, 7, frame), at, THUMBNAIL + 0.1)
