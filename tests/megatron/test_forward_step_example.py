"""The examples: the one on megatron-core alone runs, the recipe for Bridge says what it trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples import bridge_recipe
from examples.bridge_recipe import RECIPES
from step37_data.forward_step import ForwardStep
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_kernels.megatron import unpatch_step37
from tests.megatron.stand_ins import bridge

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_example_trains_to_half_its_first_loss():
    for module in ("megatron.core", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "examples.train_megatron_core"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout


CALLS: list[tuple] = []
RECIPE = """
from types import SimpleNamespace
def {name}():
    return SimpleNamespace(train=SimpleNamespace(), model=SimpleNamespace(), dataset=None,
                           checkpoint=SimpleNamespace())
"""
PRETRAIN = """
import importlib
def pretrain(cfg, forward_step):
    from tests.megatron.test_forward_step_example import CALLS
    model = importlib.import_module("{model}")
    CALLS.append((model.ImageInsertEmbedding.__name__, cfg, forward_step))
"""


@pytest.mark.parametrize("place", range(len(RECIPES)))
def test_the_recipe_trains_the_patched_class_on_our_data_by_our_step(place, tmp_path, monkeypatch):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    module, name = RECIPES[place]
    (tmp_path / "recipe.py").write_text(RECIPE.format(name=name))
    (tmp_path / "pretrain.py").write_text(PRETRAIN.format(model=bridge.MODEL))
    sources = {
        module: tmp_path / "recipe.py",
        "megatron.bridge.training.pretrain": tmp_path / "pretrain.py",
        bridge.MODEL: bridge.HERE / "model.py",
        bridge.EMBEDDING: bridge.HERE / "image_insert_embedding.py",
    }
    monkeypatch.setattr(sys, "argv", ["recipe", "--tokenizer", "folder", "--steps", "7"])
    with bridge.installed(sources):
        bridge_recipe.main()
        unpatch_step37()
    name, cfg, forward_step = CALLS.pop()
    assert name == "Step37ImageInsertEmbedding"
    assert isinstance(forward_step, ForwardStep)
    assert isinstance(cfg.dataset, Step37Flickr8kSFTDataProvider)
    assert cfg.dataset.tokenizer_path == "folder"
    assert (cfg.train.train_iters, cfg.train.micro_batch_size) == (7, 1)


def test_without_a_recipe_of_bridges_the_places_are_named():
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    with bridge.installed(), pytest.raises(ImportError, match=r"h100\.step37\.step37_sft_64gpu"):
        bridge_recipe.bridge_recipe()
