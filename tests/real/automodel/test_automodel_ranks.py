"""Automodel's Step-3.7 on two gloo ranks: FSDP2, and its own pipeline with its own collate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.megatron.processes import run
from tests.real.automodel import automodel_ranks as ranks_of
from tests.real.automodel.automodel_ranks import HOWS
from tests.real.automodel.test_automodel import assert_within_stocks_rounding


@pytest.fixture(scope="module")
def sharded() -> Any:
    exact, stock = ranks_of.whole(torch.float64), ranks_of.whole(torch.float32)
    return run(ranks_of.fsdp), stock, exact


@pytest.mark.parametrize("how", HOWS)
def test_fsdp2_gives_the_losses_and_gradients_of_one_process(sharded, how):
    ranks, stock, exact = sharded
    for rank in ranks:
        assert_within_stocks_rounding(rank[how], stock, exact)


@pytest.fixture(scope="module", params=["GPipe", "1F1B"])
def stages(request: pytest.FixtureRequest) -> Any:
    exact, stock = ranks_of.unsplit(torch.float64), ranks_of.unsplit(torch.float32)
    return run(ranks_of.pipeline, request.param), stock, exact


@pytest.mark.parametrize("media", ["its media", "our media"])
@pytest.mark.parametrize("how", HOWS)
def test_its_pipeline_gives_the_losses_and_gradients_of_the_whole_model(stages, how, media):
    ranks, stock, exact = stages
    seen = set()
    for rank in ranks:
        ours = rank[f"{how}, {media}"]
        for step, gradients in enumerate(ours):
            names = gradients.keys()
            of_stage = [[{n: s[step][n] for n in names}] for s in (stock, exact)]
            assert_within_stocks_rounding([gradients], *of_stage)
            seen |= names
    assert seen == exact[0].keys()
