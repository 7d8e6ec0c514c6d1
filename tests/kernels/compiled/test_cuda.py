"""What only a GPU can show: no host synchronisation, graph replay, compiled bf16, large addresses.

The other kernel tests run compiled on a GPU as well; these have no meaning without one.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    clip_normalize,
    plan_insert,
    project_and_insert,
    reference,
)
from step37_kernels.testing import deviation, expected, make_insert_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IM_START, PATCH_START, WORD = 128000, 128003, 11
HIDDEN, WIDTH = 512, 768


class Words(torch.nn.Module):
    """Looks up ``[B, S]`` ids as ``[S, B, H]``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(256, HIDDEN)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        del position_ids
        embedded: Tensor = self.table(input_ids % 256)
        return embedded.transpose(0, 1).contiguous()


def make_ids(starts: list[int], seq_len: int = 1024, batch_size: int = 1) -> Tensor:
    ids = torch.full((batch_size, seq_len), WORD)
    ids[0, starts] = IM_START
    ids[0, 900] = PATCH_START
    return ids.cuda()


def make_module(**options: object) -> tuple[ImageInsertEmbedding, Words]:
    torch.manual_seed(0)
    words = Words().cuda().bfloat16()
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, projector_bias=True, **options)
    return module.cuda().bfloat16(), words


def make_images(count: int, layout: str) -> list[ImageForInsert]:
    features = torch.randn(count, WIDTH, 169, device="cuda", dtype=torch.bfloat16)
    features = features.transpose(1, 2)
    if layout == "contiguous":
        features = features.contiguous()
    crops = torch.randn(1, 81, WIDTH, device="cuda", dtype=torch.bfloat16)
    return [
        ImageForInsert(insert_start_token=PATCH_START, image_features=crops.requires_grad_()),
        ImageForInsert(insert_start_token=IM_START, image_features=features.requires_grad_()),
    ]


@pytest.mark.parametrize("layout", ["contiguous", "channels-first"])
def test_forward_and_backward_never_wait_for_the_device(layout):
    module, _ = make_module()
    ids = make_ids([5, 180, 400])
    images = make_images(3, layout)
    ragged = [ImageForInsert(insert_start_token=IM_START, image_features=[])]
    ragged[0].image_features = [images[1].image_features[0, :100], images[1].image_features[1:]]
    pixels = torch.randint(0, 256, (2, 37, 53, 3), dtype=torch.uint8, device="cuda")
    for _ in range(2):
        module(ids, images).sum().backward()
        clip_normalize(pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in (images, ragged):
            module(ids, batch).sum().backward()
        clip_normalize(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_pytorch_implementation_does_not_wait_either():
    module, _ = make_module(impl="torch")
    ids, images = make_ids([5, 180, 400]), make_images(3, "contiguous")
    module(ids, images).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(ids, images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["contiguous", "channels-first"])
@pytest.mark.parametrize("warm_layout", [True, False])
def test_a_captured_graph_replays_with_new_ids_and_features(layout, warm_layout):
    module, words = make_module()
    ids = make_ids([5, 180, 400])
    images = make_images(3, layout)
    leaves = [image.image_features for image in images]
    grad_output = torch.randn(1024, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    wanted = [*leaves, *module.parameters(), words.table.weight]

    def step() -> list[Tensor]:
        output = module(ids, images)
        return [output, *torch.autograd.grad(output, wanted, grad_output)]

    if not warm_layout:
        # Kernels are compiled by another layout; the one captured is new. Nothing here may keep a
        # leaf's node of autograd alive: it belongs to the stream on which it was made, and no
        # capture may make the default stream wait.
        other = [ImageForInsert(insert_start_token=IM_START, image_features=leaves[1].detach()[:1])]
        module(ids, other).sum().backward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if warm_layout:
            step()
        else:
            torch.autograd.grad(module(ids, [*images, images[0]]), wanted, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    with torch.no_grad():
        ids.copy_(make_ids([1, 2, 700]))
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    for one, other in zip(replayed, step(), strict=True):
        assert torch.equal(one, other)


def test_a_mismatch_is_warned_about_by_the_next_forward(caplog):
    module, _ = make_module()
    ids = make_ids([5, 180])
    module(ids, make_images(3, "contiguous"))
    assert not caplog.records
    torch.cuda.synchronize()
    module(ids, None)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert ["2 in input_ids, 3 features" in warning for warning in warnings] == [True]


@pytest.mark.parametrize("rows", [1, 100, 169, 600, 1521, 2500])
@pytest.mark.parametrize("layout", ["contiguous", "channels-first"])
def test_compiled_bf16_is_within_its_rounding_at_every_tile_of_the_table(rows, layout):
    ids = torch.full((1, rows + 50), WORD)
    ids[0, 7] = IM_START
    case = make_insert_case(
        ids,
        [(IM_START, [(1, rows)])],
        hidden=HIDDEN,
        width=WIDTH,
        seed=rows,
        dtype=torch.bfloat16,
        layout=layout,
        bias=True,
        device="cuda",
    )
    plan = plan_insert(case.input_ids, case.plan_groups)
    output = project_and_insert(case.embeddings, case.features, case.weight, case.bias, plan)
    grads = torch.autograd.grad(
        output, [case.embeddings, case.weight, case.bias, *case.features], case.grad_output
    )
    wanted = expected(case)
    assert deviation(output, wanted.output, wanted.output_bound)[1] <= 1
    assert torch.equal(grads[0].double().cpu(), wanted.grad_embeddings)
    assert deviation(grads[1], wanted.grad_weight, wanted.grad_weight_bound)[1] <= 1
    assert deviation(grads[2], wanted.grad_bias, wanted.grad_bias_bound)[1] <= 1
    features = deviation(grads[3], wanted.grad_features[0], wanted.grad_features_bound[0])
    assert features[1] <= 1


def test_results_are_bit_equal_from_run_to_run():
    module, words = make_module()
    ids, images = make_ids([5, 180, 400]), make_images(3, "channels-first")
    wanted = [*module.parameters(), words.table.weight, images[1].image_features]
    runs = []
    for _ in range(3):
        output = module(ids, images)
        runs.append([output, *torch.autograd.grad(output, wanted, torch.ones_like(output))])
    for run in runs[1:]:
        # The embedding table's own gradient is PyTorch's affair.
        for one, other in zip(runs[0][:3] + runs[0][4:], run[:3] + run[4:], strict=True):
            assert torch.equal(one, other)


def test_elements_beyond_two_to_the_31_are_addressed_right():
    hidden, seq_len = 4096, 2**31 // 4096 + 2048
    ids = torch.full((1, seq_len), WORD, device="cuda")
    starts = [100, seq_len - 1000]
    ids[0, starts] = IM_START
    embeddings = torch.ones(seq_len, 1, hidden, device="cuda", dtype=torch.bfloat16)
    features = torch.randn(2, 169, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(hidden, 64, device="cuda", dtype=torch.bfloat16)
    plan = plan_insert(ids, [(IM_START, [169, 169])])
    output = project_and_insert(embeddings, features, weight, None, plan)
    projected = reference.project(features.detach(), weight)
    for k, start in enumerate(starts):
        span = output[start + 1 : start + 170, 0]
        torch.testing.assert_close(span, projected[k], rtol=2**-7, atol=2**-7)
        assert (output[start + 170 : start + 400] == 1).all()
    grad_output = torch.zeros_like(output)
    grad_output[starts[1] + 1 : starts[1] + 170] = 1
    (grad,) = torch.autograd.grad(output, features, grad_output)
    assert not grad[0].any()
    torch.testing.assert_close(grad[1, 0], weight.float().sum(0).bfloat16(), rtol=2**-6, atol=0.5)


def test_the_current_device_need_not_be_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = make_insert_case(
        torch.tensor([[IM_START, 1, 2]]),
        [(IM_START, [(1, 2)])],
        hidden=64,
        width=64,
        seed=0,
        dtype=torch.bfloat16,
        device="cuda:1",
    )
    with torch.cuda.device(0):
        plan = plan_insert(case.input_ids, case.plan_groups)
        output = project_and_insert(case.embeddings, case.features, case.weight, None, plan)
        output.backward(case.grad_output)
    wanted = expected(case)
    assert deviation(output, wanted.output, wanted.output_bound)[1] <= 1


def test_a_new_number_of_rows_compiles_nothing():
    from step37_kernels.ops import copy_rows as copy_ops
    from step37_kernels.ops import gradient, project
    from step37_kernels.ops import plan_rows as plan_ops

    kernels = [
        plan_ops.plan_kernel,
        copy_ops.copy_rows_kernel,
        project.project_insert_kernel,
        project.sum_parts_kernel,
        project.place_rows_kernel,
        gradient.gradient_rows_kernel,
    ]
    module, _ = make_module()

    def compiled() -> int:
        return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())

    def step(count: int, seq_len: int) -> None:
        ids = torch.full((1, seq_len), WORD, device="cuda")
        ids[0, 5] = IM_START
        images = make_images(count, "channels-first")[1:]
        module(ids, images).sum().backward()

    for count in (1, 4, 13):  # one of each bucket of the tile table
        step(count, 2000)
    before = compiled()
    for count, seq_len in ((2, 1001), (3, 512), (5, 64), (12, 4096), (16, 777), (31, 1)):
        step(count, max(seq_len, 6))
    assert compiled() == before


def test_a_layout_first_seen_on_a_busy_stream_is_right_on_another_at_once():
    input_ids = make_ids([5, 180, 400])
    groups = [(IM_START, [3, 1, 4])]
    wanted = reference.plan_insert(input_ids.cpu(), groups)
    plan_insert(input_ids, [(IM_START, [9, 9, 9])])
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)
        plan_insert(input_ids, groups)
    plan = plan_insert(input_ids, groups)
    assert torch.equal(plan.destinations.cpu(), wanted.destinations)


def test_tensors_made_on_the_gpu_by_default_do_not_break_staging():
    module, _ = make_module()
    ids, images = make_ids([5, 180, 400]), make_images(3, "contiguous")
    wanted = module(ids, images)
    with torch.device("cuda"):
        assert torch.equal(module(ids, [*images]), wanted)
