"""plan_placeholders and batch-first plans: against a slow oracle, and against masked_scatter."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from step37_kernels import plan_insert, plan_placeholders, project_and_insert, reference
from step37_kernels.ops import plan_rows as ops
from step37_kernels.testing import deviation, product_bound
from tests.kernels.strategies import TOKENS, plan_groups, token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"]


class Operations(TorchDispatchMode):
    """Names of what PyTorch does meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


def assert_references(ids, num_rows, batch_first, impl):
    plan = plan_placeholders(
        ids.to(DEVICE), TOKENS[0], num_rows, batch_first=batch_first, impl=impl
    )
    expected = reference.plan_placeholders(ids, TOKENS[0], num_rows, batch_first=batch_first)
    for name, value in expected._asdict().items():
        ours = getattr(plan, name)
        assert ours.dtype == torch.int32
        assert torch.equal(ours.cpu(), value), name
    return plan


@pytest.mark.parametrize("impl", IMPLS)
@given(ids=token_ids(), num_rows=st.integers(0, 130), batch_first=st.booleans())
def test_the_kth_row_goes_to_the_kth_placeholder(impl, ids, num_rows, batch_first):
    plan = assert_references(ids, num_rows, batch_first, impl)
    assert (plan.batch_size, plan.seq_len) == ids.shape
    assert plan.num_rows == num_rows
    assert plan.destinations.is_contiguous()
    assert plan.row_at.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.sampled_from([1, 2, 3]),
    num_rows=st.sampled_from([1700, 9000]),
    batch_first=st.booleans(),
)
def test_placeholders_are_numbered_across_blocks_of_ids(
    impl, seed, batch_size, num_rows, batch_first
):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(batch_size, 5000, generator=generator) < 0.5
    strided = torch.where(dense, TOKENS[0], 5).T.contiguous().T
    assert_references(strided, num_rows, batch_first, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_batch_without_tokens_has_no_placeholders(impl, shape, batch_first):
    plan = assert_references(torch.zeros(shape, dtype=torch.int64), 3, batch_first, impl)
    assert plan.destinations.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("batch_first", [False, True])
def test_placeholders_are_planned_in_one_launch(batch_first, monkeypatch):
    launches = []
    monkeypatch.setattr(ops, "launch", lambda *arguments, **_: launches.append(arguments[:2]))
    ids = torch.full((2, 40), TOKENS[0], device=DEVICE)
    with Operations() as seen:
        plan_placeholders(ids, TOKENS[0], 70, batch_first=batch_first, impl="triton")
    assert launches == [(ops.plan_kernel, (1,))]
    assert seen.names <= {"aten.empty.memory_format", "aten.fill_.Scalar"}


@pytest.mark.parametrize("impl", IMPLS)
@given(ids=token_ids(), groups=plan_groups())
def test_a_batch_first_plan_is_the_same_map_otherwise_numbered(impl, ids, groups):
    ids = ids.to(DEVICE)
    plan = plan_insert(ids, groups, impl=impl)
    other = plan_insert(ids, groups, batch_first=True, impl=impl)
    batch_size, seq_len = ids.shape
    assert torch.equal(other.row_at, plan.row_at.T)
    assert (other.batch_size, other.seq_len) == (batch_size, seq_len)
    for ours, theirs in zip(other.destinations.tolist(), plan.destinations.tolist(), strict=True):
        s, b = divmod(theirs, batch_size)
        assert ours == (-1 if theirs < 0 else b * seq_len + s)
    for name in ("starts", "start_counts"):
        assert torch.equal(getattr(other, name), getattr(plan, name))


@given(
    data=st.data(),
    ids=token_ids(max_batch=2, max_seq=12),
    grouped=st.booleans(),
)
def test_a_shard_of_a_batch_first_plan_is_that_of_the_other(data, ids, grouped):
    ids = ids.to(DEVICE)
    positions = data.draw(st.permutations(range(ids.shape[1])))
    positions = torch.tensor(positions[: data.draw(st.integers(1, len(positions)))], device=DEVICE)
    plans = [
        plan_insert(ids, [(TOKENS[0], [2, 3])], batch_first=first)
        if grouped
        else plan_placeholders(ids, TOKENS[0], 5, batch_first=first)
        for first in (False, True)
    ]
    sequence, batch = (plan.shard(positions) for plan in plans)
    assert torch.equal(batch.row_at, sequence.row_at.T)
    assert torch.equal(batch.local_rows, sequence.local_rows)
    assert torch.equal(batch.live_rows, sequence.live_rows)
    size = ids.shape[0]
    for ours, theirs in zip(
        batch.destinations.tolist(), sequence.destinations.tolist(), strict=True
    ):
        s, b = divmod(theirs, size)
        assert ours == (-1 if theirs < 0 else b * len(positions) + s)


@pytest.mark.parametrize("impl", IMPLS)
@given(
    ids=token_ids(max_batch=2, max_seq=16),
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_forward_and_gradients_are_those_of_masked_scatter(impl, ids, pieces, bias, seed):
    """In fp32, with as many rows as placeholders or more, as ``masked_scatter`` demands."""
    ids = ids.to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    hidden, width = 8, 12

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()

    mask = ids == TOKENS[0]
    needed = int(mask.sum())
    if sum(pieces) < needed:
        pieces = [*pieces, needed - sum(pieces)]
    embeddings, weight = normal(*ids.shape, hidden), normal(hidden, width)
    features = [normal(1, rows, width) for rows in pieces]
    offset = normal(hidden) if bias else None
    inputs = [t for t in (embeddings, weight, offset, *features) if t is not None]
    plan = plan_placeholders(ids, TOKENS[0], sum(pieces), batch_first=True, impl=impl)
    ours = project_and_insert(embeddings, features, weight, offset, plan, impl=impl)
    grad = torch.randn(ours.shape, generator=generator).to(DEVICE)

    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    left = iter(exact_inputs)
    exact_embeddings, exact_weight = next(left), next(left)
    exact_offset = next(left) if bias else None
    rows = torch.cat([feature.flatten(0, 1) for feature in left])
    exact = exact_embeddings.masked_scatter(
        mask.unsqueeze(-1), F.linear(rows, exact_weight, exact_offset)
    )
    exact_grads = torch.autograd.grad(
        exact, exact_inputs, grad.double(), allow_unused=True, materialize_grads=True
    )
    grads = torch.autograd.grad(ours, inputs, grad, allow_unused=True, materialize_grads=True)
    assert torch.equal(ours[~mask], embeddings[~mask])
    flat = grad.double()[mask]
    used, kept = rows.detach()[:needed], exact_weight.detach()
    plus = None if exact_offset is None else exact_offset.detach()
    bound = product_bound(used, kept.T, [torch.float32], plus=plus)
    assert deviation(ours[mask], exact.detach()[mask].cpu(), bound.cpu())[1] <= 1
    assert torch.equal(grads[0], exact_grads[0].float())
    ones = torch.ones(needed, 1, dtype=torch.float64, device=DEVICE)
    bounds = [product_bound(flat.T, used, [torch.float32])]
    if bias:
        bounds.append(product_bound(flat.T, ones, [torch.float32])[:, 0])
    of_rows = product_bound(flat, kept, [torch.float32])
    of_rows = torch.cat([of_rows, of_rows.new_zeros(sum(pieces) - needed, width)])
    bounds += [bound[None] for bound in of_rows.split(pieces)]
    for actual, wanted, limit in zip(grads[1:], exact_grads[1:], bounds, strict=True):
        assert deviation(actual, wanted.cpu(), limit.cpu())[1] <= 1


@pytest.mark.parametrize("impl", IMPLS)
def test_of_too_few_rows_the_last_placeholders_keep_their_words(impl):
    ids = torch.tensor([[7, 1, 7], [7, 7, 1]], device=DEVICE)
    words = torch.randn(2, 3, 4, device=DEVICE)
    rows = torch.randn(1, 2, 4, device=DEVICE)
    plan = plan_placeholders(ids, 7, 2, batch_first=True, impl=impl)
    out = project_and_insert(words, rows, torch.eye(4, device=DEVICE), None, plan, impl=impl)
    wanted = words.clone()
    wanted[0, 0], wanted[0, 2] = rows[0]
    assert torch.equal(out, wanted)
    with pytest.raises(ValueError, match="token 7: 4 in input_ids, 2 features"):
        plan.check()


def test_wrong_arguments_name_themselves():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_rows: expected at least 0, got -1"):
        plan_placeholders(ids, 7, -1)
    with pytest.raises(ValueError, match=r"input_ids: expected \[B, S\], got \(3,\)"):
        plan_placeholders(ids[0], 7, 1)
    with pytest.raises(TypeError, match="input_ids: expected int32 or int64"):
        plan_placeholders(ids.float(), 7, 1)
    for token, num_rows in ((7.0, 1), (7, 1.5)):
        with pytest.raises(TypeError, match="float"):
            plan_placeholders(ids, token, num_rows)
    with pytest.raises(ValueError, match="impl: expected one of auto, triton, torch, got 'cuda'"):
        plan_placeholders(ids, 7, 1, impl="cuda")
    plan = plan_placeholders(ids, 7, 1, batch_first=True)
    with pytest.raises(ValueError, match=r"expected \[B, S, H\] = \[2, 3, 4\], got \(3, 2, 4\)"):
        project_and_insert(
            torch.zeros(3, 2, 4), torch.zeros(1, 1, 5), torch.zeros(4, 5), None, plan
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_one_graph_for_any_number_of_rows(batch_first, impl):
    torch._dynamo.reset()
    compiled = torch.compile(plan_placeholders, fullgraph=True, dynamic=True, backend="eager")
    for rows, length in itertools.product((3, 5), (6, 9)):
        ids = torch.arange(2 * length, device=DEVICE).view(2, length) % 3
        plan = compiled(ids, 1, rows, batch_first=batch_first, impl=impl)
        expected = plan_placeholders(ids, 1, rows, batch_first=batch_first)
        assert torch.equal(plan.destinations, expected.destinations)
        assert torch.equal(plan.row_at, expected.row_at)
