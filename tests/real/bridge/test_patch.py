"""patch_step37 and unpatch_step37 on Megatron-Bridge's own modules."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
import sys
import types
from typing import Any

import pytest
import torch

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.integration.vocab_parallel import RowGradient
from step37_kernels.megatron import (
    Step37ImageInsertEmbedding,
    patch_step37,
    replace_in,
    unpatch_step37,
)
from tests.real.bridge.bridge_model import (
    EMBEDDING,
    HIDDEN,
    IM_START,
    LENGTH,
    MODEL,
    PACKAGE,
    VOCABULARY,
    WIDTH,
    build,
    features,
    forward,
    local_layers,
    train,
)

BOTH = (
    f"{MODEL}.ImageInsertEmbedding",
    f"{EMBEDDING}.ImageInsertEmbedding",
)


pytestmark = pytest.mark.usefixtures("megatron", "bridge")


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("imported", [[], [EMBEDDING], [MODEL]], ids=str)
def test_models_get_the_fused_embedding_in_whatever_order_things_are_imported(imported):
    for name in imported:
        load(name)
    assert patch_step37() == BOTH
    model = build()
    assert isinstance(model.image_insert_embedding, ImageInsertEmbedding)
    assert load(EMBEDDING).ImageInsertEmbedding is load(MODEL).ImageInsertEmbedding


def test_replacing_the_class_in_its_own_module_alone_would_change_nothing():
    load(MODEL)
    load(EMBEDDING).ImageInsertEmbedding = Step37ImageInsertEmbedding
    assert not isinstance(build().image_insert_embedding, ImageInsertEmbedding)


def test_the_options_reach_the_model():
    layout = SequenceLayout()
    patch_step37(impl="torch", strict=True, text_only_gradient=False, layout=layout)
    module = build().image_insert_embedding
    assert (module.impl, module.strict, module.text_only_gradient) == ("torch", True, False)
    assert module.layout is layout
    patch_step37()
    module = build().image_insert_embedding
    assert (module.impl, module.strict, module.text_only_gradient) == ("auto", False, "auto")
    assert module.layout == "auto"
    patch_step37(layout=None)
    assert build().image_insert_embedding.layout is None


def test_an_unknown_impl_patches_nothing():
    stock = load(MODEL).ImageInsertEmbedding
    with pytest.raises(ValueError, match="impl: expected one of auto, triton, torch, got 'cuda'"):
        patch_step37(impl="cuda")  # type: ignore[arg-type]
    assert load(MODEL).ImageInsertEmbedding is stock


def test_patching_twice_changes_nothing():
    patch_step37()
    before = {name: dict(vars(load(name))) for name in (MODEL, EMBEDDING)}
    assert patch_step37() == BOTH
    for name, names in before.items():
        assert vars(load(name)) == names
    assert unpatch_step37() == BOTH


def test_unpatching_leaves_no_trace(caplog):
    modules = [load(MODEL), load(EMBEDDING)]
    before = [dict(vars(module)) for module in modules]
    patch_step37(impl="torch", strict=True)
    assert unpatch_step37() == BOTH
    assert [vars(module) for module in modules] == before
    assert not isinstance(build().image_insert_embedding, ImageInsertEmbedding)
    caplog.clear()
    assert unpatch_step37() == ()
    assert not caplog.records
    module = Step37ImageInsertEmbedding(torch.nn.Identity(), WIDTH, HIDDEN)
    assert (module.impl, module.strict) == ("auto", False)
    patch_step37()
    assert build().image_insert_embedding.impl == "auto"


def test_unpatching_leaves_alone_what_somebody_else_has_put_there(caplog):
    patch_step37()
    model = load(MODEL)
    model.ImageInsertEmbedding = other = type("Other", (), {})
    assert unpatch_step37() == BOTH[1:]
    assert model.ImageInsertEmbedding is other
    assert "not what patch_step37 put there" in caplog.text


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_log_says_what_is_patched_and_what_is_not(caplog, channels_last):
    with caplog.at_level(logging.INFO, "step37_kernels.megatron"):
        names = patch_step37(impl="torch", channels_last=channels_last)
    # Modules that hold the stock tower by name have a warning of their own.
    (record,) = [record for record in caplog.records if record.levelno == logging.INFO]
    done, left = record.getMessage().split("Not patched: ")
    for part in (*BOTH, *names, "impl='torch'"):
        assert part in done
    for part in ("forward step", "ImageForInsert"):
        assert part in left
    assert ("Step37VisionModel" in done) == channels_last
    assert ("the vision tower" in left) == (not channels_last)


def test_patching_after_a_model_was_built_warns_and_points_to_replace_in(caplog):
    model = build()
    patch_step37()
    assert "after 1 stock ImageInsertEmbedding had been built" in caplog.text
    assert "replace_in(model)" in caplog.text
    assert not isinstance(model.image_insert_embedding, ImageInsertEmbedding)
    replace_in(model)
    assert isinstance(model.image_insert_embedding, ImageInsertEmbedding)


def test_a_module_that_took_the_class_by_name_before_is_named_in_a_warning(caplog, monkeypatch):
    recipe = types.ModuleType("my_recipe")
    recipe.ImageInsertEmbedding = load(EMBEDDING).ImageInsertEmbedding
    monkeypatch.setitem(sys.modules, "my_recipe", recipe)
    patch_step37()
    assert "imported it by name before: my_recipe" in caplog.text


@pytest.mark.parametrize("name", [MODEL, EMBEDDING])
def test_a_missing_name_is_an_import_error_that_names_it_and_the_known_versions(name, monkeypatch):
    modules = {module: load(module) for module in (MODEL, EMBEDDING)}
    monkeypatch.delattr(modules[name], "ImageInsertEmbedding")
    before = {module: dict(vars(found)) for module, found in modules.items()}
    message = rf"{name}\.ImageInsertEmbedding: no such name.*Megatron-Bridge 0\.6\.2"
    with pytest.raises(ImportError, match=message):
        patch_step37()
    assert before == {module: vars(found) for module, found in modules.items()}


def test_without_bridge_the_import_error_names_the_missing_module(monkeypatch):
    monkeypatch.setitem(sys.modules, MODEL, None)
    message = rf"module {MODEL}: no module {MODEL}.*Known to work.*installed: megatron-bridge 0"
    with pytest.raises(ImportError, match=message):
        patch_step37()


def test_a_dependency_that_bridge_misses_is_reported_as_what_it_is(monkeypatch):
    vision = f"{PACKAGE}.vision_model"
    monkeypatch.setitem(sys.modules, vision, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        patch_step37()
    assert caught.value.name == vision
    assert "Known to work" not in str(caught.value)


def test_training_gives_the_losses_of_the_stock_model():
    stock = train(build(), steps=4)
    patch_step37()
    ours = train(build(), steps=4)
    torch.testing.assert_close(ours, stock)
    assert stock[-1] < stock[0]


def test_insertion_groups_of_bridge_and_ours_are_interchangeable():
    theirs = load(EMBEDDING).ImageForInsert
    stock = build()
    patch_step37()
    fused = build()
    outputs = [
        forward(model, [kind(insert_start_token=IM_START, image_features=features())])
        for model in (stock, fused)
        for kind in (theirs, ImageForInsert)
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_go_from_stock_to_ours_and_back(bias):
    stock = build(projector_bias=bias)
    patch_step37()
    torch.manual_seed(5)
    fused = build(projector_bias=bias, seed=None)
    saved, own = copy.deepcopy(stock.state_dict()), copy.deepcopy(fused.state_dict())
    assert own.keys() == saved.keys()
    projector = "image_insert_embedding.align_projector.weight"
    assert not torch.equal(own[projector], saved[projector])
    fused.load_state_dict(saved, strict=True)
    stock.load_state_dict(own, strict=True)
    for model, loaded in ((fused, saved), (stock, own)):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, loaded[name])


def test_the_sharded_state_dict_is_that_of_the_stock_model():
    stock = build().sharded_state_dict()
    patch_step37()
    fused = build().sharded_state_dict()
    assert fused.keys() == stock.keys()
    name = "image_insert_embedding.align_projector.weight"
    assert name in fused
    for field in (
        "key",
        "dtype",
        "global_shape",
        "global_offset",
        "replica_id",
        "axis_fragmentations",
    ):
        assert getattr(fused[name], field) == getattr(stock[name], field)
    assert fused[name].global_shape[-1] == WIDTH


def test_a_patched_module_can_be_copied_and_pickled():
    patch_step37(impl="torch")
    # megatron-core's embedding holds process groups, which cannot be copied.
    module = load(MODEL).ImageInsertEmbedding(torch.nn.Identity(), WIDTH, HIDDEN)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is Step37ImageInsertEmbedding
        assert copied.impl == "torch"
        assert torch.equal(copied.align_projector.weight, module.align_projector.weight)


def build_last_stage(**options: Any) -> Any:
    """A last pipeline stage with multi-token prediction, which looks words up again."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, mtp_num_layers=1
    )
    layers = local_layers(config, None)
    mtp = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False)
    return build(pre_process=False, mtp_num_layers=1, mtp_block_spec=mtp, **options)


def words_of(model: Any) -> Any:
    return model.language_model.embedding.word_embeddings


def backward_of_last_stage(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step; what is in ``main_grad`` counts as one."""
    hidden = torch.randn(LENGTH, 1, HIDDEN, generator=torch.Generator().manual_seed(4))
    model.set_input_tensor(hidden)
    words_of(model).weight.main_grad = torch.zeros(VOCABULARY, HIDDEN)
    forward(model, []).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    table = "language_model.embedding.word_embeddings.weight"
    gradients[table] = gradients.get(table, 0) + words_of(model).weight.main_grad
    return gradients


def test_the_second_lookup_on_the_last_stage_has_its_gradient_by_rows():
    stock = build_last_stage()
    wanted = backward_of_last_stage(stock)
    assert not isinstance(words_of(stock), RowGradient)
    stock_init = load(MODEL).Step37Model.__init__
    patch_step37(gradient_accumulation_fusion=True)
    model = build_last_stage()
    assert isinstance(words_of(model), RowGradient)
    assert model.state_dict().keys() == stock.state_dict().keys()
    found = backward_of_last_stage(model)
    assert words_of(model).weight.grad is None
    assert words_of(model).weight.main_grad.any()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)

    unpatch_step37()
    assert not isinstance(words_of(model), RowGradient)
    assert load(MODEL).Step37Model.__init__ is stock_init
    assert not isinstance(words_of(build_last_stage()), RowGradient)


@pytest.mark.parametrize("fusion", [False, "auto"])
def test_without_fusion_the_second_lookup_is_left_to_stock(fusion):
    patch_step37(gradient_accumulation_fusion=fusion)
    assert not isinstance(words_of(build_last_stage()), RowGradient)


def test_a_model_class_that_was_taken_by_name_before_builds_patched_models(monkeypatch):
    taken = load(MODEL).Step37Model
    patch_step37(gradient_accumulation_fusion=True)
    assert load(MODEL).Step37Model is taken
    patch_step37(gradient_accumulation_fusion=True)
    assert isinstance(words_of(build_last_stage()), RowGradient)
    # Somebody wraps the constructor in turn: it stays, and does nothing of ours any more.
    ours = taken.__init__
    monkeypatch.setattr(taken, "__init__", lambda *args, **kwargs: ours(*args, **kwargs))
    unpatch_step37()
    assert taken.__init__ is not ours
    assert not isinstance(words_of(build_last_stage()), RowGradient)
