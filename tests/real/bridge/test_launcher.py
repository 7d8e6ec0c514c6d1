"""``python -m step37_bridge`` on Bridge's wheel, with a stand-in for the script that it lacks."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from megatron.bridge.models.stepfun.data.flickr8k.provider import (
    Step37Flickr8kSFTDataProvider as StockProvider,
)
from megatron.bridge.models.stepfun.step37_flickr8k_step import forward_step as stock_step
from megatron.bridge.models.stepfun.step37_provider import Step37ModelProvider
from megatron.bridge.training.callbacks import CallbackManager
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from step37_bridge import __main__ as launcher
from step37_bridge import replacing
from step37_bridge.callbacks import CompareWithStock
from step37_data.forward_step import ForwardStep
from step37_data.provider import Step37Flickr8kSFTDataProvider
from tests.real.bridge.bridge_model import MODEL

ROOT = Path(__file__).parents[3]
RECIPES = "megatron.bridge.recipes.stepfun.h100.step37"
ARGUMENTS = [
    "--recipe",
    "step37_sft_4gpu_h100_bf16_flickr8k_smoke_config",
    "--step_func",
    "step37_flickr8k_step",
]


@dataclass
class Trained:
    """What the training function was given, and the embedding that a model would have had."""

    config: Any
    forward_step: Any
    callbacks: Any
    embedding: str


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, bridge: None) -> list[Trained]:  # noqa: ARG001
    """Calls of Bridge's training functions, which need GPUs and are stood in for."""
    calls: list[Trained] = []

    def train(config: Any, forward_step_func: Any, callbacks: Any = None) -> None:
        embedding = importlib.import_module(MODEL).ImageInsertEmbedding.__name__
        calls.append(Trained(config, forward_step_func, callbacks, embedding))

    for module_name, name in replacing.TRAINING_FUNCTIONS:
        module = types.ModuleType(module_name)
        setattr(module, name, train)
        monkeypatch.setitem(sys.modules, module_name, module)
    recipe = importlib.import_module(RECIPES)
    # The recipe reads the model's configuration from a hub.
    model = Step37ModelProvider(num_layers=45, hidden_size=64, num_attention_heads=4)
    hub = types.SimpleNamespace(to_megatron_provider=lambda **_: model)
    monkeypatch.setattr(
        recipe, "AutoBridge", types.SimpleNamespace(from_hf_pretrained=lambda _: hub)
    )
    # What the launcher replaces is back after the test; the embedding's fixture does its own.
    monkeypatch.setattr(recipe, "Step37Flickr8kSFTDataProvider", StockProvider)
    step_module = importlib.import_module(replacing.STEP_MODULE)
    monkeypatch.setattr(step_module, "forward_step", stock_step)
    return calls


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The stand-in in a folder of its own, with the module that it imports from there."""
    shutil.copy(Path(__file__).parent / "run_recipe_stand_in.py", tmp_path / "run_recipe.py")
    (tmp_path / "recipe_neighbour.py").write_text('RECIPES = "megatron.bridge.recipes"\n')
    return tmp_path / "run_recipe.py"


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The launcher with a command line; what it changes in ``sys`` is put back."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["step37_bridge", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        sys.modules.pop("recipe_neighbour", None)
        launcher.main()

    return run


def test_the_script_trains_our_embedding_on_our_data_by_our_step(
    trained: list[Trained], script: Path, launch: Callable[..., None]
) -> None:
    launch(str(script), *ARGUMENTS)
    (call,) = trained
    assert call.embedding == "Step37ImageInsertEmbedding"
    assert type(call.forward_step) is ForwardStep
    assert type(call.config.dataset) is Step37Flickr8kSFTDataProvider
    assert call.callbacks is None
    # Bridge's recipe gives its own values to our provider.
    assert (call.config.dataset.fixed_pack_idx, call.config.dataset.sample_count) == (0, 8)


def test_stock_runs_the_script_with_nothing_replaced(
    trained: list[Trained], script: Path, launch: Callable[..., None]
) -> None:
    launch("--stock", str(script), *ARGUMENTS)
    (call,) = trained
    assert call.embedding == "ImageInsertEmbedding"
    assert call.forward_step is stock_step
    assert type(call.config.dataset) is StockProvider


@pytest.mark.parametrize("kind", [[], ["--stock"]], ids=["ours", "stock"])
def test_the_command_line_is_the_scripts_with_every_override(
    trained: list[Trained], script: Path, launch: Callable[..., None], kind: list[str]
) -> None:
    overrides = [
        "model.pipeline_model_parallel_size=8",
        "model.num_layers_in_last_pipeline_stage=3",
        "dataset.sample_count=null",
        "dataset.cache_dir='/a folder/with = in it'",
        "train.train_iters=7",
    ]
    launch(*kind, str(script), *ARGUMENTS, *overrides)
    (call,) = trained
    assert call.config.command == [str(script), *ARGUMENTS, *overrides]
    model, dataset = call.config.model, call.config.dataset
    assert (model.pipeline_model_parallel_size, model.num_layers_in_last_pipeline_stage) == (8, 3)
    assert (dataset.sample_count, dataset.cache_dir) == (None, "/a folder/with = in it")
    assert call.config.train.train_iters == 7


@pytest.mark.parametrize("number", [0, 1], ids=["torchrun", "Slurm"])
def test_bridge_takes_what_the_page_hands_to_its_script(
    trained: list[Trained], script: Path, launch: Callable[..., None], number: int
) -> None:
    page = (ROOT / "docs" / "megatron-bridge.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"-m step37_bridge /\S+/scripts/training/run_recipe\.py((?: \\\n.*?)+)\n(?!    )", page
    )
    assert len(commands) == 2
    launch(str(script), *shlex.split(commands[number].replace("\\\n", "")))
    (call,) = trained
    model = call.config.model
    stages = range(model.pipeline_model_parallel_size)
    assert sum(get_num_layers_to_build(model, None, rank) for rank in stages) == 45
    assert call.config.checkpoint.pretrained_checkpoint == "/shared/step37_megatron"
    assert type(call.config.dataset) is Step37Flickr8kSFTDataProvider
    assert model.variable_seq_lengths is True
    assert len(stages) == (4, 8)[number]


def test_options_of_our_data_set_that_stock_has_not_can_be_overridden(
    trained: list[Trained], script: Path, launch: Callable[..., None]
) -> None:
    launch(str(script), *ARGUMENTS, "dataset.packing=best_fit", "dataset.multicrop=true")
    (call,) = trained
    assert (call.config.dataset.packing, call.config.dataset.multicrop) == ("best_fit", True)


def test_options_behind_the_path_are_the_scripts_even_if_we_have_them(
    tmp_path: Path, bridge: None, launch: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    del bridge
    path = tmp_path / "shows.py"
    path.write_text("import sys\nprint(sys.argv[1:], __name__)\n")
    given = ["--", "--stock", "--help", "--compare=x", "a b"]
    launch("--stock", str(path), *given)
    assert capsys.readouterr().out == f"{given} __main__\n"


def test_the_first_rank_says_what_is_replaced_and_the_others_say_nothing(
    *,
    trained: list[Trained],
    script: Path,
    launch: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch(str(script), *ARGUMENTS)
    told = capsys.readouterr().err
    for line in (
        f"step37_bridge: {MODEL}.ImageInsertEmbedding is now step37_kernels.ImageInsertEmbedding\n",
        f"step37_bridge: {replacing.STEP_MODULE}.forward_step is now step37_data.forward_step.",
        f"step37_bridge: {RECIPES}.Step37Flickr8kSFTDataProvider is now step37_data.provider.",
    ):
        assert line in told
    launch("--stock", str(script), *ARGUMENTS)
    assert "step37_bridge: --stock: nothing is replaced\n" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_PROCID", "3")
    launch(str(script), *ARGUMENTS)
    assert "step37_bridge:" not in capsys.readouterr().err
    assert len(trained) == 3


def test_a_script_that_imports_the_step_and_the_recipe_at_its_top_gets_ours_too(
    trained: list[Trained],
    tmp_path: Path,
    launch: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    del trained
    path = tmp_path / "older.py"
    path.write_text(
        f"from {replacing.STEP_MODULE} import forward_step\n"
        "from megatron.bridge.recipes import step37_sft_flickr8k_config as recipe\n"
        "print(type(forward_step), type(recipe().dataset))\n"
    )
    launch(str(path))
    assert capsys.readouterr().out == f"{ForwardStep} {Step37Flickr8kSFTDataProvider}\n"


def test_the_threads_that_read_ahead_end_with_the_script_even_if_it_fails(
    trained: list[Trained],
    tmp_path: Path,
    launch: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del trained
    closed: list[ForwardStep] = []
    monkeypatch.setattr(ForwardStep, "close", lambda step: closed.append(step))
    path = tmp_path / "fails.py"
    path.write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="3"):
        launch(str(path))
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (replacing.STEP_MODULE, "forward_step"),
        (RECIPES, "Step37Flickr8kSFTDataProvider"),
        (MODEL, "ImageInsertEmbedding"),
    ],
)
def test_a_bridge_without_a_name_is_one_line_and_nothing_is_replaced(
    *,
    module: str,
    name: str,
    trained: list[Trained],
    script: Path,
    launch: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(SystemExit) as error:
        launch(str(script), *ARGUMENTS)
    message = str(error.value)
    assert message.startswith("step37_bridge: ")
    assert f"{module}.{name}" in message
    assert "megatron-bridge 0.6.2" in message
    assert "\n" not in message
    assert trained == []
    stock = {
        (replacing.STEP_MODULE, "forward_step"): stock_step,
        (RECIPES, "Step37Flickr8kSFTDataProvider"): StockProvider,
    }
    for place in stock.keys() - {(module, name)}:
        assert getattr(importlib.import_module(place[0]), place[1]) is stock[place]


def test_compare_trains_stocks_embedding_and_adds_its_callback_to_those_of_the_script(
    trained: list[Trained], script: Path, launch: Callable[..., None]
) -> None:
    launch("--compare", "5", str(script), *ARGUMENTS)
    (call,) = trained
    assert call.embedding == "ImageInsertEmbedding"
    assert type(call.forward_step) is ForwardStep
    (callback,) = call.callbacks
    assert type(callback) is CompareWithStock
    pretrain = importlib.import_module("megatron.bridge.training.pretrain").pretrain
    mine: list[Any] = ["mine"]
    pretrain(None, None, callbacks=mine)
    assert trained[1].callbacks == ["mine", callback]
    assert mine == ["mine"]
    manager = CallbackManager()
    pretrain(None, None, manager)
    assert trained[2].callbacks is manager
    assert manager.list_callbacks("on_train_step_end") == [callback.on_train_step_end]
