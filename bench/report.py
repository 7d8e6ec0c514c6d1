"""Writes results as JSON, and makes Markdown tables and comparisons of two runs from it.

``python -m bench.report RESULTS.json`` prints the tables again. :func:`table_lines` writes all
tables, those of rows and those that subjects define.

Ratios are computed here, from the medians of one run:

- × stock, × best peer: how many times faster than stock, and than the fastest competitor (stock
  included). Above 1 is faster.
- × GEMM, × limit: time over that of the bare matrix product, and over the least time that the
  operation's work can take at the copy bandwidth and product rate measured in the same run. At
  best 1.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import Ceilings, Row
from bench.targets import judge

NOTABLE_CHANGE = 0.03
COLUMNS = (
    "shape", "layout", "dtype", "implementation", "µs (p20–p80)", "TFLOP/s", "GB/s", "× stock",
    "× best peer", "× GEMM", "× limit", "host µs", "syncs", "launches", "peak MiB", "temporary MiB",
)  # fmt: skip
NAMES = 4  # columns that name a row
LEGEND = """\
× stock and × best peer: times faster (above 1 is faster). × GEMM and × limit: time over that of the
bare product, and over what the copy and product rates above allow (at best 1). Rates are those of
the least work. Peak: allocated above the inputs; temporary: what of it is free again when the call
returns. An empty cell was not measured."""
GROUP = ("subject", "operation", "shape", "variant", "dtype")
Record = dict[str, Any]
"""A :class:`~bench.harness.Row` as a flat dictionary, with the fields of its key and work."""


class Column(NamedTuple):
    """A column of a table: its title, and how its figures are shown."""

    name: str
    form: str = "{}"
    """Format of a cell, for ``str.format``; a tuple fills one place with each of its figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with any columns, for subjects whose figures are not rows of a group."""

    title: str = ""  # becomes a heading
    text: str = ""  # Markdown between heading and table
    columns: Sequence[Column]
    lines: Iterable[Sequence[Any]]
    """The lines, with one cell for each column, ``None`` where there is no figure. May be a
    generator that measures one line at a time; each line is printed as soon as it is measured."""


def table_lines(columns: Sequence[Column], lines: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Write the lines of a Markdown table."""
    yield _line(column.name for column in columns)
    yield f"|{'---|' * len(columns)}"
    for cells in lines:
        yield _line(map(_shown, columns, cells))


def _shown(column: Column, cell: Any) -> str:
    if cell is None:
        return ""
    return column.form.format(*cell) if isinstance(cell, tuple) else column.form.format(cell)


def print_table(table: Table) -> Record:
    """Print a table while its lines are measured; returns it as plain data, with all figures."""
    kept: list[Sequence[Any]] = []

    def lines() -> Iterator[Sequence[Any]]:
        for cells in table.lines:
            kept.append(list(cells))
            yield cells

    print(_heading(table.title, table.text), end="")
    for line in table_lines(table.columns, lines()):
        print(line, flush=True)
    columns = [list(column) for column in table.columns]
    return {"title": table.title, "text": table.text, "columns": columns, "lines": kept}


def _heading(title: str, text: str) -> str:
    return f"## {title}\n\n" * bool(title) + f"{text}\n\n" * bool(text)


def to_json(rows: Iterable[Row], ceilings: Ceilings, environment: dict[str, str]) -> Record:
    """Turn rows into plain data, together with ceilings and environment."""
    records = []
    for row in rows:
        record = asdict(row)
        records.append({**record.pop("key"), **record.pop("work"), **record})
    found = {"environment": environment, "ceilings": asdict(ceilings), "rows": records}
    return {**found, "tables": [], "state": {}, "errors": []}


def group_of(record: Record) -> tuple[str, ...]:
    """Return the names that the rows of one group share."""
    return tuple(record[name] for name in GROUP)


class Ratios(NamedTuple):
    """The ratios of one row; None if there is nothing to compare with."""

    stock: float | None
    best_peer: float | None
    gemm: float | None
    limit: float | None


def limit_us(record: Record, ceilings: Record) -> float | None:
    """Compute the least µs of the work; None if the rate of its dtype was not measured."""
    moving = record["bytes"] / ceilings["copy_bytes_per_s"]
    if not record["flops"]:
        return 1e6 * moving
    rate = ceilings["flops_per_s"].get(record["dtype"])
    return 1e6 * max(moving, record["flops"] / rate) if rate else None


def ratios(record: Record, group: Sequence[Record], ceilings: Record) -> Ratios:
    """Compare a row with the other rows of its group."""
    own = record["median_us"]

    def best(*kinds: str) -> float | None:
        others = [each for each in group if each is not record and each["kind"] in kinds]
        return min((each["median_us"] for each in others if each["median_us"]), default=None)

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    gemm = [other["median_us"] for other in group if other["implementation"] == "GEMM alone"]
    # A floor does less work than the others, so its ratios to them mean nothing.
    whole = None if record["kind"] == "floor" else own
    return Ratios(
        over(best("stock"), whole),
        over(best("stock", "peer"), whole),
        over(own, gemm[0]) if gemm else None,
        over(own, limit_us(record, ceilings)),
    )


def grouped(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the rows by group, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    yield from groups.values()


def _figure(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def table_row(record: Record, group: Sequence[Record], ceilings: Record) -> list[str]:
    """Make the cells of one row, one for each of :data:`COLUMNS`."""
    name = [record["shape"], record["variant"], record["dtype"], record["implementation"]]
    if record["problem"]:
        return [*name, record["problem"], *[""] * (len(COLUMNS) - NAMES - 1)]
    own = record["median_us"]
    spread = f"{own:.1f} ({record['p20_us']:.1f}–{record['p80_us']:.1f})"
    flops, peak, kept = record["flops"], record["peak_bytes"], record["kept_bytes"]
    temporary = None if peak is None or kept is None else peak - kept
    return [
        *name,
        spread,
        _figure(flops / own / 1e6 if flops else None, ".1f"),
        _figure(record["bytes"] / own / 1e3, ".0f"),
        *map(_figure, ratios(record, group, ceilings)),
        _figure(record["host_us"], ".0f"),
        _figure(record["host_syncs"], "d"),
        _figure(record["launches"], "d"),
        *(_figure(None if size is None else size / 2**20, ".1f") for size in (peak, temporary)),
    ]


def markdown(results: Record) -> str:
    """Write a run as Markdown: where and when, ceilings, a table for each operation."""
    environment, ceilings = results["environment"], results["ceilings"]
    lines = ["# Benchmark", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items() if value]
    if results["rows"]:
        lines.append(f"- copy: {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, read plus written")
    for dtype, rate in ceilings["flops_per_s"].items():
        lines.append(f"- matrix product, {dtype}: {rate / 1e12:.1f} TFLOP/s")
    for shape, state in results.get("state", {}).items():
        figures = ", ".join(f"{name} {figure}" for name, figure in state.items())
        lines.append(f"- while multiplying, before {shape}: {figures}")
    lines += ["", LEGEND] if results["rows"] else []
    by_operation: dict[str, list[Sequence[Any]]] = {}
    for group in grouped(results["rows"]):
        title = f"{group[0]['subject']}: {group[0]['operation']}"
        rows = by_operation.setdefault(title, [])
        rows += [table_row(record, group, ceilings) for record in group]
    for title, rows in by_operation.items():
        lines += ["", f"## {title}", "", *table_lines(_columns(COLUMNS), rows)]
    for title, table in (("Means", means(results)), ("Targets: worst groups", targets(results))):
        lines += ["", f"## {title}", "", *table] if table else []
    for table in results.get("tables", []):
        columns = [Column(*column) for column in table["columns"]]
        # JSON has no tuples.
        cells = [[tuple(c) if isinstance(c, list) else c for c in line] for line in table["lines"]]
        lines += ["", *_heading(table["title"], table["text"]).splitlines()]
        lines += table_lines(columns, cells)
    return "\n".join([*lines, ""])


def _columns(names: Iterable[str]) -> list[Column]:
    return [Column(name) for name in names]


def targets(results: Record) -> list[str]:
    """Write a table of the targets that a run has figures for; no lines if there are none."""
    rows = [
        (target.text, target.limit, worst, where, target.verdict(worst))
        for target, worst, where in judge(list(grouped(results["rows"])))
    ]
    columns = [
        Column("target"), Column("limit", "≤ {:.3g}"), Column("measured", "{:.3g}"),
        Column("where"), Column(""),
    ]  # fmt: skip
    return list(table_lines(columns, rows)) if rows else []


def means(results: Record) -> list[str]:
    """Write geometric means of our ratios over shapes, a line for each operation and layout."""
    found: dict[str, list[Ratios]] = {}
    for group in grouped(results["rows"]):
        for record in group:
            if record["implementation"] == "step37" and record["median_us"]:
                key = " ".join(record[name] for name in GROUP if record[name] and name != "shape")
                found.setdefault(key, []).append(ratios(record, group, results["ceilings"]))
    rows = []
    for key, several in found.items():
        measured = [[value for value in column if value] for column in zip(*several, strict=True)]
        figures = (statistics.geometric_mean(each) if each else None for each in measured)
        rows.append((key, len(several), *figures))
    ratio = (Column(f"× {name}", "{:.2f}") for name in ("stock", "best peer", "GEMM", "limit"))
    columns = [Column("geometric mean"), Column("shapes"), *ratio]
    return list(table_lines(columns, rows)) if rows else []


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def console(group: Sequence[Row], ceilings: Ceilings) -> str:
    """Write the rows of one group as a table, below a line that names the group."""
    results = to_json(group, ceilings, {})
    records = results["rows"]
    shown = [table_row(record, records, results["ceilings"])[NAMES - 1 :] for record in records]
    title = " · ".join(filter(None, group_of(records[0])))
    return "\n".join([title, "", *table_lines(_columns(COLUMNS[NAMES - 1 :]), shown)])


def compare(old: Record, new: Record) -> str:
    """Write medians of two runs side by side; changes above 3 % are marked and counted."""
    lines = []
    for name in ("device", "driver", "torch", "triton", "commit"):
        before, after = old["environment"].get(name), new["environment"].get(name)
        if before != after:
            lines.append(f"{name}: {before} before, {after} now")
    known = {(*group_of(r), r["implementation"]): r for r in old["rows"]}
    changed = compared = 0
    for record in new["rows"]:
        before = known.get((*group_of(record), record["implementation"]))
        if before is None or not before["median_us"] or not record["median_us"]:
            continue
        ratio = record["median_us"] / before["median_us"]
        compared += 1
        mark = ""
        if abs(math.log(ratio)) > math.log1p(NOTABLE_CHANGE):
            changed += 1
            mark = "  slower" if ratio > 1 else "  faster"
        what = " ".join(filter(None, (*group_of(record), record["implementation"])))
        times = f"{before['median_us']:10.1f} → {record['median_us']:10.1f} µs"
        lines.append(f"{times}  × {ratio:.3f}  {what}{mark}")
    lines.append(f"{changed} of {compared} rows changed by more than {NOTABLE_CHANGE:.0%}")
    return "\n".join(lines)


def file_name(device: str) -> str:
    """Name the results of a run that ends now on this device; without extension."""
    date = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return f"{date}-{re.sub(r'[^0-9A-Za-z_]+', '-', device).strip('-').lower()}"


def write(results: Record, stem: Path) -> list[Path]:
    """Write ``<stem>.json`` and ``<stem>.md``; returns what was written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data, table = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".md")
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table.write_text(markdown(results), encoding="utf-8")
    return [data, table]


def read(path: Path) -> Record:
    """Read results that :func:`write` wrote; ``ValueError`` if the file holds something else."""
    try:
        results: Record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(results, dict) or not {"environment", "ceilings", "rows"} <= results.keys():
        raise ValueError(f"{path}: not a file of benchmark results")
    return results


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1]))))
