"""A data set as one HTML page: tables, pictures, and packs to leaf through.

One file that fetches nothing, so that it can be mailed and opened offline. Its template is
``page.html`` beside this file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import jinja2
from tqdm import tqdm

from step37_data.inspect import style
from step37_data.inspect.data_set import DataSetDescription, draw_data_set
from step37_data.inspect.pack_picture import PackDescription, draw_pack


def write_page(
    path: Path,
    data: DataSetDescription,
    packs: Iterable[PackDescription],
    total: int,
    *,
    progress: bool = True,
) -> None:
    """Write the page of a data set.

    Args:
        path: of the HTML file; its folder is made.
        data: described data set.
        packs: the packs to leaf through.
        total: number of packs in all.
        progress: show a bar while packs are drawn.
    """
    drawn = tqdm(packs, desc="Drawing packs", unit="pack", disable=not progress)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined)
    text = page.render(
        data=data,
        total=total,
        picture=_encoded(draw_data_set(data)),
        packs=[(pack, _encoded(draw_pack(pack))) for pack in drawn],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _encoded(sheet: style.Figure) -> str:
    return base64.b64encode(style.png_of(sheet)).decode()
