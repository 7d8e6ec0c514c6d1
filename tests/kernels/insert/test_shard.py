"""Plans of shards: together they are the whole plan, and each projects its own rows only."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step37_kernels import plan_insert, project_and_insert
from step37_kernels.integration.parallel import context_parallel_positions
from step37_kernels.testing import deviation, expected, make_insert_case
from tests.kernels.strategies import FILLER, TOKENS, feature_groups, plan_groups, token_ids


def partition(draw: st.DrawFn, seq_len: int) -> list[torch.Tensor]:
    """The positions 0 … S−1, in any order, dealt out to up to three ranks."""
    order = draw(st.permutations(range(seq_len)))
    cuts = sorted(draw(st.lists(st.integers(0, seq_len), min_size=0, max_size=2)))
    return list(torch.tensor(order).tensor_split(cuts))


@st.composite
def sharded_plans(draw: st.DrawFn):
    input_ids = draw(token_ids(max_seq=20))
    return input_ids, draw(plan_groups()), partition(draw, input_ids.shape[1])


@given(arguments=sharded_plans())
def test_the_shards_together_are_the_whole_plan(arguments):
    input_ids, groups, shards = arguments
    whole = plan_insert(input_ids, groups, impl="torch")
    batch_size = input_ids.shape[0]
    seen: dict[int, int] = {}
    for positions in shards:
        part = whole.shard(positions)
        rows = torch.cat([part.local_rows, torch.full((1,), -1)])[part.row_at.long()]
        assert torch.equal(rows, whole.row_at[positions])
        assert part.num_rows == whole.num_rows
        assert part.destinations.shape == part.local_rows.shape
        assert part.destinations.numel() == min(whole.num_rows, part.row_at.numel())
        rows = part.local_rows[part.local_rows >= 0].tolist()
        assert rows == sorted(rows)
        for row, slot in zip(part.local_rows.tolist(), part.destinations.tolist(), strict=True):
            assert (row < 0) == (slot < 0)
            if row >= 0:
                seen[row] = int(positions[slot // batch_size]) * batch_size + slot % batch_size
    wanted = {row: d for row, d in enumerate(whole.destinations.tolist()) if d >= 0}
    assert seen == wanted


@given(arguments=sharded_plans())
def test_every_row_that_lands_is_one_ranks_work_and_comes_before_unused_entries(arguments):
    input_ids, groups, shards = arguments
    whole = plan_insert(input_ids, groups, impl="torch")
    live = []
    for positions in shards:
        part = whole.shard(positions)
        assert part.local_rows.numel() == min(
            whole.num_rows, positions.numel() * input_ids.shape[0]
        )
        live.append(int((part.local_rows >= 0).sum()))
        assert (part.local_rows[: live[-1]] >= 0).all()
    dropped = int((whole.destinations < 0).sum())
    assert sum(live) == whole.num_rows - dropped


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_rows_of_a_rank_shrink_by_the_number_of_ranks(ranks):
    ids = torch.full((1, 64), FILLER)
    ids[0, ::16] = TOKENS[0]
    plan = plan_insert(ids, [(TOKENS[0], [12] * 4)])
    parts = [plan.shard(positions) for positions in torch.arange(64).tensor_split(ranks)]
    assert [int((part.local_rows >= 0).sum()) for part in parts] == [48 // ranks] * ranks
    assert [part.local_rows.numel() for part in parts] == [min(48, 64 // ranks)] * ranks


@st.composite
def sharded_cases(draw: st.DrawFn):
    input_ids = draw(token_ids(max_batch=2, max_seq=20))
    return input_ids, draw(feature_groups()), partition(draw, input_ids.shape[1])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@given(arguments=sharded_cases(), seed=st.integers(0, 2**31))
def test_values_and_gradients_of_the_shards_add_up(device, impl, arguments, seed):
    input_ids, groups, shards = arguments
    case = make_insert_case(
        input_ids,
        groups,
        hidden=16,
        width=24,
        seed=seed,
        dtype=torch.float32,
        bias=True,
        device=device,
    )
    wanted = expected(case)
    whole = plan_insert(case.input_ids, case.plan_groups, impl=impl)
    leaves = [case.weight, case.bias, *case.features]
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for positions in shards:
        positions = positions.to(device)
        embeddings = case.embeddings.detach()[positions].requires_grad_()
        part = whole.shard(positions)
        output = project_and_insert(
            embeddings, case.features, case.weight, case.bias, part, impl=impl
        )
        exact, bound = wanted.output[positions.cpu()], wanted.output_bound[positions.cpu()]
        assert deviation(output, exact, bound)[1] <= 1
        grads = torch.autograd.grad(
            output,
            [embeddings, *leaves],
            case.grad_output[positions],
            allow_unused=True,
            materialize_grads=True,
        )
        assert torch.equal(grads[0].double().cpu(), wanted.grad_embeddings[positions.cpu()])
        totals = [total + grad for total, grad in zip(totals, grads[1:], strict=True)]
    exact = [wanted.grad_weight, wanted.grad_bias, *wanted.grad_features]
    bounds = [wanted.grad_weight_bound, wanted.grad_bias_bound, *wanted.grad_features_bound]
    for total, value, bound in zip(totals, exact, bounds, strict=True):
        # Adding up three shards in fp32 rounds twice more.
        assert deviation(total, value, 3 * bound)[1] <= 1


def test_a_rank_projects_no_more_rows_than_it_has_positions(device, monkeypatch):
    from step37_kernels.ops import project

    launched: list[int] = []
    real = project.project_insert

    def spy(text, sources, *rest, **options):
        launched.append(sum(map(len, sources)))
        return real(text, sources, *rest, **options)

    monkeypatch.setattr(project, "project_insert", spy)
    ids = torch.full((1, 64), FILLER)
    ids[0, 1] = TOKENS[0]
    case = make_insert_case(
        ids,
        [(TOKENS[0], [(1, 60)])],
        hidden=16,
        width=16,
        seed=0,
        dtype=torch.float32,
        device=device,
    )
    plan = plan_insert(case.input_ids, case.plan_groups)
    for size in (1, 2, 4):
        for positions in torch.arange(64, device=device).tensor_split(size):
            project_and_insert(
                case.embeddings[positions],
                case.features,
                case.weight,
                None,
                plan.shard(positions),
                impl="triton",
            )
    assert launched == [60, 32, 32, 16, 16, 16, 16]


def test_the_pytorch_implementation_projects_no_more_rows_either(device, monkeypatch):
    projected: list[int] = []
    real = torch.nn.functional.linear

    def spy(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        projected.append(x.shape[0])
        return real(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    ids = torch.full((1, 64), FILLER)
    ids[0, 1] = TOKENS[0]
    case = make_insert_case(
        ids,
        [(TOKENS[0], [(1, 60)])],
        hidden=16,
        width=16,
        seed=0,
        dtype=torch.float32,
        device=device,
    )
    plan = plan_insert(case.input_ids, case.plan_groups, impl="torch")
    for positions in torch.arange(64, device=device).tensor_split(2):
        part = plan.shard(positions)
        project_and_insert(
            case.embeddings[positions], case.features, case.weight, None, part, impl="torch"
        )
    assert projected == [32, 32]


def test_what_an_unused_entry_would_read_stays_out_of_the_gradients(device):
    ids = torch.full((1, 8), FILLER)
    ids[0, 0] = TOKENS[0]
    case = make_insert_case(
        ids,
        [(TOKENS[0], [(1, 3)])],
        hidden=16,
        width=16,
        seed=0,
        dtype=torch.float32,
        device=device,
    )
    features = case.features[0].detach().clone()
    features[0, 0] = float("inf")
    case = dataclasses.replace(case, groups=[(TOKENS[0], [features.requires_grad_()])])
    positions = torch.arange(3, 8, device=device)
    plan = plan_insert(case.input_ids, case.plan_groups).shard(positions)
    output = project_and_insert(
        case.embeddings[positions], case.features, case.weight, None, plan, impl="triton"
    )
    (grad,) = torch.autograd.grad(output.sum(), case.weight)
    torch.testing.assert_close(grad, features[0, 2].expand(16, 16))


def test_bad_shards_are_refused():
    plan = plan_insert(torch.tensor([[7, 5, 5]]), [(7, [2])])
    with pytest.raises(ValueError, match=r"positions: expected \[S_local\], got \(1, 3\)"):
        plan.shard(torch.arange(3)[None])
    part = plan.shard(torch.arange(2))
    with pytest.raises(ValueError, match="already the plan of a shard"):
        part.shard(torch.arange(1))
    with pytest.raises(ValueError, match="check the plan of the whole sequence"):
        part.check()


def zigzag(bounds: list[int], size: int, rank: int) -> list[int]:
    """Chunk r and chunk 2n − 1 − r of each sequence, written out."""
    positions: list[int] = []
    for start, end in itertools.pairwise(bounds):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            positions += range(start + number * chunk, start + (number + 1) * chunk)
    return positions


@given(
    size=st.integers(1, 4),
    chunks=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    packed=st.booleans(),
)
def test_context_parallel_positions_are_megatrons_balanced_halves(size, chunks, packed):
    bounds = [0]
    for chunk in chunks:
        bounds.append(bounds[-1] + 2 * size * chunk)
    if not packed:
        bounds = [0, bounds[-1]]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    everything: list[int] = []
    for rank in range(size):
        positions = context_parallel_positions(bounds[-1], size, rank, cu_seqlens)
        assert positions.tolist() == zigzag(bounds, size, rank)
        everything += positions.tolist()
    assert sorted(everything) == list(range(bounds[-1]))


def test_context_parallel_positions_refuse_what_cannot_be_cut():
    with pytest.raises(ValueError, match="seq_len: expected a multiple of 4, got 10"):
        context_parallel_positions(10, 2, 0)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        context_parallel_positions(8, 2, 2)
