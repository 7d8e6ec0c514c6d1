"""Megatron-Bridge's own ``Step37Model``, stock against ours over several steps."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from step37_data.forward_step import Stage, model_inputs
from step37_data.preprocess import (
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    build_image_for_insert,
    preprocess_packed_batch,
)
from step37_kernels import ImageInsertEmbedding
from step37_kernels.megatron import patch_step37, replace_in, unpatch_step37
from tests.real.bridge.bridge_model import (
    EMBEDDING,
    IM_START,
    LENGTH,
    MODEL,
    PATCH_START,
    SIDE,
    VOCABULARY,
    build,
)

BATCH = 2

pytestmark = pytest.mark.usefixtures("megatron", "bridge")


def load(name: str) -> Any:
    return importlib.import_module(name)


def batch() -> dict[str, Any]:
    """Pictures of 4 rows and crops of 1 in both columns, as ``step37_data`` hands them over."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (BATCH, LENGTH), generator=generator)
    ids[0, 3] = ids[0, 26] = ids[1, 10] = IM_START
    ids[0, 20] = ids[1, 24] = PATCH_START

    def pixels(size: int) -> Tensor:
        return torch.randn(3, size, size, generator=generator)

    items = [(pixels(SIDE), IMAGE_ITEM_TYPE) for _ in range(3)]
    items += [(pixels(56), PATCH_ITEM_TYPE) for _ in range(2)]
    images = build_image_for_insert(
        items,
        patch_start_id=PATCH_START,
        image_start_id=IM_START,
        limit_images=3,
        limit_patches=2,
        dtype=torch.float32,
        device="cpu",
    )
    position = torch.arange(LENGTH)
    return {
        "input_ids": ids,
        "images": images,
        "position_ids": position.expand(BATCH, -1),
        "attention_mask": position[None, None, :, None] < position,
        "labels": ids.roll(-1, 1),
    }


def train(model: Any, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of some steps of Adam, and the first step's gradients by name."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, gradients = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).mean()
        loss.backward()
        if not gradients:
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("how", [patch_step37, replace_in])
def test_it_trains_as_with_its_own_embedding(how, impl):
    stock = build()
    state = copy.deepcopy(stock.state_dict())
    stock_losses, stock_gradients = train(stock, steps=4)
    if how is patch_step37:
        patch_step37(impl=impl)
        fused = build()
    else:
        fused = build()
        assert replace_in(fused, impl=impl) == ("image_insert_embedding",)
    assert isinstance(fused.image_insert_embedding, ImageInsertEmbedding)
    assert fused.state_dict().keys() == state.keys()
    fused.load_state_dict(state, strict=True)
    losses, gradients = train(fused, steps=4)
    torch.testing.assert_close(losses, stock_losses)
    assert stock_losses[-1] < stock_losses[0]
    assert gradients.keys() == stock_gradients.keys()
    assert "image_insert_embedding.align_projector.weight" in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, stock_gradients[name])
        assert gradient.any(), name


def test_it_takes_what_the_forward_step_gives():
    pack = {
        "tokens": torch.arange(10, 34),
        "labels": torch.arange(11, 35),
        "loss_masks": torch.ones(24),
        "position_id": torch.arange(24),
        "cu_seqlens": torch.tensor([0, 24], dtype=torch.int32),
        "image_paths": [],
    }
    prepare = functools.partial(
        preprocess_packed_batch,
        img_start_token_id=IM_START,
        patch_start_token_id=PATCH_START,
        image_size=728,
        patch_image_size=504,
        encoder_patch_size=14,
        device="cpu",
    )
    model = load(MODEL).Step37Model
    for first, last in itertools.product([True, False], repeat=2):
        stage = Stage(pre_process=first, post_process=last, divisible_by=16)
        inputs = model_inputs(pack, stage, preprocess=prepare)
        assert inputs.keys() <= inspect.signature(model.forward).parameters.keys()
        if plan := getattr(model, "build_schedule_plan", None):
            del inputs["cu_seqlens"]  # So does forward_step.
            assert inputs.keys() <= inspect.signature(plan).parameters.keys()


def test_freezing_the_projector_leaves_it_without_a_gradient():
    patch_step37()
    model = build()
    model.freeze(
        freeze_language_model=False, freeze_vision_model=False, freeze_vision_projection=True
    )
    _, gradients = train(model, steps=1)
    assert not any(name.startswith("image_insert_embedding") for name in gradients)
    assert any(name.startswith("vision_model") for name in gradients)


def test_the_class_is_as_before_once_unpatched():
    stock = load(MODEL).ImageInsertEmbedding
    patch_step37()
    assert issubclass(load(MODEL).ImageInsertEmbedding, ImageInsertEmbedding)
    unpatch_step37()
    assert load(MODEL).ImageInsertEmbedding is stock
    assert load(EMBEDDING).ImageInsertEmbedding is stock
    assert not isinstance(build().image_insert_embedding, ImageInsertEmbedding)
