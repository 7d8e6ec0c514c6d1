"""``layout="auto"``: what it reads, when, and what it refuses.

That it divides the rows, on real ranks: test_training_steps and test_sequence_layout.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step37_kernels import ImageInsertEmbedding
from step37_kernels.megatron import auto_layout, patch_step37, replace_in
from step37_kernels.parallel import SequenceLayout
from tests.megatron.stand_ins.models import build, forward, groups, ids

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


def built(how: str, **options: Any) -> Any:
    if how == "patched":
        patch_step37(**options)
        return build()
    model = build()
    replace_in(model, **options)
    return model


def marks(module: ImageInsertEmbedding) -> set[bool]:
    return {getattr(p, "sequence_parallel", False) for p in module.align_projector.parameters()}


def test_without_sequence_parallelism_it_needs_no_groups_and_changes_nothing():
    words = Words()
    module = ImageInsertEmbedding(words, 6, 4, layout=auto_layout)
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


@pytest.mark.usefixtures("megatron", "stand_ins")
@pytest.mark.parametrize("how", ["patched", "replaced"])
def test_forward_marks_the_projector_as_the_rule_says(how):
    layouts: list[SequenceLayout | None] = [
        SequenceLayout(sequence_parallel_group=torch.distributed.group.WORLD)
    ]
    model = built(how, layout=lambda _: layouts[0])
    assert marks(model.image_insert_embedding) == {False}
    forward(model)
    assert marks(model.image_insert_embedding) == {True}
    layouts[0] = None
    forward(model)
    assert marks(model.image_insert_embedding) == {False}


@pytest.mark.usefixtures("megatron", "stand_ins")
def test_the_projector_is_marked_before_a_wrapper_could_copy_its_parameters():
    patch_step37()
    from megatron.bridge.models.stepfun.modelling_step37.model import ImageInsertEmbedding as Fused

    assert marks(Fused(Words(sequence_parallel=True), 6, 4, projector_bias=True)) == {True}
    assert marks(Fused(Words(), 6, 4)) == {False}
    patch_step37(layout=None)
    assert marks(Fused(Words(sequence_parallel=True), 6, 4)) == {False}


@pytest.mark.usefixtures("megatron", "stand_ins")
@pytest.mark.parametrize("how", ["patched", "replaced"])
@pytest.mark.parametrize("known_by", ["the configuration", "the process groups"])
def test_context_parallelism_wants_an_explicit_layout(how, known_by, monkeypatch):
    from megatron.core import parallel_state

    model = built(how)
    if known_by == "the configuration":
        model.config.context_parallel_size = 2
    else:
        monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
    module = model.image_insert_embedding
    message = r"layout: 'auto' .* 2 context-parallel .* layout=sequence_layout\(.*, or layout=None"
    with pytest.raises(ValueError, match=message):
        module(ids(), groups())
    whole = built(how, layout=None).image_insert_embedding(ids(), groups())
    assert whole.shape[0] == ids().shape[1]


def test_an_embedding_that_is_not_megatrons_is_refused():
    message = r"layout: 'auto' reads language_embedding\.config, which Identity has not; pass"
    with pytest.raises(ValueError, match=message):
        auto_layout(torch.nn.Identity())


@pytest.mark.usefixtures("megatron", "stand_ins")
def test_another_word_is_refused_everywhere():
    message = "layout: expected 'auto', sequence_layout(...) or None, got 'sequence'"
    for how in ("patched", "replaced"):
        with pytest.raises(ValueError, match=re.escape(message)):
            built(how, layout="sequence")
    with pytest.raises(ValueError, match=r"layout: expected a SequenceLayout.*got 'auto'"):
        ImageInsertEmbedding(Words(), 6, 4, layout="auto")  # type: ignore[arg-type]


@pytest.mark.usefixtures("megatron", "stand_ins")
def test_it_compiles_to_one_graph():
    module = built("patched").image_insert_embedding
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids(), groups()), module(ids(), groups()))


@pytest.mark.usefixtures("megatron", "stand_ins")
def test_compiled_it_marks_the_projector_too():
    layout = SequenceLayout(sequence_parallel_group=torch.distributed.group.WORLD)
    module = built("patched", layout=lambda _: layout).image_insert_embedding
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    compiled(ids(), groups())
    assert marks(module) == {True}
