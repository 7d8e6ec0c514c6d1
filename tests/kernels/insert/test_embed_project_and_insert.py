"""``embed_project_and_insert`` against the reference in float64, and its gradient for the table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from step37_kernels import embed_project_and_insert, plan_insert, project_and_insert, reference
from step37_kernels.lookup import LookUp
from step37_kernels.ops import order as order_ops
from step37_kernels.ops import project
from step37_kernels.ops import table as table_ops
from step37_kernels.ops.launch import launch
from step37_kernels.testing import InsertCase, make_insert_case, product_bound
from tests.kernels.checks import assert_within
from tests.kernels.insert.test_project_and_insert import AWKWARD

TOKENS = (7, 3)
VOCABULARY = 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["triton", "torch"]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Ids of every kind of repetition, and feature groups that fit them or not."""
    batch_size, seq_len = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    words = draw(st.sampled_from([[5], [0, 5], list(range(VOCABULARY)), [7], [7, 3, 5]]))
    ids = draw(
        st.lists(
            st.sampled_from(words), min_size=batch_size * seq_len, max_size=batch_size * seq_len
        )
    )
    tensor = st.tuples(st.integers(0, 3), st.integers(0, 9))
    group = st.tuples(st.sampled_from(TOKENS), st.lists(tensor, min_size=1, max_size=2))
    return {
        "input_ids": torch.tensor(
            ids, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
        ).view(batch_size, seq_len),
        "groups": draw(st.lists(group, min_size=1, max_size=2)),
        "hidden": draw(st.sampled_from([1, 16, 40])),
        "width": draw(st.sampled_from([3, 32])),
        "seed": draw(st.integers(0, 2**31)),
        "bias": draw(st.booleans()),
    }


def with_anything_under_features(case: InsertCase) -> Tensor:
    """The case's ids, with ids that no table has wherever a feature row lands."""
    row_at = reference.plan_insert(case.input_ids.cpu(), case.plan_groups).row_at.T
    ids = case.input_ids.clone()
    starts = torch.isin(ids, torch.tensor(TOKENS, dtype=ids.dtype, device=ids.device))
    hidden_ids = (row_at >= 0).to(ids.device) & ~starts
    ids[hidden_ids] = torch.tensor([-9, 10**6], dtype=ids.dtype, device=ids.device)[
        torch.arange(int(hidden_ids.sum()), device=ids.device) % 2
    ]
    return ids


def make_table(case: InsertCase, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(VOCABULARY, case.weight.shape[0], generator=generator)
    return values.to(case.weight.device, dtype).requires_grad_()


def gradient_of_table(case: InsertCase, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and how far a sum in fp32 that is rounded once may be from it."""
    row_at = reference.plan_insert(case.input_ids.cpu(), case.plan_groups).row_at.flatten()
    ids = case.input_ids.cpu().T.flatten().long()
    grad = grad_output.detach().double().cpu().reshape(len(ids), -1)
    one_hot = torch.zeros(VOCABULARY, len(ids), dtype=torch.float64)
    text = (row_at < 0).nonzero()[:, 0]
    one_hot[ids[text], text] = 1
    return one_hot @ grad, product_bound(one_hot, grad, [grad_output.dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(arguments=problems())
def test_rows_are_the_tables_bit_for_bit_and_gradients_within_rounding(
    device, dtype, impl, arguments
):
    case = make_insert_case(**arguments, dtype=dtype, device=device)
    table = make_table(case, dtype)
    ids = with_anything_under_features(case)
    plan = plan_insert(ids, case.plan_groups, impl=impl)
    output = embed_project_and_insert(
        ids, table, case.features, case.weight, case.bias, plan, impl=impl
    )
    looked_up = table.detach()[ids.clamp(0, VOCABULARY - 1).long()].transpose(0, 1)
    wanted = project_and_insert(looked_up, case.features, case.weight, case.bias, plan, impl=impl)
    assert torch.equal(output, wanted)
    leaves = [table, case.weight, *case.features] + [case.bias] * (case.bias is not None)
    grads = torch.autograd.grad(
        output, leaves, case.grad_output, allow_unused=True, materialize_grads=True
    )
    exact, bound = gradient_of_table(case, case.grad_output)
    assert grads[0].dtype == dtype
    assert_within("grad table", grads[0], exact, bound)
    others = (
        torch.autograd.grad(
            wanted, leaves[1:], case.grad_output, allow_unused=True, materialize_grads=True
        )
        if wanted.requires_grad
        else [torch.zeros_like(leaf) for leaf in leaves[1:]]
    )
    for ours, separate in zip(grads[1:], others, strict=True):
        assert torch.equal(ours, separate)


@pytest.mark.parametrize("batch_first", [False, True])
@given(arguments=problems())
def test_the_reference_says_the_same_by_a_loop(arguments, batch_first):
    case = make_insert_case(**arguments, dtype=torch.float64)
    table = make_table(case, torch.float64)
    ids = with_anything_under_features(case)
    plan = plan_insert(ids, case.plan_groups, batch_first=batch_first, impl="torch")
    arguments_ = (ids, table, case.features, case.weight, case.bias, plan)
    ours = embed_project_and_insert(*arguments_, impl="torch")
    loop = reference.embed_project_and_insert(*arguments_, batch_first=batch_first)
    torch.testing.assert_close(ours, loop)
    gradient = torch.randn_like(loop)
    for leaf in (table, case.weight):
        one, other = (
            torch.autograd.grad(
                result, leaf, gradient, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            for result in (ours, loop)
        )
        torch.testing.assert_close(one, other)


def small_case(device: str, dtype: torch.dtype = torch.float32) -> InsertCase:
    ids = torch.arange(60).view(2, 30) % 5
    ids[0, 3] = ids[0, 12] = ids[1, 1] = TOKENS[0]
    ids[1, 20] = TOKENS[1]
    groups = [(TOKENS[0], [(3, 7)]), (TOKENS[1], [(1, 5)])]
    return make_insert_case(
        ids, groups, hidden=48, width=64, seed=0, dtype=dtype, bias=True, device=device
    )


def run(case: InsertCase, table: Tensor, impl: str, **options: Any) -> Tensor:
    plan = plan_insert(case.input_ids, case.plan_groups, impl=impl)
    return embed_project_and_insert(
        case.input_ids, table, case.features, case.weight, case.bias, plan, impl=impl, **options
    )


@pytest.mark.parametrize("layout", AWKWARD)
def test_the_tables_gradient_is_right_for_a_grad_output_that_is(device, layout):
    case = small_case(device)
    table = make_table(case, torch.float32)
    grad_output = AWKWARD[layout](case.grad_output)
    for impl in IMPLS:
        (grad,) = torch.autograd.grad(run(case, table, impl), table, grad_output)
        assert_within(impl, grad, *gradient_of_table(case, grad_output))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "distinct", "outside"])
@pytest.mark.parametrize("count", [0, 1, 16, 17, 511, 513, 1100])
def test_positions_are_put_in_order_as_by_a_stable_sort(device, count, kind, dtype):
    generator = torch.Generator().manual_seed(count)
    ids = {
        "random": torch.randint(0, VOCABULARY, (count,), generator=generator),
        "equal": torch.full((count,), 3),
        "distinct": torch.randperm(count, generator=generator),
        "outside": torch.randint(-4, VOCABULARY + 4, (count,), generator=generator) * 10**8,
    }[kind].to(device, dtype)
    num_rows = count if kind == "distinct" else VOCABULARY
    in_order, order = order_ops.order_by_id(ids, num_rows)
    wanted, positions = ids.clamp(-1, num_rows).sort(stable=True)
    assert torch.equal(in_order, wanted)
    assert torch.equal(order, positions)


def test_many_positions_and_huge_tables_are_left_to_the_librarys_sort():
    assert order_ops.is_counted(8192, 128_896)
    assert not order_ops.is_counted(8193, 8)
    largest = 2**31 // 8192 - 3
    assert order_ops.is_counted(8192, largest)
    assert not order_ops.is_counted(8192, largest + 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_largest_number_that_is_counted_with_does_not_overflow(device, dtype):
    ids = torch.tensor([2**31 - 1, -(2**31), 0, 2**31 - 1, 5], device=device, dtype=dtype)
    num_rows = (2**31 - 1) // len(ids) - 2
    assert order_ops.is_counted(len(ids), num_rows)
    assert not order_ops.is_counted(len(ids), num_rows + 1)
    in_order, order = order_ops.order_by_id(ids, num_rows)
    assert in_order.tolist() == [-1, 0, 5, num_rows, num_rows]
    assert order.tolist() == [1, 2, 4, 0, 3]


@pytest.mark.parametrize("counted", [True, False])
def test_a_word_that_spans_more_blocks_than_are_added_at_a_time_counts_each_once(
    device, counted, monkeypatch
):
    """Padding: 3 words, of which one fills 20 blocks; whichever way they are put in order."""
    if not counted:
        monkeypatch.setattr(order_ops, "MOST_COUNTED", 0)
    assert 2 * table_ops.JOIN_BLOCKS < 20
    ids = torch.tensor([1] * 7 + [4] * 20 * table_ops.BLOCK_P + [5] * 9, device=device)
    grad_output = torch.randn(len(ids), 8, device=device)
    table = torch.zeros(VOCABULARY, 8, device=device, requires_grad=True)
    LookUp.apply(table, ids, None, None, True, math.nan).backward(grad_output)
    one_hot = torch.nn.functional.one_hot(ids, VOCABULARY).double().T.cpu()
    grad = grad_output.double().cpu()
    bound = product_bound(one_hot, grad, [torch.float32])
    assert_within("table", table.grad, one_hot @ grad, bound)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shard_looks_up_the_words_of_its_own_positions(device, impl):
    case = small_case(device)
    table = make_table(case, torch.float32)
    whole = run(case, table, impl)
    (grad,) = torch.autograd.grad(whole, table, case.grad_output)
    plan = plan_insert(case.input_ids, case.plan_groups, impl=impl)
    parts, total = [], torch.zeros_like(table)
    for positions in torch.arange(30, device=device).chunk(3):
        part = embed_project_and_insert(
            case.input_ids[:, positions],
            table,
            case.features,
            case.weight,
            case.bias,
            plan.shard(positions),
            impl=impl,
        )
        total += torch.autograd.grad(part, table, case.grad_output[positions])[0]
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(total, grad)


def test_two_runs_are_bit_equal(device):
    case = small_case(device, torch.float16)
    table = make_table(case, torch.float16)
    for impl in IMPLS:
        runs = [
            torch.autograd.grad(run(case, table, impl), [table, case.weight], case.grad_output)
            for _ in range(2)
        ]
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["table", "projector", "both"])
def test_nothing_is_computed_for_what_is_frozen(device, impl, frozen, monkeypatch):
    from step37_kernels import lookup

    calls: list[str] = []
    monkeypatch.setattr(lookup, "table_gradient", lambda *_, **__: calls.append("table"))
    monkeypatch.setattr("step37_kernels.insert.table_gradient", lambda *_, **__: calls.append("t"))
    case = small_case(device)
    table = make_table(case, torch.float32)
    if frozen in ("table", "both"):
        table.requires_grad_(False)
    if frozen in ("projector", "both"):
        case.weight.requires_grad_(False)
        case.bias.requires_grad_(False)
    output = run(case, table, impl)
    output.backward(case.grad_output)
    assert bool(calls) == (frozen == "projector")
    assert (case.weight.grad is None) == (frozen != "table")


@pytest.mark.parametrize("impl", IMPLS)
def test_an_id_outside_the_table_at_a_text_position_is_an_error_on_the_cpu(device, impl):
    if device == "cuda":
        pytest.skip("on CUDA nothing waits for the ids")
    case = small_case(device)
    table = make_table(case, torch.float32)
    for wrong in (VOCABULARY, -1):
        case.input_ids[1, 0] = wrong
        message = rf"expected 0 to 11 at text positions.*got {wrong} at \(1, 0\) of \(2, 30\)"
        with pytest.raises(IndexError, match=message):
            run(case, table, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_where_nobody_waits_a_row_of_an_unknown_id_is_nan_and_gets_no_gradient(
    device, impl, monkeypatch
):
    monkeypatch.setattr("step37_kernels.insert.check_ids", lambda *_: None)  # as on CUDA
    case = small_case(device)
    table = make_table(case, torch.float32)
    wanted = run(case, table, impl)
    case.input_ids[0, 0], case.input_ids[1, 0] = VOCABULARY, -1
    output = run(case, table, impl)
    assert output[0].isnan().all()
    assert torch.equal(output[1:], wanted[1:])
    (grad,) = torch.autograd.grad(output, table, case.grad_output)
    text = case.grad_output.clone()
    text[0] = 0
    exact, bound = gradient_of_table(small_case(device), text)
    assert_within("table", grad, exact, bound)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(4)}, r"table: expected \[V, H\] = \[V, 48\], got \(4,\)"),
        ({"table": torch.zeros(4, 40)}, r"table: expected \[V, H\] = \[V, 48\], got \(4, 40\)"),
        ({"table": torch.zeros(4, 48, dtype=torch.int32)}, "table: expected a floating-point"),
        (
            {"input_ids": torch.zeros(2, 29, dtype=torch.int64)},
            r"input_ids: expected \[B, S\] = \[2, 30\] \(the plan's\), got \(2, 29\)",
        ),
        (
            {"input_ids": torch.zeros(30, 2, dtype=torch.int64)},
            r"input_ids: expected \[B, S\] = \[2, 30\] \(the plan's\), got \(30, 2\)",
        ),
        (
            {"input_ids": torch.zeros(60, dtype=torch.int64)},
            r"input_ids: expected \[B, S\] = \[2, 30\] \(the plan's\), got \(60,\)",
        ),
        (
            {"input_ids": torch.zeros(1, 2, 30, dtype=torch.int64)},
            r"input_ids: expected \[B, S\] = \[2, 30\] \(the plan's\), got \(1, 2, 30\)",
        ),
    ],
)
def test_a_bad_argument_is_named(device, change, message):
    case = small_case(device)
    plan = plan_insert(case.input_ids, case.plan_groups)
    given_ = {"input_ids": case.input_ids, "table": make_table(case, torch.float32)}
    given_ |= {name: value.to(device) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        embed_project_and_insert(
            **given_, features=case.features, weight=case.weight, bias=case.bias, plan=plan
        )


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    def __init__(self, but: Tensor) -> None:
        super().__init__()
        self.largest = 0
        self.spared = but.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                own = tensor.numel() and tensor.untyped_storage().data_ptr() != self.spared
                self.largest = max(self.largest, tensor.numel() if own else 0)
        return made


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_with_fusion_nothing_of_the_tables_size_is_made(device, impl, overlapped, monkeypatch):
    def launch_unseen(*arguments: Any, **options: Any) -> None:
        with _disable_current_modes():  # Triton's interpreter copies its arguments
            launch(*arguments, **options)

    for module in (table_ops, project):
        monkeypatch.setattr(module, "launch", launch_unseen)
    case = small_case(device)
    table = torch.randn(50_000, 48, device=device).requires_grad_()
    for parameter in (table, case.weight):
        parameter.main_grad = torch.zeros(parameter.shape, device=device)
        if overlapped:
            parameter.grad_added_to_main_grad = False
    with torch.autograd.set_multithreading_enabled(False), Allocations(table.main_grad) as seen:
        output = run(case, table, impl, gradient_accumulation_fusion=True)
        output.backward(case.grad_output)
    assert 0 < seen.largest < table.numel() / 10
    exact, bound = gradient_of_table(case, case.grad_output)
    assert_within("main_grad", table.main_grad[:VOCABULARY], exact, bound)
    assert not table.main_grad[VOCABULARY:].any()
    if overlapped:
        assert table.grad.shape == table.shape
        assert table.grad._nnz() == 0
    else:
        assert table.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_microbatches_add_up_in_fp32_beyond_the_tables_own_dtype(device, impl):
    case = small_case(device, torch.float16)
    table = make_table(case, torch.float16)
    table.main_grad = torch.zeros(table.shape, device=device)
    case.weight.main_grad = torch.zeros(case.weight.shape, device=device)
    for _ in range(3):
        output = run(case, table, impl, gradient_accumulation_fusion=True)
        output.backward(case.grad_output)
    exact, _ = gradient_of_table(case, case.grad_output)
    grad = case.grad_output.double().cpu().reshape(60, -1).abs().sum(0)
    assert ((table.main_grad.double().cpu() - 3 * exact).abs() <= 3 * 63 * 2.0**-23 * grad).all()
    assert not torch.equal(table.main_grad.half().float(), table.main_grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("flagged", [False, True])
def test_a_table_used_twice_in_a_graph_loses_nothing(device, impl, flagged):
    """Tied output weights, or a second lookup whose gradient is dense; then Megatron's hook."""
    case = small_case(device)
    table = make_table(case, torch.float32)
    table.main_grad = torch.zeros(table.shape, device=device)
    case.weight.main_grad = torch.zeros(case.weight.shape, device=device)
    if flagged:
        table.grad_added_to_main_grad = False
    dense = torch.randn(table.shape, device=device)
    output = run(case, table, impl, gradient_accumulation_fusion=True)
    torch.autograd.backward([output, table], [case.grad_output, dense])
    assert not getattr(table, "grad_added_to_main_grad", False)
    table.main_grad.add_(table.grad)  # as Megatron's hook does
    exact, bound = gradient_of_table(case, case.grad_output)
    total = exact + dense.double().cpu()
    assert_within("both", table.main_grad, total, bound + 2.0**-23 * (total.abs() + bound))


@pytest.mark.parametrize("impl", IMPLS)
def test_main_grad_that_is_to_be_overwritten_is(device, impl):
    case = small_case(device)
    table = make_table(case, torch.float32)
    table.main_grad = torch.full(table.shape, math.nan, device=device)
    table.overwrite_main_grad = True
    case.weight.main_grad = torch.zeros(case.weight.shape, device=device)
    run(case, table, impl, gradient_accumulation_fusion=True).backward(case.grad_output)
    assert_within("main_grad", table.main_grad, *gradient_of_table(case, case.grad_output))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_missing_or_wrong_main_grad_is_an_error_that_names_the_table(device, impl):
    case = small_case(device)
    table = make_table(case, torch.float32)
    case.weight.main_grad = torch.zeros(case.weight.shape, device=device)
    with pytest.raises(ValueError, match=r"table: gradient_accumulation_fusion=True needs table"):
        run(case, table, impl, gradient_accumulation_fusion=True)
    table.main_grad = torch.zeros(48, VOCABULARY, device=device).T
    output = run(case, table, impl, gradient_accumulation_fusion=True)
    with pytest.raises(ValueError, match=r"table.main_grad: expected \(12, 48\), contiguous"):
        output.backward(case.grad_output)


@pytest.mark.parametrize("impl", IMPLS)
def test_main_grad_that_is_none_is_missing(device, impl):
    case = small_case(device)
    table = make_table(case, torch.float32)
    table.main_grad = None
    case.weight.main_grad = torch.zeros(case.weight.shape, device=device)
    with pytest.raises(ValueError, match=r"table: gradient_accumulation_fusion=True needs table"):
        run(case, table, impl, gradient_accumulation_fusion=True)
    table.main_grad = torch.zeros(table.shape, device=device)
    output = run(case, table, impl, gradient_accumulation_fusion=True)
    table.main_grad = None
    with pytest.raises(ValueError, match=r"table\.main_grad: .* none in backward"):
        output.backward(case.grad_output)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32], ids=str)
def test_ids_of_a_dtype_that_no_plan_takes_are_an_error(device, impl, dtype):
    case = small_case(device)
    plan = plan_insert(case.input_ids, case.plan_groups, impl=impl)
    with pytest.raises(TypeError, match="input_ids: expected int32 or int64, got torch"):
        embed_project_and_insert(
            case.input_ids.to(dtype),
            make_table(case, torch.float32),
            case.features,
            case.weight,
            case.bias,
            plan,
            impl=impl,
        )


def test_the_kernel_refuses_a_table_in_float64_also_where_there_is_no_feature(device):
    ids = torch.arange(12, device=device).view(2, 6)
    table = torch.randn(VOCABULARY, 16, dtype=torch.float64, device=device, requires_grad=True)
    features, weight = table.new_zeros(0, 8), table.new_zeros(16, 8)
    plan = plan_insert(ids, [])
    with pytest.raises(ValueError, match=r"table: the Triton kernels take .*, got torch\.float64"):
        embed_project_and_insert(ids, table, features, weight, None, plan, impl="triton")
    output = embed_project_and_insert(ids, table, features, weight, None, plan, impl="torch")
    third = torch.full_like(output, 1 / 3)
    assert torch.equal(torch.autograd.grad(output, table, third)[0], torch.full_like(table, 1 / 3))


def test_the_gradient_by_pytorch_can_be_differentiated_again_and_by_torch_func(device):
    case = small_case(device, torch.float64)
    table = make_table(case, torch.float64)
    direction = torch.randn_like(table)

    def cubed(rows: Tensor) -> Tensor:
        return run(case, rows, "torch").pow(3).sum()

    def cubed_looked_up(rows: Tensor) -> Tensor:
        plan = plan_insert(case.input_ids, case.plan_groups, impl="torch")
        embeddings = rows[case.input_ids].transpose(0, 1)
        result = project_and_insert(
            embeddings, case.features, case.weight, case.bias, plan, impl="torch"
        )
        return result.pow(3).sum()

    products = []
    for function in (cubed, cubed_looked_up):
        (grad,) = torch.autograd.grad(function(table), table, create_graph=True)
        products.append(torch.autograd.grad((grad * direction).sum(), table)[0])
    torch.testing.assert_close(*products)
    tables = torch.stack([table.detach(), 2 * table.detach()])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(cubed))(tables),
        torch.func.vmap(torch.func.grad(cubed_looked_up))(tables),
    )


def test_tensors_without_values_give_gradients_of_the_right_shape():
    with FakeTensorMode():
        table = torch.empty(VOCABULARY, 16, requires_grad=True)
        weight = torch.empty(16, 8, requires_grad=True)
        ids = torch.zeros(2, 6, dtype=torch.int64)
        plan = plan_insert(ids, [(TOKENS[0], [3])])
        output = embed_project_and_insert(ids, table, torch.empty(1, 3, 8), weight, None, plan)
        output.sum().backward()
    assert output.shape == (6, 2, 16)
    assert table.grad.shape == table.shape


@pytest.mark.parametrize("triton", [True, False])
def test_ids_of_a_packed_sequence_have_one_dimension(device, triton):
    ids = torch.tensor([3, 1, 3, 0], device=device)
    table = torch.randn(VOCABULARY, 16, device=device, requires_grad=True)
    table.main_grad = torch.zeros(table.shape, device=device)
    rows = LookUp.apply(table, ids, None, (table,), triton, math.nan)
    rows.backward(torch.ones_like(rows))
    assert table.main_grad[:, 0].tolist() == [1, 1, 0, 2, *[0] * (VOCABULARY - 4)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("freed", ["table", "weight"])
def test_a_main_grad_whose_memory_is_freed_is_an_error(device, impl, freed):
    """As between Megatron's ``offload_grad_buffers`` and ``restore_grad_buffers``."""
    case = small_case(device)
    table = make_table(case, torch.float32)
    parameters = {"table": table, "weight": case.weight}
    for parameter in parameters.values():
        parameter.main_grad = torch.zeros(parameter.shape, device=device)
    output = run(case, table, impl, gradient_accumulation_fusion=True)
    parameters[freed].main_grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"{freed}\.main_grad: its memory is freed"):
        output.backward(case.grad_output)


def test_asking_autograd_for_other_gradients_adds_to_main_grad_all_the_same(device):
    """As Megatron's own fused layers do: ``ctx.needs_input_grad`` does not tell what is asked."""
    case = small_case(device)
    table = make_table(case, torch.float32)
    table.main_grad = torch.zeros(table.shape, device=device)
    case.weight.main_grad = torch.zeros(case.weight.shape, device=device)
    output = run(case, table, "triton", gradient_accumulation_fusion=True)
    torch.autograd.grad(output, case.features, case.grad_output)
    assert_within("main_grad", table.main_grad, *gradient_of_table(case, case.grad_output))
    assert case.weight.main_grad.any()
