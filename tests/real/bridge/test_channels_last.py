"""``channels_last=True``: the vision tower hands over contiguous rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from step37_kernels.megatron import patch_step37, replace_in, unpatch_step37
from tests.real.bridge.bridge_model import SIDE, build, forward

pytestmark = pytest.mark.usefixtures("megatron", "bridge")


def made(how: str) -> Any:
    if how == "patched":
        patch_step37(channels_last=True)
        return build()
    model = build()
    if how == "replaced":
        for _ in range(2):
            replace_in(model, channels_last=True)
    return model


@pytest.mark.parametrize("how", ["patched", "replaced"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_rows_are_contiguous_and_values_and_gradients_are_those_of_the_tower_as_it_was(
    how, count
):
    pixels = torch.randn(count, 3, SIDE, SIDE)
    stock, ours = made("stock"), made(how)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    results = []
    for model in (stock, ours):
        features = model.vision_model(pixels)
        features.square().sum().backward()
        gradient = model.vision_model.vit_downsampler2.weight.grad
        results.append((features, gradient))
    assert results[1][0].is_contiguous()
    assert results[0][0].is_contiguous() == (count > 1)
    for stock_value, value in zip(*results, strict=True):
        torch.testing.assert_close(value, stock_value)


def test_a_patch_without_it_and_unpatching_leave_the_tower_as_it_was():
    hooks = []
    patch_step37(channels_last=True)
    hooks.append(build())
    patch_step37()
    hooks.append(build())
    patch_step37(channels_last=True)
    unpatch_step37()
    hooks.append(build())
    counts = [len(m.vision_model.vit_downsampler2._forward_pre_hooks) for m in hooks]
    assert counts == [1, 0, 0]
    assert torch.isfinite(forward(hooks[0])).all()
