"""``gradient_accumulation_fusion``: the weight's gradient goes to ``main_grad``, as in Megatron."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.testing import deviation, expected, make_insert_case
from tests.kernels.strategies import FILLER, TOKENS

HIDDEN, WIDTH = 48, 40


def make(device: str, impl: str, main_dtype: torch.dtype | None, dtype: torch.dtype):
    ids = torch.full((1, 30), FILLER)
    ids[0, 2] = ids[0, 12] = TOKENS[0]
    case = make_insert_case(
        ids,
        [(TOKENS[0], [(2, 7)])],
        hidden=HIDDEN,
        width=WIDTH,
        seed=0,
        dtype=dtype,
        bias=True,
        device=device,
    )
    module = ImageInsertEmbedding(
        lambda **_: case.embeddings * 1,
        WIDTH,
        HIDDEN,
        projector_bias=True,
        impl=impl,
        gradient_accumulation_fusion=True,
    )
    module.align_projector.weight = nn.Parameter(case.weight.detach())
    module.align_projector.bias = nn.Parameter(case.bias.detach())
    weight = module.align_projector.weight
    if main_dtype is not None:
        weight.main_grad = torch.zeros(weight.shape, dtype=main_dtype, device=device)

    def step() -> None:
        images = [ImageForInsert(insert_start_token=TOKENS[0], image_features=case.features[0])]
        module(case.input_ids, images).backward(case.grad_output)

    return case, weight, module.align_projector.bias, step


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_microbatches_add_up_in_fp32_beyond_the_weights_own_dtype(device, impl):
    case, weight, bias, step = make(device, impl, torch.float32, torch.float16)
    for _ in range(3):
        step()
    wanted = expected(case)
    # The kernel keeps fp32 all the way; PyTorch rounds each gradient to fp16 before it is added.
    rounding = 3 * wanted.grad_weight_bound
    assert deviation(weight.main_grad, 3 * wanted.grad_weight, rounding)[1] <= 1
    assert weight.grad is None
    assert bias.grad is not None
    if impl == "triton":
        assert not torch.equal(weight.main_grad.half().float(), weight.main_grad)


@pytest.mark.parametrize("main_dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_main_grad_is_rounded_once_a_microbatch(device, main_dtype):
    case, weight, _, step = make(device, "triton", main_dtype, torch.float32)
    step()
    wanted = expected(case)
    rounded = wanted.grad_weight_bound + wanted.grad_weight.abs() * torch.finfo(main_dtype).eps
    assert deviation(weight.main_grad, wanted.grad_weight, rounded)[1] <= 1


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_with_megatrons_flag_a_dummy_gradient_lets_the_hooks_run(device, impl):
    _, weight, _, step = make(device, impl, torch.float32, torch.float32)
    weight.grad_added_to_main_grad = False
    calls: list[int] = []
    weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    step()
    assert weight.grad_added_to_main_grad is True
    assert calls == [1]
    assert weight.grad.shape == weight.shape
    assert weight.grad.dtype == weight.dtype


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_dummy_is_zero_where_megatron_wants_it_so(device, impl):
    _, weight, _, step = make(device, impl, torch.float32, torch.float32)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = True
    step()
    assert weight.grad.abs().max() == 0
    assert weight.main_grad.abs().max() > 0


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_weight_marked_for_overwriting_is_overwritten(device, impl):
    case, weight, _, step = make(device, impl, torch.float32, torch.float32)
    weight.main_grad.fill_(float("nan"))
    weight.overwrite_main_grad = True
    for _ in range(2):
        step()
    wanted = expected(case)
    assert deviation(weight.main_grad, wanted.grad_weight, wanted.grad_weight_bound)[1] <= 1


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_megatron_fsdp_hands_out_the_buffer(device, impl):
    case, weight, _, step = make(device, impl, None, torch.float32)
    buffer = torch.full(weight.shape, float("nan"), device=device)
    weight.__fsdp_param__ = True
    weight.get_main_grad = lambda: buffer
    step()
    wanted = expected(case)
    assert weight.main_grad is buffer
    assert deviation(buffer, wanted.grad_weight, wanted.grad_weight_bound)[1] <= 1


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_without_main_grad_it_is_an_error_before_anything_is_lost(device, impl):
    _, weight, _, step = make(device, impl, None, torch.float32)
    with pytest.raises(ValueError, match=r"weight: gradient_accumulation_fusion=True needs weight"):
        step()
    weight.requires_grad_(False)
    step()


@pytest.mark.parametrize(
    ("main_grad", "got"),
    [
        (torch.zeros(WIDTH, HIDDEN).T, r"\(48, 40\) with strides \(1, 48\)"),
        (torch.zeros(HIDDEN * WIDTH), r"\(1920,\) with strides \(1,\)"),
    ],
)
def test_a_main_grad_that_the_kernel_would_write_wrong_is_refused(device, main_grad, got):
    _, weight, _, step = make(device, "triton", torch.float32, torch.float32)
    weight.main_grad = main_grad.to(device)
    with pytest.raises(ValueError, match=r"weight.main_grad: expected \(48, 40\), contig.*" + got):
        step()
    assert not weight.main_grad.any()
