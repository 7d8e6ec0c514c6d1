"""Several optimizer steps on real ranks (gloo), against one process with the stock class.

Everything that moves a tensor between ranks is Megatron's: layers, schedule, DDP,
``finalize_model_grads``. Only the core attention under context parallelism is not, because
megatron-core has none without Transformer Engine: see ``bridge_model.PackedAttention``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from step37_kernels import ImageForInsert, reference
from step37_kernels.dispatch import Impl
from step37_kernels.integration.parallel import context_parallel_positions
from step37_kernels.megatron import patch_step37, replace_in, sequence_layout, unpatch_step37
from step37_kernels.testing import FP32_UNIT
from tests.megatron.processes import CudaMeansCpu, run
from tests.real.bridge.bridge_model import (
    IM_START,
    LENGTH,
    PATCH_START,
    ROWS,
    SIDE,
    VOCABULARY,
    WIDTH,
    build,
    name_in_whole,
    packed,
    set_weights,
)

STEPS, MICROBATCHES, LAYERS = 3, 2, 2
LEARNING_RATE, MOMENTUM = 0.3, 0.9
CROP_ROWS = 11
# The ranks are on the CPU: interpreted kernels, where the tests do not compile them for a GPU.
IMPL: Impl = "torch" if torch.cuda.is_available() else "triton"
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": {"tensor_model_parallel_size": 2},
    "TP 2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP 2 + SP, replaced in the built model": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "replaced": True,
    },
    "CP 2": {"context_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "DP 2": {},
}
Step = dict[str, Tensor]
# Gradients by name in the whole model, and that of the "features", each in full. "losses" of the
# rank's own "tokens", "embeddings" of its "rows", both of its own "microbatches".


def microbatch(number: int, dtype: torch.dtype) -> tuple[Tensor, list[ImageForInsert]]:
    """Ids, and two images for the tower between which a crop comes as features.

    Spans cross boundaries of shards: 16 under sequence parallelism; 5, 10, 15 and 26 under context
    parallelism, with packed sequences of 20 and 12 tokens.
    """
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(10, VOCABULARY, (1, LENGTH), generator=generator)
    tokens[0, [3, 24]] = IM_START
    tokens[0, 8] = PATCH_START
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=generator).to(dtype)
    crop = torch.randn(1, CROP_ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    return tokens, [
        ImageForInsert(insert_start_token=PATCH_START, image_features=crop),
        ImageForInsert(insert_start_token=IM_START, images=pixels),
    ]


def exact_losses(model: Any, labels: Tensor, **inputs: Any) -> Tensor:
    """Without Megatron's cross-entropy, which computes in fp32 whatever it is given."""
    logits = model(labels=None, **inputs)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")[None]


def train(
    *,
    stock: bool = False,
    replaced: bool = False,
    dtype: torch.dtype = torch.float32,
    **parallel: Any,
) -> list[Step]:
    """Some steps of SGD with momentum by this rank, through Megatron's own schedule."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    contexts = parallel_state.get_context_parallel_world_size()
    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    params = packed()
    options: dict[str, Any] = {"impl": IMPL, "strict": True}
    if contexts > 1:
        options["layout"] = sequence_layout(cu_seqlens=params.cu_seqlens_q)
    if stock or replaced:
        unpatch_step37()
    else:
        patch_step37(**options)
    model = build(
        num_layers=LAYERS,
        projector_bias=True,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        pipeline_dtype=dtype,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=False,
        finalize_model_grads_func=finalize_model_grads,
        **parallel,
    )
    first_layer = stage * (LAYERS // stages)
    set_weights(model, first_layer, parallel_state.get_tensor_model_parallel_rank())
    model.to(dtype)
    if replaced:
        replace_in(model, **options)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    own_tokens = torch.arange(LENGTH)
    if contexts > 1:
        rank = parallel_state.get_context_parallel_rank()
        own_tokens = context_parallel_positions(LENGTH, contexts, rank, params.cu_seqlens_q)
    own_rows = own_tokens
    if parallel.get("sequence_parallel"):
        own_rows = own_tokens.chunk(2)[parallel_state.get_tensor_model_parallel_rank()]
    losses: dict[int, Tensor] = {}
    crops: dict[int, Tensor] = {}
    embeddings: list[Tensor] = []
    if stage == 0:
        model.image_insert_embedding.register_forward_hook(
            lambda _module, _arguments, output: embeddings.append(output.detach()[:, 0].clone())
        )

    def reduce(number: int, per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses[number] = per_token.detach()[0]
        # Megatron multiplies by the number of context ranks and averages over them.
        return per_token.sum() / LENGTH, {}

    def forward_step(data: Any, chunk: Any) -> tuple[Tensor, Any]:
        number = next(data)
        tokens, images = microbatch(number, dtype)
        crops[number] = images[0].image_features
        inputs = {
            "input_ids": tokens,
            "position_ids": torch.arange(LENGTH)[None],
            "images": images,
            "labels": tokens.roll(-1, 1)[:, own_tokens],
            "packed_seq_params": params,
        }
        forward = chunk if dtype == torch.float32 else functools.partial(exact_losses, chunk)
        return forward(**inputs), functools.partial(reduce, number)

    steps = []
    for step in range(STEPS):
        numbers = range(step * MICROBATCHES, (step + 1) * MICROBATCHES)
        own = numbers[dp_rank::dp_size]
        wrapped.zero_grad_buffer()
        embeddings.clear()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(own),
            model=wrapped,
            num_microbatches=len(own),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad.clone()
        result = {
            name_in_whole(name, first_layer): in_full(parameter)
            for name, parameter in model.named_parameters()
        }
        if stage == 0:
            gradients = [
                crops[n].grad if n in own else torch.zeros_like(crops[own[0]]) for n in numbers
            ]
            result["features"] = averaged(torch.cat(gradients))
            result["embeddings"] = torch.stack(embeddings)
            result["rows"] = own_rows
        if stage == stages - 1:
            result["losses"] = torch.stack([losses[n] for n in own])
            result["tokens"] = own_tokens
        result["microbatches"] = torch.tensor(own) - numbers[0]
        optimizer.step()
        # Autograd would add the next gradient to it, and DDP's hook that sum to main_grad.
        optimizer.zero_grad()
        steps.append(result)
    return steps


def in_full(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient, of a shard together with those of the other tensor-parallel ranks."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    gradient = parameter.grad
    if not getattr(parameter, "tensor_model_parallel", False) or dist.get_world_size(group) == 1:
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, gradient.contiguous(), group=group)
    return torch.cat(parts, parameter.partition_dim)


def averaged(gradient: Tensor) -> Tensor:
    """What Megatron's DDP does with a parameter's gradient; features are no parameter."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=group)
    return gradient / dist.get_world_size(group)


def in_all_layouts(rank: int) -> dict[str, list[Step]]:
    from megatron.core import parallel_state

    del rank
    results = {}
    for name, parallel in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        sizes = {key: size for key, size in parallel.items() if key.endswith("_parallel_size")}
        parallel_state.initialize_model_parallel(**sizes)
        results[name] = train(**parallel)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Step]]]:
    return run(in_all_layouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneProcess:
    exact: list[Step]
    """The stock class in fp64."""
    stock: list[Step]
    """In fp32: what its own rounding amounts to."""
    ours: list[Step]


@pytest.fixture(scope="module")
def one_process(megatron: None) -> Iterator[OneProcess]:  # noqa: ARG001
    with CudaMeansCpu():
        yield OneProcess(
            exact=train(stock=True, dtype=torch.float64), stock=train(stock=True), ours=train()
        )
        unpatch_step37()


def of_the_rank(name: str, whole: Tensor, rank: Step) -> Tensor:
    """The part of a result of one process that a rank has."""
    if name == "losses":
        return whole[rank["microbatches"]][:, rank["tokens"]]
    if name == "embeddings":
        return whole[rank["microbatches"]][:, rank["rows"]]
    return whole


INDICES = ("tokens", "rows", "microbatches")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_all_gradients_of_every_step_are_those_of_one_process(
    ranks, one_process, layout
):
    for step, (exact, stock) in enumerate(zip(one_process.exact, one_process.stock, strict=True)):
        seen = set()
        for number, rank in enumerate(ranks):
            ours = rank[layout][step]
            for name in ours.keys() - set(INDICES):
                wanted, single = (of_the_rank(name, whole[name], ours) for whole in (exact, stock))
                largest = wanted.abs().max()
                # The ranks sum in another order than one process: so each may be off by as much.
                # Four last places where one process happens to be nearly exact.
                bound = 2 * (single - wanted).abs().max() + 4 * FP32_UNIT * largest
                assert bound < 1e-4 * largest
                assert ours[name].shape == wanted.shape
                error = (ours[name] - wanted).abs().max()
                where = f"step {step}, rank {number}, {name}"
                assert error <= bound, f"{where}: off by {error:.3g}, allowed {bound:.3g}"
                seen.add(name)
        assert seen == exact.keys() - set(INDICES)


def test_a_pipeline_reduces_nothing_and_is_bit_equal_to_one_process(ranks, one_process):
    for step, whole in enumerate(one_process.ours):
        for rank in ranks:
            ours = rank["PP 2"][step]
            assert all(torch.equal(ours[name], whole[name]) for name in ours)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "PP 2"])
def test_the_first_embeddings_are_bit_equal_to_those_of_one_process(ranks, one_process, layout):
    whole = one_process.ours[0]["embeddings"]
    for rank in ranks:
        ours = rank[layout][0]
        wanted = of_the_rank("embeddings", whole, ours)
        if layout in ("TP 2", "DP 2"):
            assert torch.equal(ours["embeddings"], wanted)
            continue
        # A product of fewer rows may be summed in another order; text rows are moved.
        for number, embeddings, expected in zip(
            ours["microbatches"], ours["embeddings"], wanted, strict=True
        ):
            text = is_text(int(number))[ours["rows"]]
            assert 0 < text.sum() < len(text)
            assert torch.equal(embeddings[text], expected[text])


def is_text(number: int) -> Tensor:
    """``[LENGTH]``: positions that no feature of the first step's microbatch lands on."""
    tokens, _ = microbatch(number, torch.float32)
    plan = reference.plan_insert(tokens, [(PATCH_START, [CROP_ROWS]), (IM_START, [ROWS, ROWS])])
    return plan.row_at[:, 0] < 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "PP 2"])
def test_the_ranks_do_not_drift_apart(ranks, layout):
    own = {*INDICES, "embeddings", *(() if layout.startswith("TP") else ("losses",))}
    for first, second in zip(*(rank[layout] for rank in ranks), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first.keys() - own)
