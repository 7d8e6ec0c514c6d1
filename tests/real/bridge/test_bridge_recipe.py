"""``step37_bridge.recipe``: Bridge's own recipe trains the patched class on our data."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
from megatron.bridge import AutoBridge
from megatron.bridge.data.base import DatasetProvider
from megatron.bridge.models.stepfun.step37_provider import Step37ModelProvider
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from examples import bridge_recipe as example
from step37_bridge import recipe
from step37_bridge.callbacks import CompareWithStock
from step37_bridge.ranks import ParallelSizes
from step37_bridge.recipe import RECIPES, SMOKE_RECIPES, RecipeOptions, make_config
from step37_bridge.replacing import RECIPE_MODULES
from step37_data.forward_step import ForwardStep
from step37_data.provider import Step37Flickr8kSFTDataProvider
from tests.real.bridge.bridge_model import MODEL

pytestmark = pytest.mark.usefixtures("hub")

LAYERS = 45


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, bridge: None) -> None:  # noqa: ARG001
    """The recipe reads the model's configuration from a hub; here it is given one."""

    def model(**_: Any) -> Step37ModelProvider:
        return Step37ModelProvider(num_layers=LAYERS, hidden_size=64, num_attention_heads=4)

    given = types.SimpleNamespace(to_megatron_provider=model)
    monkeypatch.setattr(AutoBridge, "from_hf_pretrained", lambda _: given)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any, Any]]:
    """Calls of Bridge's ``pretrain``, which needs GPUs and is stood in for."""
    calls: list[tuple[str, Any, Any, Any]] = []

    def pretrain(cfg: Any, forward_step: Any, callbacks: Any) -> None:
        embedding = importlib.import_module(MODEL).ImageInsertEmbedding
        calls.append((embedding.__name__, cfg, forward_step, callbacks))

    module = types.ModuleType("megatron.bridge.training.pretrain")
    module.pretrain = pretrain
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize("main", [recipe.main, example.main], ids=["wheel", "example"])
def test_the_recipe_trains_the_patched_class_on_our_data_by_our_step(main, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "128")
    monkeypatch.setattr(sys, "argv", ["recipe", "--tokenizer", "folder", "--steps", "7"])
    main()
    ((name, cfg, forward_step, callbacks),) = trained
    assert name == "Step37ImageInsertEmbedding"
    assert isinstance(forward_step, ForwardStep)
    assert isinstance(cfg.dataset, Step37Flickr8kSFTDataProvider)
    assert isinstance(cfg.dataset, DatasetProvider)
    assert cfg.dataset.tokenizer_path == "folder"
    assert (cfg.dataset.sample_count, cfg.dataset.packing) == (None, "best_fit")
    assert (cfg.train.train_iters, cfg.train.micro_batch_size) == (7, 1)
    assert cfg.model.variable_seq_lengths is True
    assert callbacks == []


def test_compare_leaves_bridges_embedding_for_the_callback_to_replace(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", ["recipe", "--smoke", "--compare", "5"])
    recipe.main()
    ((name, _, _, callbacks),) = trained
    assert name == "ImageInsertEmbedding"
    assert [type(callback) for callback in callbacks] == [CompareWithStock]


@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
def test_our_sizes_are_those_of_bridges_recipe(smoke):
    model = recipe.bridge_recipe(smoke=smoke).model
    sizes = RecipeOptions(smoke=smoke).parallel_sizes
    assert sizes == ParallelSizes(
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
        expert=model.expert_model_parallel_size,
    )
    assert model.context_parallel_size == 1
    (_, name), _ = SMOKE_RECIPES if smoke else RECIPES
    assert f"_{sizes.ranks_needed()}gpu_" in name


def test_smoke_is_bridges_smoke_configuration_on_our_data():
    stock = recipe.bridge_recipe(smoke=True)
    cfg = make_config(RecipeOptions(smoke=True))
    assert vars(stock.dataset).items() <= vars(cfg.dataset).items()
    assert (cfg.dataset.fixed_pack_idx, cfg.dataset.sample_count) == (0, 8)
    assert cfg.optimizer.lr == stock.optimizer.lr
    assert cfg.model.freeze_language_model is True
    assert cfg.train.train_iters == stock.train.train_iters


def test_overrides_arrive_in_the_configuration(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    sizes = ParallelSizes(tensor=2, pipeline=4, expert=2)
    options = RecipeOptions(
        smoke=True,
        tokenizer="t",
        checkpoint=str(tmp_path),
        data_dir="d",
        sample_count=16,
        train_iters=9,
        sizes=sizes,
    )
    cfg = make_config(options)
    model, dataset = cfg.model, cfg.dataset
    assert (dataset.tokenizer_path, dataset.cache_dir, dataset.sample_count) == ("t", "d", 16)
    assert (cfg.checkpoint.pretrained_checkpoint, cfg.train.train_iters) == (str(tmp_path), 9)
    assert model.tensor_model_parallel_size == 2
    assert model.pipeline_model_parallel_size == 4
    assert (model.expert_model_parallel_size, model.expert_tensor_parallel_size) == (2, 1)
    assert model.sequence_parallel is True


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 23, 45])
def test_megatron_gives_every_layer_to_a_stage(stages):
    model = make_config(RecipeOptions(smoke=True, sizes=ParallelSizes(pipeline=stages))).model
    built = [get_num_layers_to_build(model, None, rank) for rank in range(stages)]
    assert sum(built) == LAYERS
    assert min(built) > 0


@pytest.mark.parametrize("stages", [16, 46])
def test_so_many_stages_that_the_last_is_empty_are_refused(stages):
    options = RecipeOptions(sizes=ParallelSizes(pipeline=stages))
    with pytest.raises(ValueError, match=rf"pipeline: {stages} stages of \d layers"):
        make_config(options)


@pytest.mark.parametrize(("smoke", "stages"), [(False, 8), (True, 4)], ids=["full", "smoke"])
def test_a_recipe_is_found_where_older_releases_of_bridge_have_it(smoke, stages, monkeypatch):
    newer, older = RECIPE_MODULES
    importlib.import_module(older)  # It has the recipe from the newer place.
    monkeypatch.setitem(sys.modules, newer, None)
    assert recipe.bridge_recipe(smoke=smoke).model.pipeline_model_parallel_size == stages


@pytest.mark.parametrize("smoke", [[], ["--smoke"]], ids=["full", "smoke"])
def test_without_a_recipe_of_bridges_the_places_are_named(smoke, monkeypatch, trained):
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setattr(sys, "argv", ["recipe", *smoke])
    for module, _ in RECIPES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"^step37_bridge\.recipe: there is no .*h100\.step37\."):
        recipe.main()
    assert trained == []


@pytest.mark.usefixtures("trained")
def test_a_folder_without_a_checkpoint_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")  # of Hugging Face, but without weights
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", ["recipe", "--smoke", "--checkpoint", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"holds neither a checkpoint .* start from random weights"
    ):
        recipe.main()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: there is no folder .*wieghts"):
        make_config(RecipeOptions(checkpoint=str(tmp_path / "wieghts")))


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(["latest_checkpointed_iteration.txt"], id="megatron"),
        pytest.param(["latest_train_state.pt"], id="bridge"),
        pytest.param(["run_config.yaml", "metadata.json"], id="one iteration"),
        pytest.param(["config.json", "model-00001-of-00002.safetensors"], id="hugging face"),
    ],
)
def test_a_folder_that_bridge_loads_is_accepted(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    cfg = make_config(RecipeOptions(smoke=True, checkpoint=str(tmp_path)))
    assert cfg.checkpoint.pretrained_checkpoint == str(tmp_path)
