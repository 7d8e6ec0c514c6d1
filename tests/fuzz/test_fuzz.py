"""A few seconds of the fuzz suite, and every finding it has made as an example."""

from __future__ import annotations

import time

import pytest

from tests.fuzz import run
from tests.fuzz.images import formats

CASES = {"insertion": 60, "images": 80, "metadata": 150, "caches": 60, "media": 200,
         "conversations": 60}  # fmt: skip


@pytest.mark.parametrize("area", run.AREAS)
def test_the_first_cases_of_an_area_find_nothing(area: str) -> None:
    for number in range(CASES[area]):
        run.check(area, 0, number)


def test_a_finding_is_reported_with_how_to_have_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(rng: object, _folder: object) -> None:
        assert rng.integers(5) != 0, "found"

    monkeypatch.setitem(run.AREAS, "media", case)
    _, found = run.run(5, 7, ["media"])
    assert len(found) == 10
    command, _, trace = found[0].partition("\n")
    assert "AssertionError: found" in trace
    number = int(command.rpartition(" ")[2])
    with pytest.raises(AssertionError, match="found"):
        run.check("media", 7, number)


def test_the_time_is_shared_by_the_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.AREAS, "media", lambda *_: time.sleep(0.02))
    monkeypatch.setitem(run.AREAS, "caches", lambda *_: time.sleep(0.001))
    counts, found = run.run(0.5, 0, ["media", "caches"])
    assert not found
    assert counts["caches"] > 3 * counts["media"] > 0


def test_pictures_of_many_formats_are_damaged() -> None:
    assert {"JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"} <= set(formats())
