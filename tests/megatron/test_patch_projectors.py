"""Projectors that are more than a weight and a bias: adapters and hooks are not passed over."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from step37_kernels import ImageForInsert, ImageInsertEmbedding, reference
from step37_kernels.image_insert_embedding import _warn_unfused

IDS = torch.tensor([[7, 1, 2, 3, 7, 4, 5]])
HIDDEN, WIDTH = 4, 6


class Adapted(nn.Linear):
    """A linear layer with a low-rank adapter, as parameter-efficient tuning puts in its place."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, HIDDEN, bias=False)
        self.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


def make(projector: nn.Module, **options) -> tuple[torch.Tensor, ImageInsertEmbedding]:
    words = torch.randn(IDS.shape[1], 1, HIDDEN)
    module = ImageInsertEmbedding(lambda **_: words.clone(), WIDTH, HIDDEN, **options)
    module.align_projector = projector
    return words, module


def groups() -> list[ImageForInsert]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(rows, WIDTH, generator=generator) for rows in (3, 2)]
    return [ImageForInsert(insert_start_token=7, image_features=features)]


def called(words: torch.Tensor, projector: nn.Module) -> torch.Tensor:
    rows = [projector(feature) for feature in groups()[0].image_features]
    return reference.insert_features(words, rows, IDS, 7)


PROJECTORS = {
    "an adapter": Adapted,
    "a parametrization": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, HIDDEN)),
}


@pytest.mark.parametrize("make_projector", PROJECTORS.values(), ids=PROJECTORS)
def test_what_is_around_the_projector_counts_forward_and_backward(make_projector):
    projector = make_projector()
    words, module = make(projector)
    results = []
    for output in (module(IDS, groups()), called(words, projector)):
        trained = [p for p in projector.parameters() if p.requires_grad]
        results.append([output, *torch.autograd.grad(output.square().sum(), trained)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_an_adapter_takes_part_in_text_only_microbatches():
    projector = Adapted()
    _, module = make(projector, text_only_gradient=True)
    module(IDS).sum().backward()
    assert projector.weight.grad is None
    for part in (projector.down, projector.up):
        assert torch.equal(part.weight.grad, torch.zeros_like(part.weight))


def test_forward_hooks_of_the_projector_run_and_their_result_counts():
    projector = nn.Linear(WIDTH, HIDDEN)
    words, module = make(projector)
    projector.register_forward_hook(lambda _module, _args, output: 2 * output)
    torch.testing.assert_close(module(IDS, groups()), called(words, projector))


def test_it_is_said_once_and_never_of_a_plain_projector(caplog):
    _warn_unfused.cache_clear()
    _, plain = make(nn.Linear(WIDTH, HIDDEN))
    _, adapted = make(Adapted())
    with caplog.at_level(logging.WARNING):
        plain(IDS, groups())
        assert not caplog.records
        for _ in range(2):
            adapted(IDS, groups())
    (record,) = caplog.records
    assert "align_projector (Adapted) is more" in record.getMessage()


def test_the_kernel_is_not_asked_for_what_it_does_not_know():
    _, module = make(Adapted(), impl="triton")
    with pytest.raises(ValueError, match=r"impl='triton': align_projector \(Adapted\) is more"):
        module(IDS, groups())
