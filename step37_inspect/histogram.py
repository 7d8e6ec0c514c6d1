"""Draws a histogram of lengths that stays readable if a few samples are very long or short."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from step37_inspect import style

_BARS = 16
# A length is unusual if it is so many times the span of the middle half of lengths away from it.
_FAR = 3


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The bins of a histogram: of equal width, and one more at each end for unusual lengths.

    Attributes:
        body: most of the lengths, as ``[start, stop)`` in tokens; its bins have one width.
        bins: ``[start, stop)`` of every bin: those of the body, and if there are unusual lengths
            one for all that are shorter and one for all that are longer.
    """

    body: range
    bins: list[range]

    @classmethod
    def of(cls, sizes: np.ndarray) -> Histogram:
        """Choose the bins for samples of these lengths."""
        low, high = int(sizes.min()), int(sizes.max())  # the array's may be of one byte
        left, right = np.percentile(sizes, [25, 75])
        reach = _FAR * max(right - left, _BARS)
        near = sizes[(sizes >= left - reach) & (sizes <= right + reach)]
        start, stop = int(near.min()), int(near.max()) + 1
        width = -(-(stop - start) // _BARS)
        body = range(start, stop + -(stop - start) % width, width)
        bins = [range(first, first + width) for first in body]
        if low < body.start:
            bins.insert(0, range(low, body.start))
        if high >= body.stop:
            bins.append(range(body.stop, high + 1))
        return cls(body, bins)

    def counts(self, sizes: np.ndarray) -> list[int]:
        """Count the samples in each bin."""
        edges = [*(bin_.start for bin_ in self.bins), self.bins[-1].stop]
        counted: list[int] = np.histogram(sizes, edges)[0].tolist()
        return counted

    def places(self) -> list[int]:
        """The left edge of every bar, in tokens; bars of unusual lengths are set apart."""
        width = self.body.step
        places = []
        for bin_ in self.bins:
            if bin_.start < self.body.start:
                places.append(self.body.start - 2 * width)
            elif bin_.start >= self.body.stop:
                places.append(self.body.stop + width)
            else:
                places.append(bin_.start)
        return places


def draw_histogram(
    axes: style.Axes, histogram: Histogram, parts: Sequence[np.ndarray], told: Sequence[str]
) -> None:
    """Draw a stacked bar for every bin; bars of unusual lengths are apart, with their range."""
    from matplotlib.ticker import MaxNLocator

    places, body, floor = histogram.places(), histogram.body, np.zeros(len(histogram.bins))
    for sizes, label, colour in zip(parts, told, (style.SERIES[0], style.BROKEN), strict=True):
        heights = np.array(histogram.counts(sizes))
        looks: Any = {"color": colour, "edgecolor": "white", "label": label, "align": "edge"}
        axes.bar(places, heights, body.step, floor, **looks)
        floor += heights
    whole = MaxNLocator(5, integer=True).tick_values(body.start, body.stop)
    axes.set_xticks([tick for tick in whole if body.start <= tick <= body.stop])
    for place, bin_, count in zip(places, histogram.bins, floor.astype(int), strict=True):
        if bin_.start < body.start:
            told = f"{count} from\n{bin_.start}"
        elif bin_.start >= body.stop:
            told = f"{count} up to\n{bin_.stop - 1}"
        else:
            continue
        above: Any = {
            "xytext": (0, 3),
            "textcoords": "offset points",
            "va": "bottom",
            "ha": "center",
        }
        axes.annotate(told, (place + body.step / 2, count), fontsize=8, **above)
        axes.margins(y=0.25)
