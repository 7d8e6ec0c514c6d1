"""The drop-in on megatron-core's own ``LanguageModelEmbedding`` (gloo, one process)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from step37_kernels import ImageForInsert, ImageInsertEmbedding, reference

HIDDEN, WIDTH, VOCABULARY = 32, 48, 64
IM_START = 7


@pytest.fixture(scope="module", autouse=True)
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def make_words(fp32_residual: bool = False, dropout: float = 0.0) -> torch.nn.Module:
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        hidden_dropout=dropout,
        use_cpu_initialization=True,
        fp32_residual_connection=fp32_residual,
        params_dtype=torch.bfloat16 if fp32_residual else torch.float32,
    )
    torch.manual_seed(0)
    return LanguageModelEmbedding(
        config,
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
    )


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (batch_size, 24), generator=generator)
    ids[:, 3] = ids[:, 14] = IM_START
    return ids, torch.randn(2 * batch_size, WIDTH, 5, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_values_and_gradients_are_those_of_the_stock_loop(impl, batch_size):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("the embedding is on the CPU, and the kernels are compiled here")
    words = make_words()
    ids, features = make_batch(batch_size)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, impl=impl)
    results = []
    for fused in (True, False):
        leaf = features.detach().clone().requires_grad_()
        for parameter in (*module.parameters(), *words.parameters()):
            parameter.grad = None
        if fused:
            output = module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=leaf)])
        else:
            output = reference.image_insert_embedding(
                words(input_ids=ids, position_ids=None),
                ids,
                [(IM_START, leaf)],
                module.align_projector.weight,
            )
        output.square().sum().backward()
        weights = [p.grad for p in (*module.parameters(), *words.parameters())]
        results.append([output, leaf.grad, *weights])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_megatrons_fresh_embedding_is_written_in_place(batch_size, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the embedding is on the CPU, and the kernels are compiled here")
    clones: list[torch.Size] = []
    real = torch.Tensor.clone
    words = make_words()
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, impl="triton")
    ids, features = make_batch(batch_size)
    inside = words.forward(input_ids=ids, position_ids=None)

    def spy(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        clones.append(tensor.shape)
        return real(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", spy)
    module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)])
    assert inside.shape not in clones


def test_embeddings_in_fp32_take_rows_rounded_to_the_weights_bf16():
    words = make_words(fp32_residual=True)
    ids, features = make_batch(1)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN).to(torch.bfloat16)
    output = module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)])
    assert output.dtype == torch.float32
    assert torch.equal(output.bfloat16().float(), output)


def test_the_embeddings_dropout_touches_text_rows_only():
    words = make_words(dropout=0.5)
    ids, features = make_batch(1)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN)
    images = [ImageForInsert(insert_start_token=IM_START, image_features=features)]
    module.train()
    words.train()
    trained = module(ids, images)
    words.eval()
    evaluated = module(ids, images)
    assert torch.equal(trained[4:9], evaluated[4:9])
    assert (trained[9:14] == 0).any()


def test_the_borrowed_embedding_is_counted_once():
    words = make_words()
    owner = torch.nn.Module()
    owner.words = words
    owner.fuse = ImageInsertEmbedding(words, WIDTH, HIDDEN)
    names = [name for name, _ in owner.named_parameters()]
    assert sorted(names) == ["fuse.align_projector.weight", "words.word_embeddings.weight"]


def test_recomputing_the_forward_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    words = make_words()
    ids, features = make_batch(2)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN)

    def run(leaf: torch.Tensor) -> torch.Tensor:
        return module(ids, [ImageForInsert(insert_start_token=IM_START, image_features=leaf)])

    gradients = []
    for call in (run, lambda leaf: checkpoint(run, leaf, use_reentrant=False)):
        leaf = features.detach().clone().requires_grad_()
        call(leaf).square().sum().backward()
        gradients.append([leaf.grad, module.align_projector.weight.grad.clone()])
        module.align_projector.weight.grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
