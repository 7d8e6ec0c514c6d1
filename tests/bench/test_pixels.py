"""Subjects ``pixels``, ``multicrop`` and ``data``: what they compare is equal, and has figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import harness
from bench.harness import Settings
from bench.report import Table, print_table
from bench.subjects import data, pixels


@pytest.fixture
def briefly(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As little as possible, on few pictures."""
    for module, name, value in (
        (pixels, "IMAGES_A_PACK", 1),
        (pixels, "LARGE", (800, 600)),
        (pixels, "LARGE_PICTURES", 1),
        (pixels, "STEP_S", 0.001),
        (harness, "MIN_SAMPLES", 1),
    ):
        monkeypatch.setattr(module, name, value)
    return dataclasses.replace(settings, row_seconds=0.0, options={"steps": 2, "largest": 4})


def lines_of(tables: Iterator[Table]) -> list[list[Any]]:
    return [print_table(table)["lines"] for table in tables]


def test_every_stage_has_a_time_for_one_and_two_threads(briefly: Settings) -> None:
    threads = torch.get_num_threads()
    stages, waits, cores = lines_of(pixels.run_pixels(briefly))
    assert [threads for _, threads, *_ in stages] == [1, 2] * 7
    ours = {stage: own for stage, _, own, *_ in stages}
    ours.pop("read, decode (simplejpeg)")  # which may be missing
    assert all(quiet > 0 for quiet, _ in ours.values())
    assert [name for name, _ in waits] == [
        "prepared within the step",
        "prefetched, depth 1",
        "prefetched, depth 2",
    ]
    assert [stage for stage, *_ in cores] == [pixels.FOR_CUDA, pixels.FOR_CPU]
    assert torch.get_num_threads() == threads


def test_a_pack_in_crops_is_compared_with_stock(briefly: Settings) -> None:
    ((stock, *others),) = lines_of(pixels.run_multicrop(briefly))
    assert (stock[0], stock[-1]) == ("stock, 1 thread", 1)
    assert [name for name, *_ in others][:3] == [
        "ours, 1 thread",
        "ours, 1 thread, pixel_order='serving'",
        "of which decoding, 1 thread",
    ]
    for _, us, rate, times in others:
        assert us * rate == pytest.approx(1e6)
        assert times == pytest.approx(stock[1] / us)


def test_pixels_that_are_not_stocks_are_not_timed(
    briefly: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pixels.stock_pixels
    monkeypatch.setattr(pixels, "stock_pixels", lambda *given: right(*given).neg())
    with pytest.raises(AssertionError, match="values differ from stock with 1 threads"):
        next(pixels.run_multicrop(briefly))


def test_a_folder_is_listed_beside_the_reader_alone() -> None:
    metadata, folder = data.listing(50)
    assert (metadata[0], folder[0]) == ("read metadata.csv", "list the pictures of a folder")
    for _, count, ours, plain, unit, times, _ in (metadata, folder):
        assert (count, unit) == (50, "s")
        assert times == pytest.approx(plain / ours)
