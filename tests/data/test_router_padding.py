"""Routers are told which positions of a pack are padding, wherever they can be told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step37_data.pack_transform import pack_samples
from step37_data.router_padding import padding_mask, padding_start, why_not_told


def sample(number: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(1, 99, (length,), generator=generator)
    return {"tokens": tokens, "loss_mask": (torch.arange(length) > length // 2).float()}


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    divisible_by=st.sampled_from([1, 7, 64]),
    pad_token_id=st.sampled_from([0, 100]),
)
def test_the_padding_of_a_pack_is_found_and_no_sample_is_taken_for_it(
    lengths, divisible_by, pad_token_id
):
    pieces = [sample(i, length) for i, length in enumerate(lengths)]
    pack = pack_samples(pieces, seqlen_divisible_by=divisible_by, pad_token_id=pad_token_id)
    assert padding_start(pack) == sum(lengths) - len(lengths)


@pytest.mark.parametrize(
    ("tokens", "loss_mask"),
    [([5, 5, 5, 6], [0.0] * 4), ([6, 5, 5, 5], [0.0] * 4), ([5, 5, 5, 5], [0.0, 0.0, 0.0, 1.0])],
    ids=["another label", "another input", "a loss"],
)
def test_a_last_sample_that_only_resembles_padding_is_a_sample(tokens, loss_mask):
    last = {"tokens": torch.tensor(tokens), "loss_mask": torch.tensor(loss_mask)}
    pack = pack_samples([sample(1, 9), last], seqlen_divisible_by=1)
    assert padding_start(pack) == len(pack["tokens"])


def test_where_a_later_stage_has_no_tokens_nothing_is_known_to_be_padding():
    assert padding_start({"cu_seqlens": torch.tensor([0, 5, 64])}) == 64
    assert padding_start({"cu_seqlens": torch.tensor([0]), "tokens": torch.empty(0)}) == 0


@given(blocks=st.integers(1, 6), parts=st.sampled_from([1, 2, 4]), data=st.data())
def test_the_parts_of_a_mask_put_together_are_the_whole(blocks, parts, data):
    length = 4 * blocks
    start = data.draw(st.integers(0, length))
    whole = [position >= start for position in range(length)]
    masks = [
        padding_mask(start, length, part=(index, parts), device=torch.device("cpu"))
        for index in range(parts)
    ]
    assert all(mask.shape == (1, length // parts) and mask.dtype == torch.bool for mask in masks)
    assert torch.cat(masks, dim=1)[0].tolist() == whole
    assert sum(int(mask.sum()) for mask in masks) == length - start


# ---- models: stand-ins of those that take the mask and of those that do not


class Experts:
    """A model whose forward is one of those below."""

    def __init__(self, forward: Any, language_model: Any = None, **config: Any) -> None:
        self.forward = forward
        self.language_model = language_model
        self.config = SimpleNamespace(num_moe_experts=4, **config)


def takes(input_ids: Any, *, padding_mask: Any = None) -> None: ...
def takes_not(input_ids: Any, *, labels: Any = None) -> None: ...
def hands_on(input_ids: Any, **kwargs: Any) -> None: ...


LANGUAGE_MODEL = SimpleNamespace(forward=takes)


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (Experts(takes), ""),
        (Experts(hands_on, LANGUAGE_MODEL), ""),  # Step37Model of Bridge 0.6.2 and its main branch
        (Experts(takes_not, LANGUAGE_MODEL), "takes no padding_mask"),
        (Experts(hands_on, SimpleNamespace(forward=takes_not)), "takes no padding_mask"),
        (Experts(hands_on), "takes no padding_mask"),
        (Experts(takes, moe_router_load_balancing_type="aux_loss"), ""),
        (Experts(takes, moe_router_load_balancing_type=["seq_aux_loss"]), ""),
        (Experts(takes, moe_router_load_balancing_type="quantile_balancing"), "quantile"),
        (Experts(takes, cuda_graph_impl="none"), ""),
        (Experts(takes, cuda_graph_impl="transformer_engine"), "CUDA graphs"),
        (SimpleNamespace(forward=takes, config=SimpleNamespace(num_moe_experts=None)), "experts"),
        (SimpleNamespace(forward=takes), "no experts"),
    ],
)
def test_whether_routers_can_be_told_is_read_from_signature_and_configuration(chunk, reason):
    assert (reason in why_not_told(chunk)) if reason else why_not_told(chunk) == ""
