"""The table's gradient by rows on megatron-core's own embedding, DDP and hooks (gloo ranks).

Three steps of three microbatches, of which one has no image, are compared with the same steps of an
embedding that is called, whose gradient is dense and which Megatron's hook adds.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from step37_kernels import ImageForInsert, ImageInsertEmbedding, reference
from step37_kernels.integration.vocab_parallel import RowGradient, restore_dense_gradient
from step37_kernels.megatron import Step37ImageInsertEmbedding, replace_in
from tests.megatron.processes import run

HIDDEN, WIDTH, VOCABULARY = 16, 24, 64
IM_START, SEQ_LEN, ROWS = 7, 24, 5


class Case(NamedTuple):
    """What a training does besides looking up and inserting."""

    impl: str = "torch"
    tied: bool = False
    """The output layer has the table for its weight."""
    second_lookup: bool = False
    """Words are looked up again, as multi-token prediction does on its stage."""
    recompute: bool = False
    dropout: float = 0.0
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32


class Stock(torch.nn.Module):
    """The class that is replaced, in the reference's words."""

    def __init__(self, words: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "words", words)
        self.align_projector = torch.nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, ids: Tensor, images: list[ImageForInsert]) -> Tensor:
        embeddings = self.words(input_ids=ids, position_ids=None)
        if not images:
            # As text_only_gradient has it: overlapped reduction waits for every parameter.
            return embeddings + 0 * self.align_projector.weight.sum()
        groups = [(group.insert_start_token, group.image_features) for group in images]
        weight = self.align_projector.weight
        self.align_projector(weight.new_empty(0, WIDTH))  # Megatron's hook waits for the weight.
        return reference.image_insert_embedding(embeddings, ids, groups, weight)


def make_model(case: Case, kind: str) -> Any:
    """``stock``, ``called`` or ``by rows``."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Model(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config=config)
            self.words = LanguageModelEmbedding(
                config,
                vocab_size=VOCABULARY,
                max_sequence_length=SEQ_LEN,
                position_embedding_type="rope",
            )
            self.fuse = Stock(self.words) if kind == "stock" else make_ours(self.words)

        def forward(self, ids: Tensor, images: list[ImageForInsert], weights: Tensor) -> Tensor:
            if case.recompute:
                rows = checkpoint(self.fuse, ids, images, use_reentrant=False)
            else:
                rows = self.fuse(ids, images)
            weights = weights.chunk(SEQ_LEN // rows.shape[0])[own_part(rows)]
            loss = (rows * weights).sum()
            if case.second_lookup:
                again = self.words(input_ids=ids.roll(-1, 1), position_ids=None)
                loss = loss + (again * weights.square()).sum()
            if case.tied:
                logits = F.linear(rows, self.words.word_embeddings.weight)
                loss = loss + logits.logsumexp(-1).sum()
            return loss

    def make_ours(words: torch.nn.Module) -> ImageInsertEmbedding:
        return Step37ImageInsertEmbedding(words, WIDTH, HIDDEN)  # replace_in gives it its options.

    def own_part(rows: Tensor) -> int:
        whole = rows.shape[0] == SEQ_LEN
        return 0 if whole else parallel_state.get_tensor_model_parallel_rank()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            hidden_dropout=case.dropout,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,  # of Megatron's own layers: an extension for CUDA
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            sequence_parallel=case.sequence_parallel,
        )
    torch.manual_seed(5)
    model = Model(config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        table = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        words = model.words.word_embeddings
        first = words.vocab_start_index
        words.weight.copy_(table[first : first + len(words.weight)])
        model.fuse.align_projector.weight.copy_(torch.randn(HIDDEN, WIDTH, generator=generator))
    if kind == "called":
        replace_in(model, impl=case.impl, lookup="call", gradient_accumulation_fusion=False)
    elif kind == "by rows":
        replace_in(model, impl=case.impl, gradient_accumulation_fusion=True)
        assert isinstance(model.words.word_embeddings, RowGradient)
    return model


def microbatch(number: int) -> tuple[Tensor, list[ImageForInsert], Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(10, VOCABULARY, (1, SEQ_LEN), generator=generator)
    ids[0, 12:] = 0  # padding: one id many times
    images = []
    if number % 3 != 1:
        ids[0, [2, 10]] = IM_START
        features = torch.randn(2, ROWS, WIDTH, generator=generator)
        images = [ImageForInsert(insert_start_token=IM_START, image_features=features)]
    return ids, images, torch.randn(SEQ_LEN, 1, HIDDEN, generator=generator)


def train(case: Case, kind: str, **ddp: Any) -> list[dict[str, Tensor]]:
    """``main_grad`` of each step, and the parameters after the last."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = make_model(case, kind)
    config = DistributedDataParallelConfig(bucket_size=1, **ddp)
    wrapped = DistributedDataParallel(model.config, config, model)
    seed = 100 * parallel_state.get_data_parallel_rank()
    steps = []
    for step in range(3):
        wrapped.zero_grad_buffer()
        for number in range(3):
            last = number == 2
            torch.manual_seed(step + number)  # of the dropout
            with contextlib.nullcontext() if last else wrapped.no_sync():
                wrapped(*microbatch(seed + 3 * step + number)).backward()
        wrapped.finish_grad_sync()
        gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
        steps.append(gradients)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.01 * gradients[name]
    restore_dense_gradient()
    return [*steps, {name: p.detach().clone() for name, p in model.named_parameters()}]


def compare(rank: int, case: Case, baseline: str, ddp: dict[str, Any]) -> None:
    del rank
    wanted = train(case, baseline, **ddp)
    found = train(case, "by rows", **ddp)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name], value, rtol=1e-4, atol=1e-4, msg=f"step {step}, {name}"
            )
            assert value.abs().max() > 0


REDUCTIONS = {
    "plain": {},
    "overlapped": {"overlap_grad_reduce": True},
    "distributed optimizer": {"use_distributed_optimizer": True},
    "distributed optimizer, overlapped": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": False,
    },
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_data_parallel_ranks_train_as_stock_does(reduction):
    run(compare, Case(), "stock", REDUCTIONS[reduction])


class NamedAsOnCuda(TorchFunctionMode):
    """``tensor.type()``, by which Megatron's optimizer asks for a dtype, has "cuda" in it.

    ``DistributedOptimizer`` refuses parameters, and clipping refuses gradients, whose type is not
    ``torch.cuda.FloatTensor`` (Half, BFloat16). Nothing else of the optimizer is stubbed, and no
    value depends on this: what follows are operations of PyTorch's on the tensors as they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func is Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


class Steps(NamedTuple):
    """What three steps of an optimizer did on this rank."""

    moved: list[dict[str, Tensor]]
    """How far each step has brought the fp32 parameters (this rank's shards) from their start."""
    values: dict[str, Tensor]
    """All parameters after the last step, as the model has them."""
    norms: list[float]
    """Of all gradients, before they are clipped."""


def step_by_step(case: Case, kind: str, **ddp: Any) -> Steps:
    """Train by Megatron's own ``DistributedOptimizer``."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    model = make_model(case, kind).to(case.dtype)
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            bucket_size=1, use_distributed_optimizer=True, grad_reduce_in_fp32=True, **ddp
        ),
        model,
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=1.0,
        # As large as a clipped gradient: what a step moves is in proportion to it, and so is what
        # it moves wrongly. Adam would make a whole step of a gradient that is only rounding.
        adam_eps=1.0,
        weight_decay=0.0,
        clip_grad=10.0,
        bf16=case.dtype is torch.bfloat16,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    assert all(type(one) is DistributedOptimizer for one in optimizer.chained_optimizers)

    def shards() -> dict[str, Tensor]:
        # main_param is what the optimizer steps, None if it is another rank's; of an fp32 model,
        # the parameter itself.
        main = {name: getattr(p, "main_param", p) for name, p in model.named_parameters()}
        return {name: p.detach().clone() for name, p in main.items() if p is not None}

    start, moved, norms = shards(), [], []
    seed = 100 * parallel_state.get_data_parallel_rank()
    for step in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        for number in range(3):
            with contextlib.nullcontext() if number == 2 else wrapped.no_sync():
                ids, images, weights = microbatch(seed + 3 * step + number)
                for group in images:
                    group.image_features = group.image_features.to(case.dtype)
                wrapped(ids, images, weights.to(case.dtype)).backward()
        wrapped.finish_grad_sync()
        done, norm, _ = optimizer.step()
        assert done
        if ddp.get("overlap_param_gather"):
            wrapped.start_param_sync(force_sync=True)
        moved.append({name: value - start[name] for name, value in shards().items()})
        norms.append(norm)
    restore_dense_gradient()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Steps(moved, values, norms)


OVERLAPS = (
    {"overlap_grad_reduce": False},
    {"overlap_grad_reduce": True},
    {"overlap_grad_reduce": True, "overlap_param_gather": True},
)


def compare_optimizers(rank: int, case: Case) -> None:
    del rank
    # The longest sums are those of the padding's row and the projector's; their order differs.
    unit = 16 * torch.finfo(case.dtype).eps / 2
    for ddp in OVERLAPS:
        with NamedAsOnCuda():
            wanted = step_by_step(case, "stock", **ddp)
            found = step_by_step(case, "by rows", **ddp)
        torch.testing.assert_close(found.norms, wanted.norms, rtol=unit, atol=0)
        for step, (ours, theirs) in enumerate(zip(found.moved, wanted.moved, strict=True)):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                size = float(value.abs().max())
                assert size > 0.1
                error = float((ours[name] - value).abs().max())
                assert error <= unit * size, f"{ddp}, step {step}, {name}: {error} of {size}"
        for name, value in wanted.values.items():
            torch.testing.assert_close(found.values[name], value, rtol=unit, atol=unit, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_megatrons_distributed_optimizer_steps_as_with_stocks_gradients(dtype):
    run(compare_optimizers, Case(dtype=dtype))


@pytest.mark.parametrize(
    "case",
    [
        Case(tied=True),
        Case(second_lookup=True),
        Case(recompute=True),
        Case(impl="triton"),
        Case(tied=True, second_lookup=True, recompute=True),
    ],
    ids=str,
)
def test_whatever_else_uses_the_table_nothing_is_lost_or_counted_twice(case):
    if case.impl == "triton" and torch.cuda.is_available():
        pytest.skip("the embedding is on the CPU, and the kernels are compiled here")
    run(compare, case, "stock", {"overlap_grad_reduce": True})


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks_train_as_with_a_dense_gradient(sequence_parallel):
    case = Case(sequence_parallel=sequence_parallel, second_lookup=True)
    run(
        compare,
        case,
        "called",
        {"overlap_grad_reduce": True},
        tensor_model_parallel_size=2,
    )


def test_an_embedding_with_dropout_is_called_and_its_gradient_goes_by_rows():
    run(compare, Case(dropout=0.3), "called", {}, world=1)


def change_options(rank: int) -> None:
    del rank
    model = make_model(Case(), "by rows")
    words = model.words.word_embeddings
    replace_in(model, gradient_accumulation_fusion=False)
    assert not isinstance(words, RowGradient)
    # An attribute of the built module does what the keyword did at its building.
    model.fuse.gradient_accumulation_fusion = True
    assert isinstance(words, RowGradient)
    model.fuse.gradient_accumulation_fusion = False
    assert not isinstance(words, RowGradient)
    replace_in(model, gradient_accumulation_fusion=True)
    copied = copy.copy(words)
    assert isinstance(copied, RowGradient)
    restore_dense_gradient()
    assert not isinstance(words, RowGradient)
    assert not isinstance(copied, RowGradient)
    replace_in(model, gradient_accumulation_fusion=True)
    fully_shard(words, mesh=init_device_mesh("cpu", (1,)))
    restore_dense_gradient()
    assert isinstance(words, FSDPModule)


def test_the_gradient_by_rows_goes_where_fusion_is_turned_off_and_leaves_fsdp_alone():
    run(change_options, world=1)


def train_without_main_grad(rank: int) -> None:
    del rank
    model = make_model(Case(), "by rows")
    ids, images, weights = microbatch(0)
    model.fuse.gradient_accumulation_fusion = "auto"
    for parameter in model.parameters():
        parameter.main_grad = None
    model.words(input_ids=ids, position_ids=None).sum().backward()
    assert model.words.word_embeddings.weight.grad.sum() == SEQ_LEN * HIDDEN
    model(ids, images, weights).backward()
    assert model.fuse.align_projector.weight.grad.abs().max() > 0


def test_a_main_grad_of_none_leaves_the_gradient_to_autograd():
    run(train_without_main_grad, world=1)


def gradients_of_gpt(rank: int, kind: str, tied: bool) -> dict[str, Tensor]:
    """``main_grad`` of Megatron's own ``GPTModel``, whose multi-token prediction looks words up
    again, after one microbatch."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            mtp_num_layers=1,
        )
    layer = get_gpt_layer_local_spec()

    class Model(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config=config)
            self.gpt = GPTModel(
                config,
                layer,
                vocab_size=VOCABULARY,
                max_sequence_length=SEQ_LEN,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=tied,
                mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False),
            )
            words = self.gpt.embedding
            stock = kind == "stock"
            self.fuse = Stock(words) if stock else ImageInsertEmbedding(words, WIDTH, HIDDEN)

        def forward(self, ids: Tensor, images: list[ImageForInsert]) -> Tensor:
            hidden = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
            losses: Tensor = self.gpt(
                input_ids=ids,
                position_ids=torch.arange(SEQ_LEN)[None],
                attention_mask=hidden,
                decoder_input=self.fuse(ids, images),
                labels=ids.roll(-1, 1),
            )
            return losses

    torch.manual_seed(3)
    model = Model()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if kind == "by rows":
        replace_in(model, gradient_accumulation_fusion=True)
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(bucket_size=1, overlap_grad_reduce=True), model
    )
    wrapped.zero_grad_buffer()
    ids, images, _ = microbatch(100 * rank)
    wrapped(ids, images).mean().backward()
    wrapped.finish_grad_sync()
    restore_dense_gradient()
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}


def compare_gpt(rank: int, tied: bool) -> None:
    wanted = gradients_of_gpt(rank, "stock", tied)
    found = gradients_of_gpt(rank, "by rows", tied)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert wanted["gpt.embedding.word_embeddings.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_multi_token_prediction_looks_up_again_and_loses_nothing(tied):
    run(compare_gpt, tied)
