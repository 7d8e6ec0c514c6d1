"""One look for every picture of this project: colours, lettering, and labels that fit.

The colours are Okabe and Ito's, which people with any colour vision tell apart; what matters is
also told by a hatch or a label. Drawing needs Matplotlib (extra ``plots``) and touches none of its
global state.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT, TRAINED, IMAGE, CROP = "#d5d8de", "#f0c05a", "#56b4e9", "#cc9fbf"
PADDING, BROKEN, INK, FRAME = "#f5f5f5", "#d55e00", "#1e1e1e", "#8a8f98"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
DPI = 100
_MARKS = str.maketrans("\n\t\r", "↵⇥↵")


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty sheet, and axes over all of it in inches, from the top left corner."""
    sheet = sheet_of(width, height)
    axes = sheet.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return sheet, axes


def sheet_of(width: float, height: float) -> Figure:
    """An empty sheet of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def box(axes: Axes, x: float, y: float, width: float, height: float, **looks: Any) -> None:
    """A rectangle without an edge, unless ``looks`` (Matplotlib's) has one."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0, **looks}))


def label(
    axes: Axes, x: float, y: float, text: str, size: float = 9, width: float = 1e9, **looks: Any
) -> None:
    """Text as it is (no formulas), its middle at height ``y``, cut to fit ``width``."""
    text = fit(text, width, size, looks.get("weight", "normal"))
    looks = {"color": INK, "va": "center", "fontsize": size, "parse_math": False, **looks}
    axes.text(x, y, text, **looks)


def legend(axes: Axes, x: float, y: float, entries: list[tuple[str, dict[str, Any]]]) -> None:
    """A row of swatches with their names."""
    for name, looks in entries:
        box(axes, x, y - 0.07, 0.16, 0.14, **{"edgecolor": FRAME, "linewidth": 0.6, **looks})
        label(axes, x + 0.22, y, name)
        x += 0.22 + width_of(name, 9) + 0.22


def show(axes: Axes, picture: Any, x: float, y: float, width: float, height: float) -> None:
    """A Pillow picture in that rectangle."""
    axes.imshow(picture, extent=(x, x + width, y + height, y), aspect="auto", zorder=1)


@functools.lru_cache(maxsize=1 << 16)
def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Inches that ``text`` is wide at ``size`` points, at most.

    A raster's letters stand on whole pixels, which makes a line a little longer than its outlines.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    points, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return 1.06 / 72 * float(points)


def fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """``text``, cut short with "…" until it is at most ``width`` inches wide; maybe nothing.

    Line ends become ↵, and what the font has no letter for □.
    """
    known = _letters()
    text = "".join(mark if ord(mark) in known else "□" for mark in text.translate(_MARKS))
    cuts = [text, *(f"{text[:length]}…" for length in range(len(text) - 1, 0, -1))]
    return next((cut for cut in cuts if width_of(cut, size, weight) <= width), "")


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def save(sheet: Figure, path: Path) -> None:
    """Write the sheet in the format that the file's name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=DPI)


def png_of(sheet: Figure) -> bytes:
    file = io.BytesIO()
    sheet.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
