"""The example on a small LLaVA of transformers: the same losses with the merge fused."""

from __future__ import annotations

import copy

import pytest
import torch

from examples.placeholders_llava import build, train

pytest.importorskip("transformers", reason="transformers is not installed")


def test_training_with_the_merge_fused_gives_the_losses_of_masked_scatter():
    model = build()
    stock, ours = (train(copy.deepcopy(model), fused) for fused in (False, True))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock))
    assert stock[0] != stock[-1]
