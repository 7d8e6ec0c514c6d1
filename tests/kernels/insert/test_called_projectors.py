"""Projectors that are called as modules, and modules whose class is swapped, or cannot be."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    automodel,
    megatron,
    plan_placeholders,
)
from step37_kernels.integration.patching import is_fsdp_unit
from step37_kernels.integration.vocab_parallel import (
    RowGradient,
    restore_dense_gradient,
    use_row_gradient,
)

IM_START = 128000
IDS = torch.tensor([[IM_START, 2, 3]])


class Words(nn.Module):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        del position_ids
        return torch.ones(input_ids.shape[1], input_ids.shape[0], 16)


def make_module(**options) -> ImageInsertEmbedding:
    options = {"impl": "torch", **options}
    return ImageInsertEmbedding(Words(), 24, 16, projector_bias=True, **options)


def images() -> list[ImageForInsert]:
    return [ImageForInsert(insert_start_token=IM_START, image_features=torch.ones(1, 2, 24))]


class Quantized(nn.Module):
    """A linear layer whose weight is stored in another dtype than its product takes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 24).to(dtype), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        assert rows.dtype == torch.float32
        return rows @ self.weight.to(rows.dtype).T


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_features_are_not_cast_to_the_dtype_in_which_a_weight_is_stored(dtype):
    module = make_module()
    module.align_projector = Quantized(dtype)
    features = torch.full((1, 2, 24), 0.5)
    output = module(IDS, [ImageForInsert(insert_start_token=IM_START, image_features=features)])
    assert torch.equal(output[1:], torch.full((2, 1, 16), 12.0))


class WithoutParameters(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, :16] * 3


def test_a_projector_without_parameters_is_called():
    module = make_module()
    module.align_projector = WithoutParameters()
    assert torch.equal(module(IDS, images())[1:], torch.full((2, 1, 16), 3.0))


@pytest.mark.parametrize("text_only", [False, True])
def test_a_linear_whose_weight_is_a_plain_tensor_is_projected(text_only):
    module = make_module(text_only_gradient=True)
    weight = torch.ones(16, 24, requires_grad=True)
    projector = nn.Linear(24, 16, bias=False)
    del projector.weight
    projector.weight = weight
    module.align_projector = projector
    module(IDS, None if text_only else images()).sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.any()) is not text_only


METHODS = (
    "get_multimodal_embeddings",
    "prepare_inputs_embeds",
    "_vision_dtype_device",
    "_process_image_features",
)


def stock_class(name: str) -> type[nn.Module]:
    class Stock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.align_projector = nn.Linear(24, 16)
            object.__setattr__(self, "_language_embedding", Words())
            self.config = SimpleNamespace()

        def forward(self) -> None:
            pass

    for method in METHODS:
        setattr(Stock, method, Stock.forward)
    Stock.__name__ = name
    return Stock


def hooked(*_: object) -> None:
    pass


@pytest.mark.parametrize("function", [hooked, functools.partial(hooked, 1)])
@pytest.mark.parametrize(
    ("framework", "name", "method"),
    [
        (megatron, "ImageInsertEmbedding", "forward"),
        (automodel, "Step3p7Model", "get_multimodal_embeddings"),
        (automodel, "Step3p7Model", "prepare_inputs_embeds"),
    ],
)
def test_replace_in_refuses_a_method_of_the_instance(framework, name, method, function):
    model = nn.ModuleDict({"first": stock_class(name)(), "part": stock_class(name)()})
    setattr(model["part"], method, function)
    kept = type(model["first"])
    with pytest.raises(
        ValueError, match=rf"part: the instance has a {method} of its own, which .*\.hooked put"
    ):
        framework.replace_in(model)
    assert type(model["first"]) is kept


@pytest.mark.parametrize("method", METHODS)
def test_replace_in_refuses_a_step3p7_without_a_method_that_ours_needs(method):
    model = nn.ModuleDict({"first": stock_class("Step3p7Model")()})
    kept = type(model["first"])
    delattr(kept, method)
    wanted = f"(_downsample_image_features or )?{method}, which ours needs. Known to work"
    with pytest.raises(ValueError, match=rf"first: .*Stock has no method {wanted}"):
        automodel.replace_in(model)
    assert type(model["first"]) is kept
    kept._downsample_image_features = kept.forward
    if method == "_process_image_features":
        assert automodel.replace_in(model) == ("first",)


class Step3p7Model(nn.Module):
    """A stand-in that pickle finds."""

    def nothing(self) -> None:
        pass


for _method in METHODS:
    setattr(Step3p7Model, _method, Step3p7Model.nothing)


def test_a_replaced_module_is_pickled_and_copied_and_its_derived_class_refused():
    model = nn.Sequential(Step3p7Model())
    automodel.replace_in(model, strict=True)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert type(copied[0]) is type(model[0]) is not Step3p7Model
        assert copied[0].step37_options == model[0].step37_options
    # As fully_shard does it, whose modules cannot be pickled either.
    model[0].__class__ = type("FSDPStep3p7Model", (type(model[0]),), {"__module__": __name__})
    with pytest.raises(pickle.PicklingError, match="FSDPStep3p7Model"):
        pickle.dumps(model)


def test_an_embedding_with_the_gradient_by_rows_is_pickled_copied_and_restored(monkeypatch):
    stand_in = ModuleType("megatron.stand_in")
    stock = type("VocabParallelEmbedding", (nn.Embedding,), {"__module__": stand_in.__name__})
    stand_in.VocabParallelEmbedding = stock
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    model = nn.Sequential(stock(4, 2))
    use_row_gradient(model)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(copied[0]) is type(model[0])
        assert isinstance(copied[0], RowGradient)
        assert torch.equal(copied[0].weight, model[0].weight)
    restore_dense_gradient()
    assert type(model[0]) is stock


def unit_of(package: str) -> type[nn.Module]:
    """The class of a linear layer that Megatron-FSDP's experimental ``fully_shard`` has sharded."""
    mixin = type("FsdpModule", (), {"__module__": f"{package}.experimental.module"})
    return type("ExperimentalFsdpLinear", (mixin, nn.Linear), {})


@pytest.mark.parametrize(
    ("package", "unit"),
    [
        ("megatron_fsdp", True),
        ("megatron.core.distributed.fsdp.src.megatron_fsdp", True),
        ("other", False),
    ],
)
def test_a_unit_of_megatron_fsdp_is_recognised_and_its_projector_called_with_the_merge(
    package, unit
):
    model = Step3p7Model()
    automodel.replace_in(model, impl="torch")
    model.vit_large_projector = projector = nn.Linear(24, 16)
    projector.__class__ = unit_of(package)
    called = []

    def gather(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        called.append([tuple(tensor.shape) for tensor in arguments])

    gather.__module__ = f"{package}.experimental.module"
    projector.register_forward_pre_hook(gather)
    assert is_fsdp_unit(projector) == unit
    assert not is_fsdp_unit(nn.Linear(24, 16))
    features = [torch.randn(2, 3, 24), torch.randn(1, 2, 24)]
    plan = plan_placeholders(torch.tensor([[9] * 8 + [1]]), 9, 8, batch_first=True)
    words = torch.zeros(1, 9, 16)
    merged = model._project_and_insert(words, features, plan)
    wanted = nn.functional.linear(
        torch.cat([tensor.flatten(0, 1) for tensor in features]), projector.weight, projector.bias
    )
    torch.testing.assert_close(merged[0, :8], wanted)
    # The features as the tower made them, or joined for a projector that is called as it is.
    assert called == [[(2, 3, 24), (1, 2, 24)] if unit else [(8, 24)]]
    assert "forward" not in vars(projector)
