"""``report(model)`` of Megatron-Bridge's own ``Step37Model``, and what its page shows of it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from step37_kernels import Report, report
from step37_kernels.integration.vocab_parallel import restore_dense_gradient
from step37_kernels.integration.ways import Ways
from step37_kernels.megatron import patch_step37, replace_in
from tests.real.bridge.bridge_model import EMBEDDING, MODEL, build, forward
from tests.real.bridge.test_patch_replace_in import PROJECTORS, WRAPPERS, megatron_ddp

pytestmark = pytest.mark.usefixtures("megatron", "bridge")

PAGE = Path(__file__).parents[3] / "docs" / "megatron-bridge.md"


def embedding_in(found: Report) -> Any:
    (module,) = (m for m in found.modules if m.stock == "ImageInsertEmbedding")
    return module


def ways_in(model: Any) -> Ways:
    ways = embedding_in(report(model, rows=8)).ways
    assert ways is not None
    return ways


def told_at_first_forward(model: Any, caplog: pytest.LogCaptureFixture, images: Any = None) -> str:
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        forward(model, images)
        forward(model, images)
    (line,) = (r.message for r in caplog.records if "words: " in r.message)
    return line


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_replaced_model_says_in_every_wrapper_what_its_first_forward_logs(wrap, caplog):
    model = build()
    wrapped = wrap(model)
    stock = embedding_in(report(wrapped))
    assert (stock.state, stock.cls) == ("stock", f"{EMBEDDING}.ImageInsertEmbedding")
    (name,) = replace_in(wrapped)
    found = report(wrapped, rows=8)
    ours = embedding_in(found)
    assert found.active
    assert (ours.name, ours.state) == (name, "ours")
    assert ours.cls == "step37_kernels.megatron.Step37ImageInsertEmbedding"
    assert (ours.ways.words.how, ours.ways.projection.how) == ("looked up", "PyTorch")
    line = told_at_first_forward(wrapped, caplog)
    assert (
        line.partition("; words on")[0]
        == (f"Step37ImageInsertEmbedding: {ours.ways}".partition("; words on")[0])
    )


def test_a_patched_model_is_ours_and_one_that_was_built_before_is_not():
    before = build()
    assert MODEL in type(before).__module__
    patch_step37()
    assert report(build()).active
    found = report(before)
    assert not found.active
    assert "replace_in(model), or patch_step37() before it is built" in str(found)
    tower = found.modules[0]
    assert (tower.name, tower.stock, tower.state) == ("vision_model", "Step37VisionModel", "stock")
    patch_step37(channels_last=True)
    assert [m.state for m in report(build()).modules] == ["ours", "ours"]


@pytest.mark.parametrize("wrap", PROJECTORS)
def test_a_projector_that_was_wrapped_is_called_and_the_report_says_what_it_is(wrap, caplog):
    model = build()
    embedding = model.image_insert_embedding
    embedding.align_projector = PROJECTORS[wrap](embedding.align_projector)
    replace_in(model)
    ways = ways_in(model)
    kind = type(embedding.align_projector).__name__
    assert str(ways.projection) == f"called (it is a {kind})"
    assert str(ways.projector_gradient) == "its own (it is called)"
    if "sequence" not in wrap:
        assert str(ways) in told_at_first_forward(model, caplog)


def test_a_frozen_model_and_a_batch_of_text(caplog):
    model = build()
    replace_in(model)
    model.requires_grad_(False)
    ways = ways_in(model)
    assert ways.projector_gradient.how == ways.words_gradient.how == "none"
    assert str(ways.text_only_gradient) == "none (the projector is frozen)"
    assert "text-only batch: none (the proj" in told_at_first_forward(model, caplog, [])


def test_a_list_of_chunks_and_a_stage_that_embeds_nothing():
    chunks = [build(), build(pre_process=False)]
    replace_in(chunks)
    assert [m.name for m in report(chunks).modules if m.ways] == ["0.image_insert_embedding"]
    assert str(report(chunks[1:])).endswith("Step37Model: not the first pipeline stage")
    assert not report(chunks[1:]).active


def test_an_embedding_that_is_an_fsdp_unit_of_its_own_says_why_it_stays():
    from torch.distributed.fsdp import fully_shard

    model = build()
    fully_shard(model.image_insert_embedding, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert embedding_in(report(model)).why.startswith("an FSDP unit of its own")
    patch_step37()
    model = build()
    fully_shard(model.image_insert_embedding, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert ways_in(model).projection.how == "PyTorch"  # as in its forward, where it is gathered
    assert report(model).active


def test_a_projector_that_is_an_fsdp_unit_of_its_own_is_called():
    from torch.distributed.fsdp import fully_shard

    model = build()
    replace_in(model)
    projector: nn.Module = model.image_insert_embedding.align_projector
    fully_shard(projector, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert str(ways_in(model).projection) == "called (it is a FSDPLinear)"


def test_the_page_shows_what_is_printed():
    model = build()
    replace_in(model, gradient_accumulation_fusion=True)
    wrapped = megatron_ddp(model)
    shown = re.search(
        r"<!-- output: report -->\n```text\n(.*?)^```$", PAGE.read_text(), re.S | re.M
    )
    assert shown is not None
    assert shown[1] == f"{report(wrapped)}\n"
    restore_dense_gradient()
