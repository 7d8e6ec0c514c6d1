"""``layout="auto"``: what it reads, when, and what it refuses.

That it divides the rows, on real ranks: test_sequence_layout and tests/real/test_training_steps; in
Bridge's model: tests/real/test_auto_layout.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step37_kernels import ImageInsertEmbedding
from step37_kernels.integration.parallel import auto_layout

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


class Words(torch.nn.Embedding):
    """What is read of Megatron's embedding; no process groups."""

    def __init__(self, **config: Any) -> None:
        super().__init__(64, 4)
        defaults = {"sequence_parallel": False, "context_parallel_size": 1}
        self.config = SimpleNamespace(**{**defaults, **config})

    def forward(self, input_ids: torch.Tensor, position_ids: Any) -> torch.Tensor:
        del position_ids
        return super().forward(input_ids).transpose(0, 1)


def test_without_sequence_parallelism_it_needs_no_groups_and_changes_nothing():
    words = Words()
    module = ImageInsertEmbedding(words, 6, 4, layout="auto")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(module(tokens), words(tokens, None))


@pytest.mark.usefixtures("megatron")
def test_sequence_parallelism_over_one_rank_divides_nothing():
    assert auto_layout(Words(sequence_parallel=True)) is None


def test_a_rule_is_asked_in_forward_and_not_before():
    asked = []
    words = Words()
    module = ImageInsertEmbedding(words, 6, 4, layout=asked.append)
    assert asked == []
    for _ in range(2):
        module(torch.tensor([[1, 2, 3]]))
    assert asked == [words, words]


def test_an_embedding_without_a_config_holds_the_whole_sequence_before_groups_are_made():
    assert auto_layout(torch.nn.Identity()) is None


@pytest.mark.usefixtures("megatron")
def test_an_embedding_without_a_config_holds_the_whole_sequence_on_one_rank():
    assert auto_layout(torch.nn.Identity()) is None


@pytest.mark.parametrize("divided", ["tensor", "context"])
def test_an_embedding_without_a_config_is_refused_where_ranks_share_the_model(
    divided: str, monkeypatch: pytest.MonkeyPatch
):
    # Two ranks of either kind are a stand-in: the message needs no process to be sent to.
    state = "megatron.core.parallel_state"
    monkeypatch.setattr(f"{state}.model_parallel_is_initialized", lambda: True)
    for kind in ("tensor", "context"):
        name = f"get_{kind}{'_model' * (kind == 'tensor')}_parallel_world_size"
        monkeypatch.setattr(f"{state}.{name}", lambda kind=kind: 1 + (kind == divided))
    message = r"layout: 'auto' reads language_embedding\.config, which Identity has not; pass"
    with pytest.raises(ValueError, match=message):
        auto_layout(torch.nn.Identity())
