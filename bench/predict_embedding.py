"""Predicts the whole embedding of a training step, with gradients added to ``main_grad``.

The rows are those of the subject ``embedding``, the rates those of :mod:`bench.predict`. Nothing is
measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.predict import PROCESSORS, Range, Rates, moved, ranged, row
from bench.report import Column, Table
from bench.shapes import Shape
from bench.subjects.embedding import VOCABULARY
from step37_kernels.ops.order import COUNT_BLOCK, COUNT_LANES, COUNT_PARTS, is_counted
from step37_kernels.ops.table import BLOCK_P

LANES, CLOCK = 128, 1.83e3
"""Integer instructions a multiprocessor does in a clock, and clocks in a µs (data sheet)."""
INSTRUCTIONS = 5.4
"""Of one comparison where positions are counted, with its share of the ids' loading: 172 in the
loop over 32 comparisons of a thread, as compiled for sm_90."""


def base(shape: Shape, chip: str) -> Range:
    """Predict our insertion, forward and backward, if the embeddings have been looked up."""
    found = row(shape, chip, "forward+backward")
    return found["predicted_us"], found["low_us"], found["high_us"]


def dense_us(shape: Shape, rates: Rates) -> float:
    """Predict the µs of the lookup, and of the table's dense gradient with Megatron's ``add_``.

    A bf16 gradient of the table's size is filled with zeros, rows are added to it, and it is read
    again to be added to fp32 ``main_grad``, which is read and written.
    """
    rows, table = shape.seq_len * shape.hidden, VOCABULARY * shape.hidden
    launches = 4 * rates["dependent"]
    lookup, fill, scatter, add = 4 * rows, 2 * table, 6 * rows, 10 * table
    return launches + sum(moved(rates, size) for size in (lookup, fill, scatter, add))


def counting_us(positions: int, rates: Rates) -> float:
    """Time the counting of positions, without the start of its launch.

    It is bound by its instructions, by the ids (int64) and feature rows (int32) that every program
    reads through L2, or by the trips to L2, one behind another, each taken as a quarter of two
    trips to memory.
    """
    square = positions**2
    computing = square * INSTRUCTIONS / (PROCESSORS * LANES * CLOCK)
    reading = (8 + 4) * square / COUNT_BLOCK / rates["L2"] / 1e6
    # In a turn of the loop, as compiled, half of the ids are loaded when the other half is there.
    trips = 2 * -(-positions // (COUNT_LANES * COUNT_PARTS)) * rates["fill"] / 4
    return rates["fill"] + max(computing, reading, trips)


def order_us(shape: Shape, rates: Rates) -> float:
    """Time what the order of the positions by id adds to the launch of the gradient's rows.

    Where positions are counted, the same launch counts and gathers. It takes as long as the longer
    of the two, and a part of the shorter that the longer does not hide. Otherwise the library picks
    the ids of text and sorts them.
    """
    if not is_counted(shape.seq_len, VOCABULARY):
        return rates["dependent"] + rates["sort"]
    counting = counting_us(shape.seq_len, rates)
    gathering = 4 * shape.num_rows * shape.hidden / rates["memory"] / 1e6
    longer, shorter = max(counting, gathering), min(counting, gathering)
    return longer + (1 - rates["hidden"]) * shorter - gathering


def by_rows_us(shape: Shape, rates: Rates) -> float:
    """Time what takes the place of that: the order of the positions, and two launches over the rows
    of text.

    Each word is assumed to occur once, which is the most that can be read and written. The gradient
    of the embeddings is not computed then, so its reading and writing is subtracted.
    """
    text = (shape.seq_len - shape.num_rows) * shape.hidden
    sums = moved(rates, 2 * text + 8 * text)
    not_made = 2 * (text + shape.seq_len * shape.hidden) / rates["memory"] / 1e6
    return order_us(shape, rates) + sums + rates["start"] + 2 * rates["dependent"] - not_made


def stock_us(shape: Shape, rates: Rates) -> float:
    """Predict the µs of stock without its products, the lookup and the dense gradient.

    Forward makes a clone for each group and a copy for each picture, and waits twice for each
    picture. Backward, for each picture, copies the gradient of ``[S, B, H]`` and sets the picture's
    rows to zero.
    """
    groups = (shape.images > 0) + (shape.crops > 0)
    pictures = shape.images + shape.crops
    whole = 4 * shape.seq_len * shape.hidden
    rows = 4 * shape.num_rows * shape.hidden
    copies = (groups + pictures) * whole + 3 * rows
    launches = (groups + 4 * pictures) * rates["dependent"]
    return copies / rates["memory"] / 1e6 + launches + 2 * pictures * rates["wait"]


def added(start: Range, *us: Range) -> Range:
    """Add ranges: nominal, fast and slow figures separately."""
    nominal, fast, slow = (sum(values) for values in zip(start, *us, strict=True))
    return nominal, fast, slow


def predicted(shape: Shape, chip: str) -> dict[str, Range]:
    """Predict the µs of stock, of ours with ``lookup="call"``, and of ours."""
    ours = base(shape, chip)
    dense = ranged(chip, lambda rates: dense_us(shape, rates))
    return {
        "stock": added(ours, dense, ranged(chip, lambda rates: stock_us(shape, rates))),
        "called": added(ours, dense),
        "ours": added(ours, ranged(chip, lambda rates: by_rows_us(shape, rates))),
    }


def temporary_bytes(shape: Shape) -> tuple[int, int]:
    """Count the bytes that a step allocates besides its output and the features' gradient.

    The first number is for ``lookup="call"``: embeddings, their gradient, and the dense gradient of
    the table. The second is ours: kept sums of segments; the ids of text, sorted, and their
    positions. Both include gathered rows.
    """
    rows = 2 * shape.num_rows * shape.hidden
    whole = 2 * shape.seq_len * shape.hidden
    kept = -(-shape.seq_len // BLOCK_P) * 2 * shape.hidden * 4
    return rows + 2 * whole + 2 * VOCABULARY * shape.hidden, rows + kept + 24 * shape.seq_len


def table_of(shapes: Sequence[Shape], chip: str) -> Table:
    """Make the table of the whole embedding on one chip."""
    form = "{:.0f} [{:.0f}–{:.0f}]"
    lines = []
    for shape in shapes:
        us = predicted(shape, chip)
        called, ours = (f"{size / 1e6:.0f}" for size in temporary_bytes(shape))
        lines.append(
            (
                shape.name,
                *us.values(),
                us["called"][0] / us["ours"][0],
                us["stock"][0] / us["ours"][0],
                called,
                ours,
            )
        )
    return Table(
        title=f"{chip}, the whole embedding into main_grad, predicted",
        text=(
            "Words and features in, forward and backward, gradients of table and projector in\n"
            f"fp32 `main_grad`; a table of {VOCABULARY:,} rows on one tensor-parallel rank. The\n"
            "insertion of stock is taken to multiply as fast as ours."
        ),
        columns=(
            Column("shape"), Column("stock µs", form), Column('ours, lookup="call", µs', form),
            Column("ours µs", form), Column("× called", "{:.1f}"), Column("× stock", "{:.1f}"),
            Column("temporary MB, called"), Column("ours"),
        ),
        lines=lines,
    )  # fmt: skip
