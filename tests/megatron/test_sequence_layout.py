"""Real ranks on loopback (gloo): shards under sequence and context parallelism against one rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

HIDDEN, WIDTH, VOCABULARY, SEQ_LEN, ROWS = 16, 24, 64, 32, 7
IM_START = 7


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
    # With sequence parallelism Megatron applies dropout (here 0) under a CUDA random state, which a
    # CPU does not have. Whether the embedding scatters was settled above.
    config.sequence_parallel = False
    # Each tensor-parallel rank holds a part of one table that does not depend on their number.
    table = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(5))
    weight = words.word_embeddings.weight
    first = words.word_embeddings.vocab_start_index
    weight.data.copy_(table[first : first + weight.shape[0]])
    return words


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, VOCABULARY, (batch_size, SEQ_LEN), generator=generator)
    ids[:, 5] = ids[:, 13] = ids[:, 23] = IM_START  # spans that cross every boundary of shards
    features = torch.randn(3 * batch_size, ROWS, WIDTH, generator=generator)
    return ids, features, torch.randn(SEQ_LEN, batch_size, HIDDEN, generator=generator)


def run(words: Any, layout: Any, batch_size: int, impl: str) -> dict[str, torch.Tensor]:
    """Forward and backward of one rank; ``positions`` says which rows are its own."""
    from step37_kernels import ImageForInsert, ImageInsertEmbedding

    torch.manual_seed(0)
    module = ImageInsertEmbedding(
        words, WIDTH, HIDDEN, projector_bias=True, impl=impl, layout=layout, strict=True
    )
    ids, features, grad_output = make_batch(batch_size)
    features.requires_grad_()
    output = module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)])
    positions = torch.arange(SEQ_LEN)
    if layout is not None:
        _, positions = module._look_up_shard(ids, None)
    output.backward(grad_output[positions])
    projector = module.align_projector
    if layout is not None and layout.sequence_parallel_group is not None:
        assert all(p.sequence_parallel for p in projector.parameters())
        for parameter in projector.parameters():  # what Megatron does with those so marked
            dist.all_reduce(parameter.grad, group=layout.sequence_parallel_group)
    results = {
        "output": output.detach(),
        "positions": positions,
        "features": features.grad,
        "weight": projector.weight.grad,
        "bias": projector.bias.grad,
        "words": words.word_embeddings.weight.grad,
    }
    if layout is not None and layout.context_parallel_group is not None:
        # What Megatron's gradient reduction over data and context ranks does.
        for name in ("features", "weight", "bias", "words"):
            dist.all_reduce(results[name], group=layout.context_parallel_group)
    return results


def sequence_parallel(impl: str, scatter: bool, batch_size: int) -> dict[str, torch.Tensor]:
    from megatron.core import parallel_state

    from step37_kernels.parallel import SequenceLayout

    layout = SequenceLayout(
        sequence_parallel_group=parallel_state.get_tensor_model_parallel_group()
    )
    return run(make_words(True, 2, scatter), layout, batch_size, impl)


def context_parallel(impl: str, packed: bool, batch_size: int) -> dict[str, torch.Tensor]:
    from megatron.core import parallel_state

    from step37_kernels.parallel import SequenceLayout

    cu_seqlens = torch.tensor([0, 8, 20, SEQ_LEN], dtype=torch.int32) if packed else None
    layout = SequenceLayout(
        context_parallel_group=parallel_state.get_context_parallel_group(), cu_seqlens=cu_seqlens
    )
    return run(make_words(False, 1, False), layout, batch_size, impl)


def both(impl: str, packed: bool, batch_size: int) -> dict[str, torch.Tensor]:
    from megatron.core import parallel_state

    from step37_kernels.parallel import SequenceLayout

    cu_seqlens = torch.tensor([0, 8, 20, SEQ_LEN], dtype=torch.int32) if packed else None
    layout = SequenceLayout(
        sequence_parallel_group=parallel_state.get_tensor_model_parallel_group(),
        context_parallel_group=parallel_state.get_context_parallel_group(),
        cu_seqlens=cu_seqlens,
    )
    return run(make_words(True, 2, False), layout, batch_size, impl)


def rank_main(
    rank: int,
    size: int,
    folder: str,
    tp: int,
    cp: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        # Megatron allocates the buffers of its collectives on "the current CUDA device".
        torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core import parallel_state

    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, context_parallel_size=cp
    )
    torch.save(work(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def launch(
    folder: Path, tp: int, cp: int, work: Callable[..., Any], *arguments: Any
) -> list[dict[str, torch.Tensor]]:
    size = tp * cp
    mp.spawn(rank_main, (size, str(folder), tp, cp, work, arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def alone(batch_size: int) -> dict[str, torch.Tensor]:
    return run(make_words(False, 1, False), None, batch_size, "torch")


def single_process(folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    folder.mkdir()
    return launch(folder, 1, 1, alone, batch_size)[0]


def assert_same(
    ranks: list[dict[str, torch.Tensor]], wanted: dict[str, torch.Tensor], vocabulary_parts: int
) -> None:
    covered = torch.cat([rank["positions"] for rank in ranks])
    assert covered.sort().values.tolist() == list(range(SEQ_LEN))
    for number, rank in enumerate(ranks):
        torch.testing.assert_close(rank["output"], wanted["output"][rank["positions"]])
        for name in ("features", "weight", "bias"):
            torch.testing.assert_close(rank[name], wanted[name], rtol=1e-5, atol=1e-5)
        part = wanted["words"].tensor_split(vocabulary_parts)[number % vocabulary_parts]
        torch.testing.assert_close(rank["words"], part, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("impl", "scatter", "batch_size"), [("triton", False, 1), ("torch", True, 2)]
)
def test_two_sequence_parallel_ranks_are_one(tmp_path, impl, scatter, batch_size):
    wanted = single_process(tmp_path / "alone", batch_size)
    ranks = launch(tmp_path, 2, 1, sequence_parallel, impl, scatter, batch_size)
    assert_same(ranks, wanted, vocabulary_parts=2)
    for rank in ranks:
        assert rank["output"].shape == (SEQ_LEN // 2, batch_size, HIDDEN)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("impl", "packed", "batch_size"), [("triton", True, 1), ("torch", False, 2)]
)
def test_two_context_parallel_ranks_are_one(tmp_path, impl, packed, batch_size):
    wanted = single_process(tmp_path / "alone", batch_size)
    ranks = launch(tmp_path, 1, 2, context_parallel, impl, packed, batch_size)
    assert_same(ranks, wanted, vocabulary_parts=1)


@pytest.mark.timeout(180)
def test_sequence_and_context_parallel_together_are_one(tmp_path):
    wanted = single_process(tmp_path / "alone", 1)
    ranks = launch(tmp_path, 2, 2, both, "torch", True, 1)
    assert_same(ranks, wanted, vocabulary_parts=2)
