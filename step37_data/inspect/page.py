"""A data set as one HTML page: tables, pictures, and packs to leaf through.

One file that fetches nothing, so that it can be mailed and opened offline. Its frame is
``page.html`` beside this file.
"""

from __future__ import annotations

import base64
import html
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from step37_data.inspect import style
from step37_data.inspect.data_set import DataSetDescription, draw_data_set
from step37_data.inspect.pack_picture import (
    PACK_COLUMNS,
    PackDescription,
    draw_pack,
    pack_rows,
    pack_title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path,
    data: DataSetDescription,
    packs: Iterable[tuple[PackDescription, Sequence[str]]],
    total: int,
    *,
    progress: bool = True,
) -> None:
    """Write the page of a data set.

    Args:
        path: of the HTML file; its folder is made.
        data: described data set.
        packs: the packs to leaf through, each with the text that its segments train.
        total: number of packs in all.
        progress: show a bar while packs are drawn.
    """
    sections = [
        _pack_section(pack, trained, total)
        for pack, trained in tqdm(packs, desc="Drawing packs", unit="pack", disable=not progress)
    ]
    picture = _picture(draw_data_set(data), "Lengths of the samples, and how full packs get")
    page = string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=html.escape(data.name),
        data_set=picture + _data_set_tables(data),
        shown=len(sections),
        total=total,
        packs="".join(sections),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _data_set_tables(data: DataSetDescription) -> str:
    fills = [
        (name, str(len(fill.tokens)), f"{fill.share:.1%}", str(fill.dropped))
        for name, fill in data.fills.items()
    ]
    tables = _table(("packing", "packs", "filled", "samples dropped"), fills, "nnnn")
    if data.broken:
        broken = list(data.broken.items())
        tables += "<h2>Images that cannot be read</h2>" + _table(("file", "reason"), broken, "  ")
    return tables


def _pack_section(pack: PackDescription, trained: Sequence[str], total: int) -> str:
    title = pack_title(pack, total)
    return (
        f'<section class="pack" id="pack-{pack.index}"><h3>{html.escape(title.capitalize())}</h3>'
        f"{_picture(draw_pack(pack), title)}"
        f"{_table(PACK_COLUMNS, pack_rows(pack, trained), 'nnn   ')}</section>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> str:
    """``kinds``: a letter a column, ``n`` where a cell is not to be broken."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if kind == 'n' else ''}>{html.escape(cell)}</td>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>\n'


def _picture(sheet: Figure, told: str) -> str:
    data = base64.b64encode(style.png_of(sheet)).decode()
    return f'<img alt="{html.escape(told)}" src="data:image/png;base64,{data}">\n'
