from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import harness, report
from bench.harness import Row, Settings
from bench.subjects import pixel_kernels

EVERYTHING = [
    ("normalize", "normalize", "1 × 40×40"),
    ("normalize", "normalize", "3 × 40×40"),
    ("resize", "resize+normalize", "1 × 30×20 → 40"),
    ("resize", "resize+normalize", "3 × 30×20 → 40"),
    ("resize", "resize+normalize", "3 × 3 sizes → 40"),
    ("resize", "multicrop", "1 × 800×600"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Settings:
    """Small pictures, measured as little as possible; compiled peers take part."""
    for module, name, value in (
        (pixel_kernels, "SIZE", 40),
        (pixel_kernels, "BATCHES", (1, 3)),
        (pixel_kernels, "FLICKR8K", (30, 20)),
        (pixel_kernels, "LARGE", (800, 600)),
        (pixel_kernels, "LARGE_PICTURES", 1),
        (harness, "MIN_SAMPLES", 1),
        (harness, "WARM_UP_ROUNDS", 1),
    ):
        monkeypatch.setattr(module, name, value)
    return dataclasses.replace(settings, dtypes=(torch.bfloat16,), row_seconds=0.0)


def groups(settings: Settings) -> list[list[Row]]:
    return [*pixel_kernels.run_normalize(settings), *pixel_kernels.run_resize(settings)]


def test_every_group_passes_the_gate_beside_a_copy_and_peers(small: Settings) -> None:
    found = groups(dataclasses.replace(small, compile_backend="aot_eager"))
    assert [(g[0].key.subject, g[0].key.operation, g[0].key.shape) for g in found] == EVERYTHING
    for group in found:
        assert [row.problem for row in group] == [None] * len(group)
        assert [row.kind for row in group].count("ours") == 1
        assert group[-1].implementation == pixel_kernels.COPY
        if group[0].key.operation != "multicrop" and "sizes" not in group[0].key.shape:
            assert [row.kind for row in group] == ["ours", "peer", "peer", "floor"]
    # Read once, written once: bytes in, two for each value out.
    normalize, resize = found[1][0].work, found[3][0].work
    assert normalize.bytes == 3 * 40 * 40 * 3 * (1 + 2)
    assert resize.bytes == 3 * (20 * 30 * 3 + 40 * 40 * 3 * 2)
    assert resize.rows == 3


def test_one_wrong_value_fails_the_gate(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pixel_kernels.resize_clip_normalize

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        result.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(pixel_kernels, "resize_clip_normalize", wrong)
    problems = {
        group[0].key.operation: row.problem
        for group in groups(small)
        for row in group
        if row.kind == "ours"
    }
    assert problems["resize+normalize"] == "failed the gate: 1 of 14400 values differ from Pillow's"
    assert problems["multicrop"].startswith("failed the gate: 1 of")
    assert problems["normalize"] is None


def test_a_peer_that_is_far_from_pillow_is_not_timed(
    small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearest(pixels, constants, side, dtype):
        grown = torch.nn.functional.interpolate(pixels.permute(0, 3, 1, 2).float(), (side, side))
        return pixel_kernels.plain_normalize(grown.permute(0, 2, 3, 1), constants, dtype)

    monkeypatch.setattr(pixel_kernels, "plain_resize", nearest)
    rows = [row for group in groups(small) for row in group if "not Pillow's" in row.implementation]
    assert len(rows) == 2
    for row in rows:
        assert row.problem is not None
        assert row.problem.endswith("of 256 levels from Pillow")
        assert row.median_us is None


def test_its_rows_can_be_reported(small: Settings) -> None:
    rows = [row for group in groups(small) for row in group]
    ceilings = harness.Ceilings(copy_bytes_per_s=1e9)
    table = report.markdown(report.to_json(rows, ceilings, {}))
    assert "## normalize: normalize" in table
    assert "| 3 × 3 sizes → 40 |" in table


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_ours_never_waits_and_needs_one_picture_between_its_passes(
    small: Settings,
) -> None:
    device = torch.device("cuda")
    for group in groups(dataclasses.replace(small, device=device, impl="auto")):
        (ours,) = (row for row in group if row.kind == "ours")
        assert ours.problem is None, ours
        assert ours.host_syncs == 0, ours
        assert ours.peak_bytes is not None
        assert ours.kept_bytes is not None
        temporary = ours.peak_bytes - ours.kept_bytes
        if ours.key.operation == "normalize":
            assert (ours.launches, temporary) == (1, 0)
        if ours.key.shape == "3 × 30×20 → 40":
            # 20 × 40 pixels a picture, and the jobs' tables.
            assert ours.launches == 2
            assert 3 * 20 * 40 * 3 <= temporary < 2**20
