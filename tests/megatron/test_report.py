"""``report(model)`` of models made of megatron-core's own embedding, DDP and groups (gloo)."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from step37_kernels import report
from step37_kernels.integration.vocab_parallel import restore_dense_gradient
from step37_kernels.integration.ways import Ways
from step37_kernels.megatron import replace_in
from tests.megatron.processes import run
from tests.megatron.test_whole_embedding import Case, make_model, microbatch


def ddp(model: Any, **options: Any) -> torch.nn.Module:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(model.config, DistributedDataParallelConfig(**options), model)


def ways_in(model: torch.nn.Module) -> Ways:
    (ways,) = (m.ways for m in report(model, rows=10).modules if m.ways is not None)
    return ways


@pytest.mark.usefixtures("megatron")
def test_in_megatrons_ddp_both_gradients_go_to_main_grad_and_the_log_says_so(caplog):
    model = make_model(Case(), "by rows")
    assert ways_in(model).projector_gradient.how == "error"  # True, and no main_grad yet
    replace_in(model, impl="torch", gradient_accumulation_fusion="auto")
    model.config.gradient_accumulation_fusion = True
    replace_in(model, impl="torch")
    assert str(ways_in(model).words_gradient) == ("autograd (no main_grad: Megatron's DDP sets it)")
    wrapped = ddp(model, overlap_grad_reduce=True, bucket_size=1)
    found = report([wrapped], rows=10)
    assert [(m.name, m.cls.rpartition(".")[2], m.state) for m in found.modules] == [
        ("0.module.words.word_embeddings", "RowGradient", "ours"),
        ("0.module.fuse", "Step37ImageInsertEmbedding", "ours"),
    ]
    assert found.active
    ways = ways_in(wrapped)
    assert ways.words.how == "looked up"
    assert ways.projector_gradient.how == ways.words_gradient.how == "main_grad"
    assert ways.text_only_gradient.how == "zeros"
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        wrapped(*microbatch(0)).backward()
    assert [r.message for r in caplog.records] == [f"Step37ImageInsertEmbedding: {ways}"]
    for parameter in (model.words.word_embeddings.weight, model.fuse.align_projector.weight):
        assert parameter.main_grad.any()
    restore_dense_gradient()
    assert [m.stock for m in report(wrapped).modules] == ["ImageInsertEmbedding"]


@pytest.mark.usefixtures("megatron")
def test_an_embedding_with_dropout_is_called_while_it_trains_and_looked_up_in_evaluation():
    model = ddp(make_model(Case(dropout=0.1), "by rows"))
    assert str(ways_in(model).words) == "called (its dropout is in effect)"
    assert ways_in(model).words_gradient.how == "main_grad"
    assert ways_in(model.eval()).words.how == "looked up"
    restore_dense_gradient()


def told_by_two_ranks(rank: int, sequence_parallel: bool) -> None:
    del rank
    model = make_model(Case(sequence_parallel=sequence_parallel), "by rows")
    wrapped = ddp(model)
    weight = model.fuse.align_projector.weight
    marked = hasattr(weight, "sequence_parallel")
    ways = ways_in(wrapped)
    # A mark is set by a forward or at the building, not by a report.
    assert hasattr(weight, "sequence_parallel") == marked
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("step37_kernels.image_insert_embedding")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    wrapped(*microbatch(0)).backward()
    assert records == [f"{type(model.fuse).__name__}: {ways}"]
    assert ways.words_gradient.how == ways.projector_gradient.how == "main_grad"
    if sequence_parallel:
        assert str(ways.words) == "called (sequence-parallel ranks share the rows)"
        assert str(ways.layout) == "shared (among 2 sequence-parallel ranks)"
    else:
        assert str(ways.words) == "called (the table is divided among 2 tensor-parallel ranks)"
        assert str(ways.layout) == "whole"
    assert model.words.word_embeddings.weight.main_grad.any()
    restore_dense_gradient()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_say_that_the_words_are_called_and_why(sequence_parallel):
    run(told_by_two_ranks, sequence_parallel, tensor_model_parallel_size=2)
