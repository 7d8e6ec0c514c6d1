"""Groups of a ``ProcessGroupCollection``, where Megatron's global parallel state has none."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.integration.parallel import sequence_layout
from tests.megatron.processes import run
from tests.megatron.test_sequence_layout import (
    HIDDEN,
    IM_START,
    SEQ_LEN,
    VOCABULARY,
    WIDTH,
    make_batch,
    make_projector,
    make_table,
    whole,
)

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


class Group:
    """A stand-in of a process group: nothing is sent."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


def words_of(group: Any) -> torch.nn.Module:
    """Megatron's language embedding by this group alone."""
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        hidden_dropout=0.0,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    words = LanguageModelEmbedding(
        config, VOCABULARY, SEQ_LEN, position_embedding_type="rope", tp_group=group
    )
    table = words.word_embeddings
    table.weight.data.copy_(make_table()[table.vocab_start_index : table.vocab_end_index])
    return words


def one_rank(rank: int, kind: str, layout: str) -> dict[str, Tensor]:
    """This rank's rows of the output, their positions, and the gradient of the features."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.destroy_model_parallel()
    alone = [dist.new_group([r]) for r in range(2)][rank]
    both = dist.new_group([0, 1])
    groups = ProcessGroupCollection()
    groups.tp, groups.cp = (both, alone) if kind == "tensor" else (alone, both)
    found = sequence_layout(sequence_parallel=kind == "tensor", pg_collection=groups)
    assert found is not None
    plain = torch.nn.Embedding.from_pretrained(make_table())
    module = ImageInsertEmbedding(
        words_of(groups.tp) if kind == "tensor" else plain,
        WIDTH,
        HIDDEN,
        projector_bias=True,
        impl="torch",
        layout="auto" if layout == "auto" else found,
    )
    module.align_projector = make_projector()
    ids, features, grad_output = make_batch(1)
    features.requires_grad_()
    output = module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)])
    _, positions = module._look_up(ids, None, layout=found, config=None)
    output.backward(grad_output[positions])
    if kind == "context":
        dist.all_reduce(features.grad)  # as Megatron does, for all gradients
    assert features.grad is not None
    return {"output": output.detach(), "positions": positions, "features": features.grad}


@pytest.mark.parametrize(
    ("kind", "layout"), [("tensor", "given"), ("tensor", "auto"), ("context", "given")]
)
def test_two_ranks_are_one_by_the_groups_of_the_model_without_a_parallel_state(kind, layout):
    ranks, wanted = run(one_rank, kind, layout), whole(1)
    positions = torch.cat([rank["positions"] for rank in ranks])
    assert positions.sort().values.tolist() == list(range(SEQ_LEN))
    for rank in ranks:
        torch.testing.assert_close(rank["output"], wanted["output"][rank["positions"]])
        torch.testing.assert_close(rank["features"], wanted["features"], rtol=1e-5, atol=1e-5)


def test_groups_of_one_rank_divide_nothing():
    groups = SimpleNamespace(tp=Group(2), cp=Group(1))
    assert sequence_layout(pg_collection=groups) is None
    groups.tp = Group(1)
    assert sequence_layout(sequence_parallel=True, pg_collection=groups) is None


def test_a_group_that_is_not_set_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.process_groups_config import ProcessGroupCollection
    groups = ProcessGroupCollection()
    with pytest.raises(ValueError, match=r"pg_collection: cp is not set; .* context-parallel"):
        sequence_layout(pg_collection=groups)
    groups.cp = Group(2)
    assert sequence_layout(pg_collection=groups).context_parallel_group is groups.cp
    with pytest.raises(ValueError, match=r"pg_collection: tp is not set; .* tensor-parallel"):
        sequence_layout(sequence_parallel=True, pg_collection=groups)
