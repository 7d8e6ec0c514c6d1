"""``plan_insert`` against the reference, which writes row numbers one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step37_kernels import InsertPlan, plan_insert, reference
from step37_kernels.ops import plan_rows as plan_ops
from tests.kernels.strategies import plan_groups, token_ids

FIELDS = ("destinations", "row_at", "starts", "start_counts")
IMPLS = ("triton", "torch")
LAUNCHES = pytest.mark.parametrize(
    ("impl", "by_table"),
    [("triton", False), ("triton", True), ("torch", False)],
    ids=["inline", "by a table", "torch"],
    indirect=["by_table"],
)


@pytest.fixture(scope="module")
def by_table(request: pytest.FixtureRequest) -> Iterator[None]:
    """As of a large layout if asked for, with any number of groups and runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(plan_ops, "fits_into_a_launch", lambda *_: False)
        yield


def assert_same_plan(plan: InsertPlan, wanted: reference.Plan) -> None:
    for name in FIELDS:
        actual, expected = getattr(plan, name), getattr(wanted, name)
        assert actual.dtype == torch.int32, name
        assert torch.equal(actual.cpu(), expected), f"{name}: {actual} is not {expected}"


@pytest.mark.usefixtures("by_table")
@LAUNCHES
@given(input_ids=token_ids(), groups=plan_groups())
def test_the_plan_is_the_references_for_any_ids_and_groups(device, impl, input_ids, groups):
    plan = plan_insert(input_ids.to(device), groups, impl=impl)
    assert_same_plan(plan, reference.plan_insert(input_ids, groups))
    kept = plan.destinations[plan.destinations >= 0]
    assert kept.unique().numel() == kept.numel()
    assert plan.num_rows == sum(sum(rows) for _, rows in groups)
    assert (plan.batch_size, plan.seq_len) == tuple(input_ids.shape)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_docstrings_example_is_true(device, impl):
    input_ids = torch.tensor([[5, 7, 5, 7, 5, 5, 7, 5]], device=device)
    plan = plan_insert(input_ids, [(7, [3, 2, 4])], impl=impl)
    assert plan.starts.tolist() == [2, 4, 7]
    assert plan.row_at.flatten().tolist() == [-1, -1, 0, 1, 3, 4, -1, 5]
    assert plan.destinations.tolist() == [2, 3, -1, 4, 5, 7, -1, -1, -1]
    assert plan.start_counts.tolist() == [3]


@pytest.mark.usefixtures("by_table")
@LAUNCHES
@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.sampled_from([1, 2, 3]),
    step=st.sampled_from([1, 2]),
)
def test_locations_are_numbered_across_blocks_of_ids(device, impl, seed, batch_size, step):
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 300, (batch_size, 5000 * step), generator=generator)
    input_ids = memory[:, ::step]
    groups = [(3, [5] * 12), (4, [2] * 60)]
    plan = plan_insert(memory.to(device)[:, ::step], groups, impl=impl)
    assert_same_plan(plan, reference.plan_insert(input_ids, groups))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "groups",
    [
        [(7, [2, 3] * 50)],
        [(token, [3]) for token in (7, 8, 9, 10, 11)],
        [(7, [1, 2]), (8, [1, 2]), (2**40, [4])],
        [(7, [3] * 70 + [2] * 40), (8, []), (8, [1] * 33), (9, [0] * 5)],
    ],
    ids=["more runs than fit", "more groups than fit", "five runs", "four runs and groups"],
)
def test_a_layout_of_any_size_reaches_the_device_whole(device, impl, groups):
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 12, (2, 700), generator=generator)
    input_ids[1, 5] = 2**40
    plan = plan_insert(input_ids.to(device), groups, impl=impl)
    assert_same_plan(plan, reference.plan_insert(input_ids, groups))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_feature_longer_than_a_block_of_rows_is_planned_whole(device, impl):
    input_ids = torch.full((2, 700), 5)
    input_ids[0, 10] = input_ids[1, 300] = 7
    groups = [(7, [600, 650])]
    plan = plan_insert(input_ids.to(device), groups, impl=impl)
    assert_same_plan(plan, reference.plan_insert(input_ids, groups))


@pytest.mark.usefixtures("by_table")
@LAUNCHES
@pytest.mark.parametrize("held", [0, 4])
def test_what_the_memory_of_the_plan_held_before_is_never_read(device, impl, held, monkeypatch):
    stock = torch.empty

    def empty(*size: int, **options: Any) -> Tensor:
        return stock(*size, **options).fill_(held)

    monkeypatch.setattr(torch, "empty", empty)
    input_ids = torch.tensor([[5, 5, 7, 5, 5, 5, 8, 5, 5, 5]])
    groups = [(7, [2, 2, 3]), (8, [2, 2])]  # of the three and the two, one each has a token
    plan = plan_insert(input_ids.to(device), groups, impl=impl)
    monkeypatch.undo()
    assert_same_plan(plan, reference.plan_insert(input_ids, groups))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("view", ["transposed", "every other", "expanded"])
def test_ids_may_have_any_strides(device, impl, view):
    base = torch.tensor([[7, 5, 7, 5], [5, 7, 7, 5], [7, 7, 5, 5], [5, 5, 5, 7]], device=device)
    input_ids = {
        "transposed": base.T,
        "every other": base[:, ::2],
        "expanded": base[:1].expand(3, 4),
    }[view]
    groups = [(7, [2, 1, 2])]
    plan = plan_insert(input_ids, groups, impl=impl)
    assert_same_plan(plan, reference.plan_insert(input_ids.cpu().contiguous(), groups))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_a_batch_without_tokens_has_no_locations(device, impl, shape):
    plan = plan_insert(torch.zeros(shape, dtype=torch.int64, device=device), [(7, [3])], impl=impl)
    assert plan.destinations.tolist() == [-1, -1, -1]
    assert plan.start_counts.tolist() == [0]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_groups_leave_every_position_to_the_text(device, impl):
    plan = plan_insert(torch.full((1, 4), 7, device=device), [], impl=impl)
    assert plan.num_rows == 0
    assert plan.row_at.flatten().tolist() == [-1] * 4


def test_bad_arguments_are_named():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input_ids: expected \[B, S\], got \(4,\)"):
        plan_insert(ids[0], [])
    with pytest.raises(TypeError, match=r"input_ids: expected int32 or int64, got torch.float32"):
        plan_insert(ids.float(), [])
    with pytest.raises(ValueError, match=r"groups: row counts must not be negative, got -1"):
        plan_insert(ids, [(7, [2, -1])])
    for groups in ([(7, [1.9])], [(7.0, [1])], [(7, 3)]):
        with pytest.raises(TypeError, match=r"groups: expected \(int, sequence of int\) of each: "):
            plan_insert(ids, groups)
    with pytest.raises(
        ValueError, match=r"start token: expected a value of torch.int32, got 10995"
    ):
        plan_insert(ids.int(), [(2**40 + 7, [1])])
    with pytest.raises(ValueError, match=r"impl: expected one of auto, triton, torch, got 'cuda'"):
        plan_insert(ids, [], impl="cuda")
    # A start may be S as well.
    many = torch.empty(1, 2**31 - 1, dtype=torch.int64, device="meta")
    for ids_of_any, groups in ((ids, [(7, [2**31])]), (many, [(7, [1])])):
        with pytest.raises(ValueError, match=r"at most 2147483647 positions and feature rows"):
            plan_insert(ids_of_any, groups)


def test_check_passes_a_batch_that_fits(device):
    input_ids = torch.tensor([[7, 5, 5, 7, 5, 5], [5, 5, 5, 5, 7, 5]], device=device)
    plan_insert(input_ids, [(7, [2, 2, 1])]).check()


@pytest.mark.parametrize(
    ("ids", "groups", "message"),
    [
        ([7, 5, 5, 7], [(7, [2])], r"start token 7: 2 in input_ids, 1 features; inserting 1"),
        ([7, 5, 5, 5], [(7, [2, 2])], r"start token 7: 1 in input_ids, 2 features; inserting 1"),
        (
            [5, 5, 7, 5],
            [(7, [3])],
            r"feature 0 of start token 7 .*cut off at the sequence length 4",
        ),
        ([5, 5, 5, 7], [(7, [1])], r"positions 4 to 4\) is cut off"),
        ([7, 5, 7, 5], [(7, [3, 1])], r"feature 1 of start token 7 .*overlaps feature 0"),
        ([7, 7, 5, 5], [(7, [3, 1])], r"feature 1 .*positions 2 to 2\) overlaps feature 0"),
        # Behind a short span within it, too, where only the first reaches.
        ([7, 9, 5, 9, 5, 5], [(7, [5]), (9, [1, 1])], r"feature 1 .*9 .*overlaps feature 0 .*7"),
        (
            [7, 9, 5, 5],
            [(7, [2]), (9, [1])],
            r"start token 9 .*overlaps feature 0 of start token 7",
        ),
    ],
)
def test_check_names_what_does_not_fit(device, ids, groups, message):
    plan = plan_insert(torch.tensor([ids], device=device), groups)
    with pytest.raises(ValueError, match=message):
        plan.check()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("token", [-7, 2**40 + 7])
def test_a_start_token_may_be_any_value_of_the_ids(device, impl, token):
    input_ids = torch.tensor([[7, token, 5, 5]], device=device)
    plan = plan_insert(input_ids, [(token, [2])], impl=impl)
    assert plan.row_at.flatten().tolist() == [-1, -1, 0, 1]


def test_spans_that_touch_do_not_overlap_and_empty_ones_take_no_room(device):
    ids = torch.tensor([[7, 5, 7, 5, 9, 5]], device=device)
    plan_insert(ids, [(7, [2, 1]), (9, [0])]).check()
    plan_insert(ids, [(7, [1, 3]), (9, [0])]).check()


def test_a_plan_made_under_fake_tensors_leaves_nothing_to_the_next():
    from torch._subclasses.fake_tensor import FakeTensorMode

    groups = [(7, [3, 1, 4, 1, 5, 9, 2, 6])]
    input_ids = torch.tensor([[7, 5, 5, 7, 5, 7]])
    with FakeTensorMode() as mode:
        plan_insert(mode.from_tensor(input_ids), groups, impl="torch")
    assert_same_plan(
        plan_insert(input_ids, groups, impl="torch"), reference.plan_insert(input_ids, groups)
    )


def test_the_default_device_is_not_where_a_plan_is_made(device):
    groups = [(7, [2, 7, 1, 8])]
    input_ids = torch.tensor([[7, 5, 5, 7, 5, 7]])
    with torch.device("meta"):
        plan = plan_insert(input_ids.to(device), groups)
    assert_same_plan(plan, reference.plan_insert(input_ids, groups))
