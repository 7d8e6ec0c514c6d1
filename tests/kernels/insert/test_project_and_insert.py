"""``project_and_insert`` against the reference in float64, within bounds derived from rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from step37_kernels import plan_insert, project_and_insert
from step37_kernels.testing import InsertCase, expected, make_insert_case
from tests.kernels.checks import assert_gradients, assert_output, assert_within
from tests.kernels.strategies import FILLER, TOKENS, feature_groups, token_ids

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels-first"]


def run(case: InsertCase, impl: str, **options: object) -> torch.Tensor:
    plan = plan_insert(case.input_ids, case.plan_groups, impl=impl)
    return project_and_insert(
        case.embeddings, case.features, case.weight, case.bias, plan, impl=impl, **options
    )


cases = st.fixed_dictionaries(
    {
        "input_ids": token_ids(),
        "groups": feature_groups(),
        "hidden": st.sampled_from([1, 16, 40, 64]),
        "width": st.sampled_from([3, 32, 48, 96]),
        "seed": st.integers(0, 2**31),
        "layout": st.sampled_from(LAYOUTS),
        "bias": st.booleans(),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(arguments=cases)
def test_forward_and_gradients_are_the_references(device, dtype, arguments):
    case = make_insert_case(**arguments, dtype=dtype, device=device)
    output = run(case, "triton")
    assert_output(case, output)
    assert_gradients(case, output, case.grad_output)


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(arguments=cases)
def test_the_pytorch_implementation_is_the_references_too(dtype, arguments):
    case = make_insert_case(**arguments, dtype=dtype)
    output = run(case, "torch")
    assert_output(case, output)
    assert_gradients(case, output, case.grad_output)


@pytest.mark.parametrize(
    ("dtype", "embedding_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@given(arguments=cases)
def test_rows_are_rounded_to_the_weights_dtype_then_to_the_embeddings(
    device, dtype, embedding_dtype, arguments
):
    case = make_insert_case(
        **arguments, dtype=dtype, embedding_dtype=embedding_dtype, device=device
    )
    output = run(case, "triton")
    assert_output(case, output)
    assert_gradients(case, output, case.grad_output)
    if dtype != torch.float32:
        inserted = (plan_insert(case.input_ids, case.plan_groups).row_at >= 0).to(output.device)
        assert torch.equal(output[inserted].to(dtype).to(embedding_dtype), output[inserted])


def small_case(device: str, **options: object) -> InsertCase:
    input_ids = torch.full((2, 30), FILLER)
    input_ids[0, 3] = input_ids[0, 12] = input_ids[1, 1] = TOKENS[0]
    input_ids[1, 20] = TOKENS[1]
    arguments = {"hidden": 48, "width": 64, "seed": 0, "dtype": torch.float32, "bias": True}
    groups = [(TOKENS[0], [(3, 7)]), (TOKENS[1], [(1, 5)])]
    return make_insert_case(input_ids, groups, device=device, **(arguments | options))


AWKWARD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded from one value": lambda g: g[:1, :1, :1].expand(g.shape),
    "expanded over the sequence": lambda g: g[:1].expand(g.shape),
    "transposed batch and sequence": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "hidden outermost": lambda g: g.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other column of a wider one": lambda g: g.repeat_interleave(2, dim=2)[..., ::2],
    "slice of a longer sequence": lambda g: torch.cat([g, g, g])[g.shape[0] : 2 * g.shape[0]],
    "rows in reverse storage": lambda g: g.flip(0).flip(0),
}


@pytest.mark.parametrize("layout", AWKWARD)
def test_gradients_are_right_for_a_grad_output_that_is(device, layout):
    case = small_case(device)
    grad_output = AWKWARD[layout](case.grad_output)
    before = grad_output.clone()
    assert_gradients(case, run(case, "triton"), grad_output)
    assert torch.equal(grad_output, before)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_embeddings_with_any_strides_are_left_as_they_are(device, impl):
    case = small_case(device)
    expanded = case.embeddings.detach()[:1].expand(case.embeddings.shape)
    transposed = case.embeddings.detach().transpose(0, 1).contiguous().transpose(0, 1)
    for embeddings in (expanded, transposed, case.embeddings.detach()):
        before = embeddings.clone()
        other = dataclasses.replace(case, embeddings=embeddings)
        assert_output(other, run(other, impl))
        assert torch.equal(embeddings, before)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_features_sliced_out_of_larger_tensors_are_read_where_they_lie(device, impl):
    case = small_case(device)
    with_class_token = torch.cat([torch.zeros_like(case.features[0][:, :1]), case.features[0]], 1)
    wider = case.features[1].repeat(1, 1, 2)
    groups = [
        (TOKENS[0], [with_class_token.detach()[:, 1:]]),
        (TOKENS[1], [wider.detach()[..., : case.weight.shape[1]]]),
    ]
    sliced = dataclasses.replace(case, groups=groups)
    assert not any(feature.is_contiguous() for feature in sliced.features[:1])
    assert_output(sliced, run(sliced, impl))


def test_a_weight_that_is_a_transposed_view_is_read_right(device):
    case = small_case(device)
    weight = case.weight.detach().T.contiguous().T.requires_grad_()
    other = dataclasses.replace(case, weight=weight)
    output = run(other, "triton")
    assert_output(other, output)
    assert_gradients(other, output, case.grad_output)


def test_two_runs_are_bit_equal(device):
    case = small_case(device, dtype=torch.float16)
    results = []
    for _ in range(2):
        output = run(case, "triton")
        leaves = [case.embeddings, case.weight, case.bias, *case.features]
        results.append([output, *torch.autograd.grad(output, leaves, case.grad_output)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


class Products(TorchDispatchMode):
    """Shapes of the left operands of the library's matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


# What is taken from grad_output in the one launch (of the embeddings, the rows, the bias), and the
# shapes of what is multiplied: 26 rows, 21 of them of the first group.
NEEDS = {
    "embeddings": ((True, False, False), []),
    "weight": ((False, True, False), [(48, 26)]),
    "bias": ((False, False, True), []),
    "first feature": ((False, True, False), [(21, 48)]),
    "last feature": ((False, True, False), [(5, 48)]),
}


@pytest.mark.parametrize("needed", [*NEEDS, "nothing"])
def test_only_what_needs_a_gradient_is_computed(device, needed, monkeypatch):
    from step37_kernels.ops import gradient

    taken: list[tuple[bool, bool, bool]] = []
    real = gradient.gradient_rows

    def spy(*arguments, embeddings, rows, bias, **order):
        taken.append((embeddings, rows, bias))
        return real(*arguments, embeddings=embeddings, rows=rows, bias=bias, **order)

    monkeypatch.setattr(gradient, "gradient_rows", spy)
    case = small_case(device)
    leaves = {
        "embeddings": case.embeddings,
        "weight": case.weight,
        "bias": case.bias,
        "first feature": case.leaves[0],
        "last feature": case.leaves[1],
    }
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == needed)
    groups = [
        (token, [leaf if leaf.requires_grad else leaf.detach()])
        for (token, _), leaf in zip(case.groups, case.leaves, strict=True)
    ]
    case = dataclasses.replace(case, groups=groups)
    output = run(case, "triton")
    if needed == "nothing":
        assert not output.requires_grad
        return
    with torch.autograd.set_multithreading_enabled(False), Products() as products:
        output.backward(case.grad_output)
    assert ([*taken], products.shapes) == ([NEEDS[needed][0]], NEEDS[needed][1])
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]
    wanted = expected(case)
    if needed == "first feature":
        assert_within(
            needed, case.leaves[0].grad, wanted.grad_features[0], wanted.grad_features_bound[0]
        )
    if needed == "last feature":
        assert_within(
            needed, case.leaves[1].grad, wanted.grad_features[1], wanted.grad_features_bound[1]
        )


def test_nothing_of_the_features_is_kept_for_a_frozen_projector(device):
    case = small_case(device)
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    output = run(case, "triton")
    saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
    assert {tensor.shape for tensor in saved} == {(30, 2), (26,), case.weight.shape}


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_features_of_another_dtype_are_cast_to_the_weights(device, impl):
    case = small_case(device, dtype=torch.float16)
    wide = [(token, [t.detach().float() for t in tensors]) for token, tensors in case.groups]
    output = run(dataclasses.replace(case, groups=wide), impl)
    assert torch.equal(output, run(case, impl))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_rows_return_the_embeddings_themselves(device, impl):
    case = make_insert_case(
        torch.tensor([[TOKENS[0], 5]]),
        [(TOKENS[0], [(0, 3), (2, 0)])],
        hidden=8,
        width=4,
        seed=0,
        dtype=torch.float32,
        device=device,
    )
    assert run(case, impl) is case.embeddings


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 1, 0)])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_embeddings_without_elements_come_back_themselves(device, impl, shape):
    embeddings = torch.zeros(shape, device=device)
    seq_len, batch_size, hidden = shape
    ids = torch.full((batch_size, seq_len), 7, device=device)
    weight = torch.ones(hidden, 6, device=device)
    features = torch.ones(1, 1, 6, device=device)
    plan = plan_insert(ids, [(7, [1])], impl=impl)
    assert project_and_insert(embeddings, features, weight, None, plan, impl=impl) is embeddings


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_rows_without_channels_are_the_bias(device, impl, bias):
    case = small_case(device, width=0, bias=bias)
    output = run(case, impl)
    assert_output(case, output)
    assert_gradients(case, output, case.grad_output)


def arguments_of(case: InsertCase) -> dict[str, object]:
    return {
        "embeddings": case.embeddings,
        "features": case.features,
        "weight": case.weight,
        "bias": case.bias,
        "plan": plan_insert(case.input_ids, case.plan_groups),
    }


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("weight", lambda c: c.weight[0], r"weight: expected \[H, C\], got \(64,\)"),
        (
            "embeddings",
            lambda c: c.embeddings[..., :40],
            r"embeddings: expected \[S, B, H\] = \[30, 2, 48\], got \(30, 2, 40\)",
        ),
        (
            "embeddings",
            lambda c: c.embeddings[:, 0],
            r"embeddings: expected \[S, B, H\] = \[30, 2, 48\], got \(30, 48\)",
        ),
        (
            "embeddings",
            lambda c: c.embeddings.transpose(0, 1),
            r"embeddings: expected \[S, B, H\] = \[30, 2, 48\], got \(2, 30, 48\)",
        ),
        ("embeddings", lambda c: c.embeddings.long(), r"embeddings: expected a floating-point"),
        ("bias", lambda c: c.bias[:-1], r"bias: expected \[H\] = \[48\], got \(47,\)"),
        ("bias", lambda c: c.bias.half(), r"bias: expected the weight's dtype torch.float32"),
        (
            "features",
            lambda c: c.features[0],
            r"features: expected R = 26 rows \(the plan's\), got 21 rows",
        ),
        (
            "features",
            lambda c: [c.features[0], c.features[1][..., :60]],
            r"features\[1\]: expected C = 64 \(the weight's\), got \(1, 5, 60\)",
        ),
        (
            "features",
            lambda c: c.features[0][None],
            r"features: expected \[L, C\] or \[N, L, C\], got \(1, 3, 7, 64\)",
        ),
        (
            "features",
            lambda c: [f.int() for f in c.features],
            r"features\[0\]: expected a floating",
        ),
        (
            "features",
            lambda c: [f.to("meta") for f in c.features],
            r"features\[0\]: expected the weight's device (cpu|cuda:0), got meta",
        ),
        (
            "embeddings",
            lambda c: c.embeddings.to("meta"),
            r"embeddings: expected the weight's device (cpu|cuda:0), got meta",
        ),
        (
            "plan",
            lambda c: plan_insert(c.input_ids.to("meta"), c.plan_groups, impl="torch"),
            r"plan.destinations: expected the weight's device (cpu|cuda:0), got meta",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_bad_argument_is_named_with_what_was_expected(device, impl, argument, change, message):
    case = small_case(device)
    with pytest.raises(ValueError, match=message):
        project_and_insert(**(arguments_of(case) | {argument: change(case)}), impl=impl)


def test_dtypes_without_kernels_are_refused_not_converted(device):
    case = small_case(device, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"embeddings: the Triton kernels take .* got torch.float64"
    ):
        run(case, "triton")
    assert run(case, "torch").dtype == torch.float64


def test_a_bias_with_a_stride_is_read_right(device):
    case = small_case(device)
    strided = case.bias.detach().repeat_interleave(2)[::2].requires_grad_()
    assert not strided.is_contiguous()
    output = run(dataclasses.replace(case, bias=strided), "triton")
    assert torch.equal(output, run(case, "triton"))
    output.backward(case.grad_output)
    assert_within("bias", strided.grad, expected(case).grad_bias, expected(case).grad_bias_bound)


def test_gradients_that_cannot_be_differentiated_again_say_so(device):
    case = small_case(device)
    output = run(case, "triton")
    # Of what depends on the weight twice: else nothing would be missed.
    (grad,) = torch.autograd.grad(output.square().sum(), case.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_nothing_that_is_given_is_written_to(device):
    case = small_case(device)
    given = {
        name: value.detach().clone()
        for name, value in arguments_of(case).items()
        if isinstance(value, torch.Tensor)
    }
    output = run(case, "triton")
    output.backward(case.grad_output)
    assert output.data_ptr() != case.embeddings.data_ptr()
    for name, value in given.items():
        assert torch.equal(arguments_of(case)[name], value)


def test_an_inference_tensor_is_read_in_and_out_of_inference_mode(device):
    case = small_case(device)
    wanted = run(case, "triton")
    with torch.inference_mode():
        embeddings = case.embeddings.clone()
        inside = run(dataclasses.replace(case, embeddings=embeddings), "triton")
        assert torch.equal(inside, wanted)
    outside = run(dataclasses.replace(case, embeddings=embeddings), "triton")
    assert outside.requires_grad
    assert torch.equal(outside, wanted)
