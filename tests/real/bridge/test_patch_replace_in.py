"""replace_in on built models, bare and inside the wrappers of megatron-core and PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from step37_kernels import ImageInsertEmbedding
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.megatron import patch_step37, replace_in
from tests.real.bridge.bridge_model import HIDDEN, WIDTH, build, forward

pytestmark = pytest.mark.usefixtures("megatron", "bridge")


def megatron_ddp(model: Any, **options: Any) -> nn.Module:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(model.config, DistributedDataParallelConfig(**options), model)


def float16_module(model: Any) -> nn.Module:
    from megatron.core.transformer.module import Float16Module

    model.config.bf16 = True
    return Float16Module(model.config, model)


def torch_ddp(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def torch_fsdp2(model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.language_model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "bare": lambda model: model,
    "Float16Module": float16_module,
    "Megatron's DDP": megatron_ddp,
    "Megatron's DDP around Float16Module": lambda model: megatron_ddp(float16_module(model)),
    "PyTorch's DDP": torch_ddp,
    "PyTorch's FSDP2": torch_fsdp2,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_parameters_outputs_and_optimizers_survive_inside(wrap):
    model = build()
    wrapped = wrap(model)
    parameters = dict(wrapped.named_parameters())
    borrowed = model.image_insert_embedding._language_embedding
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    before = forward(wrapped)
    held = dict(wrapped.named_parameters())  # FSDP2's change while a forward is under way

    (name,) = replace_in(wrapped)

    module = wrapped.get_submodule(name)
    assert module is model.image_insert_embedding
    assert isinstance(module, ImageInsertEmbedding)
    assert module._language_embedding is borrowed
    assert "_language_embedding" not in dict(module.named_modules())
    after = dict(wrapped.named_parameters())
    assert after.keys() == held.keys()
    assert all(after[key] is held[key] for key in held)
    torch.testing.assert_close(forward(wrapped), before)

    weight = parameters[f"{name}.align_projector.weight"]
    old = local(weight).clone()
    forward(wrapped).mean().backward()
    assert module.align_projector.weight is weight
    if hasattr(weight, "main_grad"):
        weight.grad = weight.main_grad.to(weight.dtype)
    assert local(weight.grad).abs().sum() > 0
    optimizer.step()
    assert not torch.equal(local(weight), old)


def local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_both_give_the_same_gradients():
    gradients = []
    for replace in (False, True):
        model = build(projector_bias=True)
        if replace:
            replace_in(model)
        forward(model).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    stock, ours = gradients
    for name, gradient in ours.items():
        if gradient is not None or stock[name] is not None:
            torch.testing.assert_close(gradient, stock[name], msg=name)


def test_a_list_of_chunks_is_searched_and_the_options_arrive():
    chunks = [build(), build(pre_process=False)]
    assert replace_in(chunks, impl="torch", strict=True, text_only_gradient=False) == (
        "0.image_insert_embedding",
    )
    module = chunks[0].image_insert_embedding
    assert (module.impl, module.strict, module.text_only_gradient) == ("torch", True, False)


def test_a_sequence_parallel_layout_marks_the_projector_of_a_built_model():
    model = build()
    group = torch.distributed.group.WORLD
    layout = SequenceLayout(sequence_parallel_group=group)
    replace_in(model, layout=layout)
    assert model.image_insert_embedding.layout is layout
    assert model.image_insert_embedding.align_projector.weight.sequence_parallel


def test_replacing_twice_only_sets_the_options():
    model = build()
    replace_in(model)
    state = dict(vars(model.image_insert_embedding))
    replace_in(model)
    assert vars(model.image_insert_embedding) == state
    replace_in(model, impl="torch")
    assert model.image_insert_embedding.impl == "torch"


def test_a_model_that_was_built_patched_is_left_as_it_is():
    patch_step37()
    model = build()
    kind = type(model.image_insert_embedding)
    assert replace_in(model) == ("image_insert_embedding",)
    assert type(model.image_insert_embedding) is kind


def test_hooks_and_the_training_flag_stay():
    model = build().eval()
    calls = []
    model.image_insert_embedding.register_forward_hook(lambda *_: calls.append("after"))
    model.image_insert_embedding.align_projector.register_forward_pre_hook(
        lambda *_: calls.append("projector")
    )
    model.image_insert_embedding.align_projector.register_forward_pre_hook(
        lambda _module, _args, _kwargs: calls.append("with kwargs"), with_kwargs=True
    )
    replace_in(model)
    forward(model)
    assert calls == ["projector", "with kwargs", "after"]
    assert not model.image_insert_embedding.training


def test_megatrons_parameter_gathering_still_waits_and_can_be_switched_off():
    model = build()
    wrapped = megatron_ddp(
        model,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=1,
    )
    replace_in(wrapped)
    projector = model.image_insert_embedding.align_projector
    waited = []
    for group in wrapped.bucket_groups:
        group.finish_param_sync = lambda group=group, **_: waited.append(group)
    forward(wrapped)
    assert wrapped.param_to_bucket_group[projector.weight] in waited
    count = len(waited)
    forward(wrapped, [])
    assert len(waited) > count
    wrapped.disable_forward_pre_hook(param_sync=False)


def test_nothing_to_replace_is_a_warning_but_not_on_a_later_pipeline_stage(caplog):
    with caplog.at_level(logging.INFO):
        assert replace_in(nn.Linear(2, 2)) == ()
        assert replace_in(build(pre_process=False)) == ()
    levels = [record.levelname for record in caplog.records if record.name.startswith("step37")]
    assert levels == ["WARNING", "INFO"]
    assert "found no ImageInsertEmbedding in Linear" in caplog.text


def test_a_module_that_is_an_fsdp_unit_of_its_own_is_refused():
    from torch.distributed.fsdp import fully_shard

    model = build()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model.image_insert_embedding, mesh=mesh)
    with pytest.raises(ValueError, match="image_insert_embedding is an FSDP unit of its own"):
        replace_in(model)


def test_a_projector_that_is_an_fsdp_unit_of_its_own_is_called():
    from torch.distributed.fsdp import fully_shard

    model = build()
    before = forward(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model.image_insert_embedding.align_projector, mesh=mesh)
    replace_in(model)
    torch.testing.assert_close(forward(model), before)
    forward(model, []).mean().backward()
    weight = model.image_insert_embedding.align_projector.weight
    assert not local(weight.grad).any()


def test_a_model_patched_before_it_was_sharded_can_be_given_options():
    from torch.distributed.fsdp import fully_shard

    patch_step37()
    model = build()
    fully_shard(model.image_insert_embedding, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    replace_in(model, strict=True)
    assert model.image_insert_embedding.strict


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"impl": "fast"}, "impl: expected one of auto, triton, torch, got 'fast'"),
        ({"layout": "all"}, "layout: expected 'auto', sequence_layout.* got 'all'"),
        ({"layout": 3}, "layout: expected 'auto', sequence_layout.* got 3"),
    ],
)
def test_an_unknown_option_replaces_nothing(option, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        replace_in(model, **option)
    assert not isinstance(model.image_insert_embedding, ImageInsertEmbedding)


def test_only_a_module_of_the_stock_shape_is_replaced():
    class ImageInsertEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.align_projector = nn.Linear(WIDTH, HIDDEN)

    model = nn.ModuleDict({"other": ImageInsertEmbedding()})
    assert replace_in(model) == ()
