"""A data set as one HTML page: tables, pictures, and packs to leaf through.

One file without scripts or pictures from elsewhere, so that it can be mailed and opened offline.
Without JavaScript all packs are shown one below the other.
"""

from __future__ import annotations

import base64
import html
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

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1e1e1e; background: #fff;
  max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h1, td { overflow-wrap: break-word; } td:not(.n) { min-width: 7em; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0;
  border-bottom: 1px solid #d5d8de; }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
nav { position: sticky; top: 0; background: #fff; padding: .4rem 0; display: flex; gap: .6rem;
  align-items: center; }
section.pack { scroll-margin-top: 3.5rem; }
nav[hidden] { display: none; }
button { font: inherit; padding: .2rem .8rem; }
"""
# Which pack is shown stands in the address, so that a pack can be linked to and "back" works.
_SCRIPT = """
const packs = [...document.querySelectorAll("section.pack")], at = document.getElementById("at");
const shown = () => {
  const place = packs.findIndex(pack => "#" + pack.id === location.hash);
  return place < 0 ? 0 : place;
};
const show = () => {
  packs.forEach((pack, place) => { pack.hidden = place !== shown(); });
  at.textContent = `${shown() + 1} of ${packs.length}`;
  document.getElementById("back").disabled = shown() === 0;
  document.getElementById("on").disabled = shown() === packs.length - 1;
};
const step = by => {
  const place = Math.min(Math.max(shown() + by, 0), packs.length - 1);
  location.hash = packs[place].id;
};
document.getElementById("back").onclick = () => step(-1);
document.getElementById("on").onclick = () => step(1);
addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
addEventListener("hashchange", show);
if (packs.length) { document.querySelector("nav").hidden = false; show(); }
"""


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
    name = html.escape(data.name)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
{_picture(draw_data_set(data), "Lengths of the samples, and how full packs get")}
{_data_set_tables(data)}
<h2>Packs</h2>
<p>{len(sections)} of {total} packs. A black bar begins a sample; its pictures carry its number.</p>
<nav hidden><button id="back" type="button">← previous</button><span id="at"></span>
<button id="on" type="button">next →</button></nav>
{"".join(sections)}
<script>{_SCRIPT}</script>
</body>
</html>
"""
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
