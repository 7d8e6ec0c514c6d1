"""Microbatches without an image: the projector's gradient of zeros.

Under Megatron's DDP, on Bridge's own model: tests/real/bridge/test_text_only.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from step37_kernels import ImageForInsert, ImageInsertEmbedding

IM_START = 7
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
