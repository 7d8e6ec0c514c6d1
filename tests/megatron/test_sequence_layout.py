"""Real ranks on loopback (gloo): shards under sequence and context parallelism against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from step37_kernels import ImageInsertEmbedding, reference
from tests.megatron.processes import run

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

HIDDEN, WIDTH, VOCABULARY, SEQ_LEN, ROWS = 16, 24, 64, 32, 7
IM_START = 7
# The ranks are on the CPU: interpreted kernels, where the tests do not compile them for a GPU.
IMPL = "torch" if torch.cuda.is_available() else "triton"


def make_table() -> Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(5))


def make_projector() -> torch.nn.Linear:
    torch.manual_seed(0)
    module = ImageInsertEmbedding(lambda **_: torch.zeros(0), WIDTH, HIDDEN, projector_bias=True)
    torch.nn.init.normal_(module.align_projector.bias)
    return module.align_projector


def make_words(sequence_parallel: bool, tp: int, scatter: bool) -> torch.nn.Module:
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
    )
    words = LanguageModelEmbedding(
        config,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
        scatter_to_sequence_parallel=scatter,
    )
    # Each tensor-parallel rank holds a part of one table that does not depend on their number.
    table = make_table()
    weight = words.word_embeddings.weight
    first = words.word_embeddings.vocab_start_index
    weight.data.copy_(table[first : first + weight.shape[0]])
    return words


def make_batch(batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, VOCABULARY, (batch_size, SEQ_LEN), generator=generator)
    ids[:, 5] = ids[:, 13] = ids[:, 23] = IM_START  # spans that cross every boundary of shards
    features = torch.randn(3 * batch_size, ROWS, WIDTH, generator=generator)
    return ids, features, torch.randn(SEQ_LEN, batch_size, HIDDEN, generator=generator)


# The option ``layout`` where it is not the layout that is wanted.
WAYS = {"auto": "auto", "set later": None}


def one_rank(
    rank: int,
    impl: str,
    batch_size: int,
    sequence_parallel: bool,
    scatter: bool,
    cu_seqlens: Tensor | None,
    way: str = "option",
) -> dict[str, Tensor]:
    """Forward and backward of one rank; ``positions`` says which rows are its own."""
    from megatron.core import parallel_state

    from step37_kernels import ImageForInsert
    from step37_kernels.integration.parallel import sequence_layout

    del rank
    layout = sequence_layout(sequence_parallel=sequence_parallel, cu_seqlens=cu_seqlens)
    assert layout is not None
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    words = make_words(sequence_parallel, tensor_ranks, scatter)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, projector_bias=True, impl=impl, strict=True)
    module.align_projector = make_projector()
    module.configure(impl=impl, strict=True, layout=WAYS.get(way, layout))
    if way == "set later":
        module.layout = layout
    state = make_projector().state_dict()
    if way == "made from meta":
        module.to_empty(device="meta")
        module.to_empty(device="cpu")
        module.align_projector.load_state_dict(state)
    if way == "assigned from a state dict":
        module.align_projector.load_state_dict(state, assign=True)
    if way == "replaced by hand":
        for name, value in state.items():
            setattr(module.align_projector, name, torch.nn.Parameter(value))
    ids, features, grad_output = make_batch(batch_size)
    features.requires_grad_()
    output = module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)])
    with torch.no_grad():
        _, positions = module._look_up(ids, None, layout=layout, config=None)
    output.backward(grad_output[positions])
    projector = module.align_projector
    for parameter in projector.parameters():
        assert getattr(parameter, "sequence_parallel", False) == sequence_parallel
        if sequence_parallel:  # what Megatron does with the gradients of those so marked
            dist.all_reduce(parameter.grad, group=layout.sequence_parallel_group)
    gradients = {
        "features": features.grad,
        "weight": projector.weight.grad,
        "bias": projector.bias.grad,
        "words": words.word_embeddings.weight.grad,
    }
    if layout.context_parallel_group is not None:
        # What Megatron's gradient reduction over data and context ranks does.
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=layout.context_parallel_group)
    return {"output": output.detach(), "positions": positions, **gradients}


def whole(batch_size: int) -> dict[str, Tensor]:
    """The same by the reference, without ranks."""
    ids, features, grad_output = make_batch(batch_size)
    table, projector = make_table().requires_grad_(), make_projector()
    features.requires_grad_()
    output = reference.image_insert_embedding(
        F.embedding(ids, table).transpose(0, 1),
        ids,
        [(IM_START, features)],
        projector.weight,
        projector.bias,
    )
    output.backward(grad_output)
    return {
        "output": output.detach(),
        "features": features.grad,
        "weight": projector.weight.grad,
        "bias": projector.bias.grad,
        "words": table.grad,
    }


def assert_same(
    ranks: list[dict[str, Tensor]], wanted: dict[str, Tensor], vocabulary_parts: int
) -> None:
    covered = torch.cat([rank["positions"] for rank in ranks])
    assert covered.sort().values.tolist() == list(range(SEQ_LEN))
    for number, rank in enumerate(ranks):
        torch.testing.assert_close(rank["output"], wanted["output"][rank["positions"]])
        for name in ("features", "weight", "bias"):
            torch.testing.assert_close(rank[name], wanted[name], rtol=1e-5, atol=1e-5)
        part = wanted["words"].tensor_split(vocabulary_parts)[number % vocabulary_parts]
        torch.testing.assert_close(rank["words"], part, rtol=1e-5, atol=1e-5)


CU_SEQLENS = torch.tensor([0, 8, 20, SEQ_LEN], dtype=torch.int32)


@pytest.mark.parametrize(
    ("impl", "scatter", "batch_size", "way"),
    [
        (IMPL, False, 1, "option"),
        ("torch", True, 2, "auto"),
        ("torch", False, 1, "set later"),
        ("torch", False, 1, "made from meta"),
        ("torch", False, 1, "assigned from a state dict"),
        ("torch", False, 1, "replaced by hand"),
    ],
)
def test_two_sequence_parallel_ranks_are_one(impl, scatter, batch_size, way):
    arguments: tuple[Any, ...] = (impl, batch_size, True, scatter, None, way)
    ranks = run(one_rank, *arguments, tensor_model_parallel_size=2)
    assert_same(ranks, whole(batch_size), vocabulary_parts=2)
    for rank in ranks:
        assert rank["output"].shape == (SEQ_LEN // 2, batch_size, HIDDEN)


@pytest.mark.parametrize(
    ("cu_seqlens", "batch_size"), [(CU_SEQLENS, 1), (None, 2)], ids=["packed", "one sequence"]
)
def test_two_context_parallel_ranks_are_one(cu_seqlens, batch_size):
    arguments: tuple[Any, ...] = (IMPL, batch_size, False, False, cu_seqlens)
    ranks = run(one_rank, *arguments, context_parallel_size=2)
    assert_same(ranks, whole(batch_size), vocabulary_parts=1)


def test_sequence_and_context_parallel_together_are_one():
    arguments: tuple[Any, ...] = (IMPL, 1, True, False, CU_SEQLENS)
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    ranks = run(one_rank, *arguments, world=4, **sizes)
    assert_same(ranks, whole(1), vocabulary_parts=2)
