"""Automodel's Step-3.7 on two gloo ranks: FSDP2, and its own recipe with its own collate function,
in its pipeline and under context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.megatron.processes import run
from tests.real.automodel import automodel_ranks as ranks_of
from tests.real.automodel.automodel_ranks import HOWS, MEDIA, SCHEDULES
from tests.real.automodel.automodel_recipe import CROPS, batches, model_options
from tests.real.automodel.test_automodel import assert_within_stocks_rounding


@pytest.fixture(scope="module")
def sharded() -> Any:
    one_process = {how: ranks_of.whole(how, torch.float32) for how in HOWS}
    return run(ranks_of.fsdp), one_process, ranks_of.whole("stock", torch.float64)


@pytest.mark.parametrize("how", HOWS)
def test_fsdp2_gives_the_losses_and_gradients_of_one_process(sharded, how):
    ranks, one_process, exact = sharded
    for rank in ranks:
        assert_within_stocks_rounding(rank[how], one_process["stock"], exact, one_process[how])


@pytest.fixture(scope="module")
def sharded_by_megatron() -> Any:
    return run(ranks_of.megatron_fsdp)


@pytest.mark.parametrize("how", HOWS)
def test_megatron_fsdp_gives_the_losses_and_gradients_of_one_process(
    sharded_by_megatron, sharded, how
):
    _, one_process, exact = sharded
    for rank in sharded_by_megatron:
        first_steps = (steps[:1] for steps in (one_process["stock"], exact, one_process[how]))
        assert_within_stocks_rounding([rank[how]], *first_steps)


@pytest.fixture(scope="module")
def one_process() -> Any:
    return [ranks_of.of_recipe(dtype) for dtype in (torch.float32, torch.float64)]


@pytest.fixture(scope="module")
def stages() -> Any:
    return run(ranks_of.pipelines)


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_pipeline_gives_the_losses_and_gradients_of_the_whole_model(
    stages, one_process, *, schedule, how, media
):
    seen = set()
    for rank in stages:
        for step, gradients in enumerate(rank[f"{schedule}, {how}, {media}"]):
            names = gradients.keys()
            of_stage = [[{n: s[step][n] for n in names}] for s in one_process]
            assert_within_stocks_rounding([gradients], *of_stage)
            seen |= names
    assert seen == one_process[1][0].keys()


@pytest.fixture(scope="module")
def contexts() -> Any:
    return run(ranks_of.contexts)


@pytest.mark.parametrize("how", HOWS[1:])
def test_context_parallelism_gives_the_losses_and_gradients_of_one_process(
    contexts, one_process, how
):
    """As near to fp64 as stock is on two ranks, which sum in another order than one process."""
    for rank in contexts:
        assert_within_stocks_rounding(rank[how], rank["stock"], one_process[1])


def test_stock_under_context_parallelism_is_a_measure(contexts, one_process):
    for rank in contexts:
        for stock, exact in zip(rank["stock"], one_process[1], strict=True):
            assert stock.keys() == exact.keys()
            for name, wanted in exact.items():
                assert (stock[name] - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def test_its_collate_function_gives_what_these_tests_are_about():
    for crops, batch in zip(CROPS, batches(), strict=True):
        assert batch["num_patches"].tolist() == crops
        assert batch["n_images_per_sample"].tolist() == [1, 1]
        rows = [169 + 81 * count for count in crops]
        assert (batch["input_ids"] == model_options()["image"]).sum(1).tolist() == rows
        assert (batch["labels"] != -100).sum() > 30
