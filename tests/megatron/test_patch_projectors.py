"""Projectors that are more than a weight and a bias: adapters and hooks are not passed over."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from step37_kernels import ImageForInsert, ImageInsertEmbedding, reference
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.integration.projector import warn_unfused

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


class Bare(nn.Module):
    """A projector of parameters alone: nothing in it says how wide its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


class Doubling(torch.Tensor):
    """A weight with a product of its own, as quantised ones have."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return 2 * result.as_subclass(torch.Tensor) if function is nn.functional.linear else result


def hooked_as_by_accelerate() -> nn.Linear:
    """Its instance has another ``forward``, which calls the old one between two hooks."""
    projector = nn.Linear(WIDTH, HIDDEN)
    old = projector.forward
    projector.forward = lambda x: 3 * old(x + 1)
    return projector


def with_pre_hook(hook: Callable[..., object], **options: bool) -> nn.Linear:
    projector = nn.Linear(WIDTH, HIDDEN)
    projector.register_forward_pre_hook(hook, **options)
    return projector


def with_weight_of_its_own_class() -> nn.Linear:
    projector = nn.Linear(WIDTH, HIDDEN, bias=False)
    projector.weight = nn.Parameter(projector.weight.detach().as_subclass(Doubling))
    return projector


def with_old_weight_norm() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # It is deprecated, and in use.
        return nn.utils.weight_norm(nn.Linear(WIDTH, HIDDEN))


def spectral_norms(normalise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    # In training each call goes on with the estimate, so that two calls differ.
    return normalise(nn.Linear(WIDTH, HIDDEN)).eval()


PROJECTORS = {
    "an adapter": Adapted,
    "an adapter around it": lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, HIDDEN)),
    "parameters alone": Bare,
    "an instance's forward": hooked_as_by_accelerate,
    "a pre-hook that changes its input": lambda: with_pre_hook(lambda _m, args: (args[0] + 1,)),
    "a pre-hook that takes keywords": lambda: with_pre_hook(
        lambda _m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    ),
    "a pre-hook that reads its input": lambda: with_pre_hook(lambda _m, args: print(args[0])),
    "pruning": lambda: prune.random_unstructured(nn.Linear(WIDTH, HIDDEN), "weight", 0.5),
    "a parametrization": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, HIDDEN)),
    "weight_norm": with_old_weight_norm,
    "spectral_norm": lambda: spectral_norms(nn.utils.spectral_norm),
    "parametrized spectral_norm": lambda: spectral_norms(parametrizations.spectral_norm),
    "a weight of another class": with_weight_of_its_own_class,
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


@pytest.mark.parametrize("make_projector", PROJECTORS.values(), ids=PROJECTORS)
def test_every_projector_takes_part_in_text_only_microbatches(make_projector):
    projector = make_projector()
    words, module = make(projector, text_only_gradient=True)
    output = module(IDS)
    assert torch.equal(output, words)
    output.sum().backward()
    for parameter in projector.parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


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


BACKWARD_HOOKS = {
    "backward": lambda m, hook: m.register_full_backward_hook(lambda *_: hook()),
    "backward, before": lambda m, hook: m.register_full_backward_pre_hook(lambda *_: hook()),
}


@pytest.mark.parametrize("register", BACKWARD_HOOKS.values(), ids=BACKWARD_HOOKS)
def test_backward_hooks_of_the_projector_run(register):
    projector = nn.Linear(WIDTH, HIDDEN)
    _, module = make(projector)
    calls = []
    register(projector, lambda: calls.append(1))
    module(IDS, groups()).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("images", [groups(), None], ids=["with images", "text only"])
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_forward_pre_hooks_of_a_plain_projector_run_before_its_weight_is_used(images, with_kwargs):
    projector = nn.Linear(WIDTH, HIDDEN)
    words, module = make(projector, text_only_gradient=True)
    arriving = torch.randn_like(projector.weight)

    def arrive() -> None:
        with torch.no_grad():
            projector.weight.copy_(arriving)

    if with_kwargs:
        projector.register_forward_pre_hook(lambda _m, _a, _k: arrive(), with_kwargs=True)
    else:
        projector.register_forward_pre_hook(lambda _m, _a: arrive())
    output = module(IDS, images)
    assert torch.equal(projector.weight, arriving)
    if images is not None:
        torch.testing.assert_close(output, called(words, projector))


@pytest.mark.parametrize(
    "place", ["megatron.core.distributed.distributed_data_parallel", "megatron_fsdp.megatron_fsdp"]
)
def test_pre_hooks_of_megatron_run_and_leave_the_product_to_the_kernel(place):
    projector = nn.Linear(WIDTH, HIDDEN)
    words, module = make(projector, impl="triton")
    arriving = torch.randn_like(projector.weight)

    def gather(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert arguments == ()  # the projector is not called
        with torch.no_grad():
            projector.weight.copy_(arriving)

    gather.__module__ = place
    hook = projector.register_forward_pre_hook(functools.partial(gather))
    output = module(IDS, groups())
    assert torch.equal(projector.weight, arriving)
    gather.__module__ = "accelerate.hooks"
    with pytest.raises(ValueError, match=r"impl='triton': align_projector \(Linear\) is more"):
        module(IDS, groups())
    hook.remove()
    torch.testing.assert_close(output, called(words, projector))


def test_what_a_hooked_projector_gets_and_gives_is_of_the_right_dtype():
    projector = nn.Linear(WIDTH, HIDDEN, dtype=torch.bfloat16)
    words, module = make(projector)
    projector.register_forward_hook(lambda *_: None)
    output = module(IDS, groups())
    assert output.dtype == words.dtype == torch.float32
    rows = [projector(f.bfloat16()).float() for f in groups()[0].image_features]
    assert torch.equal(output, reference.insert_features(words, rows, IDS, 7))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondHalf(SequenceLayout):
    """The layout of a rank that looks up the later positions, without other ranks."""

    def positions_looked_up(self, seq_len, device):
        return torch.arange(seq_len // 2, seq_len, device=device)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_rank_looks_up_and_inserts_its_own_positions(hooked, impl):
    if hooked and impl == "triton":
        pytest.skip("a projector with a hook is PyTorch's")
    seen = {}
    table = torch.randn(10, HIDDEN)

    def words(input_ids, position_ids):
        seen.update(ids=input_ids, positions=position_ids)
        return table[input_ids[0]][:, None] + position_ids[0, :, None, None]

    whole = ImageInsertEmbedding(words, WIDTH, HIDDEN)
    position_ids = torch.arange(IDS.shape[1])[None]
    wanted = whole(IDS, groups(), position_ids)[IDS.shape[1] // 2 :]
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, impl=impl, layout=SecondHalf())
    module.align_projector = whole.align_projector
    if hooked:
        module.align_projector.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(IDS, groups(), position_ids), wanted)
    assert seen["ids"].tolist() == [IDS[0, 3:].tolist()]
    assert seen["positions"].tolist() == [[3, 4, 5, 6]]


def test_it_is_said_once_and_never_of_a_plain_projector(caplog):
    warn_unfused.cache_clear()
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
