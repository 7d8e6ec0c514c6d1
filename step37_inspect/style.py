"""Draws the parts of all pictures of this project in one style: colours, text, labels that fit.

The colours are Okabe and Ito's, which people with any colour vision can distinguish; important
parts also have a hatch or a label. Drawing needs Matplotlib (extra ``plots``) and changes none of
its global state.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

TEXT, TRAINED, IMAGE, CROP = "#d5d8de", "#f0c05a", "#56b4e9", "#cc9fbf"
PADDING, BROKEN, INK, FRAME = "#f5f5f5", "#d55e00", "#1e1e1e", "#8a8f98"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
DPI = 100
TITLE_HEIGHT = 0.45
"""The height of a title, in inches."""
Point = tuple[float, float]
"""A place on axes: x, y."""
_MARKS = str.maketrans("\n\t\r", "↵⇥↵")


def figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """Make a sheet with a title and axes over all of it, in inches from the top left corner."""
    sheet = sheet_of(width, height, title)
    axes = sheet.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return sheet, axes


def sheet_of(width: float, height: float, title: str) -> Figure:
    """Make an empty sheet, in inches, with a title at the top of height :data:`TITLE_HEIGHT`."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    place = {"x": 0.2 / width, "y": 1 - 0.28 / height, "ha": "left", "va": "center"}
    title = fit(title, width - 0.4, 12, "bold")
    sheet.suptitle(title, size=12, weight="bold", parse_math=False, **place)
    return sheet


def box(axes: Axes, place: tuple[float, float, float, float], **looks: Any) -> None:
    """Draw a rectangle, ``place`` = x, y, width, height; it has an edge only if ``looks`` has."""
    from matplotlib.patches import Rectangle

    x, y, width, height = place
    axes.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0, **looks}))


def label(
    axes: Axes, at: Point, text: str, *, size: float = 9, width: float = 1e9, **looks: Any
) -> None:
    """Write ``text`` from ``at`` to the right, cut to ``width`` inches; ``$`` makes no formula.

    ``at`` is the left end of the text, at half of its height.
    """
    text = fit(text, width, size, looks.get("weight", "normal"))
    looks = {"color": INK, "va": "center", "fontsize": size, "parse_math": False, **looks}
    axes.text(*at, text, **looks)


def legend(axes: Axes, at: Point, entries: Mapping[str, dict[str, Any]], *, rows: int = 1) -> None:
    """Draw rows of swatches with their names; ``at`` is the left end, at half of the height."""
    from matplotlib.patches import Patch

    edge = {"edgecolor": FRAME, "linewidth": 0.6}
    swatches = [Patch(label=name, **{**edge, **looks}) for name, looks in entries.items()]
    place = {"loc": "center left", "bbox_to_anchor": at, "bbox_transform": axes.transData}
    space = {"borderpad": 0, "borderaxespad": 0, "handlelength": 1.3}
    axes.legend(
        handles=swatches,
        ncols=-(-len(swatches) // rows),
        frameon=False,
        fontsize=9,
        **place,
        **space,
    )


def show(axes: Axes, picture: Image, at: Point, side: float) -> None:
    """Draw a picture at the lower left of the square whose top left corner is ``at``."""
    x, y = at
    width, height = (side * pixels / max(picture.size) for pixels in picture.size)
    extent = (x, x + width, y + side, y + side - height)
    axes.imshow(picture, extent=extent, aspect="auto", zorder=1)


@functools.lru_cache(maxsize=1 << 16)
def fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Shorten ``text`` with "…" to at most ``width`` inches, if necessary to nothing.

    Line ends become ↵, and characters that the font does not have □.
    """
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties, findfont, get_font

    looks = FontProperties(size=size, weight=weight)
    has = get_font(findfont(looks)).get_char_index
    text = "".join(mark if has(ord(mark)) else "□" for mark in text.translate(_MARKS))
    # Measured in pixels of a raster, in which letters are wider than their outlines.
    measure = functools.partial(RendererAgg(1, 1, DPI).get_text_width_height_descent, ismath=False)
    cuts = [text, *(f"{text[:length]}…" for length in range(len(text) - 1, 0, -1))]
    return next((cut for cut in cuts if measure(cut, looks)[0] <= width * DPI), "")


def save(sheet: Figure, path: Path) -> None:
    """Write the sheet to a file, in the format of the file name's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=DPI)


def png_of(sheet: Figure, *, titled: bool = True) -> bytes:
    """Return the sheet as a PNG file; with ``titled=False`` without its title."""
    from matplotlib.transforms import Bbox

    width, height = sheet.get_size_inches()
    below = None if titled else Bbox.from_extents(0, 0, width, height - TITLE_HEIGHT)
    file = io.BytesIO()
    sheet.savefig(file, format="png", dpi=DPI, bbox_inches=below)
    return file.getvalue()
