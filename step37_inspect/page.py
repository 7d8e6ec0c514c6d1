"""Writes a report on a data set as one HTML page: tables, pictures, and packs to browse.

The page is one file and loads no others, so it can be mailed and opened offline. Its template is
``page.html`` in this folder.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from tqdm import tqdm

from step37_data.packed_dataloader import MixedPackedDataloader
from step37_inspect import style
from step37_inspect.data_set import DataSetDescription, draw_data_set
from step37_inspect.pack_picture import describe_pack, draw_pack


def write_page(
    path: Path,
    data: DataSetDescription,
    packs: MixedPackedDataloader | None,
    *,
    shown: range,
    settings: Mapping[str, str],
    progress: bool,
) -> None:
    """Write the page of a data set.

    Args:
        path: path of the HTML file; its folder is created.
        data: description of the data set.
        packs: of the data set; None if no sample fits in one.
        shown: the packs that can be browsed.
        settings: the settings of the report, by name, shown on the page.
        progress: show a bar while packs are drawn.
    """
    numbers = tqdm(shown, desc="Drawing packs", unit="pack", disable=not progress)
    described = [] if packs is None else [describe_pack(packs, number) for number in numbers]
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined)
    text = page.render(
        data=data,
        settings=settings,
        total=0 if packs is None else len(packs),
        pictures=_encoded(draw_data_set, data),
        packs=[(pack, _encoded(draw_pack, pack)) for pack in described],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _encoded(draw: Callable[..., style.Figure], subject: Any) -> list[str]:
    """A wide and a narrow picture for the page, without title: the page has that as text."""
    sheets = (draw(subject, narrow=narrow) for narrow in (False, True))
    return [base64.b64encode(style.png_of(sheet, titled=False)).decode() for sheet in sheets]
