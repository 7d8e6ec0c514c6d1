"""``layout="auto"`` in Bridge's own model: patched in, or replaced in a built one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from step37_kernels import ImageInsertEmbedding
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.megatron import patch_step37, replace_in
from tests.megatron.test_auto_layout import Words
from tests.real.bridge.bridge_model import build, forward, groups, ids

pytestmark = pytest.mark.usefixtures("megatron", "bridge")


def built(how: str, **options: Any) -> Any:
    if how == "patched":
        patch_step37(**options)
        return build()
    model = build()
    replace_in(model, **options)
    return model


def marks(module: ImageInsertEmbedding) -> set[bool]:
    return {getattr(p, "sequence_parallel", False) for p in module.align_projector.parameters()}


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


def test_the_projector_is_marked_before_a_wrapper_could_copy_its_parameters():
    patch_step37()
    from megatron.bridge.models.stepfun.modelling_step37.model import ImageInsertEmbedding as Fused

    assert marks(Fused(Words(sequence_parallel=True), 6, 4, projector_bias=True)) == {True}
    assert marks(Fused(Words(), 6, 4)) == {False}
    patch_step37(layout=None)
    assert marks(Fused(Words(sequence_parallel=True), 6, 4)) == {False}


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


def test_another_word_is_refused_everywhere():
    message = "layout: expected 'auto', sequence_layout(...) or None, got 'sequence'"
    for how in ("patched", "replaced"):
        with pytest.raises(ValueError, match=re.escape(message)):
            built(how, layout="sequence")


def test_it_compiles_to_one_graph():
    module = built("patched").image_insert_embedding
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids(), groups()), module(ids(), groups()))


def test_compiled_it_marks_the_projector_too():
    layout = SequenceLayout(sequence_parallel_group=torch.distributed.group.WORLD)
    module = built("patched", layout=lambda _: layout).image_insert_embedding
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    compiled(ids(), groups())
    assert marks(module) == {True}
