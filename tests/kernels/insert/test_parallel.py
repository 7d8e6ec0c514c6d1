"""The pieces of a layout that take a group: here one of a single rank, or none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.integration import parallel
from step37_kernels.integration.parallel import SequenceLayout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of this process."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def first_of_two(monkeypatch):
    """Stands in for a group of two ranks where no communication takes place."""
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    return object()


AWKWARD = {
    "expanded": lambda: torch.ones(()).expand(4, 1, 3),
    "transposed": lambda: torch.randn(3, 1, 4).transpose(0, 2),
    "sliced": lambda: torch.randn(4, 1, 6)[..., ::2],
}


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("function", [parallel._Slice, parallel._SumGradient])
def test_gradients_may_have_any_strides(alone, function, make, monkeypatch):
    def of_contiguous(collective: Callable[..., Any]) -> Callable[..., Any]:
        """NCCL takes no other; gloo with one rank would."""

        def call(*tensors: torch.Tensor, **options: Any) -> Any:
            assert all(t.is_contiguous() for t in tensors)
            return collective(*tensors, **options)

        return call

    for name in ("all_reduce", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, name, of_contiguous(getattr(dist, name)))
    tensor = torch.randn(4, 1, 3, requires_grad=True)
    gradient = make()
    function.apply(tensor, alone).backward(gradient)
    assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("function", [parallel._Slice, parallel._SumGradient])
def test_what_comes_in_is_neither_shared_nor_changed(alone, function):
    gradient = torch.randn(4, 1, 3)
    returned, _ = function.backward(SimpleNamespace(group=alone), gradient)
    assert returned.data_ptr() != gradient.data_ptr()
    whole = torch.randn(4, 1, 3)
    if function is parallel._Slice:
        assert function.apply(whole, alone).data_ptr() != whole.data_ptr()


def test_features_without_a_gradient_are_passed_on(first_of_two):
    features = torch.ones(2, 3)
    layout = SequenceLayout(sequence_parallel_group=first_of_two)
    assert layout.complete_gradient(features) is features
    assert layout.complete_gradient(features.requires_grad_()) is not features


def test_rows_that_cannot_be_divided_or_are_of_another_length_are_refused(first_of_two):
    layout = SequenceLayout(sequence_parallel_group=first_of_two)
    with pytest.raises(ValueError, match="input_ids: 5 rows cannot be divided among 2 seq"):
        layout.shard(torch.zeros(5, 1, 3), 5, None)
    with pytest.raises(ValueError, match="embeddings: expected 6 rows or 3, got 4"):
        layout.shard(torch.zeros(4, 1, 3), 6, None)
    rows, positions = layout.shard(torch.arange(6.0).view(6, 1, 1), 6, None)
    assert rows.flatten().tolist() == [0, 1, 2]
    assert positions.tolist() == [0, 1, 2]


def test_the_projectors_mark_outlives_the_first_forward(alone):
    layout = SequenceLayout(sequence_parallel_group=alone)
    module = ImageInsertEmbedding(lambda **_: torch.zeros(3, 1, 4), 6, 4, layout=lambda _: layout)
    images = [ImageForInsert(insert_start_token=7, image_features=torch.ones(1, 1, 6))]
    for _ in range(3):
        module(torch.tensor([[7, 5, 5]]), images)
        assert module.align_projector.weight.sequence_parallel


def test_the_projectors_mark_goes_with_the_layout_and_comes_back_with_it(alone):
    layout = SequenceLayout(sequence_parallel_group=alone)
    module = ImageInsertEmbedding(lambda **_: torch.zeros(3, 1, 4), 6, 4)
    for wanted in (layout, None, lambda _: layout, lambda _: None, layout):
        module.layout = wanted
        module(torch.tensor([[5, 5, 5]]))  # a batch of text alone marks as well
        marked = getattr(module.align_projector.weight, "sequence_parallel", False)
        assert marked == (module._layout_now() is layout)
