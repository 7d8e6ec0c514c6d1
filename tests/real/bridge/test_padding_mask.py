"""Padding counts in no statistic of a router: Bridge's Step37Model, with experts."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import router as megatron_router
from torch import Tensor

from step37_data.forward_step import ForwardStep, Stage, model_inputs
from step37_data.pack_transform import pack_samples
from step37_kernels.megatron import patch_step37
from tests.megatron.processes import run
from tests.real.bridge.bridge_model import VOCABULARY, build, set_weights
from tests.real.bridge.test_forward_step import DATASET, State, as_is

EXPERTS = 4
LENGTHS = (21, 13)  # 32 positions: without seqlen_divisible_by they need no padding
MIXTURE = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1.0,
    "moe_z_loss_coeff": 1.0,
    "add_bias_linear": False,
}


def pack(divisible_by: int) -> dict[str, Any]:
    """The same two samples, and as much padding as ``divisible_by`` asks for."""
    generator = torch.Generator().manual_seed(3)
    samples = [
        {
            "tokens": torch.randint(10, VOCABULARY, (length,), generator=generator),
            "loss_mask": (torch.arange(length) > 4).float(),
        }
        for length in LENGTHS
    ]
    return pack_samples(samples, seqlen_divisible_by=divisible_by)


def one_step(
    divisible_by: int, *, padding_mask: bool, tensor_rank: int = 0, **parallel: Any
) -> dict[str, Tensor]:
    """What one step leaves in the model: gradients, losses, and the routers' counts."""
    model = build(seed=None, **MIXTURE, **parallel)
    set_weights(model, tensor_rank=tensor_rank)
    model.train()
    state = State(SimpleNamespace(**vars(DATASET), padding_mask=padding_mask))
    with contextlib.closing(ForwardStep(device="cpu")) as step:
        losses, loss_function = step(state, iter([pack(divisible_by)]), model)
    loss_function(losses)[0].backward()
    left = {"losses": losses.detach().flatten()[: sum(LENGTHS) - len(LENGTHS)]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            left[name] = parameter.grad
    for name, buffer in model.named_buffers():
        if name.endswith("local_tokens_per_expert"):
            left[name] = buffer.clone()
    assert sum("router.weight" in name for name in left) == 2
    assert sum("local_tokens_per_expert" in name for name in left) == 2
    return left


@pytest.fixture
def fused() -> None:
    patch_step37()


single = pytest.mark.usefixtures("megatron", "bridge", "fused")


@single
@pytest.mark.parametrize("divisible_by", [64, 7])
def test_a_padded_pack_leaves_what_the_same_pack_without_padding_leaves(divisible_by):
    """64: padding of the pack alone. 7: three positions of the pack's, 13 of the step's."""
    expected = one_step(1, padding_mask=True)
    padded = one_step(divisible_by, padding_mask=True)
    assert padded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(padded[name], value, msg=lambda text, name=name: name + text)
    counts = [value for name, value in padded.items() if name.endswith("tokens_per_expert")]
    assert [count.sum().item() for count in counts] == [32 * MIXTURE["moe_router_topk"]] * 2


@single
def test_padding_counts_as_in_bridges_step_where_that_is_asked_for():
    without, padded = (one_step(n, padding_mask=False) for n in (1, 64))
    counts = [value for name, value in padded.items() if name.endswith("tokens_per_expert")]
    assert [count.sum().item() for count in counts] == [64 * MIXTURE["moe_router_topk"]] * 2
    torch.testing.assert_close(padded["losses"], without["losses"])
    routers = [name for name in padded if "router.weight" in name]
    assert not any(torch.allclose(padded[name], without[name]) for name in routers)


@single
def test_a_model_without_experts_is_given_no_mask(monkeypatch):
    model = build()
    seen = []
    forward = type(model.language_model).forward

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model.language_model), "forward", record)
    with contextlib.closing(ForwardStep(device="cpu")) as step:
        step(State(), iter([pack(64)]), model)
    (options,) = seen
    assert "packed_seq_params" in options
    assert "padding_mask" not in options


@single
def test_the_signature_is_read_once_for_a_model(monkeypatch):
    model = build(**MIXTURE)
    asked = []
    signature = inspect.signature

    def record(target: Any, **options: Any) -> Any:
        asked.append(target)
        return signature(target, **options)

    with contextlib.closing(ForwardStep(device="cpu", prefetch_depth=0)) as step:
        monkeypatch.setattr(inspect, "signature", record)
        iterator = iter([pack(64)] * 3)
        for _ in range(3):
            step(State(), iterator, model)
    assert sum(target == model.forward for target in asked) == 1


def test_every_stage_gets_the_mask_and_a_rank_its_part():
    batch = pack(64)
    for first, last in [(True, True), (True, False), (False, False), (False, True)]:
        parts = [
            model_inputs(
                batch,
                Stage(pre_process=first, post_process=last, divisible_by=48, mask_part=part),
                preprocess=as_is,
            )["padding_mask"]
            for part in [(0, 1), (0, 3), (1, 3), (2, 3)]
        ]
        assert parts[0].tolist() == [[False] * 32 + [True] * 64]  # 96 is a multiple of 48
        assert torch.equal(parts[0], torch.cat(parts[1:], dim=1))


@single
def test_bridges_own_mending_of_the_counts_goes_with_ours(monkeypatch):
    """Its main branch wraps the same method for ``gpt_step``, and hands on ``[tokens, 1]``."""
    kind = megatron_router.TopKRouter
    expected = one_step(1, padding_mask=True)
    ours = kind._apply_expert_bias

    def of_bridge(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1).unsqueeze(-1)
        ours(self, routing_map, padding_mask=padding_mask)

    monkeypatch.setattr(kind, "_apply_expert_bias", of_bridge)
    padded = one_step(64, padding_mask=True)
    for name in (name for name in expected if name.endswith("tokens_per_expert")):
        assert torch.equal(padded[name], expected[name])


def split_step(rank: int) -> dict[str, Tensor]:
    patch_step37()
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    # 48 positions, 24 a rank; the padding begins at the ninth of the second.
    left = one_step(7, padding_mask=True, tensor_rank=rank, **parallel)
    return {name: value for name, value in left.items() if name.endswith("tokens_per_expert")}


@single
def test_with_sequence_parallelism_the_ranks_count_the_tokens_of_one_process():
    whole = one_step(1, padding_mask=True)
    ranks = run(split_step, tensor_model_parallel_size=2)
    for name, count in ranks[0].items():
        assert torch.equal(count + ranks[1][name], whole[name]), name
