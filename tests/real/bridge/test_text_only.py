"""Microbatches without an image under Megatron's DDP, data parallel 2, on Bridge's own model.

The tower is frozen and its features are given: it is outside the class, and no part of this.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from step37_kernels.megatron import patch_step37, unpatch_step37
from tests.megatron.processes import run
from tests.real.bridge.bridge_model import build, forward, groups

Schedule = list[tuple[int, int]]
# Images of rank 0 and rank 1, step by step.


def make_model(fused: bool, fusion: bool = False) -> Any:
    if fused:
        patch_step37(gradient_accumulation_fusion=fusion)
    else:
        unpatch_step37()
    model = build(projector_bias=True)
    model.vision_model.requires_grad_(False)
    return model


def loss_of(model: Any, step: int, rank: int, schedule: Schedule) -> torch.Tensor:
    count = schedule[step][rank]
    images = groups(seed=10 * step + rank, images=count) if count else []
    return forward(model, images, seed=100 + 10 * step + rank).mean()


Gradients = list[dict[str, torch.Tensor]]


def step_down(model: Any, gradients: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= 0.1 * gradients[name]


def expected_gradients(schedule: Schedule) -> Gradients:
    """Of each step of a training, from one process that runs both ranks' microbatches through the
    stock class. ``"loss"`` is the mean of the losses."""
    model = make_model(fused=False)
    steps = []
    for step in range(len(schedule)):
        model.zero_grad(set_to_none=False)
        losses = [loss_of(model, step, rank, schedule) / 2 for rank in (0, 1)]
        for loss in losses:
            loss.backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        step_down(model, gradients)
        steps.append({**gradients, "loss": sum(losses).detach()})
    return steps


def reduced_gradients(
    rank: int, schedule: Schedule, fused: bool, fusion: bool = False, **options: Any
) -> Gradients:
    """The same, as Megatron's DDP reduces them while backward runs."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = make_model(fused, fusion)
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1, **options),
        model,
    )
    steps = []
    for step in range(len(schedule)):
        wrapped.zero_grad_buffer()
        loss = loss_of(wrapped, step, rank, schedule)
        loss.backward()
        wrapped.finish_grad_sync()
        if options.get("use_distributed_optimizer"):
            gather_shards(wrapped, rank)
        gradients = {
            name: parameter.main_grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        step_down(model, gradients)
        mean = loss.detach() / 2
        dist.all_reduce(mean)
        steps.append({**gradients, "loss": mean})
    return steps


def gather_shards(wrapped: Any, rank: int) -> None:
    """The distributed optimizer leaves each rank the sum of one half of a bucket."""
    for group in wrapped.bucket_groups:
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(2)[rank].clone()
            halves = [torch.empty_like(own), torch.empty_like(own)]
            dist.all_gather(halves, own)
            bucket.grad_data.copy_(torch.cat(halves))


def in_a_process(rank: int) -> tuple[dict[str, Gradients], str]:
    results = {
        f"{name}, {reduction}": reduced_gradients(rank, schedule, fused=True, **options)
        for name, schedule in SCHEDULES.items()
        for reduction, options in REDUCTIONS.items()
    }
    # Both ranks without an image, so that neither waits for the other.
    with pytest.raises(AssertionError) as stock:
        reduced_gradients(rank, [(1, 1), (0, 0)], False)
    return results, str(stock.value)


SCHEDULES: dict[str, Schedule] = {
    "rank 1 has no image in the second step": [(2, 1), (1, 0), (1, 2)],
    "rank 0 has no image in the first step": [(0, 2), (2, 0), (0, 0)],
}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "all-reduce": {},
    "reduce-scatter": {"use_distributed_optimizer": True},
    "weight gradient into main_grad": {"fusion": True},
    "weight gradient into main_grad, reduce-scatter": {
        "fusion": True,
        "use_distributed_optimizer": True,
    },
}


@pytest.fixture(scope="module")
def ranks(megatron: None) -> list[tuple[dict[str, Gradients], str]]:  # noqa: ARG001
    return run(in_a_process)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_training_goes_on_as_in_one_process_when_a_rank_has_no_image(ranks, name, reduction):
    for step, expected in enumerate(expected_gradients(SCHEDULES[name])):
        for gradients, _ in ranks:
            actual = gradients[f"{name}, {reduction}"][step]
            assert actual.keys() == expected.keys()
            for parameter, gradient in expected.items():
                torch.testing.assert_close(actual[parameter], gradient)


def test_stock_runs_into_an_assertion_of_megatrons_there(ranks):
    for _, message in ranks:
        assert "Communication call has not been issued for this bucket" in message
