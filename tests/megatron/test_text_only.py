"""Microbatches without an image: the projector's gradient of zeros, alone and under DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.megatron import patch_step37, unpatch_step37
from tests.megatron.stand_ins import bridge
from tests.megatron.stand_ins.models import IM_START, build, forward, groups
from tests.megatron.stand_ins.processes import (
    run,
)

IDS = torch.tensor([[11, 12, 13, 14]])


class Words(torch.nn.Embedding):
    def forward(self, input_ids: torch.Tensor, position_ids: Any) -> torch.Tensor:
        del position_ids
        return super().forward(input_ids).transpose(0, 1)


def make(text_only_gradient: bool = True, bias: bool = True) -> tuple[Words, ImageInsertEmbedding]:
    words = Words(20, 4)
    return words, ImageInsertEmbedding(
        words, 6, 4, projector_bias=bias, text_only_gradient=text_only_gradient
    )


def empty_group(*shape: int) -> list[ImageForInsert]:
    return [ImageForInsert(insert_start_token=IM_START, image_features=torch.empty(shape))]


NO_ROWS = {
    "None": None,
    "no group": [],
    "no feature": empty_group(0, 9, 6),
    "no feature, no width": empty_group(0, 0, 0),
    "no row": empty_group(2, 0, 6),
}


@pytest.mark.parametrize("images", NO_ROWS.values(), ids=NO_ROWS)
def test_the_projector_gets_zeros_and_everything_else_is_untouched(images):
    words, module = make()
    output = module(IDS, images)
    plain = words(IDS, None)
    assert torch.equal(output, plain)
    gradient = torch.randn(output.shape)
    (expected,) = torch.autograd.grad(plain, words.weight, gradient)
    output.backward(gradient)
    assert torch.equal(words.weight.grad, expected)
    for parameter in module.align_projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_a_start_token_without_features_makes_no_difference():
    _, module = make()
    module(torch.tensor([[11, IM_START, 13]])).sum().backward()
    assert torch.equal(module.align_projector.weight.grad, torch.zeros(4, 6))


def test_zeros_are_added_to_the_gradient_of_other_microbatches():
    _, module = make()
    image = [ImageForInsert(insert_start_token=IM_START, image_features=torch.ones(1, 2, 6))]
    module(torch.tensor([[IM_START, 1, 2, 3]]), image).sum().backward()
    before = module.align_projector.weight.grad.clone()
    module(IDS).sum().backward()
    assert torch.equal(module.align_projector.weight.grad, before)
    assert before.abs().sum() > 0


def test_it_is_off_unless_asked_for():
    words = Words(20, 4)
    module = ImageInsertEmbedding(words, 6, 4)
    module(IDS).sum().backward()
    assert words.weight.grad is not None
    assert module.align_projector.weight.grad is None


def test_a_frozen_projector_and_inference_cost_nothing():
    words, module = make()
    module._language_embedding = lambda **_: embeddings
    embeddings = words(IDS, None)
    with torch.no_grad():
        assert module(IDS) is embeddings
    module.align_projector.requires_grad_(False)
    assert module(IDS) is embeddings


def test_only_what_is_trained_gets_a_gradient():
    words, module = make()
    words.requires_grad_(False)
    module.align_projector.bias.requires_grad_(False)
    module(IDS).sum().backward()
    assert torch.equal(module.align_projector.weight.grad, torch.zeros(4, 6))
    assert module.align_projector.bias.grad is None
    assert words.weight.grad is None


def test_a_later_layer_may_change_the_output_in_place():
    words, module = make()
    output = module(IDS)
    output.mul_(2)
    output.sum().backward()
    assert words.weight.grad.sum() == 2 * IDS.numel() * 4


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_come_in_the_order_of_a_forward_with_images(impl):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors are on the CPU, and the kernels are compiled here")
    words, module = make()
    module.impl = impl
    parameters = {"words": words.weight, **dict(module.named_parameters())}
    image = [ImageForInsert(insert_start_token=IM_START, image_features=torch.ones(1, 2, 6))]
    orders: list[list[str]] = [[], []]
    for images, order in zip((image, None), orders, strict=True):
        handles = [
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name, order=order: order.append(name)
            )
            for name, parameter in parameters.items()
        ]
        module(torch.tensor([[IM_START, 1, 2, 3]]), images).sum().backward()
        for handle in handles:
            handle.remove()
    assert sorted(orders[0]) == sorted(parameters)
    assert orders[1] == orders[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_the_forward_gives_the_same(use_reentrant):
    words, module = make()
    anchor = torch.zeros(1, requires_grad=True)
    output = checkpoint(lambda x: module(IDS) + x, anchor, use_reentrant=use_reentrant)
    output.sum().backward()
    assert torch.equal(module.align_projector.weight.grad, torch.zeros(4, 6))
    assert words.weight.grad.sum() == IDS.numel() * 4


# Data parallel 2 on real megatron-core. The tower is frozen and its features are given: it is
# outside the class, and no part of this.


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
    with bridge.installed():
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

    with bridge.installed():
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
