"""The example for Megatron-Bridge: its own recipe trains the patched class on our data."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
from megatron.bridge import AutoBridge
from megatron.bridge.data.base import DatasetProvider

from examples import bridge_recipe
from examples.bridge_recipe import RECIPES
from step37_data.forward_step import ForwardStep
from step37_data.provider import Step37Flickr8kSFTDataProvider
from tests.real.bridge.bridge_model import MODEL


@pytest.mark.usefixtures("bridge")
def test_the_recipe_trains_the_patched_class_on_our_data_by_our_step(monkeypatch):
    """Bridge's own recipe; its ``pretrain`` needs GPUs and is stood in for."""
    calls: list[tuple[str, Any, Any]] = []

    def pretrain(cfg: Any, forward_step: Any) -> None:
        embedding = importlib.import_module(MODEL).ImageInsertEmbedding
        calls.append((embedding.__name__, cfg, forward_step))

    module = types.ModuleType("megatron.bridge.training.pretrain")
    module.pretrain = pretrain
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["recipe", "--tokenizer", "folder", "--steps", "7"])
    # The recipe reads the model's configuration from a hub.
    hub = types.SimpleNamespace(to_megatron_provider=lambda **_: types.SimpleNamespace())
    monkeypatch.setattr(AutoBridge, "from_hf_pretrained", lambda _: hub)
    bridge_recipe.main()
    ((name, cfg, forward_step),) = calls
    assert name == "Step37ImageInsertEmbedding"
    assert isinstance(forward_step, ForwardStep)
    assert isinstance(cfg.dataset, Step37Flickr8kSFTDataProvider)
    assert isinstance(cfg.dataset, DatasetProvider)
    assert cfg.dataset.tokenizer_path == "folder"
    assert (cfg.train.train_iters, cfg.train.micro_batch_size) == (7, 1)


def test_without_a_recipe_of_bridges_the_places_are_named(monkeypatch):
    for module, _ in RECIPES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"h100\.step37\.step37_sft_64gpu"):
        bridge_recipe.bridge_recipe()
