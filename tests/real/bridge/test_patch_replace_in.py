"""replace_in on built models, bare and inside the wrappers of megatron-core and PyTorch."""

from __future__ import annotations

import copy
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


class LowRank(nn.Module):
    """As PEFT's ``lora.Linear``: no ``nn.Linear``, one inside, whose attributes it hands on."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, HIDDEN, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Saved(nn.Module):
    """As PEFT's ``ModulesToSaveWrapper``: the copy that is trained is called."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.modules_to_save.requires_grad_(True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["modules_to_save"]["default"], name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.modules_to_save["default"](x)


class OwnLinear(nn.Module):
    """A linear layer of a library of its own, as Transformer Engine's is."""

    def __init__(self, linear: nn.Linear, told: bool = True) -> None:
        super().__init__()
        if told:
            self.in_features, self.out_features = WIDTH, HIDDEN
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


PROJECTORS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "LoRA": LowRank,
    "modules_to_save": Saved,
    "a linear layer that is no nn.Linear": OwnLinear,
    "one that does not say its width": lambda linear: OwnLinear(linear, told=False),
    "a linear layer in a sequence": nn.Sequential,
}


@pytest.mark.parametrize("wrap", [w for k, w in PROJECTORS.items() if "sequence" not in k])
def test_a_model_whose_projector_was_wrapped_before_is_replaced_and_calls_it(wrap):
    results = []
    for replace in (False, True):
        model = build()
        embedding = model.image_insert_embedding
        torch.manual_seed(1)
        embedding.align_projector = wrap(embedding.align_projector)
        if replace:
            assert replace_in(model) == ("image_insert_embedding",)
            assert isinstance(embedding, ImageInsertEmbedding)
        loss = forward(model).mean()
        loss.backward()
        trained = [p for p in embedding.align_projector.parameters() if p.requires_grad]
        results.append([loss.detach(), *(p.grad for p in trained)])
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("wrap", PROJECTORS.values(), ids=PROJECTORS)
def test_such_a_projector_takes_part_in_text_only_steps(wrap):
    model = build()
    embedding = model.image_insert_embedding
    embedding.align_projector = wrap(embedding.align_projector)
    replace_in(model, text_only_gradient=True)
    forward(model, []).mean().backward()
    trained = {n: p for n, p in embedding.align_projector.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_what_is_named_so_and_is_left_is_told_with_its_class_and_its_projectors(caplog):
    model = build()
    del model.image_insert_embedding.align_projector
    model.image_insert_embedding.align_projector = nn.functional.relu
    with caplog.at_level(logging.INFO):
        assert replace_in(model) == ()
    (record,) = (r for r in caplog.records if r.name.startswith("step37"))
    assert record.levelname == "WARNING"
    assert (
        "image_insert_embedding (megatron.bridge.models.stepfun.modelling_step37."
        "image_insert_embedding.ImageInsertEmbedding: align_projector of class function, which is "
        "no module)" in record.getMessage()
    )


def test_only_a_module_of_the_stock_shape_is_replaced(caplog):
    class ImageInsertEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.align_projector = nn.Linear(WIDTH, HIDDEN)

    model = nn.ModuleDict({"other": ImageInsertEmbedding()})
    assert replace_in(model) == ()
    assert "align_projector of class Linear, no _language_embedding" in caplog.text
