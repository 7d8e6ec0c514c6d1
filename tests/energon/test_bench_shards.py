"""In ``python -m bench shards`` both encoders draw every sample of the shards that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.energon", reason="the extra energon is not installed")

from bench.subjects import shards
from step37_energon import Step37TaskEncoder

COUNT = 60


@pytest.mark.parametrize("plain", [False, True])
def test_both_encoders_draw_the_samples_and_the_workers_are_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(shards, "SHARD", 25)
    shards.write(tmp_path, COUNT)
    assert len(list((tmp_path / "train").glob("*.tar"))) == 3
    encoder = shards.ExampleEncoder() if plain else Step37TaskEncoder(shards.TOKENIZER)
    *_, (drawn, packs, by_sample, by_pack, cost, memory) = shards.draw(tmp_path, encoder, COUNT, 2)
    assert COUNT <= drawn < COUNT + 12
    # 169 tokens of 2048 are a picture's.
    assert drawn / 11 <= packs < drawn
    assert by_sample / by_pack == pytest.approx(drawn / packs)
    assert cost >= 0  # counted in ticks of 10 ms
    assert len(memory) == 2
    assert min(memory) > 50
