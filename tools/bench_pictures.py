"""Draws benchmark results: ``python -m tools.bench_pictures RESULTS.json``. Needs Matplotlib.

It reads the JSON that ``python -m bench`` writes, and draws bars for each shape and the roofline.
For the subject ``predict`` it draws predicted times over those of the predicted product; the titles
say that they are predicted. The pictures are written to the folder of the file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from step37_inspect import style

Record = dict[str, Any]
# In addition to the colour, so that the picture is readable without colours.
_HATCHES, _MARKERS = ("", "//", "..", "xx", "\\\\", "oo", "--"), "osD^vP*X"


def pictures_of(results: Record) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, figure)`` of every picture that can be drawn from these results."""
    if predicted := predicted_rows(results):
        yield "predicted", draw_predicted(predicted)
    timed = [row for row in results["rows"] if row["median_us"]]
    where = " · ".join(
        str(results["environment"][name])
        for name in ("device", "date", "commit")
        if name in results["environment"]
    )
    products = [row for row in timed if row["flops"] and row["subject"] != "tune"]
    if products:
        yield "roofline", draw_roofline(products, results["ceilings"], where)
    kinds = dict.fromkeys((r["subject"], r["operation"], r["variant"], r["dtype"]) for r in timed)
    for kind in kinds:
        same = [
            row
            for row in timed
            if (row["subject"], row["operation"], row["variant"], row["dtype"]) == kind
        ]
        title = ", ".join(filter(None, kind))
        yield re.sub(r"\W+", "-", title), draw_bars(same, title, where)


def predicted_rows(results: Record) -> list[Record]:
    """Read the rows of the subject ``predict``, each with its chip and operation."""
    found = []
    for table in results.get("tables", []):
        chip, operation, kind = (*table["title"].split(", "), "", "")[:3]
        if kind == "predicted":
            names = [name for name, _ in table["columns"]]
            for cells in table["lines"]:
                row = dict(zip(names, cells, strict=True))
                ratio = dict(
                    zip(("ratio", "low_ratio", "high_ratio"), row["× product"], strict=True)
                )
                found.append({"shape": row["shape"], "chip": chip, "operation": operation, **ratio})
    return found


def draw_bars(rows: Sequence[Record], title: str, where: str) -> Any:
    """Draw µs of every implementation, a group of bars for each shape; whiskers from p20 to p80."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    sheet, axes = _sheet(title, where, len(names), width=max(7.0, 1.5 + 1.9 * len(shapes)))
    bar = 0.8 / len(names)
    for number, name in enumerate(names):
        own = {row["shape"]: row for row in rows if row["implementation"] == name}
        xs = [place + number * bar - 0.4 for place, shape in enumerate(shapes) if shape in own]
        times = [own[shape]["median_us"] for shape in shapes if shape in own]
        spread = [
            [max(0.0, own[s]["median_us"] - own[s]["p20_us"]) for s in shapes if s in own],
            [max(0.0, own[s]["p80_us"] - own[s]["median_us"]) for s in shapes if s in own],
        ]
        looks = {"color": _colour(number), "hatch": _HATCHES[number % len(_HATCHES)]}
        axes.bar(xs, times, bar, align="edge", yerr=spread, label=name, edgecolor="white", **looks,
                 error_kw={"elinewidth": 0.8})  # fmt: skip
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set(yscale="log", ylabel="µs, median (p20 to p80)")
    _legend(sheet, axes)
    return sheet


def draw_roofline(rows: Sequence[Record], ceilings: Record, where: str) -> Any:
    """Draw FLOP/s over FLOP per byte, with the limits measured in the same run."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    sheet, axes = _sheet("Rates against what the device reached", where, len(names) + 1)
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    copy = ceilings["copy_bytes_per_s"]
    for number, (dtype, rate) in enumerate(ceilings["flops_per_s"].items()):
        xs = sorted({low, min(max(rate / copy, low), high), high})
        line = ("-", "--", ":")[number % 3]
        axes.plot(xs, [min(rate, x * copy) / 1e12 for x in xs], line, color=style.INK,
                  linewidth=1, label=f"limit, {dtype}")  # fmt: skip
    for number, name in enumerate(names):
        own = [row for row in rows if row["implementation"] == name]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in own],
            [row["flops"] / row["median_us"] / 1e6 for row in own],
            s=22, color=_colour(number), marker=_MARKERS[number % len(_MARKERS)], label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    _legend(sheet, axes)
    return sheet


def draw_predicted(rows: Sequence[Record]) -> Any:
    """Draw predicted time over the predicted product's, by number of images, for each chip.

    The band is that of the first chip, from all rates at their fast end to all at their slow end.
    """
    swept = [row for row in rows if re.fullmatch(r"images-\d+", row["shape"])]
    kinds = list(dict.fromkeys((row["chip"], row["operation"]) for row in swept))
    sheet, axes = _sheet("Predicted, not measured: time over the bare products'", "", len(kinds))
    for number, (chip, operation) in enumerate(kinds):
        own = [row for row in swept if (row["chip"], row["operation"]) == (chip, operation)]
        images = [int(row["shape"].partition("-")[2]) for row in own]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(images, [row["ratio"] for row in own], marker=marker, markersize=4,
                  color=_colour(number), label=f"{operation}, {chip}")  # fmt: skip
        # For one chip only: the bands of several would hide each other.
        if chip == kinds[0][0]:
            ends = ([row[name] for row in own] for name in ("low_ratio", "high_ratio"))
            axes.fill_between(images, *ends, color=_colour(number), alpha=0.15, linewidth=0)
    axes.axhline(1, color=style.INK, linewidth=1)
    axes.set(xlabel="images of 169 rows", ylabel="× product (1: inserting is free)")
    _legend(sheet, axes)
    return sheet


def _sheet(title: str, where: str, entries: int, width: float = 8.0) -> tuple[Any, Any]:
    """Make a sheet with one plot, and space for a legend of so many entries below it."""
    below = 0.75 + 0.22 * -(-entries // 2)
    height = 3.6 + below + 0.75
    sheet = style.sheet_of(width, height, title)
    left, right = 1.0 / width, 1 - 0.25 / width
    axes = sheet.add_axes((left, below / height, right - left, 3.6 / height))
    where = style.fit(where, width - 0.4, 9)
    sheet.text(0.2 / width, 1 - 0.55 / height, where, fontsize=9, va="center")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return sheet, axes


def _legend(sheet: Any, axes: Any) -> None:
    sheet.legend(*axes.get_legend_handles_labels(), loc="lower left", ncols=2, frameon=False,
                 fontsize=8, bbox_to_anchor=(axes.get_position().x0, 0))  # fmt: skip


def _colour(number: int) -> str:
    return style.SERIES[number % len(style.SERIES)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the results of a benchmark.")
    parser.add_argument("results", type=Path, help="JSON that python -m bench has written")
    path = parser.parse_args().results
    for name, sheet in pictures_of(json.loads(path.read_text(encoding="utf-8"))):
        out = path.with_name(f"{path.stem}-{name}.png")
        style.save(sheet, out)
        print(out)


if __name__ == "__main__":
    main()
