"""Stands in for ``megatron.bridge.training.losses``: the masked sum and the number of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor


def create_masked_next_token_loss_function(
    loss_mask: Tensor, check_for_nan_in_loss: bool, check_for_spiky_loss: bool
) -> partial[Any]:
    del check_for_nan_in_loss, check_for_spiky_loss
    return partial(_loss, loss_mask)


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (losses.flatten().float() * loss_mask.flatten()).sum()
    tokens = loss_mask.sum().detach()
    report = torch.stack([total.detach(), tokens])
    return total, tokens.to(torch.int), {"lm loss": report}
